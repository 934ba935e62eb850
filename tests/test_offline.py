"""Many requests through a small window: the same results, whatever is refused, fails or breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import pytest

from jaxinfer import LLM, InvalidRequest, JaxinferError, QueueFull, SamplingParams, delivery
from jaxinfer.offline import Job, as_completed, seed_of
from jaxinfer.requests import Request
from jaxinfer.types import MAX_SEED
from tests.conftest import TinyModel, small_llm

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def shared(tiny: TinyModel) -> Iterator[LLM]:
    with small_llm(tiny) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared LLM; afterwards nothing may be left in it."""
    yield shared
    assert shared._owners == {}
    assert shared.engine._live == {}
    assert shared.engine.waiting == 0


def jobs(total: int, n: int = 1) -> Iterator[Job]:
    for i in range(total):
        params = replace(PARAMS, seed=seed_of(3, i), n=n, max_tokens=2 + i % 5)
        yield Job(i, [1 + i, 2, 3 + 2 * i], params)


@pytest.mark.parametrize(("window", "n"), [(1, 1), (3, 1), (100, 1), (2, 3), (7, 3)])
def test_each_gets_what_it_gets_alone(llm: LLM, window: int, n: int) -> None:
    got = dict(as_completed(llm, jobs(12, n), window=window))
    given = list(jobs(12, n))
    want = llm.generate([job.prompt for job in given], [job.params or PARAMS for job in given])
    assert [got[i].outputs for i in range(12)] == [w.outputs for w in want]


@pytest.mark.parametrize(("window", "n"), [(3, 1), (7, 3), (2, 3)])
def test_no_more_than_the_window_is_under_way(llm: LLM, window: int, n: int) -> None:
    seen: list[int] = []

    def watch(requests: list[Request]) -> bool:
        seen.append(sum(request.unfinished for request in requests))
        return True

    assert len(list(as_completed(llm, jobs(12, n), window=window, watch=watch))) == 12
    assert max(window - n, n) <= max(seen) <= max(window, n)


def test_jobs_are_read_as_there_is_room(llm: LLM) -> None:
    read = count()
    endless = (Job(next(read), [5, 6], PARAMS) for _ in count())
    results = as_completed(llm, endless, window=4)
    assert len(list(islice(results, 20))) == 20
    results.close()  # type: ignore[attr-defined]
    assert next(read) < 20 + 2 * 4


def test_nothing_to_do(llm: LLM) -> None:
    assert list(as_completed(llm, [])) == []


@pytest.mark.parametrize("window", [1, 2, 50])
def test_refused_ones_are_told_by_their_own_index(llm: LLM, window: int) -> None:
    mixed = [Job(i, [] if i % 3 else [5, 6, i], PARAMS) for i in range(20)]
    got = dict(as_completed(llm, mixed, window=window))
    assert sorted(got) == list(range(20))
    for index, result in got.items():
        if index % 3:
            assert isinstance(result.error, InvalidRequest)
            assert (result.error.index, result.error.field) == (index, "prompt")
            assert str(result.error).startswith(f"request {index}, prompt: it is empty")
        else:
            assert result.error is None
            assert result.finished


def test_one_that_fails_does_not_stop_the_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    take = delivery.take

    def failing(request: Request, *rest: Any) -> None:
        if request.prompt_ids[0] == 3:
            raise ZeroDivisionError("no")
        take(request, *rest)

    monkeypatch.setattr(delivery, "take", failing)
    got = dict(as_completed(llm, jobs(6)))
    assert [i for i, result in got.items() if result.error is not None] == [2]
    assert isinstance(got[2].error, JaxinferError)
    assert got[2].outputs == ()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_what_a_broken_turn_had_finished_is_not_lost(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    take = delivery.take
    finished: set[str] = set()

    def breaking(request: Request, *rest: Any) -> None:
        if len(finished) == 2:
            raise error
        take(request, *rest)
        if request.finished:
            finished.add(request.id)

    monkeypatch.setattr(delivery, "take", breaking)
    got = []
    with pytest.raises(type(error)):
        got.extend(result for _, result in as_completed(llm, jobs(8)))
    assert {result.request_id for result in got} == finished
    assert all(result.finished for result in got)


def test_a_watcher_ends_it(llm: LLM) -> None:
    turns = iter([True, True, True, False])
    got = list(as_completed(llm, jobs(50), window=8, watch=lambda _: next(turns)))
    assert len(got) < 50


def test_known_answers_need_no_turn(tiny: TinyModel) -> None:
    with small_llm(tiny, response_cache=20) as llm:
        first = dict(as_completed(llm, jobs(10), window=3))
        again = dict(as_completed(llm, jobs(10), window=3, watch=lambda _: False))
        assert {i: r.outputs for i, r in again.items()} == {i: r.outputs for i, r in first.items()}


def test_the_queue_bounds_the_window(tiny: TinyModel) -> None:
    with small_llm(tiny, max_waiting=2) as llm:
        assert len(list(as_completed(llm, jobs(9)))) == 9
        with pytest.raises(QueueFull):
            list(as_completed(llm, jobs(1, n=3)))


def test_a_window_of_nothing(llm: LLM) -> None:
    with pytest.raises(ValueError, match="window=0"):
        as_completed(llm, jobs(1), window=0)


def test_seeds_are_far_apart_and_fixed() -> None:
    seeds = {seed_of(run, index) for run in range(30) for index in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < MAX_SEED for seed in seeds)
    assert seed_of(0, 0) == 3202682252830578881
