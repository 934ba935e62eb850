"""Decode steps at a batch of 64: what the host adds to them, and what sampling does.

    python -m bench.steady --measure steady,sampled --shape llama-3.1-8b

`steady`: wall time of a step through `generate`, over that of the same compiled steps run again
without the host between. `sampled`: with temperature, top-k and top-p, different for each request,
over greedy. A step is timed as in `bench.timing`, by calls of few and of many tokens, which take
turns; medians.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from bench import inside, measuring, start, workloads
from bench.measuring import Measurement, Setup
from bench.record import Record
from jaxinfer.types import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

SEED = 500
REPLAYS = 2

Prompts = tuple[list[int], ...]


def seconds(llm: LLM, prompts: Prompts, params: Sequence[SamplingParams]) -> float:
    """Of one `generate` call."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    took = time.perf_counter() - began
    if any(
        len(out.outputs[0].token_ids) != p.max_tokens
        for out, p in zip(outputs, params, strict=True)
    ):
        raise RuntimeError("generate did not return the tokens asked for, for every prompt")
    return took


def greedy(n: int, tokens: int) -> list[SamplingParams]:
    """For `n` requests."""
    return [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)] * n


def sampled(n: int, tokens: int) -> list[SamplingParams]:
    """For `n` requests, around temperature 0.8, top-k 50 and top-p 0.9; no two are alike."""
    return [
        SamplingParams(
            temperature=0.6 + 0.4 * i / n, top_k=30 + 40 * i // n, top_p=0.85 + 0.1 * i / n,
            seed=i, max_tokens=tokens, ignore_eos=True,
        )
        for i in range(n)
    ]  # fmt: skip


def ms_per_step(
    timed: Callable[[Prompts, int], float], setup: Setup, draw: Callable[[], Prompts]
) -> float:
    """From a call of few tokens and one of many, each of `timed(prompts, tokens)` in seconds. Each
    draws prompts that were never read: a call that finds some in the cache would be too short."""
    short, long = setup.scale.short, setup.scale.long
    less, more = timed(draw(), short), timed(draw(), long)
    return 1000 * (more - less) / (long - short)


def drawing(llm: LLM, seed: int, batch: int, context: int) -> Callable[[], Prompts]:
    """Other prompts at every call."""
    seeds = itertools.count(1000 * seed)
    lengths, vocab_size = [context] * batch, llm.config.vocab_size
    return lambda: workloads.random_ids(next(seeds), lengths, vocab_size)


def measure_steady(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`steady.8b.b64.wall_ms`, `.device_ms`, `.wall_over_device`."""
    batch, context = setup.scale.steady
    stem = f"steady.{setup.name}.b{batch}"

    def wall(prompts: Prompts, tokens: int) -> float:
        return seconds(llm, prompts, greedy(batch, tokens))

    draw = drawing(llm, SEED, batch, context)
    ms_per_step(wall, setup, draw)  # compiles
    walls = [ms_per_step(wall, setup, draw) for _ in range(setup.repeats)]
    detail = {"context": context, "tokens": [setup.scale.short, setup.scale.long]}
    whole = statistics.median(walls)
    yield Record(f"{stem}.wall_ms", whole, "ms", {**setup.detail, **detail, "each": walls})

    def device(prompts: Prompts, tokens: int) -> float:
        return inside.device_seconds(llm, list(prompts), tokens)

    devices = [ms_per_step(device, setup, draw) for _ in range(REPLAYS)]
    alone = statistics.median(devices)
    yield Record(f"{stem}.device_ms", alone, "ms", {**detail, "each": devices})
    yield Record(f"{stem}.wall_over_device", whole / alone, "ratio", detail)


def measure_sampled(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`sampled.8b.b64.over_greedy`."""
    batch, context = setup.scale.sampled
    kinds = {"greedy": greedy, "sampled": sampled}
    draw = drawing(llm, SEED + 100, batch, context)

    def once(turn: int) -> list[float]:
        order = list(kinds.values())[:: 1 if turn % 2 else -1]  # neither always comes first
        by = {
            params: ms_per_step(lambda p, n, f=params: seconds(llm, p, f(batch, n)), setup, draw)
            for params in order
        }
        return [by[params] for params in kinds.values()]

    once(0)  # compiles
    before = llm.engine.compiler.count
    each = [once(1 + i) for i in range(setup.repeats)]
    ms = dict(zip(kinds, map(statistics.median, zip(*each, strict=True)), strict=True))
    detail = {
        **setup.detail,
        "context": context,
        "ms_per_step": ms,
        "each": each,
        "compiled_while_timed": llm.engine.compiler.count - before,
    }
    name = f"sampled.{setup.name}.b{batch}.over_greedy"
    yield Record(name, ms["sampled"] / ms["greedy"], "ratio", detail)


MEASUREMENTS = {
    "steady": Measurement(measure_steady, 120.0, options=workloads.for_latency),
    "sampled": Measurement(
        measure_sampled, 90.0, (start.GREEDY, start.SAMPLED), workloads.for_latency
    ),
}


if __name__ == "__main__":
    measuring.main("bench.steady", MEASUREMENTS)
