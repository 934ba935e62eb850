"""What the engine tells the controller of times."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxinfer.buckets import make_buckets
from jaxinfer.config import BatcherConfig, Speculative
from jaxinfer.controller import WARM, Costs
from jaxinfer.drafting import Drafter
from jaxinfer.guesser import Guesser

LIMITS = BatcherConfig(num_pages=9, page_size=8, max_num_seqs=8, max_model_len=64, max_guesses=2)
COSTS = Costs(1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0)


def seconds_after(results: Sequence[tuple[float, bool]]) -> float | None:
    """What a step without guesses is taken to need, after results of one step each, all under way:
    when each was read, and whether it was there before."""
    how = Speculative("lookup", tokens=2)
    guesser = Guesser(Drafter(how), LIMITS, make_buckets(LIMITS, gpu=False), COSTS)
    done: Any = SimpleNamespace(
        action=SimpleNamespace(guesses=0, chunks=()), key=SimpleNamespace(steps=1, rows=8),
        sampled=SimpleNamespace(attempted=None), guessed=np.zeros(0, bool), under_way=True,
    )  # fmt: skip
    for now, late in results:
        guesser.observed(done, now=now, late=late)
    seconds, count = guesser._control.times.get((8, 0), (0.0, 0))
    return seconds if count > WARM else None


def test_the_device_sets_the_pace() -> None:
    assert seconds_after([(float(i), False) for i in range(9)]) == 1


def test_what_is_read_late_makes_no_step_short() -> None:
    """Two results were there when the host came back; nobody knows when the second had begun."""
    hiccup = [(0.0, False), (1.0, False), (2.0, False), (6.0, True), (6.01, True)]
    for times in range(1, 9):
        results = [(now + 10 * i, late) for i in range(times) for now, late in hiccup]
        found = seconds_after([*results, (7.0 + 10 * times, False)])
        assert found is None or found >= 1


def test_a_host_that_is_always_late_sets_the_pace() -> None:
    assert seconds_after([(2.0 * i, True) for i in range(12)]) == pytest.approx(2)
