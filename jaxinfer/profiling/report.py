"""From kernels and work to a table: pure functions on data. Seconds are of one step."""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from jaxinfer.profiling.ceilings import Ceilings
from jaxinfer.profiling.trace import Event
from jaxinfer.roofline import Work

OTHER, LARGEST = "other", 5
MATMULS = ("qkv", "o", "gate_up", "down", "output")
# Scopes of the model's code, and the groups in which they are shown.
SCOPES: Mapping[str, str] = MappingProxyType(
    {
        **{name: name for name in MATMULS},
        **{name: name for name in ("attention", "kv_write", "sampling", "collectives", "batch")},
        **dict.fromkeys(("norm", "activation", "rope", "embed"), "elementwise"),
    }
)
GROUPS = (*dict.fromkeys(SCOPES.values()), OTHER)
IDEAL, PADDING = "roofline", "padding"
BETWEEN, RECORDING, HOST = "between kernels", "graphs on, recording off", "host"


@dataclass(frozen=True)
class Op:
    """A group of ops in one step, all layers together.

    Attributes:
        kernels: launched; on a CPU, ops run.
        bytes, flops: that it moves and computes, padding included (`roofline.op_work`); 0 of what
            that does not count.
        bound: which ceiling limits it.
        ideal_s: at that ceiling. `share`: of the ceiling that it reaches; None where there is none.
    """

    name: str
    kernels: float
    seconds: float
    bytes: float
    flops: float
    bound: Literal["memory", "compute"] | None
    ideal_s: float
    share: float | None


@dataclass(frozen=True)
class Phase:
    """One kind of step.

    Attributes:
        name: `decode` or `prefill`.
        rows, rows_wanted: tokens that it computes, and how many of them anyone wants.
        engine_s: in the engine, from one step to the next; of a prompt, to its first token.
        step_s: the same program alone, dispatched again and again.
        profiled_s: while its kernels are recorded, without CUDA graphs.
        busy_s: of that, while any kernel runs.
        ops: all groups.
        parts: what `engine_s` is made of; adds up to it. `roofline` is what could be, groups have
            what they take beyond it.
        unknown: names of the largest in `other`, with their seconds.
    """

    name: str
    rows: int
    rows_wanted: int
    engine_s: float
    step_s: float
    profiled_s: float
    busy_s: float
    ops: tuple[Op, ...]
    parts: dict[str, float]
    unknown: tuple[tuple[str, float], ...]


def own_times(events: Sequence[Event]) -> list[float]:
    """Nanoseconds that are each event's own: of several at a time, the one that began last has it
    (of those the shortest), as the inner one of nested ones. They add up to the time in which
    anything runs."""
    own = [0.0] * len(events)
    order = sorted(
        range(len(events)), key=lambda i: (events[i].start_ns, -events[i].duration_ns, i)
    )
    edges = sorted({edge for e in events for edge in (e.start_ns, e.end_ns)})
    running: list[int] = []  # a heap of places in `order`, negative: the last first
    begun = 0
    for left, right in pairwise(edges):
        while begun < len(order) and events[order[begun]].start_ns <= left:
            heapq.heappush(running, -begun)
            begun += 1
        while running and events[order[-running[0]]].end_ns <= left:
            heapq.heappop(running)
        if running:
            own[order[-running[0]]] += right - left
    return own


def group_of(event: Event, paths: Mapping[str, str], module: str) -> str:
    """The group of the innermost scope that is known; `other` if none is.

    `paths`: of `kernel_names`; `module`: what the trace calls the program that they are of.
    """
    if event.module and event.module != module:
        return OTHER
    path = paths.get(event.op) or paths.get(event.name) or event.path
    known = (SCOPES[part] for part in reversed(path.split("/")) if part in SCOPES)
    return next(known, OTHER)


def kernel_names(paths: Mapping[str, str]) -> dict[str, str]:
    """`paths` with instructions also as XLA calls their kernels: `fusion.3`, `fusion_3`."""
    return {re.sub(r"\W", "_", name): path for name, path in paths.items()} | dict(paths)


def ideal(work: Work, ceilings: Ceilings) -> tuple[float, Literal["memory", "compute"] | None]:
    """Seconds at the ceiling that limits it, and which that is."""
    moved = work.bytes / ceilings.copy_bytes_per_s
    computed = work.flops / ceilings.matmul_flops_per_s
    bound = None if not moved + computed else "memory" if moved >= computed else "compute"
    return max(moved, computed), bound


def make_phase(
    name: str,
    events: Sequence[Event],
    paths: Mapping[str, str],
    *,
    steps: int,
    rows: tuple[int, int],
    work: Mapping[str, Work],
    wanted: Mapping[str, Work],
    ceilings: Ceilings,
    step_s: float,
    engine_s: float,
) -> Phase:
    """The table of a kind of step.

    Args:
        events: of `steps` steps, one after the other; at least one. What is of another program than
            most of them are is not of the step.
        paths: of the program that ran (`trace.op_paths`).
        rows: computed, wanted.
        work: of a step as it is computed, by group; `wanted`: if nothing were padded.
        step_s, engine_s: see `Phase`.
    """
    names, each = kernel_names(paths), own_times(events)
    modules = Counter(event.module for event in events if event.module)
    module = next((name for name, _ in modules.most_common(1)), "")
    spent: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    kernels: dict[str, int] = dict.fromkeys(GROUPS, 0)
    unknown: dict[str, float] = defaultdict(float)
    for event, own in zip(events, each, strict=True):
        group, seconds = group_of(event, names, module), own / 1e9 / steps
        spent[group] += seconds
        kernels[group] += 1
        if group == OTHER:
            unknown[event.op or event.name] += seconds
    ops = tuple(
        _op(group, kernels[group] / steps, spent[group], work.get(group, Work(0, 0)), ceilings)
        for group in GROUPS
    )
    busy = sum(spent.values())
    begin, end = min(e.start_ns for e in events), max(e.end_ns for e in events)
    profiled = (end - begin) / 1e9 / steps
    rest = {BETWEEN: profiled - busy, RECORDING: step_s - profiled, HOST: engine_s - step_s}
    least = sum(ideal(one, ceilings)[0] for one in wanted.values())
    ranked = sorted(unknown.items(), key=lambda item: -item[1])
    return Phase(
        name=name,
        rows=rows[0],
        rows_wanted=rows[1],
        engine_s=engine_s,
        step_s=step_s,
        profiled_s=profiled,
        busy_s=busy,
        ops=ops,
        parts=_parts(ops, least) | rest,
        unknown=tuple(ranked[:LARGEST]),
    )


def _op(name: str, kernels: float, seconds: float, work: Work, ceilings: Ceilings) -> Op:
    least, bound = ideal(work, ceilings)
    share = least / seconds if bound is not None and seconds else None
    return Op(name, kernels, seconds, *work, bound, least, share)


def _parts(ops: Sequence[Op], least: float) -> dict[str, float]:
    """What the time is made of in which kernels run. A group's part is negative where it takes less
    than its ceiling says: caches hold what it reads, or it computes in fewer bits than were
    measured."""
    over = {op.name: op.seconds - op.ideal_s for op in ops}
    matmul = sum(over.pop(name) for name in MATMULS)
    padding = sum(op.ideal_s for op in ops) - least
    return {IDEAL: least, PADDING: padding, "matmul": matmul, **over}
