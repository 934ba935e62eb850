"""Trials of engines to records: medians and spread, ratios to the first engine, agreement.

A record is `compare.MODEL.WORKLOAD.CASE.ENGINE.FIGURE`; its detail names the same parts, so that
tables and pictures need not read the name.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from bench import cases, serving
from bench.cases import Case
from bench.record import Record
from bench.serving import Stream
from bench.sessions import Event, Failure, Took, Trial

BAR_CASE = "lognormal-128"  # of the bar over HF transformers' continuous batching
CERTAIN = 0.99  # share of tokens that must agree where nothing is rounded to 16 bits
HEADLINES = {
    "latency": "ms_per_step", "quantised": "ms_per_step", "prefill": "ttft_ms",
    "throughput": "out_tok_s", "serve": "itl_p99_ms", "speculative": "ms_per_step",
}  # fmt: skip


def stem(model: str, case: Case, engine: str) -> str:
    """Of the names of an engine's records of a case."""
    return f"compare.{model}.{case.workload}.{case.name}.{engine}"


def described(model: str, case: Case, engine: str) -> dict[str, Any]:
    """What every record's detail has."""
    return {
        "model": model,
        "workload": case.workload,
        "case": case.name,
        "engine": engine,
        **case.detail,
    }


def spread(values: Sequence[float]) -> float:
    """(largest − smallest) / median; 0 of one value."""
    median = statistics.median(values)
    return (max(values) - min(values)) / abs(median) if median else 0.0


def summarise(
    model: str, events: Sequence[Event], *, greedy: bool, exact: bool, reference: str
) -> list[Record]:
    """Records of a session, those of one case after those of another.

    Args:
        model: in the names.
        events: of `sessions.run`.
        greedy: whether engines' tokens can be compared at all.
        exact: whether they must be the same: float32.
        reference: the engine that others are compared with.
    """
    by: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for event in events:
        if isinstance(event, Trial):
            by[event.case.workload + "." + event.case.name, event.engine].append(event)
    found: list[Record] = []
    for (case, engine), trials in by.items():
        others = by.get((case, reference), [])
        found += _of_trials(model, engine, trials, others if engine != reference else [])
        if greedy and engine != reference:
            found += _agreement(model, engine, trials, others, exact)
    for event in events:
        if isinstance(event, Failure):
            found.append(_failure(model, event))
        elif isinstance(event, Took) and event.case.workload == "memory":
            found += _memory(model, event)
    return found


def _of_trials(
    model: str, engine: str, trials: Sequence[Trial], others: Sequence[Trial]
) -> list[Record]:
    case, names = trials[0].case, list(trials[0].figures)
    theirs = {trial.turn: trial.figures for trial in others}
    found = []
    for name in names:
        each = [trial.figures[name] for trial in trials]
        detail = described(model, case, engine) | {
            "each": [float(f"{x:.6g}") for x in each],
            "spread": round(spread(each), 4),
        }
        pairs = [
            (trial.figures[name], theirs[trial.turn][name])
            for trial in trials
            if trial.turn in theirs
        ]
        if pairs and all(a and b for a, b in pairs):
            detail["over_reference"] = round(statistics.median(a / b for a, b in pairs), 4)
        if compiled := sum(trial.compiled for trial in trials):
            detail["compiled_while_timed"] = compiled
        if case.work.get("of") == name:
            detail |= {k: v for k, v in case.work.items() if k != "of"}
        if HEADLINES.get(case.workload) == name:
            seen: list[Stream] = [one for trial in trials for one in trial.seen]
            detail["itl_quantiles_ms"] = serving.itl_quantiles(seen)
        value = statistics.median(each)
        found.append(Record(f"{stem(model, case, engine)}.{name}", value, cases.unit(name), detail))
    return found


def _agreement(
    model: str, engine: str, trials: Sequence[Trial], others: Sequence[Trial], exact: bool
) -> list[Record]:
    """`.agree`: share of tokens before the first that differs from the reference's."""
    theirs = {trial.turn: trial.outputs for trial in others}
    pairs = [
        cases.agreement(trial.outputs, theirs[trial.turn])
        for trial in trials
        if trial.turn in theirs
    ]
    if not pairs:
        return []
    share, first = (statistics.fmean(each) for each in zip(*pairs, strict=True))
    detail = described(model, trials[0].case, engine) | {"first_token": round(first, 4)}
    name = f"{stem(model, trials[0].case, engine)}.agree"
    error = f"only {share:.3f} of the tokens agree" if exact and share < CERTAIN else None
    return [Record(name, round(share, 4), "ratio", detail, error)]


def _failure(model: str, failure: Failure) -> Record:
    """What could not run is a figure, 0; what went wrong is a failed part."""
    case = failure.case
    name = (
        f"compare.{model}.{failure.engine}" if case is None else stem(model, case, failure.engine)
    )
    detail: dict[str, Any] = {"engine": failure.engine, "why": failure.error}
    if case is not None:
        detail |= described(model, case, failure.engine)
    if failure.missing:
        return Record(f"{name}.runs", 0, "", detail)
    return Record(f"{name}.failed", None, "", detail | {"output_tail": failure.tail}, failure.error)


def _memory(model: str, took: Took) -> list[Record]:
    detail = described(model, took.case, took.engine) | {"versions": took.versions}
    return [
        Record(f"{stem(model, took.case, took.engine)}.{name}_bytes", value, "bytes", detail)
        for name, value in took.memory._asdict().items()
        if value is not None
    ]


def over_hf(records: Sequence[Record]) -> list[Record]:
    """`throughput.MODEL.over_hf_continuous` of the list's beginning, as `bars.toml` has it."""
    rates = {r.name: r.value for r in records if r.name.endswith(".out_tok_s") and r.value}
    found = []
    for name, theirs in rates.items():
        ours = name.replace(".hf-continuous.", ".jaxinfer.")
        if f".throughput.{BAR_CASE}.hf-continuous." in name and ours in rates:
            ratio = rates[ours] / theirs
            bar = f"throughput.{name.split('.')[1]}.over_hf_continuous"
            found.append(Record(bar, ratio, "ratio", {ours: rates[ours], name: theirs}))
    return found


def shares(records: Sequence[Record], ceilings: Mapping[str, float]) -> list[Record]:
    """`.mfu` of every time with FLOPs behind it, over this run's matmul ceiling."""
    most = ceilings.get("bf16_matmul_flops_per_s")
    return [
        Record(
            f"{r.name.rpartition('.')[0]}.mfu",
            round(r.detail["flops"] / (r.value / 1000) / most, 4),
            "ratio",
            {k: r.detail[k] for k in ("model", "workload", "case", "engine")},
        )
        for r in records
        if most and r.value and "flops" in r.detail and r.detail["workload"] == "prefill"
    ]
