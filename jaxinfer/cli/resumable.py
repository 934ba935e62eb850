"""`generate --out`: prompts by the million, a line for each when it is done, nothing done twice."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import jaxinfer
from jaxinfer.cli.metrics import metrics_written
from jaxinfer.cli.model import ModelOptions, choose_dtype, model_digest, open_llm
from jaxinfer.cli.output import note, result_record
from jaxinfer.cli.prompts import Extent, Source, digest_line, measure
from jaxinfer.cli.results import Results, check_header, open_results, results_path
from jaxinfer.errors import InvalidRequest, JaxinferError
from jaxinfer.hub import resolve_model
from jaxinfer.progress import RunState, run_bar
from jaxinfer.types import MAX_SEED, SamplingParams

if TYPE_CHECKING:
    from jaxinfer.llm import LLM
    from jaxinfer.offline import Job
    from jaxinfer.requests import Request


def complete_to_file(
    out: str,
    source: Source,
    params: SamplingParams,
    options: ModelOptions,
    metrics: Path | None = None,
) -> int:
    """Completes the prompts that have no line in the file yet. Returns the exit code.

    A prompt that is refused has its error for a line. One that fails for no fault of its own has
    none, and is tried again by the next run. `metrics`: where those of this run go.
    """
    path = results_path(out)
    extent = measure(source)
    directory = resolve_model(options.model, options.revision)
    dtype = choose_dtype(options)
    asked = _asked(options, dtype, model_digest(directory), params, extent)
    check_header(path, asked)  # before the weights are read
    with open_llm(options, dtype) as llm, metrics_written(metrics, llm):
        header = asked | {
            "max_model_len": llm.memory_plan.max_model_len,
            "run_seed": secrets.randbelow(MAX_SEED),
            "device": _device(),
        }
        with open_results(path, header, extent.count) as results:
            if results.header.get("device") != header["device"]:
                note(f"begun on {results.header.get('device')}: last digits may differ here")
            failed = _work(llm, results, source, params, extent, out)
    return 1 if failed else 2 if results.refused else 0


def _decides(speculative: str | None) -> str | None:
    """What was said of speculation, where tokens depend on it."""
    from jaxinfer.speculative import parse

    if speculative is None:
        return None
    try:
        how = parse(speculative)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return speculative if how.rule != "shared" or how.forced is not None else None


def _asked(
    options: ModelOptions, dtype: str, model: str, params: SamplingParams, extent: Extent
) -> dict[str, Any]:
    """What results depend on, as far as it is known before the model is loaded."""
    from jaxinfer.cache import resolve_kv_dtype

    return {
        "jaxinfer": jaxinfer.__version__,
        "model": options.model,
        "model_digest": model,
        "dtype": dtype,
        "kv_cache_dtype": resolve_kv_dtype(options.kv_cache_dtype, dtype).name,
        "speculative": _decides(options.speculative),
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "params": asdict(params),
        "prompts": extent.count,
        "prompts_digest": extent.digest,
    }


def _device() -> str:
    import jax

    return jax.devices()[0].device_kind


@dataclass
class _Counts:
    """What this run has done: prompts in the file, tokens of finished requests, failures."""

    done: int
    tokens: int = 0
    failed: int = 0


def _work(
    llm: LLM, results: Results, source: Source, params: SamplingParams, extent: Extent, out: str
) -> int:
    """Runs what is left, adding each result. Returns how many failed."""
    from jaxinfer.offline import as_completed

    counts = _Counts(sum(results.done))
    if counts.done:
        note(f"{counts.done} of {extent.count} prompts are in {out} already")
    lines: dict[int, int | None] = {}
    jobs = _jobs(results, source, params, extent, lines)
    try:
        with run_bar(counts.done, extent.count) as show, _interruptible() as interrupted:

            def watch(requests: list[Request]) -> bool:
                if show is not None:
                    show(_state(llm, requests, counts))
                return not interrupted()

            for index, result in as_completed(llm, jobs, watch=watch):
                line = lines.pop(index)
                if result.error is not None and not isinstance(result.error, InvalidRequest):
                    note(f"prompt {index}: failed, and has no line: {result.error}")
                    counts.failed += 1
                    continue
                results.add(result_record(index, result) | {"line": line})
                counts.done += 1
                counts.tokens += sum(len(output.token_ids) for output in result.outputs)
            if counts.done + counts.failed < extent.count:  # for nothing else ends it early
                raise KeyboardInterrupt
    except BaseException:
        note(f"ended early: {counts.done} of {extent.count} prompts are in {out}; "
             "the same command goes on with the rest")  # fmt: skip
        raise
    refused = f", {results.refused} of them refused" if results.refused else ""
    note(f"[{counts.done} of {extent.count} prompts are in {out}{refused}]")
    return counts.failed


def _jobs(
    results: Results,
    source: Source,
    params: SamplingParams,
    extent: Extent,
    lines: dict[int, int | None],
) -> Iterator[Job]:
    """What is not done yet; `lines` is told where each prompt stands.

    Raises:
        JaxinferError: at the end, if these are not the prompts that were measured.
    """
    from jaxinfer.offline import Job, seed_of

    digest, count = hashlib.sha256(), 0
    for index, item in enumerate(source()):
        digest.update(digest_line(item))
        count += 1
        if count > extent.count:
            break
        if not results.done[index]:
            lines[index] = item.line
            own = params.seed
            seed = seed_of(results.header["run_seed"], index) if own is None else own
            yield Job(index, item.prompt, replace(params, seed=seed))
    if Extent(count, digest.hexdigest()) != extent:
        raise JaxinferError("the prompts were changed while they were run: begin a new file")


def _state(llm: LLM, requests: list[Request], counts: _Counts) -> RunState:
    waiting = llm.engine.waiting
    begun = sum(len(sample.tokens) for request in requests for sample in request.samples)
    unfinished = sum(request.unfinished for request in requests)
    return RunState(counts.done, counts.tokens + begun, max(0, unfinished - waiting), waiting)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yields what tells whether Ctrl-C was pressed, which ends nothing: results are on their way.

    Pressed again it interrupts at once.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False  # somebody else's affair, or ignored, as where a shell runs it behind
        return
    pressed: list[int] = []

    def press(number: int, _: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # not `note`, which the signal may have interrupted
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
