"""Several engines as one, without devices: who is begun, who is read, who has which sequence."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.observe import Update
from jaxinfer.plans import SequenceSpec
from jaxinfer.replicas import Replicas
from jaxinfer.types import SamplingParams

LIMITS = SimpleNamespace(num_pages=64, host_slots=0, page_size=8, prefix_caching=True)
AHEAD = 2


class Clock:
    """Goes on when somebody looks for results, and so while the host waits."""

    now = 0


class Fake:
    """An engine whose dispatches take so many looks each, one after the other."""

    def __init__(self, clock: Clock, times: list[int]) -> None:
        self.limits, self.clock = LIMITS, clock
        self.todo, self.under_way = list(times), []
        self.done: list[int] = []
        self.specs: dict[int, SequenceSpec] = {}
        self.updates: list[Update] = []

    @property
    def in_flight(self) -> int:
        return len(self.under_way)

    @property
    def ready(self) -> bool:
        self.clock.now += 1
        return bool(self.under_way) and self.under_way[0] <= self.clock.now

    def fill(self) -> None:
        while self.todo and len(self.under_way) < AHEAD:
            begin = max([self.clock.now, *self.under_way[-1:]])
            self.under_way.append(begin + self.todo.pop(0))

    def read(self) -> list[Update]:
        self.done.append(self.under_way.pop(0))
        updates, self.updates = self.updates, []
        return updates

    def submit(self, specs: list[SequenceSpec], ids: list[int]) -> list[int]:
        self.specs |= dict(zip(ids, specs, strict=True))
        return ids

    def cancel(self, sequence: int, *, complete: bool = False) -> None:
        del self.specs[sequence]


def make(*times: list[int]) -> tuple[Any, list[Fake]]:
    clock = Clock()
    engines = [Fake(clock, some) for some in times]
    return Replicas(engines), engines  # type: ignore[arg-type]


@given(times=st.lists(st.lists(st.integers(0, 40), max_size=12), min_size=1, max_size=4))
def test_nobody_is_waited_for_while_others_have_results_or_room(times):
    replicas, engines = make(*times)
    counts = [0] * len(engines)
    while any(engine.todo or engine.under_way for engine in engines):
        replicas.step()
        (read,) = (i for i, e in enumerate(engines) if len(e.done) > counts[i])
        others = [e for e in engines if e is not engines[read]]
        for engine in others:  # all were filled before anything was waited for
            assert not engine.todo or engine.in_flight == AHEAD
        now = engines[read].clock.now
        assert engines[read].done[-1] <= now or not any(e.under_way for e in others)
        counts = [len(e.done) for e in engines]
    assert counts == [len(some) for some in times]
    assert replicas.step() == []


def test_those_with_results_have_their_turns():
    replicas, engines = make([0] * 9, [0] * 9, [0] * 9)
    for turn in range(1, 28):
        replicas.step()
        assert [len(e.done) for e in engines] == [(turn + 2 - i) // 3 for i in range(3)]


def spec(prompt: list[int], sample: int = 0, limit: int = 20) -> SequenceSpec:
    return SequenceSpec(np.array(prompt, np.int32), SamplingParams(), limit, 0, sample=sample)


def test_samples_of_a_request_stay_together_and_others_are_shared_out():
    replicas, engines = make([], [])
    some = [spec([i], sample) for i in range(6) for sample in range(3)]
    assert replicas.submit(some) == list(range(18))
    assert [len(e.specs) for e in engines] == [9, 9]
    for engine in engines:
        owners = Counter(int(s.prompt[0]) for s in engine.specs.values())
        assert set(owners.values()) == {3}
        assert all(engine.specs[i] is some[i] for i in engine.specs)


def test_who_has_ended_counts_no_more():
    replicas, (one, other) = make([0], [])
    first, *_ = replicas.submit([spec([1], limit=100), spec([2]), spec([3]), spec([4])])
    assert list(one.specs) == [first]
    one.updates = [Update(first, [5], None, None, True)]
    assert replicas.step()[0].id == first
    replicas.cancel(first, complete=True)  # as an LLM does
    replicas.cancel(99)
    assert list(one.specs) == [first], "it had ended by itself"
    replicas.submit([spec([5], limit=61), spec([6])])
    assert len(one.specs) == 2, "one had nothing to do, and has more to do now"
    for i in list(other.specs):
        replicas.cancel(i)
    assert not other.specs
    assert [r.tokens for r in replicas._router.replicas] == [61, 0]


@pytest.mark.parametrize("caching", [True, False])
def test_a_beginning_is_followed_where_pages_are_shared(caching, monkeypatch):
    monkeypatch.setattr(LIMITS, "prefix_caching", caching)
    replicas, (one, _) = make([], [])
    replicas.submit([spec([*range(9)])])
    replicas.submit([spec([*range(8), 9])])
    assert len(one.specs) == (2 if caching else 1)
