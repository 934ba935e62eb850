"""`jaxinfer estimate`: from a config to what it needs, how fast it would be, and what it costs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.cli.options import KvCacheDtype
from jaxinfer.cli.output import record
from jaxinfer.errors import CheckpointError
from jaxinfer.hardware import GPUS, find_gpu
from jaxinfer.hub import DEMO_MODELS, resolve_model
from jaxinfer.known_models import HF_CONFIGS

if TYPE_CHECKING:
    from rich.table import Table

    from jaxinfer.config import ModelConfig
    from jaxinfer.estimate import Estimate
    from jaxinfer.placement import Setting

CONTEXT = 4096  # tokens, where the user says nothing
DENSE = "bf16"
GB, PIPE_WIDTH = 1e9, 120
PARTS = {  # of a decode step
    "read": "reading weights",
    "compute": "products, meanwhile",
    "kv": "reading keys and values",
    "launches": "launches",
    "communication": "all-reduces",
}


@dataclass(frozen=True)
class EstimateOptions:
    """What the command line says. `tp`, `pp` None: 1 with `gpu`, else what is needed. `precision`
    None: `DENSE`, or what the model is stored in, where it is loaded."""

    model: str
    gpu: str | None = None
    precision: str | None = None
    kv_dtype: KvCacheDtype = "auto"
    batch: int = 1
    context: int | None = None
    prompt: int | None = None
    tp: int | None = None
    pp: int | None = None
    dp: int = 1
    price: str | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True)
class Answer:
    """About one kind of GPU.

    Attributes:
        estimate: None where there is none; `reason` says why.
        batch_within_tpot: most sequences that each get a token in the time asked for; None where
            none was, or there is no estimate.
    """

    gpu: str
    estimate: Estimate | None
    reason: str | None = None
    batch_within_tpot: int | None = None


def read_model(name: str) -> ModelConfig:
    """The config of a known name, a directory, a `config.json`, a GGUF file or the demo model.

    Raises:
        CheckpointError: there is no such, or it cannot be read.
        UnsupportedModel: see `models.families.parse_config`.
    """
    from jaxinfer.loading import model_config
    from jaxinfer.models.families import parse_config

    path = Path(name).expanduser()
    if name.lower() in HF_CONFIGS:
        return parse_config(HF_CONFIGS[name.lower()])
    if name in DEMO_MODELS or path.is_dir() or path.suffix == ".gguf":
        return model_config(resolve_model(name))
    if not path.is_file():
        raise CheckpointError(
            f"model {name!r}: expected a directory, a config.json, a .gguf file, demo, or one of"
            f" {', '.join(HF_CONFIGS)}"
        )
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a JSON {type(contents).__name__}, not an object")
    return parse_config(contents)


def answers(config: ModelConfig, options: EstimateOptions) -> list[Answer]:
    """One of the GPU asked for, or one of each.

    Raises:
        ValueError: an option that makes no sense; it says what is accepted.
    """
    from jaxinfer.placement import Setting, check_setting

    o = options
    if o.tpot_ms is not None and not 0 < o.tpot_ms < math.inf:
        raise ValueError(f"tpot-ms={o.tpot_ms}: expected a number above 0")
    prices = read_prices(o.price, o.gpu)
    chosen = find_gpu("h100" if o.gpu is None else o.gpu)
    context = min(CONTEXT, config.max_position) if o.context is None else o.context
    setting = Setting(
        chosen,
        o.precision or DENSE,
        o.kv_dtype,
        o.batch,
        context,
        o.prompt,
        o.tp or 1,
        o.pp or 1,
        o.dp,
    )
    check_setting(config, setting)
    if o.gpu is not None:
        return [_answer(config, setting, prices, o.tpot_ms)]
    if o.tp is not None or o.pp is not None:
        raise ValueError("tp and pp are of one kind of GPU: give --gpu too")
    kinds = [replace(setting, gpu=gpu) for gpu in GPUS.values()]
    return [_smallest(config, kind, prices, o.tpot_ms) for kind in kinds]


def _smallest(
    config: ModelConfig, setting: Setting, prices: dict[str, float], tpot_ms: float | None
) -> Answer:
    """On the fewest of one kind of GPU."""
    from jaxinfer.placement import MOST_GPUS, search

    if setting.stored.dtype == "bfloat16" and not setting.gpu.bfloat16:
        return Answer(setting.gpu.name, None, "no bfloat16")
    found = search(config, setting)
    if found is None:
        return Answer(setting.gpu.name, None, f"over {MOST_GPUS}")
    return _answer(config, found, prices, tpot_ms)


def _answer(
    config: ModelConfig, setting: Setting, prices: dict[str, float], tpot_ms: float | None
) -> Answer:
    from jaxinfer.estimate import estimate
    from jaxinfer.placement import largest_batch

    name = setting.gpu.name
    within = None if tpot_ms is None else largest_batch(config, setting, tpot_ms=tpot_ms)
    return Answer(name, estimate(config, setting, price=prices.get(name)), None, within)


def read_prices(text: str | None, gpu: str | None) -> dict[str, float]:
    """Of a GPU for an hour: `2.5`, of the one asked for, or `h100=2.5,l40s=1.1`.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return {}
    if gpu is not None and "=" not in text:
        text = f"{gpu}={text}"
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {find_gpu(name.strip()).name: float(price) for name, price in pairs}
    except ValueError as error:
        raise ValueError(
            f"price={text!r}: expected a number with --gpu, or such as h100=2.5,l40s=1.1 ({error})"
        ) from error


def json_record(model: str, answer: Answer) -> dict[str, Any]:
    """An `estimate` record: the fields of `Answer`, with what follows from them."""
    fields = asdict(answer)
    if answer.estimate is not None:
        memory = answer.estimate.memory
        fields["estimate"]["memory"] |= {"needed": memory.needed, "fits": memory.fits}
        fields["estimate"]["setting"]["gpus"] = answer.estimate.setting.gpus
    return record("estimate", model=model, **fields)


def show(model: str, answers: list[Answer], options: EstimateOptions) -> None:
    """A table on stdout: all about the GPU asked for, or a row for each kind."""
    from rich.console import Console

    one = options.gpu is not None
    table = details(model, answers[0]) if one else comparison(answers, options.tpot_ms)
    # A pipe has no width of its own, and rows that are wrapped are hard to take apart.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def comparison(answers: list[Answer], tpot_ms: float | None) -> Table:
    """A row for each kind of GPU."""
    from rich import box
    from rich.table import Table

    table = Table("GPU", "GPUs", box=box.SIMPLE)
    heads = ["GB each", "max batch", "ms/token", "token/s", "first ms"]
    heads += [] if tpot_ms is None else [f"batch in {tpot_ms:g} ms"]
    heads += ["per million"] if any(map(_cost, answers)) else []
    for head in heads:
        table.add_column(head, justify="right")
    for a in answers:
        e = a.estimate
        if e is None:
            table.add_row(a.gpu, a.reason)
            continue
        cells = [
            a.gpu, layout(e.setting), f"{e.memory.needed / GB:.1f}/{e.memory.usable / GB:.1f}",
            f"{e.max_batch:,}", f"{e.decode_ms:.2f}", f"{e.decode_tok_s:,.0f}",
            f"{e.prefill_ms:,.0f}",
        ]  # fmt: skip
        cells += [] if tpot_ms is None else [f"{a.batch_within_tpot:,}"]
        table.add_row(*cells, _cost(a))
    return table


def _cost(answer: Answer) -> str:
    cost = answer.estimate and answer.estimate.cost_per_million_output
    return "" if cost is None else f"{cost:.3f}"


def layout(setting: Setting) -> str:
    """`8 tp4 pp2`: how many GPUs, and what for."""
    ways = [f"{name}{getattr(setting, name)}" for name in ("tp", "pp", "dp")]
    return " ".join([str(setting.gpus), *(way for way in ways if not way.endswith("p1"))])


def details(model: str, answer: Answer) -> Table:
    """Everything about one kind of GPU."""
    from rich import box
    from rich.table import Table

    assert answer.estimate is not None, "there is one of a GPU that was asked for"
    s = answer.estimate.setting
    table = Table("", f"{model}, {s.precision}, {s.gpu.name}: {layout(s)}", box=box.SIMPLE)
    for name, value in _lines(answer.estimate):
        table.add_row(name, value)
    if answer.batch_within_tpot is not None:
        table.add_row("sequences within the time asked", f"{answer.batch_within_tpot:,}")
    return table


def _lines(e: Estimate) -> Iterator[tuple[str, str]]:
    m, s, parts = e.memory, e.setting, e.decode_parts
    yield "parameters", f"{e.parameters / 1e9:.2f} billion"
    yield "weights", f"{e.weight_bytes / GB:.2f} GB, {m.weights / GB:.2f} GB a GPU"
    a_sequence = f"{e.kv_bytes_per_sequence / GB:.2f} GB at {s.context} tokens"
    yield "KV cache", f"{e.kv_bytes_per_token:,} bytes a token, {a_sequence}"
    yield "", f"{m.kv / GB:.2f} GB a GPU, of {s.rows} sequences"
    yield "activations", f"{m.activations / GB:.2f} GB"
    yield "compiled temporaries", f"{m.temporaries / GB:.2f} GB"
    yield "kept free beside them", f"{m.margin / GB:.2f} GB"
    verdict = "fits" if m.fits else "does not fit"
    yield "memory of a GPU", f"{m.needed / GB:.2f} of {m.usable / GB:.2f} GB: {verdict}"
    if not m.fits:
        yield "fits with", "; or ".join(e.nearest) or "none of the changes tried"
    yield "most sequences", f"{e.max_batch:,}"
    yield "a token, each sequence", f"{e.decode_ms:.2f} ms"
    yield "tokens, all sequences", f"{e.decode_tok_s:,.0f} a second"
    for name, what in PARTS.items():
        if seconds := getattr(parts, name):
            yield f"  {what}", f"{1e3 * s.pp * seconds:.3f} ms"
    if s.gpus > s.dp:
        sent = f"{e.communication_bytes / 1e6:.2f} MB a GPU a step"
        yield "between GPUs", f"{e.communication_ms:.3f} ms, {sent} (assumed, not measured)"
    if s.pp > 1:
        yield "stages idle", f"decode {e.decode_bubble:.0%}, one prompt {e.prefill_bubble:.0%}"
    yield "first token", f"{e.prefill_ms:,.1f} ms after a prompt of {s.prompt_tokens} tokens"
    yield "prompts", f"{e.prefill_tok_s:,.0f} tokens a second"
    if e.cost_per_million_output is not None:
        yield "a million tokens made", f"{e.cost_per_million_output:.3f}"
        yield "a million tokens read", f"{e.cost_per_million_input:.4f}"
    yield "efficiency", s.gpu.efficiency.source
