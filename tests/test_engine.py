"""The loop on a tiny model, without the API on top of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import BatcherConfig
from jaxinfer.engine import Engine
from jaxinfer.plans import SequenceSpec
from jaxinfer.types import SamplingParams
from tests.conftest import TinyModel

GREEDY = SamplingParams(temperature=0.0)
LIMITS = BatcherConfig(
    num_pages=9,
    page_size=64,
    max_num_seqs=4,
    max_model_len=128,
    max_num_batched_tokens=16,
    max_steps=4,
)


def sequence(prompt: list[int], new: int = 6, **fields) -> SequenceSpec:
    array = np.array(prompt, np.int32)
    return replace(SequenceSpec(array, GREEDY, len(prompt) + new, seed=0), **fields)


@pytest.fixture(scope="module")
def shared(tiny: TinyModel) -> Engine:
    return Engine(tiny.params, tiny.config, LIMITS, dtype=jnp.float32)


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    assert drain(shared) == {}
    assert shared._live == {}
    assert shared._batcher.pool.available == LIMITS.num_pages - 1


def drain(engine: Engine) -> dict[int, list[int]]:
    """Tokens of every sequence, run to the end."""
    tokens: dict[int, list[int]] = {}
    while not engine.idle:
        for update in engine.step():
            tokens.setdefault(update.id, []).extend(update.tokens)
    return tokens


def alone(engine: Engine, what: SequenceSpec) -> list[int]:
    (number,) = engine.submit([what])
    return drain(engine)[number]


def test_ids_are_in_order_and_never_used_again(engine: Engine) -> None:
    first = engine.submit([sequence([1]), sequence([2])])
    second = engine.submit([sequence([3])])
    assert sorted(drain(engine)) == [*first, *second]
    assert max(first) < second[0]
    assert engine.submit([sequence([3])])[0] > second[0]
    drain(engine)


def test_nothing_to_do(engine: Engine) -> None:
    assert engine.idle
    assert engine.step() == []
    assert engine.waiting == 0


def test_together_as_alone(engine: Engine) -> None:
    many = [sequence(list(range(i + 1, 3 * i + 3)), 1 + i) for i in range(9)]
    want = [alone(engine, one) for one in many]
    assert [len(tokens) for tokens in want] == list(range(1, 10))
    numbers = engine.submit(many)
    assert engine.waiting == 9
    got = drain(engine)
    assert [got[i] for i in numbers] == want


def test_a_limit_of_the_prompt_generates_nothing(engine: Engine) -> None:
    (number,) = engine.submit([sequence(list(range(1, 20)), 0, score=1)])
    updates = []
    while not engine.idle:
        updates += engine.step()
    assert [(u.id, u.tokens, u.finished) for u in updates] == [
        (number, [], False),
        (number, [], True),
    ]
    assert [u.scores.logprob.shape for u in updates] == [(16,), (2,)]
    assert [u.scores.top_ids.shape for u in updates] == [(16, 1), (2, 1)]


def test_the_device_stops_at_stop_tokens(engine: Engine) -> None:
    full = alone(engine, sequence([5, 6], 12))
    for stop in full[:6]:
        want = full[: full.index(stop) + 1]
        assert alone(engine, sequence([5, 6], 12, stop_ids=(4000, stop))) == want


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_cancelling_at_any_time(engine: Engine, steps: int) -> None:
    kept, given_up = sequence([7, 8], 20), sequence(list(range(1, 40)), 40)
    want = alone(engine, kept)
    first, second, third = engine.submit([given_up, kept, given_up])
    got: list[int] = []
    for _ in range(steps):
        got += [t for u in engine.step() if u.id == second for t in u.tokens]
    engine.cancel(first)
    engine.cancel(third)
    engine.cancel(first)  # again: nothing happens
    engine.cancel(12345)
    later = drain(engine)
    assert set(later) <= {second}
    assert got + later.get(second, []) == want


def test_cancelled_rows_are_used_again_at_once(engine: Engine) -> None:
    """While dispatched steps of the old sequence may still run."""
    want = alone(engine, sequence([9], 10))
    running = engine.submit([sequence([i + 1], 100) for i in range(4)])
    for _ in range(6):
        engine.step()
    for number in running:
        engine.cancel(number)
    fresh = engine.submit([sequence([9], 10) for _ in range(4)])
    got = drain(engine)
    assert [got[i] for i in fresh] == [want] * 4


def test_waiting_counts_events_to_come(engine: Engine) -> None:
    numbers = engine.submit([sequence([i + 1], 4) for i in range(7)])
    engine.cancel(numbers[6])
    assert engine.waiting == 6
    engine.step()
    assert engine.waiting == 2
    engine.cancel(numbers[5])
    engine.cancel(numbers[0])  # it runs: the queue is as long
    assert engine.waiting == 1
    drain(engine)


def test_reset_forgets_everything(engine: Engine) -> None:
    want = alone(engine, sequence([1, 2]))
    engine.submit([sequence([3], 50)] * 6)
    engine.step()
    engine.reset()
    assert engine.idle
    assert engine.waiting == 0
    for leaf in jax.tree.leaves(engine._cache):
        leaf.delete()  # as a step that broke off would leave it
    engine.reset()
    assert alone(engine, sequence([1, 2])) == want
