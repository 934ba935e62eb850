"""Metrics: what the engine counts adds up, and what is made of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.batcher import Prefill, Run, create_state
from jaxinfer.cli import main
from jaxinfer.config import BatcherConfig
from jaxinfer.engine import Engine
from jaxinfer.metrics import Metrics, Percentiles, RequestRecord, StepRecord, Together, summary
from jaxinfer.plans import SequenceSpec, padded_tokens
from jaxinfer.runner import StepKey
from tests.conftest import TinyModel, small_llm

GREEDY = SamplingParams(temperature=0.0)
LIMITS = BatcherConfig(
    num_pages=9,
    page_size=8,
    max_num_seqs=2,
    max_model_len=48,
    max_num_batched_tokens=16,
    max_steps=4,
)
STEP = StepRecord(
    number=0, dispatched_s=10.0, observed_s=11.0, steps=1, guesses=0, attempted=0, held=0, rows=0,
    read=8, sampled=2, padded_tokens=16, wasted=8, waiting=0, running=2, pages_held=2,
    pages_total=8, kv_tokens=8, kv_slots=16, preempted=0, stored=0, loaded=0, idle_s=5.0,
)  # fmt: skip
REQUEST = RequestRecord(
    id=0, arrived_s=9.0, admitted_s=10.0, first_token_s=11.0, finished_s=14.0, prompt_tokens=8,
    output_tokens=4, cached_tokens=4, preemptions=0, cancelled=False,
)  # fmt: skip


def engine_of(tiny: TinyModel, **limits: Any) -> Engine:
    """Its clock goes on by a second whenever it is looked at."""
    ticks = itertools.count()
    return Engine(
        tiny.params, tiny.config, replace(LIMITS, **limits), dtype=jnp.float32,
        clock=lambda: float(next(ticks)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Engine:
    return engine_of(tiny)


@pytest.fixture(autouse=True)
def forgotten(request: pytest.FixtureRequest) -> None:
    """Of the engine that several tests share: its cache, and the records of those before."""
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        engine.reset()
        for kept in (engine.metrics.steps, engine.metrics.requests, engine.metrics.gaps):
            kept.clear()


def sequence(prompt: list[int], new: int = 6) -> SequenceSpec:
    return SequenceSpec(np.array(prompt, np.int32), GREEDY, len(prompt) + new, seed=0)


def drain(engine: Engine) -> dict[int, int]:
    """How many tokens every sequence got."""
    counts: dict[int, int] = {}
    while not engine.idle:
        for update in engine.step():
            counts[update.id] = counts.get(update.id, 0) + len(update.tokens)
    return counts


def test_tokens_add_up(engine: Engine) -> None:
    many = [sequence([50 + i] * (3 * i + 1), 1 + 3 * i) for i in range(5)]
    ids = engine.submit(many)
    counts = drain(engine)
    requests = {r.id: r for r in engine.metrics.requests}
    assert sorted(requests) == ids
    assert {i: r.output_tokens for i, r in requests.items()} == counts
    assert [requests[i].prompt_tokens for i in ids] == [len(s.prompt) for s in many]
    assert not any(r.cancelled for r in requests.values())
    steps = engine.metrics.steps
    assert sum(s.sampled for s in steps) == sum(counts.values())
    computed = sum(len(s.prompt) for s in many) - sum(r.cached_tokens for r in requests.values())
    assert sum(s.read for s in steps) == computed
    assert sum(s.preempted for s in steps) == 0
    rows = sum(counts.values()) - len(many)  # a token that follows a prompt is no row's
    assert sum(s.padded_tokens - s.wasted - s.read for s in steps) == rows


def test_steps_are_in_order_and_within_bounds(engine: Engine) -> None:
    engine.submit([sequence([i] * 9, 20) for i in range(4)])
    drain(engine)
    steps = list(engine.metrics.steps)
    first = steps[0].number
    assert [s.number for s in steps] == list(range(first, first + len(steps)))
    assert any(s.waiting for s in steps)
    for s in steps:
        assert s.dispatched_s < s.observed_s
        assert 0 <= s.wasted < s.padded_tokens
        assert s.running <= 2
        assert 0 < s.pages_held <= s.pages_total == 8
        assert 0 < s.kv_tokens <= s.kv_slots
    assert [s.observed_s for s in steps] == sorted(s.observed_s for s in steps)
    for s, before in zip(steps[1:], steps, strict=False):
        under_way = before.observed_s > s.dispatched_s
        assert s.idle_s == (0 if under_way else s.dispatched_s - before.observed_s)


def test_times_of_a_request(engine: Engine) -> None:
    for _ in range(2):
        engine.submit([sequence([7], 6)])
        drain(engine)
    one, two = engine.metrics.requests
    assert one.admitted_s is not None
    assert one.first_token_s is not None
    assert one.arrived_s < one.admitted_s < one.first_token_s < one.finished_s < two.arrived_s
    read, *decoded = (s for s in engine.metrics.steps if s.observed_s <= one.finished_s)
    assert (one.admitted_s, one.first_token_s) == (read.dispatched_s, read.observed_s)
    assert one.finished_s == decoded[-1].observed_s
    gaps = len(engine.metrics.gaps) // 2
    assert gaps == len(decoded)
    assert sum(list(engine.metrics.gaps)[:gaps]) == one.finished_s - one.first_token_s
    (again,) = (s for s in engine.metrics.steps if s.dispatched_s == two.admitted_s)
    assert again.idle_s >= two.admitted_s - one.finished_s > 0


def test_cached_tokens(engine: Engine) -> None:
    prompt = list(range(100, 120))
    for _ in range(2):
        engine.submit([sequence(prompt)])
        drain(engine)
    assert [r.cached_tokens for r in engine.metrics.requests] == [0, 16]
    assert engine.metrics.summary().prefix_hit_share == 16 / 40


def test_preemptions(engine: Engine) -> None:
    """Two sequences of six pages each, in eight."""
    ids = engine.submit([sequence([i] * 10, 38) for i in (3, 4)])
    counts = drain(engine)
    first, second = engine.metrics.requests
    assert (first.id, second.id) == tuple(ids)
    assert (first.preemptions, first.cached_tokens) == (0, 0)
    assert second.preemptions > 0
    assert second.cached_tokens == 0  # what it finds again was its own
    assert counts == dict.fromkeys(ids, 38) == {r.id: r.output_tokens for r in (first, second)}
    assert engine.metrics.summary().preemptions == second.preemptions
    assert sum(s.read for s in engine.metrics.steps) > 20


def test_what_a_sequence_finds_of_its_own_is_not_cached() -> None:
    metrics = Metrics(itertools.count().__next__, LIMITS.page_size)
    state, none = create_state(LIMITS), np.empty((1, 0), np.int32)
    empty = np.empty(0, np.int64)
    metrics.submit({0: 20})
    for start, given in ((0, 0), (8, 1), (16, 1)):  # preempted before its first token, and after
        chunk = Prefill(0, 0, start, 20, True, True, 48, empty)
        run = Run(1, 0, empty, empty, 20, empty, empty, (chunk,), empty)
        metrics.dispatch(run, state, 64)
        metrics.observe(none, np.array([[given - 1]]))
        metrics.give(0, given)
        metrics.preempt(0)
    metrics.finish(0)
    (found,) = metrics.requests
    assert (found.cached_tokens, found.preemptions, found.output_tokens) == (8, 3, 2)
    assert [(s.read, s.sampled, s.preempted) for s in metrics.steps] == [
        (20, 0, 0), (12, 1, 1), (4, 1, 1)
    ]  # fmt: skip


def test_guesses_that_hold() -> None:
    """Two steps with two guesses of two rows, of which one ends in the first."""
    metrics = Metrics(itertools.count().__next__, LIMITS.page_size)
    state, empty = create_state(LIMITS), np.empty(0, np.int64)
    ids, following = np.arange(2), np.empty((6, 0), np.int32)
    run = Run(2, 2, ids, ids, 20, empty, empty, (), empty)
    metrics.dispatch(run, state, 48)
    tokens = np.array([[5, 5], [6, -1], [7, -1], [8, -1], [9, -1], [-1, -1]], np.int32)
    metrics.observe(tokens, following, np.array([[2, 1], [2, 0]], np.int32))
    (step,) = metrics.steps
    assert (step.steps, step.guesses, step.rows) == (2, 2, 2)
    assert (step.attempted, step.held, step.sampled, step.wasted) == (5, 3, 6, 42)
    assert metrics.summary().acceptance == 3 / 5
    # A dispatch that guesses nothing changes nothing about it, one in which nothing holds does.
    metrics.dispatch(run._replace(guesses=0), state, 16)
    metrics.observe(tokens[:2], following[:2])
    assert (metrics.steps[-1].attempted, metrics.steps[-1].held) == (0, 0)
    assert metrics.summary().acceptance == 3 / 5
    metrics.dispatch(run, state, 48)
    none = np.where(np.arange(6)[:, None] % 3 == 0, tokens, -1)
    metrics.observe(none, following, np.array([[1, 1], [1, 0]], np.int32))
    assert (metrics.steps[-1].attempted, metrics.steps[-1].held) == (3, 0)
    assert metrics.summary().acceptance == 3 / 8


def test_guesses_of_an_llm(tiny: TinyModel) -> None:
    """Tokens that repeat themselves are easy to guess; one who does not want it has no guesses."""
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    prompts = [[7, 8, 9] * 4, [7, 8, 9] * 4]
    with small_llm(tiny, speculative="lookup,tokens=2,adapt=false") as llm:
        llm.generate(prompts, [params, replace(params, speculate=False)])
        steps, found = list(llm.metrics.steps), llm.metrics.summary()
    guessing = [s for s in steps if s.guesses]
    assert sum(s.sampled for s in steps) == 48
    for s in guessing:
        assert s.guesses == 2
        assert 0 <= s.held <= s.attempted <= s.guesses * s.steps  # of one of the rows
        assert s.sampled <= s.rows * s.steps + s.held
        assert 0 <= s.wasted < s.padded_tokens
    attempted, held = (sum(getattr(s, x) for s in guessing) for x in ("attempted", "held"))
    assert 0 < held <= attempted
    assert found.acceptance == held / attempted
    plain = [s for s in steps if not s.guesses]
    assert plain
    assert not any(s.attempted or s.held for s in plain)


def test_cancelled(engine: Engine) -> None:
    waits, runs, done = engine.submit([sequence([5], 30), sequence([6], 30), sequence([7], 30)])[
        ::-1
    ]
    got = {runs: 0, done: 0}
    for _ in range(4):
        for update in engine.step():
            got[update.id] += len(update.tokens)
    engine.cancel(waits)
    engine.cancel(runs)
    engine.cancel(runs)
    engine.cancel(done, complete=True)
    drain(engine)
    never, half, whole = engine.metrics.requests
    assert (never.id, never.cancelled, never.admitted_s, never.output_tokens) == (
        waits,
        True,
        None,
        0,
    )
    assert (never.queue_s, never.ttft_s, never.tpot_s) == (None, None, None)
    assert (half.id, half.cancelled, half.output_tokens) == (runs, True, got[runs])
    assert (whole.id, whole.cancelled, whole.output_tokens) == (done, False, got[done])
    assert whole.finished_s < never.finished_s < half.finished_s
    found = engine.metrics.summary()
    assert (found.requests, found.cancelled) == (3, 2)
    assert found.e2e_s == Percentiles(whole.e2e_s, whole.e2e_s)


def test_reset_keeps_records(engine: Engine) -> None:
    (first,) = engine.submit([sequence([8])])
    drain(engine)
    steps = len(engine.metrics.steps)
    (second,) = engine.submit([sequence([9])])
    engine.step()
    engine.reset()
    assert [(r.id, r.cancelled) for r in engine.metrics.requests] == [
        (first, False),
        (second, True),
    ]
    (third,) = engine.submit([sequence([9])])
    assert drain(engine) == {third: 6}
    assert engine.metrics.requests[-1].output_tokens == 6
    assert len(engine.metrics.steps) > steps
    assert not engine.metrics._live
    assert not engine.metrics._under_way


def test_only_the_newest_are_kept(engine: Engine) -> None:
    before = engine.metrics
    engine.metrics = Metrics(itertools.count().__next__, LIMITS.page_size, kept=3, kept_gaps=5)
    ids = engine.submit([sequence([i], 9) for i in range(7)])
    drain(engine)
    kept, engine.metrics = engine.metrics, before
    assert [r.id for r in kept.requests] == ids[-3:]
    assert len(kept.steps) == 3
    assert len(kept.gaps) == 5
    assert kept.steps[-1].number > 3
    assert kept.summary().requests == 3


def test_summary() -> None:
    steps = [
        STEP,
        STEP._replace(dispatched_s=10.5, observed_s=12.0, idle_s=0.0, rows=2, read=0, sampled=6,
                      steps=3, padded_tokens=24, wasted=18, kv_tokens=12, preempted=1),
        STEP._replace(dispatched_s=13.0, observed_s=14.0, idle_s=1.0, read=0, wasted=16, sampled=0),
    ]  # fmt: skip
    requests = [
        REQUEST,
        REQUEST._replace(arrived_s=8.0, output_tokens=1, finished_s=11.0, prompt_tokens=24),
        REQUEST._replace(admitted_s=None, first_token_s=None, output_tokens=0, cancelled=True),
    ]
    found = summary(steps, requests, [1.0, 3.0])
    assert (found.requests, found.cancelled, found.preemptions) == (3, 1, 1)
    assert found.seconds == 4.0
    assert found.output_tokens_per_s == 8 / 4
    assert found.queue_s == pytest.approx(Percentiles(1.5, 1.99))
    assert found.ttft_s == pytest.approx(Percentiles(2.5, 2.99))
    assert found.tpot_s == Percentiles(1.0, 1.0)
    assert found.itl_s == pytest.approx(Percentiles(2.0, 2.98))
    assert found.e2e_s == pytest.approx(Percentiles(4.0, 4.98))
    assert found.prefix_hit_share == 8 / 32
    assert found.padding_waste_share == 42 / 56
    assert found.kv_waste_share == 20 / 48
    assert found.device_idle_share == 1 / 4  # not what was before the first
    assert found.mean_rows == 6 / 5
    assert found.acceptance is None
    steps[1] = steps[1]._replace(guesses=4, attempted=9, held=3)
    steps[2] = steps[2]._replace(guesses=2, attempted=3, held=3)
    assert summary(steps, requests).acceptance == 6 / 12


def test_several_engines_together() -> None:
    """Each idle for a second of four; what one of them reads last was not begun last."""
    parts = [Metrics(lambda: 0.0, 8) for _ in range(2)]
    times = [[(0.0, 2.0, 0.0), (3.0, 4.0, 1.0)], [(0.5, 1.0, 0.0), (2.0, 3.5, 1.0)]]
    for part, some in zip(parts, times, strict=True):
        steps = (STEP._replace(dispatched_s=a, observed_s=b, idle_s=c) for a, b, c in some)
        part.steps.extend(steps)
        part.requests.append(REQUEST._replace(finished_s=some[-1][1]))
        part.gaps.append(1.0)
    both = Together(parts)
    assert [s.observed_s for s in both.steps] == [1.0, 2.0, 3.5, 4.0]
    assert [r.finished_s for r in both.requests] == [3.5, 4.0]
    found = both.summary()
    assert found.seconds == 4.0
    assert found.output_tokens_per_s == 8 / 4
    assert found.device_idle_share == 2 / (2 * 4)
    assert found.itl_s == Percentiles(1.0, 1.0)
    assert Together(parts[:1]).summary() == parts[0].summary()


def test_summary_of_nothing() -> None:
    found = summary([], [])
    assert (found.requests, found.cancelled, found.seconds, found.preemptions) == (0, 0, 0, 0)
    rest = {name: x for name, x in found._asdict().items() if x is not None}
    assert set(rest) == {"requests", "cancelled", "seconds", "preemptions", "loaded_pages"}


def test_padded_tokens() -> None:
    key = StepKey(rows=1, tokens=0, chunks=0, pages=1, page_size=8, steps=4)
    assert padded_tokens(key) == 32  # no program computes fewer than 8 rows
    assert padded_tokens(replace(key, rows=16)) == 64
    assert padded_tokens(replace(key, tokens=64, steps=1, chunks=2)) == 64


def test_of_an_llm(tiny: TinyModel) -> None:
    options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 64,
                               "kv_cache_bytes": 1 << 20, "page_size": 8}  # fmt: skip
    with LLM.from_params(tiny.params, tiny.config, tokenizer=tiny.tokenizer, **options) as llm:
        params = SamplingParams(max_tokens=24, ignore_eos=True, n=2, seed=1)
        prompts = [[*range(20, 40), i] for i in range(3)]
        results = llm.generate(prompts, params)
        requests = list(llm.metrics.requests)
        assert len(requests) == 6
        assert sum(r.output_tokens for r in requests) == 6 * 24
        assert sum(r.cached_tokens for r in requests) == sum(r.num_cached_tokens for r in results)
        text = results[0].outputs[0].text
        llm.generate(prompts[0], replace(params, n=1, stop=(text[:3],)))
        stopped = llm.metrics.requests[-1]
        assert not stopped.cancelled
        assert stopped.output_tokens < 24
        stream = llm.stream([1, 2, 3], replace(params, n=1))
        next(stream)
        stream.close()
        assert llm.metrics.requests[-1].cancelled
        assert llm.metrics.summary().requests == 8


@pytest.mark.parametrize("out", [False, True])
def test_command_line(out: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("old")
    command = ["generate", "def f(", "--max-tokens", "5", "--metrics", str(path)]
    assert main(command + (["--out", str(tmp_path / "out.jsonl")] if out else [])) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [line.pop("kind") for line in lines]
    steps, requests = kinds.count("step"), kinds.count("request")
    assert kinds == ["step"] * steps + ["request"] * requests + ["summary"]
    assert steps
    assert requests == 1
    assert set(lines[0]) == set(StepRecord._fields)
    derived = {"queue_s", "ttft_s", "tpot_s", "e2e_s"}
    assert set(lines[-2]) == {*RequestRecord._fields, *derived}
    assert lines[-2]["output_tokens"] == sum(line["sampled"] for line in lines[:steps]) == 5
    assert lines[-1]["requests"] == 1
    assert set(lines[-1]["ttft_s"]) == {"p50", "p99"}
    assert not list(tmp_path.glob("*.tmp-*"))


def test_command_line_refuses_a_folder_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none" / "metrics.jsonl"
    assert main(["generate", "x", "--metrics", str(path)]) == 2
    assert "expected a file in a folder that exists" in " ".join(capsys.readouterr().err.split())
