"""`jaxinfer estimate --check`: what was predicted for a model, beside what it takes here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from jaxinfer.cli.estimating import CONTEXT, GB, PIPE_WIDTH, EstimateOptions
from jaxinfer.cli.measuring import Loaded, MeasureOptions, load_measured, settled
from jaxinfer.cli.output import record

if TYPE_CHECKING:
    from jaxinfer.config import ModelConfig
    from jaxinfer.llm import LLM
    from jaxinfer.placement import Setting
    from jaxinfer.runner import StepKey
    from jaxinfer.temporaries import StepShape

# Of an estimate, but not of a check: it is of one device, this one.
REFUSED = ("gpu", "tp", "pp", "dp", "price", "tpot_ms")


@dataclass(frozen=True)
class Item:
    """One figure, in `unit`. `predicted`, `measured`: None where there is no such."""

    what: str
    unit: str
    predicted: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Check:
    """All of them.

    Attributes:
        device: as its driver calls it.
        precision: as asked for, or as the model is stored: a key of `PRECISIONS`, or `mixed`.
        gpu: the row of the hardware table by which speed was predicted; None: it was not.
        unpredicted: why something was not predicted; None: all was.
    """

    model: str
    device: str
    precision: str
    dtype: str
    batch: int
    context: int
    prompt: int
    gpu: str | None
    unpredicted: str | None
    items: tuple[Item, ...]


def check(options: EstimateOptions) -> Check:
    """Loads the model and measures it.

    Raises:
        ValueError: an option that is not of a check, or makes no sense.
        CapacityError, CheckpointError, UnsupportedModel: see `LLM`.
    """
    from jaxinfer.roofline import PRECISIONS

    o = options
    usual = {field.name: field.default for field in fields(EstimateOptions)}
    for name in REFUSED:
        if getattr(o, name) != usual[name]:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"--check measures on this device, one: leave {option} out")
    if o.precision is not None and o.precision not in PRECISIONS:
        raise ValueError(f"precision={o.precision!r}: expected one of {', '.join(PRECISIONS)}")
    dtype = "auto" if o.precision is None else PRECISIONS[o.precision].dtype
    asked = MeasureOptions(
        o.model, None, dtype, o.kv_dtype, batch=o.batch, context=o.context, prompt=o.prompt
    )
    config, chosen = settled(asked, CONTEXT)
    loaded = load_measured(chosen, config)
    with loaded.llm:
        return measured(o, chosen, config, loaded)


def measured(
    o: EstimateOptions, chosen: MeasureOptions, config: ModelConfig, loaded: Loaded
) -> Check:
    import jax

    from jaxinfer.hardware import GPUS, gpu_of
    from jaxinfer.placement import Setting
    from jaxinfer.profiling.weights import DENSE, MIXED, find_precision

    device = jax.devices()[0]
    gpu = gpu_of(device.device_kind)
    stored = o.precision or find_precision(loaded.llm.params, loaded.dtype)[0]
    assert chosen.context is not None, "settled"
    assert chosen.prompt is not None, "settled"
    setting = Setting(
        gpu or GPUS["h100"],  # memory is the same on each
        DENSE[loaded.dtype] if stored == MIXED else stored,
        o.kv_dtype, o.batch, chosen.context, chosen.prompt, dtype=loaded.dtype,
    )  # fmt: skip
    reasons = []
    if not _known_steps(device, setting):
        reasons.append("temporaries: they are known of a GPU's kernels, of 16 bits")
    if gpu is None:
        reasons.append(f"speed: the hardware table has no row for {device.device_kind!r}")
    if stored == MIXED:
        reasons.append("weights and speed: several precisions; --precision says which to take")
    known = gpu is not None and stored != MIXED
    speed = [*_speed(config, setting, loaded.llm, known=known)]  # compiles what memory looks at
    memory = memory_items(
        config, setting, loaded.llm, device, known=stored != MIXED, drawn=chosen.random is not None
    )
    return Check(
        o.model, device.device_kind, stored, loaded.dtype, o.batch, chosen.context, chosen.prompt,
        gpu.name if gpu is not None and known else None, "; ".join(reasons) or None,
        (*memory, *speed),
    )  # fmt: skip


def memory_items(
    config: ModelConfig, setting: Setting, llm: LLM, device: Any, *, known: bool, drawn: bool
) -> Iterator[Item]:
    """`known`: whether the precision of the matrices is; `drawn`: they were made here, which took
    more memory than running them does."""
    from jaxinfer.cache import page_bytes
    from jaxinfer.parallel import device_bytes
    from jaxinfer.placement import memory_of

    compiler, plan = llm.engine.compiler, llm.memory_plan
    memory = memory_of(config, setting, [shape_of(*key) for key in compiler.keys])
    weights, cache = device_bytes(llm.params), llm.engine.cache_bytes
    steps = memory.steps if _known_steps(device, setting) else None
    whole = memory.occupied if known and steps is not None else None
    yield Item("weights", "B", memory.weights if known else None, weights)
    a_token = cache / (plan.num_pages * plan.page_size)
    yield Item("KV cache, a token", "B", page_bytes(config, 1, setting.kv_name), a_token)
    yield Item("KV cache", "B", memory.kv, cache)
    yield Item("temporaries of compiled steps", "B", steps, compiler.step_bytes)
    yield Item("memory, of these", "B", whole, weights + cache + compiler.step_bytes)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if peak is not None and not drawn:
        yield Item("peak", "B", whole, peak)


def _known_steps(device: Any, setting: Setting) -> bool:
    """Whether `temporaries` describes the steps that are compiled there."""
    return device.platform == "gpu" and setting.stored.dtype != "float32"


def shape_of(key: StepKey, penalties: bool) -> StepShape:
    """What decides the memory of a compiled step."""
    from jaxinfer.temporaries import StepShape

    return StepShape(
        key.rows, key.tokens, key.chunks, key.pages * key.page_size, key.random, key.truncated,
        key.top, key.score, key.guesses, penalties,
    )  # fmt: skip


def _speed(config: ModelConfig, setting: Setting, llm: LLM, *, known: bool) -> Iterator[Item]:
    from jaxinfer.estimate import prefill_time
    from jaxinfer.placement import decode_time
    from jaxinfer.profiling.engine_times import decode_seconds, prompt_seconds, window

    at, batch, prompt = window(setting.context), setting.batch, setting.prompt_tokens
    step = decode_time(config, replace(setting, context=at.context, prompt=None))[0]
    first = prefill_time(config, setting)[0]
    for what, count, predicted, measured in (
        ("decode", batch, step, decode_seconds(llm, batch, at)),
        ("prompt", prompt, first, prompt_seconds(llm, prompt)),
    ):
        names = {"decode": ("decode step", "decode"), "prompt": ("first token", "prompts")}[what]
        yield Item(names[0], "ms", 1e3 * predicted if known else None, 1e3 * measured)
        yield Item(names[1], "tok/s", count / predicted if known else None, count / measured)


def json_record(found: Check) -> dict[str, Any]:
    """A `check` record: the fields of `Check`, each item with its error."""
    items = [asdict(item) | {"error": item.error} for item in found.items]
    return record("check", **asdict(found) | {"items": items})


def show(found: Check) -> None:
    """A table on stdout, with what was not predicted beneath it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    where = f"{found.model}, {found.precision}, {found.dtype} on {found.device}"
    sizes = f"batch {found.batch}, context {found.context}, prompt {found.prompt}"
    table = Table(title=f"{where}\n{sizes}", box=box.SIMPLE)
    for head in ("", "predicted", "measured", "error"):
        table.add_column(head, justify="right" if head else "left")
    for item in found.items:
        cells = (_shown(item.predicted, item.unit), _shown(item.measured, item.unit))
        error = "" if item.error is None else f"{item.error:+.1%}"
        table.add_row(item.what, *cells, error)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(table)
    if found.unpredicted:
        console.print(f"not predicted: {found.unpredicted}")


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "B":
        return f"{value / GB:,.3f} GB" if value >= GB / 1000 else f"{value:,.0f} B"
    return f"{value:,.2f} {unit}" if unit == "ms" else f"{value:,.0f} {unit}"
