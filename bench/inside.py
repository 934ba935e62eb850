"""What the benchmarks read from inside the engine. All that is not its public API is here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxinfer.llm import LLM


def waste(llm: LLM) -> tuple[int, int]:
    """Tokens in the KV cache of the sequences that run, and the slots of the pages granted to them.

    A token counts once the step that computes it was dispatched; the newest of a sequence is not in
    the cache before the step after. A page that two rows share counts for both, and so do its
    tokens.
    """
    state = llm.engine._batcher
    rows = state.rows
    read = rows.prefilled >= rows.prompt
    held = np.where(read, rows.prompt + np.maximum(rows.scheduled - 1, 0), rows.prefilled)
    pages = np.count_nonzero(state.pages, axis=1)
    return int(held[rows.id >= 0].sum()), int(pages.sum()) * llm.memory_plan.page_size


def preemptions(event_log: str | Path) -> int:
    """Sequences that the scheduler has preempted, by an LLM's event log."""
    with Path(event_log).open() as file:
        return sum(line.count('"kind": "Preempt"') for line in file)


def device_ms_per_step(llm: LLM, prompts: list[list[int]], repeats: int = 30) -> float:
    """Milliseconds that the device alone takes for one decode step of these prompts.

    The requests are begun until all of them decode; then the newest dispatch is run again,
    `repeats` times one after the other, without the host between: each waits for the one before it,
    whose cache and state it is given. Lengths grow as they do in generation. Nothing is left
    running, and the engine begins anew.

    Args:
        llm: with as many rows as there are prompts, and room for 32 · `repeats` more tokens.
        prompts: one for each row.
        repeats: dispatches timed, after as many that are not.
    """
    import time

    import jax

    from jaxinfer import SamplingParams

    engine: Any = llm.engine
    compiler, run = engine.compiler, engine.compiler.run
    calls: list[tuple[Any, Any]] = []

    def noted(key: Any, params: Any, cache: Any, seq: Any, plan: Any) -> Any:
        calls.append((key, plan))
        return run(key, params, cache, seq, plan)

    left = llm.memory_plan.max_model_len - max(map(len, prompts))
    sampling = SamplingParams(temperature=0, max_tokens=left, ignore_eos=True)
    requests = [llm.prepare(prompt, sampling) for prompt in prompts]
    compiler.run = noted
    try:
        llm.submit(requests)
        while any(not sample.tokens for r in requests for sample in r.samples) or (
            len(calls) < 2 or calls[-1][0] != calls[-2][0]
        ):
            llm.pump()
        compiler.run = run
        key, plan = calls[-1]
        steps = int(getattr(plan, "steps", 1))

        def replay() -> float:
            began = time.perf_counter()
            for _ in range(repeats):
                engine._cache, engine._seq, _ = run(
                    key, engine._params, engine._cache, engine._seq, plan
                )
            jax.block_until_ready(engine._seq)
            return time.perf_counter() - began

        replay()
        return 1000 * replay() / (repeats * steps)
    finally:
        compiler.run = run
        llm.cancel(requests)
        engine.reset()
