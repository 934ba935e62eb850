"""What the benchmarks read from inside the engine. All that is not its public API is here."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.metrics import kv_tokens

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

PREEMPT = '"kind": "Preempt"'


def waste(llm: LLM) -> tuple[int, int]:
    """Tokens in the KV cache of the sequences that run, and the slots of the pages granted to them.

    A token counts once the step that computes it was dispatched; the newest of a sequence is not in
    the cache before the step after. A page that two rows share counts for both, and so do its
    tokens.
    """
    engine: Any = llm.engine
    state = engine._batcher
    return kv_tokens(state), int(state.rows.held.sum()) * llm.memory_plan.page_size


class Preemptions(io.TextIOBase):
    """An event log that is only counted: `count` sequences were preempted."""

    count = 0

    def write(self, text: str, /) -> int:
        self.count += text.count(PREEMPT)
        return len(text)


@contextmanager
def preemptions(llm: LLM) -> Iterator[Preemptions]:
    """Counts, from here on, what an event log would hold, for an LLM that was started without."""
    engine: Any = llm.engine
    log, before = Preemptions(), engine._log
    engine._log = log
    try:
        yield log
    finally:
        engine._log = before


def logged_preemptions(event_log: Path) -> int:
    """Sequences that the scheduler has preempted, by an LLM's event log."""
    with event_log.open() as file:
        return sum(line.count(PREEMPT) for line in file)


def device_seconds(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    """Seconds that the device alone takes for one `generate` call of these prompts.

    The call is made, and the steps that it dispatches are noted with their plans. Then the same
    compiled steps run again in the same order on a new cache, without the host between: each takes
    the cache and state that the one before it returns, and nothing is read before the end. As for
    the wall time, the difference of two such calls is what counts (`bench.timing`).

    Args:
        llm: idle. Its cache is made anew, twice.
        prompts: token ids.
        tokens: output tokens of each, greedy.
    """
    import jax

    from jaxinfer import SamplingParams

    engine: Any = llm.engine
    compiler, run = engine.compiler, engine.compiler.run
    calls: list[tuple[Any, Any]] = []

    def noted(key: Any, params: Any, cache: Any, seq: Any, plan: Any, tables: Any) -> Any:
        calls.append((key, plan))
        return run(key, params, cache, seq, plan, tables)

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    engine.reset()
    compiler.run = noted
    try:
        llm.generate(prompts, sampling)
    finally:
        compiler.run = run
    engine.reset()
    try:
        jax.block_until_ready((engine._cache, engine._seq, calls))
        began = time.perf_counter()
        for key, plan in calls:
            engine._cache, engine._seq, _ = run(
                key, engine._params, engine._cache, engine._seq, plan
            )
        jax.block_until_ready(engine._seq)
        return time.perf_counter() - began
    finally:
        engine.reset()
