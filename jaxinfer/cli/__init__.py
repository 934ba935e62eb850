"""The command line: `jaxinfer generate`, `chat`, `quantize`, `distill`, `estimate` and others.

Data goes to stdout, everything else to stderr. JAX and transformers are imported by the commands
that need them, so that `jaxinfer --help` is quick.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.main import get_command

from jaxinfer.cli.metrics import metrics_path, metrics_written
from jaxinfer.cli.model import ModelOptions, describe, describe_sites, follows, open_llm
from jaxinfer.cli.options import (
    SAMPLING,
    DataParallel,
    DeviceWeightBytes,
    DtypeOption,
    File,
    GpuMemory,
    Json,
    KvCacheDtypeOption,
    KvHostBytes,
    MaxModelLen,
    MaxTokens,
    MinP,
    Model,
    Out,
    PipelineParallel,
    RepetitionPenalty,
    Revision,
    Seed,
    SpeculativeOption,
    Stop,
    Temperature,
    TensorParallel,
    TokenIds,
    TopK,
    TopP,
)
from jaxinfer.cli.output import (
    logprobs_record,
    note,
    print_info,
    print_logprobs,
    print_result,
    print_sites,
    record,
    result_record,
    show_prompt,
    stream,
    write_record,
)
from jaxinfer.cli.prompts import prompt_source, read_prompts, typed_lines
from jaxinfer.cli.resumable import complete_to_file
from jaxinfer.errors import (
    CapacityError,
    CheckpointError,
    InvalidRequest,
    JaxinferError,
    QueueFull,
    UnsupportedModel,
)
from jaxinfer.types import SamplingParams

EXIT_CODES: dict[type[JaxinferError], int] = {
    InvalidRequest: 2,
    UnsupportedModel: 3,
    CheckpointError: 3,
    CapacityError: 4,
    QueueFull: 4,
}
EPILOG = (
    "Exit codes: 0 done; 1 unexpected error, or nobody reads stdout any more; 2 wrong usage or "
    "invalid request; 3 the model or its checkpoint cannot be used; 4 not enough memory; "
    "130 interrupted."
)


app = typer.Typer(
    name="jaxinfer",
    help="LLM inference in JAX.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    context.obj["debug"] = debug


@app.command(epilog=EPILOG)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Text; - reads stdin.")
    ] = None,
    file: File = None,
    token_ids: TokenIds = None,
    as_json: Json = False,
    model: Model = "demo",
    revision: Revision = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: GpuMemory = 0.9,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    speculative: SpeculativeOption = None,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    data_parallel_size: DataParallel = 1,
    device_weight_bytes: DeviceWeightBytes = None,
    kv_host_bytes: KvHostBytes = 0,
    n: Annotated[int, typer.Option(help="Samples a prompt.", rich_help_panel=SAMPLING)] = 1,
    max_tokens: MaxTokens = 128,
    min_tokens: Annotated[
        int, typer.Option(help="No stop token before this many.", rich_help_panel=SAMPLING)
    ] = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after EOS.", rich_help_panel=SAMPLING)
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: each token's, and those of this many of the likeliest."),
    ] = None,
    event_log: Annotated[
        str | None, typer.Option(help="File for the scheduler's events; see `jaxinfer replay`.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="File for times and counts, JSONL: steps, requests, summary.")
    ] = None,
    out: Out = None,
) -> None:
    """Completes prompts. One prompt is printed as it comes."""
    if logprobs is not None and not (as_json or out):
        raise typer.BadParameter("--logprobs needs --json or --out")
    if out and as_json:
        raise typer.BadParameter("--out writes the records to its file: leave --json out")
    params = SamplingParams(
        n=n, max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_p=top_p,
        top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
        stop=tuple(stop or ()), ignore_eos=ignore_eos, logprobs=logprobs,
    )  # fmt: skip
    options = ModelOptions(
        model, revision, dtype, max_model_len, gpu_memory_utilization, kv_cache_dtype, event_log,
        speculative, tensor_parallel_size, pipeline_parallel_size, data_parallel_size,
        device_weight_bytes, kv_host_bytes,
    )  # fmt: skip
    if follows(options):
        return
    measured = metrics_path(metrics)
    if out:
        source = prompt_source(prompts, file, token_ids)
        raise typer.Exit(complete_to_file(out, source, params, options, measured))
    wanted = read_prompts(prompts, file, token_ids)
    with open_llm(options) as llm, metrics_written(measured, llm):
        if len(wanted) == 1 and n == 1 and not as_json:
            show_prompt(wanted[0])
            stream(llm, wanted[0], params)
            return
        results = llm.generate(wanted, params, on_error="return")
        for index, result in enumerate(results):
            if as_json:
                write_record(result_record(index, result))
            else:
                print_result(index, result, llm.tokenizer)
    failed = [r.error for r in results if r.error is not None]
    if failed:
        raise typer.Exit(_exit_code(failed[0]))


@app.command(epilog=EPILOG)
def chat(
    message: Annotated[
        list[str] | None,
        typer.Option("--message", help="Say this instead of asking; repeat for several turns."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    as_json: Json = False,
    model: Model = "demo",
    revision: Revision = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: GpuMemory = 0.9,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    speculative: SpeculativeOption = None,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    device_weight_bytes: DeviceWeightBytes = None,
    kv_host_bytes: KvHostBytes = 0,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Talks with a model that has a chat template. Ctrl-D ends."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    options = ModelOptions(
        model, revision, dtype, max_model_len, gpu_memory_utilization, kv_cache_dtype,
        speculative=speculative, tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size, device_weight_bytes=device_weight_bytes,
        kv_host_bytes=kv_host_bytes,
    )  # fmt: skip
    if follows(options):
        return
    with open_llm(options) as llm:
        if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
            raise InvalidRequest(
                f"{model} has no chat template; use generate with a plain prompt", field="messages"
            )
        conversation = [{"role": "system", "content": system}] if system else []
        for turn, text in enumerate(message or typed_lines()):
            conversation.append({"role": "user", "content": text})
            result = stream(llm, llm.chat_tokens(conversation), params, silent=as_json)
            conversation.append({"role": "assistant", "content": result.outputs[0].text})
            if as_json:
                write_record(result_record(turn, result))


@app.command(epilog=EPILOG)
def logprobs(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Text; - reads stdin.")
    ] = None,
    file: File = None,
    token_ids: TokenIds = None,
    top: Annotated[int, typer.Option(help="Show this many of the likeliest tokens too.")] = 0,
    as_json: Json = False,
    model: Model = "demo",
    revision: Revision = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: GpuMemory = 0.9,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
) -> None:
    """Log-probability (natural) of each token of a text, given those before it."""
    wanted = read_prompts(texts, file, token_ids)
    options = ModelOptions(
        model, revision, dtype, max_model_len, gpu_memory_utilization, kv_cache_dtype
    )
    with open_llm(options) as llm:
        results = llm.logprobs(wanted, top=top)
        for index, result in enumerate(results):
            if as_json:
                write_record(logprobs_record(index, result, llm.tokenizer))
            else:
                print_logprobs(result, llm.tokenizer)


@app.command(epilog=EPILOG)
def info(
    as_json: Json = False,
    model: Model = "demo",
    revision: Revision = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: GpuMemory = 0.9,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    sites: Annotated[
        bool, typer.Option("--sites", help="Where activations can be read and changed, instead.")
    ] = False,
) -> None:
    """Says what a model is and what it needs here. Reads no weights."""
    if sites:
        found = describe_sites(model, revision)
        if as_json:
            write_record(record("sites", **found))
        else:
            print_sites(found)
        return
    options = ModelOptions(
        model, revision, dtype, max_model_len, gpu_memory_utilization, kv_cache_dtype
    )
    description = describe(options)
    if as_json:
        write_record(record("info", **description))
    else:
        print_info(description)


@app.command(epilog=EPILOG)
def quantize(
    model: Annotated[str, typer.Argument(help="Directory, Hub id, or demo: a dense model.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    method: Annotated[
        str,
        typer.Option(help="rtn, gptq, awq, nf4: weights alone. smoothquant, int8, fp8: W8A8."),
    ] = "awq",
    bits: Annotated[int, typer.Option(help="4 or 8, of rtn, gptq and awq.")] = 4,
    group_size: Annotated[int, typer.Option(help="Columns a scale; -1: a whole row.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="Without zero points.")] = True,
    act_order: Annotated[
        bool, typer.Option(help="gptq: columns of the largest inputs first.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Text to calibrate with: gptq, awq, smoothquant.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pieces of that text.")] = 128,
    length: Annotated[int, typer.Option(min=8, help="Tokens a piece.")] = 512,
    form: Annotated[
        str, typer.Option("--format", help="compressed-tensors, or orbax: jaxinfer's own.")
    ] = "compressed-tensors",
    scales: Annotated[
        str, typer.Option(help="Of W8A8: row; fp8 also block, of 128 by 128; tensor.")
    ] = "row",
    activations: Annotated[
        str, typer.Option(help="Of W8A8: dynamic, a scale a token; static, from --data.")
    ] = "dynamic",
    report: Annotated[
        Path | None, typer.Option(help="Held-out text to compare with the dense model on.")
    ] = None,
) -> None:
    """Quantises a model, one layer at a time, into a directory that jaxinfer reads; PyTorch
    engines read compressed-tensors."""
    from jaxinfer.cli import quantizing
    from jaxinfer.progress import layers_bar

    options = quantizing.QuantizeOptions(
        model, out, method, bits, group_size, symmetric, act_order, data, samples, length, form,
        report, scales, activations,
    )  # fmt: skip
    try:
        with layers_bar(out.name) as progress:
            found = quantizing.quantize(options, progress)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if found is not None:
        print_info({"quality": found._asdict()})


@app.command(epilog=EPILOG)
def estimate(
    model: Annotated[
        str,
        typer.Argument(
            help="Directory, config.json, .gguf file, demo, or a name such as llama-3.1-8b."
        ),
    ],
    gpu: Annotated[str | None, typer.Option(help="Such as h100; default: compare all.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the weights: bf16 (default), fp16, fp32, int8, w8a8, fp8, int4, nf4."
        ),
    ] = None,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    batch: Annotated[int, typer.Option(help="Sequences that decode at once.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens that each holds; default: 4096.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of a prompt; default: the context.")
    ] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs that share each layer.")] = None,
    pp: Annotated[int | None, typer.Option(help="Stages that hold the layers in turn.")] = None,
    dp: Annotated[int, typer.Option(help="Copies that share the batch.")] = 1,
    price: Annotated[
        str | None, typer.Option(help="Of a GPU for an hour: 2.5, or h100=2.5,l40s=1.1.")
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(help="Find the largest batch with such a time a token.")
    ] = None,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Write a roofline here; needs --gpu.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Load the model, and show what it takes here beside that."),
    ] = False,
) -> None:
    """Says what a model needs on GPUs that need not be here, and predicts its speed and cost."""
    from jaxinfer.cli import checking, estimating, plotting

    options = estimating.EstimateOptions(
        model, gpu, precision, kv_cache_dtype, batch, context, prompt, tp, pp, dp, price, tpot_ms
    )
    try:
        if check and plot:
            raise ValueError("--plot is of what is predicted: leave --check out")
        if check:
            measured = checking.check(options)
            if as_json:
                write_record(checking.json_record(measured))
            else:
                checking.show(measured)
            return
        if plot and gpu is None:
            raise ValueError("--plot is of one kind of GPU: give --gpu too")
        if plot:
            plotting.need_matplotlib()
        config = estimating.read_model(model)
        found = estimating.answers(config, options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        for answer in found:
            write_record(estimating.json_record(model, answer))
    else:
        estimating.show(model, found, options)
    if plot and found[0].estimate:
        plotting.plot_roofline(model, config, found[0].estimate.setting, plot)


@app.command(epilog=EPILOG)
def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="Directory, Hub id, .gguf file or demo; with --random-weights a config.json too, "
            "or a name such as llama-3.1-8b."
        ),
    ],
    revision: Revision = None,
    dtype: DtypeOption = "auto",
    gpu_memory_utilization: GpuMemory = 0.9,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    tensor_parallel_size: TensorParallel = 1,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Read no weights: draw them.")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(help="Of random weights: int8, w8a8, fp8, int4, nf4; default: as --dtype."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences that decode at once.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens that each comes to hold; default: 1024.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of the prompt; default: the context, 2048 at most.")
    ] = None,
    as_json: Json = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a roofline and the time here: .png, .svg or .html.")
    ] = None,
) -> None:
    """Says where a step's time goes, op by op, beside what this device can do."""
    from jaxinfer.cli import plotting, profiling
    from jaxinfer.cli.measuring import MeasureOptions

    if precision is not None and not random_weights:
        raise typer.BadParameter("--precision is of --random-weights: a model has its own")
    options = MeasureOptions(
        model, revision, dtype, kv_cache_dtype, gpu_memory_utilization, batch, context, prompt,
        (precision or "auto") if random_weights else None,
    )  # fmt: skip
    try:
        if plot:
            plotting.need_matplotlib()
            plotting.check_name(plot)
        found = profiling.profile(options, tensor_parallel_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        write_record(profiling.json_record(model, found))
    else:
        profiling.show(model, found)
    if plot:
        plotting.plot_profile(model, found, plot)


@app.command(epilog=EPILOG)
def distill(
    target: Annotated[str, typer.Option(help="Directory, Hub id, or demo: what to learn from.")],
    draft_config: Annotated[
        str, typer.Option(help="A config.json: from random weights; a model: from its weights.")
    ],
    data: Annotated[Path, typer.Option(help="Text to learn on.")],
    out: Annotated[
        Path,
        typer.Option(help="Directory to write; the same command again goes on where it stopped."),
    ],
    held_out: Annotated[
        Path | None, typer.Option(help="Text to measure on; default: the last 5 % of --data.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="The highest, of AdamW.")] = 1e-3,
    cross_entropy: Annotated[
        float, typer.Option(help="Share of the text's own tokens in the loss; the rest is KL.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the text's order, and of random weights.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Of the forwards; auto: bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto",
    k: Annotated[int, typer.Option("-k", help="Guesses a step, where acceptance is measured.")] = 4,
) -> None:
    """Trains a draft model to guess what a target says, and measures how many guesses hold."""
    from jaxinfer.cli.distill_run import DistillOptions
    from jaxinfer.cli.distilling import distill as run

    options = DistillOptions(
        target, draft_config, data, out, held_out, steps, batch_size, sequence_length,
        learning_rate, cross_entropy, seed, save_every, dtype, k,
    )  # fmt: skip
    try:
        found = run(options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print_info(found)


@app.command(epilog=EPILOG)
def replay(
    log: Annotated[Path, typer.Argument(help="Written by `generate --event-log`.", exists=True)],
) -> None:
    """Runs the scheduler again over an event log, and shows each step: what came, what was run,
    what waits and why."""
    from jaxinfer import eventlog

    for step in eventlog.replay(log):
        print(eventlog.describe(step))


@app.command(epilog=EPILOG)
def verify(
    model: Annotated[str, typer.Argument(help="Directory, Hub id, or demo (shipped).")] = "demo",
    revision: Revision = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of both sides.")
    ] = "float32",
    as_json: Json = False,
) -> None:
    """Compares a model's computation with transformers on PyTorch, which must be installed."""
    from rich.console import Console

    from jaxinfer import verify as verification

    report = verification.verify(model, revision=revision, dtype=dtype)
    if as_json:
        write_record(record("verify", **asdict(report)))
    else:
        Console().print(verification.render(report))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the process's exit code (see `EPILOG`)."""
    settings = {"debug": False}
    try:
        get_command(app)(args=argv, prog_name="jaxinfer", obj=settings)
    except SystemExit as done:  # how typer ends, well or not
        return done.code if isinstance(done.code, int) else 0
    except Exception as error:
        if settings["debug"]:
            traceback.print_exc()
        if isinstance(error, JaxinferError):
            note(f"error: {error}")
        else:
            note(f"unexpected {type(error).__name__}: {error} (jaxinfer --debug shows where)")
        return _exit_code(error)
    return 0


def _exit_code(error: Exception) -> int:
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
