"""What `bench.compare` asks of engines: request lists by workload, and figures of what came back.

Pure functions of sizes and seeds. A case is measured several times, each with prompts of its own,
so that nothing is found in a cache but what the case itself repeats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from bench import serving, timing, workloads
from bench.engines import ARRIVALS, QUANTISED, RAGGED, SPECULATIVE, Output, Request
from bench.serving import Stream, stream
from bench.sizes import Model, Sizes
from bench.workloads import Prompt

Calls = list[list[Request]]
Figures = dict[str, float]

UNITS = {
    "ms_per_step": "ms", "_ms": "ms", "tok_s": "tok/s", "req_s": "req/s", "_s": "s",
    "_bytes": "bytes", "agree": "ratio", "mfu": "ratio",
}  # fmt: skip
BRIEF = 16  # tokens of a call of which nothing is timed
PREFIX, SUFFIX = 2000, 128  # tokens that all prompts of `prefix_repetition` begin with; at most own


@dataclass(frozen=True)
class Got:
    """Of one call: its outputs, and how long it took."""

    outputs: Sequence[Output]
    seconds: float


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        workload, name: in the names of records.
        draw: a seed to requests of one or more calls, which follow one another.
        measure: those requests and what came of them to figures by name.
        needs: what an engine must be able to do.
        work: bytes and FLOPs behind the figure `of`, for ceilings.
        detail: sizes, for the record.
    """

    workload: str
    name: str
    draw: Callable[[int], Calls]
    measure: Callable[[Calls, Sequence[Got]], Figures]
    needs: frozenset[str] = frozenset()
    work: dict[str, Any] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

    def tokens(self) -> list[list[int]]:
        """Of each request of each call, prompt and output."""
        return [[len(r.prompt) + r.max_tokens for r in call] for call in self.draw(0)]


def unit(figure: str) -> str:
    """Of a figure, by the end of its name."""
    return next((u for end, u in UNITS.items() if figure.endswith(end)), "")


def brief(calls: Calls) -> Calls:
    """The first call alone, all of it there at once and to BRIEF tokens each: enough to compile,
    and to make caches, of the sizes that it has."""
    return [[
        r._replace(max_tokens=min(r.max_tokens, BRIEF), due=0.0,
                   room=max(r.room, len(r.prompt) + r.max_tokens))
        for r in calls[0]
    ]]  # fmt: skip


def fixed(seed: int, batch: int, prompt: int, new: int, vocab_size: int) -> list[Request]:
    """Requests of random ids, all as long."""
    ids = workloads.random_ids(seed, [prompt] * batch, vocab_size)
    return [Request(p, new) for p in ids]


# -- latency, prefill --------------------------------------------------------------------------


def latency(model: Model, batch: int, prompt: int, lengths: tuple[int, int]) -> Case:
    """A decode step as the slope between a short call and a long one, and the time to the first
    token of the long one."""
    short, long = lengths

    def draw(seed: int) -> Calls:
        return [
            [r._replace(room=prompt + long)
             for r in fixed(2 * seed + i, batch, prompt, n, model.vocab_size)]
            for i, n in enumerate(lengths)
        ]  # fmt: skip

    def measure(calls: Calls, got: Sequence[Got]) -> Figures:
        step = (got[1].seconds - got[0].seconds) / (long - short)
        first = statistics.median(out.times[0] for out in got[1].outputs)
        if step <= 0:
            raise ValueError(f"{long} tokens took no longer than {short}: use longer outputs")
        return {"ms_per_step": 1000 * step, "tok_s": batch / step, "ttft_ms": 1000 * first}

    context = prompt + (short + long) // 2
    moved = timing.config_bytes(model.config, model.weight_bytes, batch, context, model.width)
    flops = timing.config_flops(model.config, batch, batch, batch * context)
    return Case(
        "latency", f"b{batch}.in{prompt}", draw, measure,
        work={"of": "ms_per_step", "bytes_per_step": moved, "flops": flops},
        detail={"batch": batch, "input_len": prompt, "output_lens": list(lengths)},
    )  # fmt: skip


def prefill(model: Model, prompt: int) -> Case:
    """One prompt, read to its first token."""

    def measure(calls: Calls, got: Sequence[Got]) -> Figures:
        return {"ttft_ms": 1000 * got[0].seconds, "in_tok_s": prompt / got[0].seconds}

    flops = timing.config_flops(model.config, prompt, 1, prompt * (prompt + 1) // 2)
    moved = timing.config_bytes(model.config, model.weight_bytes, 1, prompt, model.width)
    return Case(
        "prefill", f"in{prompt}", lambda seed: [fixed(seed, 1, prompt, 1, model.vocab_size)],
        measure, work={"of": "ttft_ms", "bytes_at_least": moved, "flops": flops},
        detail={"input_len": prompt},
    )  # fmt: skip


# -- throughput, serve -------------------------------------------------------------------------


def listed(model: Model, dataset: str, sizes: Sizes, seed: int) -> list[Request]:
    """The requests of a dataset, `sizes.num_prompts` of them.

    Raises:
        ValueError: no such dataset.
    """
    n, vocab = sizes.num_prompts, model.vocab_size
    kind, _, rest = dataset.partition(":")
    if kind == "random" and all(x.isdecimal() and int(x) for x in rest.split(":")):
        prompt, new = map(int, rest.split(":"))
        return fixed(seed, n, prompt, new, vocab)
    scale = replace(
        workloads.FULL, requests=min(n, workloads.FULL.requests), shrink=sizes.shrink,
        prefix=PREFIX // sizes.shrink, suffix=max(1, SUFFIX // sizes.shrink), prefix_requests=n,
        prefix_tokens=max(2, workloads.FULL.prefix_tokens // sizes.shrink),
    )  # fmt: skip
    if dataset == "lognormal":
        load = workloads.lognormal(scale, vocab, seed)
    elif dataset == "prefix_repetition":
        load = workloads.shared_prefix(scale, vocab, 3 * seed)
    else:
        raise ValueError(
            f"dataset {dataset!r}: expected lognormal, prefix_repetition or random:INPUT:OUTPUT"
        )
    return [Request(p, m) for p, m in zip(load.prompts, load.tokens, strict=True)]


def streams(calls: Calls, got: Sequence[Got]) -> list[Stream]:
    """What the clients of all calls saw."""
    return [
        stream(r.due, out.times)
        for call, one in zip(calls, got, strict=True)
        for r, out in zip(call, one.outputs, strict=True)
    ]


def throughput(model: Model, dataset: str, sizes: Sizes) -> Case:
    """All requests at once; tokens over the time of the whole call."""

    def measure(calls: Calls, got: Sequence[Got]) -> Figures:
        ((call,), (one,)) = calls, got
        new, read = sum(r.max_tokens for r in call), sum(len(r.prompt) for r in call)
        return {
            "out_tok_s": new / one.seconds,
            "total_tok_s": (new + read) / one.seconds,
            "req_s": len(call) / one.seconds,
        }

    def draw(seed: int) -> Calls:
        return [listed(model, dataset, sizes, seed)]

    equal = dataset.startswith("random:")
    name = f"{dataset.removeprefix('random:').replace(':', 'x')}-{sizes.num_prompts}"
    return Case(
        "throughput", name, draw, measure, frozenset() if equal else frozenset({RAGGED}),
        detail={"dataset": dataset, "num_prompts": sizes.num_prompts},
    )  # fmt: skip


def serve(model: Model, sizes: Sizes, rate: float, burstiness: float) -> Case:
    """The lognormal list, as requests arrive; the same times at every repeat."""
    arrive = partial(workloads.gamma_arrivals, rate=rate, burstiness=burstiness)

    def draw(seed: int) -> Calls:
        requests = listed(model, "lognormal", sizes, seed)
        due = arrive(len(requests))
        return [[r._replace(due=at) for r, at in zip(requests, due, strict=True)]]

    def measure(calls: Calls, got: Sequence[Got]) -> Figures:
        seen, seconds = streams(calls, got), got[0].seconds
        by = {
            "ttft": [one.ttft for one in seen],
            "itl": [gap for one in seen for gap in one.itl],
            "tpot": [x for one in seen if (x := one.tpot) is not None],
        }
        found = {
            f"{name}_p{p}_ms": serving.percentile(values, p)
            for name, values in by.items()
            for p in (50, 99)
        }
        found["out_tok_s"] = sum(r.max_tokens for r in calls[0]) / seconds
        return found | {"goodput_req_s": serving.goodput(seen, sizes.goodput, seconds)}

    kind = "poisson" if burstiness == 1 else f"burst{burstiness:g}".replace(".", "_")
    detail = {"request_rate": rate, "burstiness": burstiness, "goodput": dict(sizes.goodput)}
    return Case(
        "serve", f"{rate:g}rps.{kind}".replace(".", "-"), draw, measure,
        frozenset({RAGGED, ARRIVALS}), detail=detail | {"num_prompts": sizes.num_prompts},
    )  # fmt: skip


# -- others ------------------------------------------------------------------------------------


def memory(model: Model, sizes: Sizes) -> Case:
    """A small batch, run before the engine is asked for its memory."""
    batch, prompt = min(8, max(sizes.batch_sizes)), min(1024, max(sizes.input_lens))
    return Case(
        "memory", f"b{batch}.in{prompt}",
        lambda seed: [fixed(seed, batch, prompt, sizes.output_lens[0], model.vocab_size)],
        lambda calls, got: {}, detail={"batch": batch, "input_len": prompt},
    )  # fmt: skip


def speculative(model: Model, sizes: Sizes, kind: str) -> Case:
    """One request, whose prompt says the same twice: a token's time, as a slope. `kind`: what
    guesses, in the name; `plain` where nothing does."""
    prompt = min(512, max(sizes.input_lens)) // 2
    base = latency(model, 1, prompt, sizes.output_lens)

    def twice(request: Request) -> Request:
        ids: Prompt = request.prompt
        return request._replace(prompt=ids + ids, room=0)

    return replace(
        base, workload="speculative", name=kind, work={}, needs=frozenset({SPECULATIVE}),
        draw=lambda seed: [[twice(r) for r in call] for call in base.draw(seed)],
        detail={"input_len": 2 * prompt, "prompt": "random ids, twice"},
    )  # fmt: skip


def of_workload(workload: str, model: Model, sizes: Sizes) -> list[Case]:
    """All cases of `latency`, `prefill`, `throughput`, `serve`, `memory` or `quantised`."""
    pairs = [(b, n) for b in sizes.batch_sizes for n in sizes.input_lens]
    match workload:
        case "latency":
            return [latency(model, b, n, sizes.output_lens) for b, n in pairs]
        case "quantised":
            return [
                replace(latency(model, b, n, sizes.output_lens), workload="quantised",
                        needs=frozenset({QUANTISED}))
                for b, n in pairs
            ]  # fmt: skip
        case "prefill":
            return [prefill(model, n) for n in sizes.prefill_lens]
        case "throughput":
            return [throughput(model, dataset, sizes) for dataset in sizes.datasets]
        case "serve":
            return [
                serve(model, sizes, r, b) for r in sizes.request_rates for b in sizes.burstiness
            ]
        case "memory":
            return [memory(model, sizes)]
    raise ValueError(f"workload {workload!r}")


def agreement(ours: Sequence[Output], theirs: Sequence[Output]) -> tuple[float, float]:
    """Of two engines' greedy outputs: share of tokens before the first that differs, and share of
    requests whose first token is the same."""
    shares, firsts = [], []
    for a, b in zip(ours, theirs, strict=True):
        same = np.equal(a.tokens, b.tokens)
        shares.append(1.0 if same.all() else int(same.argmin()) / len(same))
        firsts.append(bool(same[0]))
    return statistics.fmean(shares), statistics.fmean(firsts)


def concurrent_tokens(cases: Sequence[Case], max_num_seqs: int) -> int:
    """Most tokens that requests which run at once can hold."""
    return max(sum(sorted(c, reverse=True)[:max_num_seqs]) for case in cases for c in case.tokens())


def rows(cases: Sequence[Case], most: float = math.inf) -> int:
    """Requests that run at once, at most."""
    return int(min(most, max(len(call) for case in cases for call in case.tokens())))


def longest(cases: Sequence[Case]) -> int:
    """Tokens of the longest request."""
    return max(n for case in cases for call in case.tokens() for n in call)
