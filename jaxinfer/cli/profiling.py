"""`jaxinfer profile`: where the time of a step goes, op by op."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jaxinfer.cli.estimating import PIPE_WIDTH
from jaxinfer.cli.measuring import MeasureOptions, load_measured, settled
from jaxinfer.cli.output import record

if TYPE_CHECKING:
    from rich.table import Table

    from jaxinfer.profiling.measure import Profile
    from jaxinfer.profiling.report import Op, Phase

CONTEXT = 1024  # tokens, where the user says nothing
HEADS = ("kernels", "us", "% of step", "MB", "GFLOP", "bound by", "% of ceiling")


def profile(options: MeasureOptions, tensor_parallel_size: int) -> Profile:
    """Measures this device, loads the model, and looks into its steps.

    Raises:
        ValueError: an option that makes no sense; it says what is accepted.
        CapacityError, CheckpointError, UnsupportedModel: see `LLM`.
    """
    from jaxinfer.memory import DEFAULT_BATCHED_TOKENS
    from jaxinfer.profiling.ceilings import measure_ceilings

    if tensor_parallel_size != 1:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size}: a profile is of one device; expected 1"
        )
    config, chosen = settled(options, CONTEXT)
    assert chosen.context is not None, "settled"
    assert chosen.prompt is not None, "settled"
    if chosen.prompt > DEFAULT_BATCHED_TOKENS:
        raise ValueError(
            f"prompt={chosen.prompt}: expected at most {DEFAULT_BATCHED_TOKENS}, one step's"
        )
    loaded = load_measured(chosen, config, measure_ceilings)
    from jaxinfer.profiling.measure import profile as measure

    return measure(
        loaded.llm, loaded.first, batch=chosen.batch, context=chosen.context, prompt=chosen.prompt,
        dtype=loaded.dtype, kv_dtype=loaded.kv_dtype,
    )  # fmt: skip


def json_record(model: str, found: Profile) -> dict[str, Any]:
    """A `profile` record: the fields of `Profile`."""
    return record("profile", model=model, **asdict(found))


def show(model: str, found: Profile) -> None:
    """Tables on stdout."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    ceilings = found.ceilings
    console.print(
        f"{model}: {found.precision}, {found.dtype}, KV {found.kv_dtype}, on {found.device}\n"
        f"measured here: copy {ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s, "
        f"{ceilings.dtype} product {ceilings.matmul_flops_per_s / 1e12:,.2f} TFLOP/s"
    )
    sizes = {
        "decode": f"batch {found.batch}, context {found.context}",
        "prefill": f"a prompt of {found.prompt}",
    }
    for phase in found.phases:
        console.print(_ops(phase, sizes[phase.name]))
        console.print(_parts(phase))
        if phase.unknown:
            names = ", ".join(f"{name} {1e6 * seconds:.1f} us" for name, seconds in phase.unknown)
            console.print(f"largest of other: {names}\n", markup=False, highlight=False)


def _ops(phase: Phase, sizes: str) -> Table:
    """A row for each group that took any time."""
    from rich import box
    from rich.table import Table

    title = f"{phase.name}, {sizes}: {phase.rows} rows computed, {phase.rows_wanted} wanted"
    table = Table("", title=title, box=box.SIMPLE, title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="right")
    for op in phase.ops:
        if op.seconds:
            table.add_row(op.name, *_cells(op, phase.profiled_s))
    gaps = phase.profiled_s - phase.busy_s
    table.add_row("between kernels", "", f"{1e6 * gaps:,.1f}", f"{gaps / phase.profiled_s:.1%}")
    table.add_row("step, recorded", "", f"{1e6 * phase.profiled_s:,.1f}", "100.0%")
    return table


def _cells(op: Op, step_s: float) -> Iterator[str]:
    yield f"{op.kernels:,.0f}"
    yield f"{1e6 * op.seconds:,.1f}"
    yield f"{op.seconds / step_s:.1%}"
    yield f"{op.bytes / 1e6:,.2f}" if op.bytes else ""
    yield f"{op.flops / 1e9:,.2f}" if op.flops else ""
    yield op.bound or ""
    yield "" if op.share is None else f"{op.share:.0%}"


def _parts(phase: Phase) -> Table:
    """What the engine's time is made of."""
    from rich import box
    from rich.table import Table

    table = Table("of a step in the engine", box=box.SIMPLE)
    table.add_column("us", justify="right")
    table.add_column("%", justify="right")
    for name, seconds in phase.parts.items():
        if seconds:
            table.add_row(name, f"{1e6 * seconds:,.1f}", f"{seconds / phase.engine_s:.1%}")
    table.add_row("in the engine", f"{1e6 * phase.engine_s:,.1f}", "100.0%")
    table.add_row("the usual program alone", f"{1e6 * phase.step_s:,.1f}")
    return table
