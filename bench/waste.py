"""KV memory granted and not used, while the lognormal requests of `bench.throughput` run.

    python -m bench.waste --shape llama-3.1-8b --llm '{"page_size": 64}'

After every turn of the engine: (slots of granted pages − tokens in them) / slots; the mean of the
turns is reported, from the first to the last in which any page is granted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bench import inside, measuring, workloads
from bench.measuring import Measurement, Setup
from bench.record import Record

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

SEED = 200


def measure(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`waste.8b.page32`, by the LLM's page size."""
    load = workloads.lognormal(setup.scale, llm.config.vocab_size, SEED)
    requests = [
        llm.prepare(prompt, params)
        for prompt, params in zip(load.prompts, load.params, strict=True)
    ]
    seen = []
    llm.submit(requests)
    try:
        while not all(request.finished for request in requests):
            if failed := next((r.failed for r in requests if r.failed), None):
                raise failed
            llm.pump()
            seen.append(inside.waste(llm))
    finally:
        llm.cancel(requests)
    held, slots = np.array([turn for turn in seen if turn[1]], np.float64).T
    detail = {
        "turns": len(held),
        "ratio_of_sums": 1 - held.sum() / slots.sum(),
        "most_slots": slots.max(),
        "requests": len(requests),
        "memory_plan": str(llm.memory_plan),
    }
    name = f"waste.{setup.name}.page{llm.memory_plan.page_size}"
    yield Record(name, float(np.mean(1 - held / slots)), "ratio", detail)


MEASUREMENTS = {"waste": Measurement(measure, 90.0, policy="makespan")}


if __name__ == "__main__":
    measuring.main("bench.waste", MEASUREMENTS)
