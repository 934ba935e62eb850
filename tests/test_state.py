"""Saving an engine in the middle of its work: what goes on is what would have been."""

from __future__ import annotations

import io
import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, CapacityError, CheckpointError, JaxinferError, SamplingParams
from jaxinfer.config import BatcherConfig
from jaxinfer.engine import Engine
from jaxinfer.plans import Kind, SequenceSpec, together
from jaxinfer.requests import Request, finish
from jaxinfer.state import EngineState, from_plain, to_plain
from jaxinfer.types import RequestOutput
from tests.conftest import TinyModel

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
LIMITS = BatcherConfig(
    num_pages=9, page_size=8, max_num_seqs=4, max_model_len=64, max_num_batched_tokens=16,
    max_steps=2,
)  # fmt: skip
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_model_len": 96,
    "page_size": 8,
    "kv_cache_bytes": 24 * 2 * 2 * 8 * 16 * 4,  # 24 pages: some are preempted
    "max_num_batched_tokens": 16,
    "max_steps": 2,
}
# Turns after which to save: before any, while one that was preempted waits, while others are read.
TURNS = [0, 2, 14, 35, 54]


def some(*turns: int, quick: int) -> list[Any]:
    """All with --slow: each compiles for a second or two."""
    return [pytest.param(n, marks=() if n == quick else pytest.mark.slow) for n in turns]


PAGES = pytest.mark.parametrize("pages", [False, True])


def specs() -> list[SequenceSpec]:
    def one(prompt: Sequence[int], new: int, params: SamplingParams, **more: Any) -> SequenceSpec:
        return SequenceSpec(np.array(prompt, np.int32), params, len(prompt) + new, 5, **more)

    return [
        one(range(1, 31), 20, GREEDY),
        one([7, 8], 40, replace(GREEDY, temperature=1.0, logprobs=3)),
        one(range(40, 60), 12, replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.4)),
        one(range(1, 25), 15, replace(GREEDY, temperature=0.8, top_k=50), sample=1, priority=-1),
        one(range(1, 30), 0, GREEDY, score=2),
        one([9], 30, replace(GREEDY, temperature=1.0, frequency_penalty=0.5, min_tokens=4)),
        one(range(100, 130), 5, replace(GREEDY, prompt_logprobs=1), score=1),
    ]


def engine(tiny: TinyModel, limits: BatcherConfig = LIMITS, **more: Any) -> Engine:
    return Engine(tiny.params, tiny.config, limits, **{"dtype": jnp.float32, **more})


class News:
    """What an engine said of each sequence: tokens, log-probabilities of them and of prompts."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.floats: dict[tuple[int, str], list[float]] = {}

    def turn(self, engine: Engine, *, schedule: bool = True) -> None:
        for update in engine.step() if schedule else engine.read():
            self.tokens.setdefault(update.id, []).extend(update.tokens)
            for name, found in (("said", update.logprobs), ("read", update.scores)):
                if found is not None:
                    self.floats.setdefault((update.id, name), []).extend(found.logprob.tolist())

    def rest(self, engine: Engine) -> None:
        while not engine.idle:
            self.turn(engine)


def check_same(got: News, want: News) -> None:
    assert got.tokens == want.tokens
    assert got.floats.keys() == want.floats.keys()
    for name, values in want.floats.items():
        np.testing.assert_allclose(got.floats[name], values, atol=1e-5, err_msg=str(name))


@pytest.fixture(scope="module")
def engines(tiny: TinyModel) -> tuple[Engine, Engine]:
    return engine(tiny), engine(tiny)


@pytest.fixture
def first(engines: tuple[Engine, Engine]) -> Engine:
    return fresh(engines[0])


@pytest.fixture
def second(engines: tuple[Engine, Engine]) -> Engine:
    return fresh(engines[1])


def fresh(engine: Engine) -> Engine:
    engine.reset()
    engine._ids = itertools.count()
    return engine


@pytest.fixture(scope="module")
def undisturbed(engines: tuple[Engine, Engine]) -> News:
    news, one = News(), fresh(engines[0])
    one.submit(specs())
    news.rest(one)
    assert len(news.tokens) == len(specs())
    return news


def stopped(one: Engine, turns: int) -> News:
    """An engine after so many turns, with nothing in flight, and what it said."""
    news = News()
    one.submit(specs())
    for _ in range(turns):
        news.turn(one)
    while one.in_flight:
        news.turn(one, schedule=False)
    return news


def through_plain(state: EngineState) -> EngineState:
    return from_plain(*to_plain(state))


@pytest.mark.slow  # test_requests_go_on goes through it
@PAGES
@pytest.mark.parametrize("turns", TURNS)
def test_an_engine_goes_on(
    undisturbed: News, first: Engine, second: Engine, turns: int, pages: bool
) -> None:
    news = stopped(first, turns)
    state = through_plain(first.snapshot(pages=pages))
    first.reset()  # nothing of the snapshot is the engine's
    second.restore(state)
    news.rest(second)
    check_same(news, undisturbed)
    assert second._batcher.pool.available == LIMITS.num_pages - 1
    assert second.submit([specs()[0]]) == [len(specs())]  # ids go on


@pytest.mark.slow
def test_stages(first: Engine) -> None:
    """That the turns above meet sequences that wait, are read, decode, and were preempted."""
    seen = set()
    for turns in TURNS:
        stopped(fresh(first), turns)
        state = through_plain(first.snapshot(pages=True))
        assert state.running is not None
        scheduler, rows = state.running.scheduler, state.running.scheduler.rows
        reads = rows.prefilled < rows.prompt
        said = {live.id: len(live.outputs) for live in state.live}
        seen |= {"reads"} if (reads & (rows.id >= 0)).any() else set()
        seen |= {"decodes"} if (~reads & (rows.id >= 0)).any() else set()
        seen |= {"waits"} if len(scheduler.waiting.ids) or state.running.events else set()
        seen |= {"preempted"} if any(said[int(i)] for i in scheduler.waiting.ids) else set()
    assert seen == {"reads", "decodes", "waits", "preempted"}


@PAGES
def test_a_snapshot_changes_nothing(undisturbed: News, first: Engine, pages: bool) -> None:
    news = stopped(first, 12)
    first.snapshot(pages=pages)
    news.rest(first)
    check_same(news, undisturbed)


@pytest.mark.slow
def test_other_sizes_will_do_without_pages(
    tiny: TinyModel, undisturbed: News, first: Engine
) -> None:
    news = stopped(first, 20)
    state = first.snapshot(pages=False)
    second = engine(tiny, replace(LIMITS, num_pages=40, max_num_seqs=8, max_steps=1))
    second.restore(state)
    news.rest(second)
    check_same(news, undisturbed)


def test_only_what_is_in_use_is_kept(first: Engine) -> None:
    first.submit([specs()[1]])
    first.step()
    while first.in_flight:
        first.read()
    state = first.snapshot(pages=True)
    assert state.running is not None
    assert len(state.running.page_ids) < 4
    assert state.running.pages.k[0].shape[0] == len(state.running.page_ids)


@pytest.mark.slow
def test_quantised_pages(tiny: TinyModel) -> None:
    want, half = News(), News()
    first, second = (engine(tiny, dtype=jnp.float8_e4m3fn) for _ in range(2))
    first.submit(specs()[:3])
    want.rest(first)
    fresh(first).submit(specs()[:3])
    for _ in range(6):
        half.turn(first)
    while first.in_flight:
        half.turn(first, schedule=False)
    second.restore(through_plain(first.snapshot(pages=True)))
    half.rest(second)
    check_same(half, want)


def test_in_flight_is_refused(first: Engine) -> None:
    first.submit([specs()[0]])
    first.step()
    with pytest.raises(JaxinferError, match="1 dispatches are in flight"):
        first.snapshot(pages=False)


def test_what_does_not_fit_is_named(tiny: TinyModel, first: Engine) -> None:
    stopped(first, 12)
    without, kept = first.snapshot(pages=False), first.snapshot(pages=True)
    few = engine(tiny, replace(LIMITS, num_pages=5))
    with pytest.raises(CapacityError, match=r"0 \(50\), 1 \(42\).* allow 32"):
        few.restore(without)
    with pytest.raises(JaxinferError, match=r"limits\.num_pages: saved 9, here 5"):
        few.restore(kept)
    assert few.idle
    with pytest.raises(CapacityError, match="max_waiting=2"):
        engine(tiny, replace(LIMITS, max_waiting=2)).restore(without)
    with pytest.raises(JaxinferError, match="kv_dtype: saved 'float32', here 'int8'"):
        engine(tiny, dtype=jnp.int8).restore(without)
    with pytest.raises(JaxinferError, match="invariant: saved True, here False"):
        engine(tiny, invariant=False).restore(without)
    other = replace(tiny.config, norm_eps=1e-5)
    with pytest.raises(JaxinferError, match=r"config\.norm_eps: saved 1e-06, here 1e-05"):
        Engine(tiny.params, other, LIMITS, dtype=jnp.float32).restore(without)
    leaves, tree = jax.tree.flatten(tiny.params)
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].multiply(1.01)
    changed = jax.tree.unflatten(tree, leaves)
    with pytest.raises(JaxinferError, match="weights: saved"):
        Engine(changed, tiny.config, LIMITS, dtype=jnp.float32).restore(without)
    with pytest.raises(JaxinferError, match="sequences run"):
        first.restore(without)
    with pytest.raises(JaxinferError, match="event log"):
        engine(tiny, event_log=io.StringIO()).restore(kept)


# -- through the API, on disk --------------------------------------------------------------------


def make(tiny: TinyModel, **options: Any) -> LLM:
    return LLM.from_params(
        tiny.params, tiny.config, tokenizer=tiny.tokenizer, **{**OPTIONS, **options}
    )


@pytest.fixture(scope="module")
def llms(tiny: TinyModel) -> Iterator[tuple[LLM, LLM]]:
    with make(tiny) as one, make(tiny) as other:
        for llm in (one, other):  # as after a warm-up: programs of one kind do for all
            llm.engine._variants = (together(Kind.of(r.params) for r in prepared(llm)),)
            anew(llm)
        yield one, other


@pytest.fixture
def llm(llms: tuple[LLM, LLM]) -> LLM:
    return anew(llms[0])


@pytest.fixture
def other(llms: tuple[LLM, LLM]) -> LLM:
    return anew(llms[1])


def anew(llm: LLM) -> LLM:
    assert llm._owners == {}
    fresh(llm.engine)
    llm._ids = itertools.count()
    llm._seeds = random.Random(0)
    return llm


def prepared(llm: LLM) -> list[Request]:
    """Greedy and sampled, two samples, penalties, a stop string, scores; no seed of its own."""
    sampled = SamplingParams(max_tokens=50, ignore_eos=True, logprobs=2)
    first = llm.prepare("import os", replace(GREEDY, max_tokens=60))
    return [
        first,
        llm.prepare(list(range(5, 45)), replace(sampled, n=2, top_p=0.9)),
        llm.prepare("def f(x):", replace(GREEDY, repetition_penalty=1.2, logprobs=0)),
        llm.prepare([3, 4, 5] * 9, replace(sampled, presence_penalty=0.3, prompt_logprobs=2)),
        llm.prepare([17, 18], replace(sampled, seed=4, min_tokens=9), priority=1),
        llm.prepare("class A", replace(GREEDY, stop=["zzz", never(llm)], stop_token_ids=[4000])),
    ]


def never(llm: LLM) -> str:
    """A stop string that the last request comes to after some twenty tokens, across tokens."""
    (output,) = llm.generate("class A", replace(GREEDY, seed=1))
    text = output.outputs[0].text
    return text[len(text) // 2 : len(text) // 2 + 7]


def run(llm: LLM, requests: Sequence[Request]) -> list[RequestOutput]:
    while not all(request.finished for request in requests):
        llm.pump()
    return [finish(request, llm.tokenizer) for request in requests]


def check_outputs(got: Sequence[RequestOutput], want: Sequence[RequestOutput]) -> None:
    for a, b in zip(got, want, strict=True):
        bare = [replace(o, logprobs=None, cumulative_logprob=None) for o in b.outputs]
        assert [replace(o, logprobs=None, cumulative_logprob=None) for o in a.outputs] == bare
        assert (a.request_id, a.prompt, a.prompt_token_ids, a.seed) == (
            b.request_id, b.prompt, b.prompt_token_ids, b.seed,
        )  # fmt: skip
        for x, y in zip(a.outputs, b.outputs, strict=True):
            close(x.logprobs, y.logprobs)
            assert x.cumulative_logprob == pytest.approx(y.cumulative_logprob, abs=1e-4)
        close(a.prompt_logprobs, b.prompt_logprobs)


def close(got: Any, want: Any) -> None:
    assert (got is None) == (want is None)
    for a, b in zip(got or (), want or (), strict=True):
        assert (a and list(a)) == (b and list(b))
        for token in list(b or {}):
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-5)
            assert (a[token].rank, a[token].decoded_token) == (
                b[token].rank,
                b[token].decoded_token,
            )


@pytest.mark.parametrize("pages", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("turns", some(0, 3, 20, 45, quick=20))
def test_requests_go_on(llm: LLM, other: LLM, tmp_path: Path, turns: int, pages: bool) -> None:
    requests = prepared(llm)
    llm.submit(requests)
    for _ in range(turns):
        llm.pump()
    llm.save(tmp_path / "state", pages=pages)
    want = run(llm, requests)  # saving does not disturb
    following = llm.generate([5], SamplingParams(max_tokens=3))
    assert want[-1].outputs[0].finish_reason == "stop"
    again = other.load(tmp_path / "state")
    done = {request.id for request in again}
    check_outputs(run(other, again), [one for one in want if one.request_id in done])
    check_outputs(other.generate([5], SamplingParams(max_tokens=3)), following)
    check_idle(other)


def check_idle(llm: LLM) -> None:
    assert llm._owners == {}
    while not llm.engine.idle:
        assert llm.engine.step() == []
    assert llm.engine._batcher.pool.available == llm.memory_plan.num_pages - 1


def test_saving_again_leaves_a_whole_one(llm: LLM, tmp_path: Path) -> None:
    where = tmp_path / "state"
    requests = prepared(llm)
    llm.submit(requests)
    for pages in (True, False, True):
        for _ in range(4):
            llm.pump()
        llm.save(where, pages=pages)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    want = run(llm, requests)
    check_outputs(run(llm, llm.load(where)), want)  # into the same, idle again
    check_idle(llm)


@PAGES
def test_no_requests(llm: LLM, tmp_path: Path, pages: bool) -> None:
    llm.save(tmp_path / "state", pages=pages)
    assert llm.load(tmp_path / "state") == []
    check_idle(llm)


def test_a_part_of_a_directory_is_refused(llm: LLM, tmp_path: Path) -> None:
    whole = tmp_path / "state"
    requests = prepared(llm)
    llm.submit(requests)
    llm.pump()
    llm.save(whole, pages=True)
    llm.cancel(requests)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert {Path("host.json"), Path("manifest.json")} < set(files)
    part = tmp_path / "part"
    for name in files:
        shutil.copytree(whole, part)
        (part / name).unlink()
        with pytest.raises(CheckpointError, match=r"missing|no manifest"):
            llm.load(part)
        shutil.rmtree(part)
    host = whole / "host.json"
    host.write_bytes(host.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"host\.json: missing, or not of the"):
        llm.load(whole)
    with pytest.raises(CheckpointError, match="no manifest"):
        llm.load(tmp_path)
    check_idle(llm)


def test_what_is_something_else_is_left_alone(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(CheckpointError, match="exists already"):
            llm.save(tmp_path / name)
    assert (tmp_path / "notes" / "a").read_text() == "mine"
