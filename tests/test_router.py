"""Requests to replicas: who gets what, whatever comes and ends in whatever order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import router
from jaxinfer.router import SLACK, Request

KEYS = 8  # that a replica's `recent` may hold
# Prompts that share beginnings: keys name all that comes before them.
prompts = st.lists(st.integers(0, 2), max_size=5).map(
    lambda path: [hash(tuple(path[: i + 1])) % 2**64 for i in range(len(path))]
)
requests = st.builds(Request, tokens=st.integers(1, 100), keys=prompts)
# A request comes, or one of those that run ends.
steps = st.lists(requests | st.integers(0, 30), max_size=60)


def run(count: int, steps: list[Any]) -> Iterator[tuple[Any, Any, int | None]]:
    """States before and after each step, and where the request was sent."""
    state, running = router.create(count, KEYS), []
    for step in steps:
        before, sent = state, None
        if isinstance(step, Request):
            state, sent = router.route(state, step)
            running.append((sent, step.tokens))
        elif running:
            state = router.ended(state, *running.pop(step % len(running)))
        yield before, state, sent
    for place in running:
        state = router.ended(state, *place)
    assert [r.tokens for r in state.replicas] == [0] * count


@given(count=st.integers(1, 4), steps=steps)
def test_load_decides_then_beginnings_then_order(count, steps):
    for step, (before, after, sent) in zip(steps, run(count, steps), strict=True):
        if sent is None:
            continue
        loads = [r.tokens for r in before.replicas]
        known = [router._known(r, step.keys) for r in before.replicas]
        most = min(loads) + SLACK * step.tokens
        assert loads[sent] <= most
        for other, load in enumerate(loads):
            better = (known[other], -load, -other) > (known[sent], -loads[sent], -sent)
            assert load > most or not better
        assert after.replicas[sent].tokens == loads[sent] + step.tokens
        untouched = [r for i, r in enumerate(after.replicas) if i != sent]
        assert untouched == [r for i, r in enumerate(before.replicas) if i != sent]


@given(count=st.integers(1, 4), steps=steps)
def test_it_replays_to_the_same_and_is_bounded(count, steps):
    found = list(run(count, steps))
    assert found == list(run(count, steps))
    for _, state, _ in found:
        for replica in state.replicas:
            held = [len(dict(x.items())) for x in (replica.recent, replica.before)]
            assert max(held) <= KEYS
            assert held[0] == replica.num_recent


@given(count=st.integers(2, 4), sent=st.lists(requests, min_size=1, max_size=60))
def test_nobody_is_left_behind_while_nothing_ends(count, sent):
    """However alike their beginnings are."""
    *_, (_, state, _) = run(count, sent)
    loads = [r.tokens for r in state.replicas]
    assert max(loads) - min(loads) <= (SLACK + 1) * max(request.tokens for request in sent)


def test_equals_are_dealt_out_in_turn():
    places = [place for *_, place in run(3, [Request(10, [])] * 7)]
    assert places == [0, 1, 2, 0, 1, 2, 0]


def test_a_beginning_is_followed_until_it_costs_too_much():
    one, other = Request(10, [1, 2]), Request(10, [3])
    places = [place for *_, place in run(2, [one, other, *[one] * (SLACK + 2)])]
    assert places == [0, 1, *[0] * SLACK, 0, 1]


def test_what_is_not_sent_again_is_forgotten():
    state = router.create(2, KEYS)
    state, _ = router.route(state, Request(1, [1]))
    for key in range(100, 100 + 4 * KEYS):
        state, _ = router.route(state, Request(1, [key]))
    assert all(router._known(r, [1]) == 0 for r in state.replicas)
    state, place = router.route(state, Request(1, range(200, 200 + 3 * KEYS)))
    assert router._known(state.replicas[place], range(200, 200 + 3 * KEYS)) == KEYS
    assert all(router._known(r, [200]) == 0 for r in router.forget(state).replicas)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_sizes_below_one(sizes):
    with pytest.raises(ValueError, match="expected at least 1"):
        router.create(*sizes)


def test_more_cannot_end_than_was_sent():
    with pytest.raises(ValueError, match="replica 0: 1 tokens ended of 0"):
        router.ended(router.create(1, 1), 0, 1)
