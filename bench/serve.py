"""Latency under Poisson arrivals through `AsyncLLM`, as its clients see it, in one asyncio loop.

    python -m bench.serve --shape llama-3.1-8b --rate 16

TTFT counts from when the request was due. ITL is the gap between tokens that follow each other: a
Delta with n tokens is one gap and n − 1 of nothing. TPOT is the time from the first token to the
last over the tokens between, of each request. Nothing else runs; the LLM is idle before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from bench import measuring, start, workloads
from bench.measuring import Measurement, Setup
from bench.record import Record
from bench.serving import Stream, percentile
from bench.workloads import Workload

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

SEED = 300


class Lent:
    """An LLM that `AsyncLLM` may use, and not close."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def close(self) -> None:
        """Does nothing."""


async def serve(llm: LLM, load: Workload, due: Sequence[float]) -> list[Stream]:
    """Sends each request when it is due, and notes when its tokens come."""
    from jaxinfer import AsyncLLM

    async with AsyncLLM(cast("LLM", Lent(llm))) as server:
        began = time.perf_counter()

        async def client(at: float, prompt: list[int], params: Any) -> Stream:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            times, counts = [], []
            async for delta in server.generate(prompt, params):
                if delta.token_ids:
                    times.append(time.perf_counter() - began)
                    counts.append(len(delta.token_ids))
            if sum(counts) != params.max_tokens:
                raise RuntimeError(f"{sum(counts)} tokens came, not {params.max_tokens}")
            return Stream(at, tuple(times), tuple(counts))

        clients = zip(due, load.prompts, load.params, strict=True)
        return await asyncio.gather(*(client(*each) for each in clients))


def records(stem: str, seen: Sequence[Stream], detail: dict) -> list[Record]:
    """`.ttft_p50_ms`, `.ttft_p99_ms`, `.itl_p99_ms`, `.tpot_p50_ms`."""
    ttft = [gap.ttft for gap in seen]
    itl = [gap for one in seen for gap in one.itl]
    tpot = [one for gap in seen if (one := gap.tpot) is not None]
    detail = {
        **detail,
        "requests": len(seen),
        "output_tokens": sum(sum(gap.counts) for gap in seen),
        "last_token_s": max(gap.times[-1] for gap in seen),
        "ttft_max_ms": 1000 * max(ttft),
        "itl_p50_ms": percentile(itl, 50),
        "itl_max_ms": 1000 * max(itl),
        # Between Deltas only, where several tokens come at once.
        "delta_gap_p99_ms": percentile([gap for gap in itl if gap], 99),
    }
    figures = [("ttft", 50, ttft), ("ttft", 99, ttft), ("itl", 99, itl), ("tpot", 50, tpot)]
    return [
        Record(f"{stem}.{name}_p{p}_ms", percentile(values, p), "ms", detail)
        for name, p, values in figures
    ]


def measure(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`serve.8b.16rps.*`."""
    due = workloads.arrivals(setup.rate, setup.scale.serve_seconds)

    def once(i: int) -> list[Stream]:
        load = workloads.lognormal(setup.scale, llm.config.vocab_size, SEED + i)
        times = len(due) // len(load.prompts) + 1  # the list again, should it be too short
        load = Workload(load.prompts * times, load.tokens * times).first(len(due))
        return asyncio.run(serve(llm, load, due))

    seen, runs = start.until_warm(llm, once)
    detail = {**setup.detail, **runs, "rate": setup.rate}
    yield from records(f"serve.{setup.name}.{setup.rate:g}rps", seen, detail)


MEASUREMENTS = {"serve": Measurement(measure, 200.0, options=workloads.for_latency)}


if __name__ == "__main__":
    measuring.main("bench.serve", MEASUREMENTS)
