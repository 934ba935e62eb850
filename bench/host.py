"""What the scheduler costs the host: `batcher.step` with 256 sequences running and 1000 waiting.

    python -m bench.host

Nothing is run on a device. `steady`: nothing happened since the step before. `admission`: one
sequence has ended, and the head of the queue takes its place.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import parts, record
from bench.parts import Part, emit
from bench.record import Record

RUNNING, WAITING, TIMES = 256, 1000, 300
PROMPT, LIMIT = 250, 4000

Step = Callable[[Any, tuple[Any, ...], Any], tuple[Any, tuple[Any, ...]]]


def measure(
    step: Step, state: Any, events: Iterable[tuple[Any, ...]], config: Any
) -> tuple[list[float], Any]:
    """Milliseconds of each of several steps that follow one another, and the state after them.

    Args:
        step: `(state, events, config) -> (state, actions)`.
        state: before the first.
        events: of each step.
        config: of all.
    """
    took = []
    for some in events:
        began = time.perf_counter()
        state, _ = step(state, some, config)
        took.append(1000 * (time.perf_counter() - began))
    return took, state


def scenario(running: int, waiting: int) -> tuple[Step, Any, Any]:
    """The scheduler's step, a state in which `running` decode and `waiting` wait, its config."""
    from jaxinfer import batcher
    from jaxinfer.config import BatcherConfig
    from jaxinfer.pages import page_keys

    config = BatcherConfig(
        num_pages=running * (LIMIT // 64 + 1) * 2,
        page_size=64,
        max_num_seqs=running,
        max_model_len=LIMIT,
    )
    n = running + waiting
    ids, rng = np.arange(n), np.random.default_rng(0)
    keys = [page_keys(rng.integers(0, 1 << 17, PROMPT).astype(np.int32), 64) for _ in range(n)]
    submit = batcher.Submit(
        ids, np.full(n, PROMPT), np.full(n, LIMIT), ids.copy(), batcher.objects(keys)
    )
    state, actions = batcher.step(batcher.create_state(config), (submit,), config)
    while any(isinstance(a, batcher.Run) and a.chunks for a in actions):
        state, actions = batcher.step(state, (), config)
    if np.count_nonzero(state.rows.id >= 0) != running:
        raise RuntimeError(f"{np.count_nonzero(state.rows.id >= 0)} run, not {running}")
    return batcher.step, state, config


def ended(ids: Sequence[int]) -> list[tuple[Any, ...]]:
    """Events of as many steps: one sequence has ended in each, and leaves nothing to be found."""
    from jaxinfer import batcher

    none = np.empty((0, 2), np.uint64)
    return [(batcher.Finished(np.array([i]), batcher.objects([none])),) for i in ids]


def records(running: int = RUNNING, waiting: int = WAITING, times: int = TIMES) -> list[Record]:
    """`host.batcher.steady_ms` and `host.batcher.admission_ms`: medians."""
    step, state, config = scenario(running, waiting)
    # The running ones end one after the other; the step that admits the next reads its prompt.
    events = {"steady": [()] * times, "admission": ended(range(min(running, waiting, times)))}
    found = []
    for name, some in events.items():
        took, _ = measure(step, state, some, config)
        detail = {
            "running": running,
            "waiting": waiting,
            "steps": len(took),
            "p99_ms": float(np.percentile(took, 99)),
            "max_ms": max(took),
        }
        found.append(Record(f"host.batcher.{name}_ms", statistics.median(took), "ms", detail))
    return found


def make_parts() -> list[Part]:
    """One process."""
    return [Part("host", "bench.host", ("--part",), 120)]


def main() -> None:
    parser = argparse.ArgumentParser(description="what the scheduler costs the host")
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        for found in records():
            emit(args.records, found)
        return
    run = record.start(parts.command_line("bench.host"))
    run = parts.run_parts(make_parts(), run, record.path_for(run, "host", args.out))
    parts.print_table(run)


if __name__ == "__main__":
    main()
