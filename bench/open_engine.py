"""What looking into the model costs: captured activations, steering, scoring, and new weights.

    python -m bench.open_engine --shape llama-3.1-8b
    python -m bench.open_engine --shape demo --measure capture

`capture`: `generate` with every residual stream returned, over without. `steering`: a decode step
at batch 1 with a vector added at one site, over a step without. `logprobs`: scoring of many
sequences, its speed over that of reading them as prompts, and what memory it takes beside.
`update`: other weights, which lie on the device, put in the place of the LLM's. Pairs take turns;
medians.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bench import measuring, workloads
from bench.measuring import Measurement, Setup
from bench.record import Record
from bench.steady import drawing, greedy, ms_per_step

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

SEED = 900
RESIDUALS = ("layers.*.resid",)
UPDATES = 3


def measure_capture(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`capture.demo.over_plain`, of whole `generate` calls."""
    batch, context = setup.scale.steady
    draw, params = drawing(llm, SEED, batch, context), greedy(batch, setup.scale.long)

    def timed(capture: Sequence[str]) -> float:
        return _seconds(lambda: llm.generate(draw(), params, capture=capture))

    found = in_turns(
        setup.repeats, {"plain": lambda: timed(()), "capture": lambda: timed(RESIDUALS)}
    )
    detail = {
        **setup.detail,
        "batch": batch,
        "prompt": context,
        "tokens": setup.scale.long,
        **found,
    }
    ratio = found["capture"]["median"] / found["plain"]["median"]
    yield Record(f"capture.{setup.name}.over_plain", ratio, "ratio", detail)


def measure_steering(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`steering.8b.b1.over_plain`, of decode steps."""
    import jax
    import numpy as np

    from jaxinfer import Intervention

    def add(where: Any, x: jax.Array, aux: Any) -> jax.Array:
        return x + aux["vector"].astype(x.dtype)

    context, config = setup.scale.steady[1], llm.config
    vector = np.random.default_rng(SEED).normal(size=config.hidden_size).astype(np.float32)
    site = f"layers.{config.num_layers // 2}.resid"
    steer = Intervention(add, (site,), {"vector": 0.01 * vector})
    draw = drawing(llm, SEED + 1, 1, context)

    def step(intervene: Intervention | None) -> float:
        def timed(prompts: Any, tokens: int) -> float:
            params = greedy(1, tokens)
            return _seconds(lambda: llm.generate(prompts, params, intervene=intervene))

        return ms_per_step(timed, setup, draw)

    found = in_turns(setup.repeats, {"plain": lambda: step(None), "steered": lambda: step(steer)})
    detail = {**setup.detail, "context": context, "site": site, **found}
    ratio = found["steered"]["median"] / found["plain"]["median"]
    yield Record(f"steering.{setup.name}.b1.over_plain", ratio, "ratio", detail)


def measure_logprobs(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`logprobs.8b.tok_s`, `.over_prefill`, and on a GPU `.extra_bytes`."""
    count, length = setup.scale.scored
    seeds = itertools.count(SEED + 100)
    params = greedy(count, 1)

    def draw() -> Sequence[list[int]]:
        return workloads.random_ids(next(seeds), [length] * count, llm.config.vocab_size)

    def prefill() -> float:
        prompts = draw()
        return _seconds(lambda: llm.generate(prompts, params))

    def score() -> float:
        sequences = draw()
        return _seconds(lambda: llm.logprobs(sequences))

    prefill()
    before = _peak()
    score()
    after = _peak()
    found = in_turns(setup.repeats, {"prefill": prefill, "logprobs": score}, warm=True)
    stem, rate = f"logprobs.{setup.name}", count * length / found["logprobs"]["median"]
    detail = {**setup.detail, "sequences": count, "tokens": length, **found}
    yield Record(f"{stem}.tok_s", rate, "tok/s", detail)
    ratio = found["prefill"]["median"] / found["logprobs"]["median"]
    yield Record(f"{stem}.over_prefill", ratio, "ratio", detail)
    if before is not None and after is not None:
        yield Record(f"{stem}.extra_bytes", after - before, "bytes", {"peak_of_prefill": before})


def measure_update(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`update_params.8b.s`, and what was compiled for it."""
    import jax

    prompts, params = drawing(llm, SEED + 2, 1, 32)(), greedy(1, 4)
    llm.generate(prompts, params)
    copied, each = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree)), []
    before = llm.engine.compiler.count
    for _ in range(UPDATES):
        new = jax.block_until_ready(copied(llm.params))
        each.append(_seconds(lambda new=new: llm.update_params(new)))
        del new
        llm.generate(prompts, params)
    detail = {"each": each, "compiled": llm.engine.compiler.count - before}
    yield Record(f"update_params.{setup.name}.s", statistics.median(each), "s", detail)


def in_turns(
    repeats: int, timed: dict[str, Callable[[], float]], *, warm: bool = False
) -> dict[str, dict[str, Any]]:
    """Each of `timed` once to compile, unless `warm`, then `repeats` times in turns whose order
    alternates: by name the median, and each."""
    for run in () if warm else timed.values():
        run()
    each: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(repeats):
        for name in list(timed)[:: 1 if turn % 2 else -1]:
            each[name].append(timed[name]())
    return {name: {"median": statistics.median(x), "each": x} for name, x in each.items()}


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _peak() -> int | None:
    """Most bytes of device memory that were in use so far; None where the device does not say."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


MEASUREMENTS = {
    "capture": Measurement(measure_capture, 90.0, options=workloads.for_scoring),
    "steering": Measurement(measure_steering, 90.0, options=workloads.for_scoring),
    "logprobs": Measurement(measure_logprobs, 200.0, options=workloads.for_scoring),
    "update": Measurement(measure_update, 60.0, options=workloads.for_scoring),
}


if __name__ == "__main__":
    measuring.main("bench.open_engine", MEASUREMENTS)
