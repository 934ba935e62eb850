"""Sessions: whose turn it is, what is cut off when time is up, and what is told of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bench import cases, figures, report, sessions
from bench.cases import Got
from bench.engines import RAGGED, Memory, Options, Output, Request
from bench.engines.client import EngineError, Missing, NoAnswer, Reply
from bench.record import Run
from bench.sessions import Failure, Session, Took, Trial
from bench.sizes import Model
from bench.until import OUT_OF_TIME, Until
from tests.bench.test_engines import DEMO

TINY = Model({
    "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
})  # fmt: skip
GPU = {"kind": "NVIDIA H100 80GB HBM3", "count": 1, "memory": 80 << 30}


def replies(calls: cases.Calls, first: float, step: float) -> list[Got]:
    """Of an engine that takes `first` seconds to each first token, and `step` for each other."""
    return [
        Got([Output([7] * r.max_tokens, [r.due + first + step * i for i in range(r.max_tokens)])
             for r in call], first + step * (max(r.max_tokens for r in call) - 1))
        for call in calls
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fit", "groups"),
    [
        (4, [["a", "b", "c", "d"]]),
        (3, [["a", "b", "c"], ["a", "d"]]),
        (2, [["a", "b"], ["a", "c"], ["a", "d"]]),
        (1, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_the_first_engine_is_in_every_group(fit: int, groups: list[list[str]]) -> None:
    assert sessions.make_groups("abcd", fit) == groups


def one_case(repeats: int = 3, **options: Any) -> Session:
    case = cases.latency(TINY, 2, 4, (2, 6))
    ragged = replace(case, name="ragged", needs=frozenset({RAGGED}))
    return Session(DEMO, Options(**options), (case, ragged), repeats=repeats)


def test_as_many_engines_share_a_device_as_fit() -> None:
    session = one_case(max_num_seqs=2)
    held = 2 * (4 + 6)  # tokens
    fits = [
        sessions.fitting(session.cases, 2, kv, memory, weights, 5)
        for kv, memory, weights in (
            (0, 80 << 30, 16 << 30),
            (1 << 30, 80 << 30, 16 << 30),
            (1, None, 1),
        )
    ]
    assert fits == [3, 1, 5]
    huge = sessions.fitting(session.cases, 2, 10 << 30, 80 << 30, 16 << 30, 5)
    assert huge == 0
    assert cases.concurrent_tokens(session.cases, 2) == held
    assert cases.concurrent_tokens(session.cases, 1) == held // 2


WARM_CALLS = 4  # of the first case: two to a repeat, of which the first compiles


class Clock:
    """Seconds that fakes say have passed."""

    seconds = 0.0


class Fake:
    """An engine whose clock is made up; `log` has whose turn it was. `takes`: seconds of its first
    calls. `after`: it answers once that one is warm."""

    log: list[tuple[str, int]]
    clock: Clock

    def __init__(self, name: str, step: float, *, token: int = 1, fails: str = "",
                 takes: Sequence[float] = (), after: Fake | None = None) -> None:  # fmt: skip
        self.name, self.step, self.token, self.fails = name, step, token, fails
        self.alive, self.versions, self.cold = True, {"torch": "2"}, 1
        self.takes, self.after, self.warm = list(takes), after, threading.Event()

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait(self, timeout_s: float) -> float:
        if self.fails == "missing":
            raise Missing("it is not installed")
        return 0.0

    def generate(self, requests: list[Request], timeout_s: float) -> Reply:
        self.log.append((self.name, len(requests[0].prompt)))
        if self.after is not None:
            assert self.after.warm.wait(60)
        seconds = self.takes.pop(0) if self.takes else 0.0
        self.clock.seconds += min(seconds, timeout_s)
        if seconds > timeout_s or not timeout_s:
            self.alive = False
            raise NoAnswer("no answer")
        if self.fails == "call":
            self.alive = False
            raise EngineError("it broke", "tail")
        (got,) = replies([requests], 0.1, self.step)
        outputs = [out._replace(tokens=[self.token] * len(out.tokens)) for out in got.outputs]
        cold, self.cold = self.cold, 0
        if [name for name, _ in self.log].count(self.name) == WARM_CALLS:
            self.warm.set()
        return Reply(outputs, got.seconds, 0.0, cold)

    def memory(self, timeout_s: float) -> Memory:
        return Memory(10, 20, 3)


def run_fakes(*fakes: Fake, session: Session | None = None, seconds: float = 1e9) -> list[Any]:
    """Events, and whose turn it was, when there are so many seconds."""
    log: list[tuple[str, int]] = []
    clock = Clock()
    by = {fake.name: fake for fake in fakes}
    for fake in fakes:
        fake.log, fake.clock = log, clock
    groups = [list(by)]
    start: Any = lambda name, path, options: by[name]  # noqa: E731
    until = Until(seconds, lambda: clock.seconds)
    found = list(sessions.run(session or one_case(), groups, until, start=start))
    return [found, log]


def test_engines_take_turns_in_an_order_that_rotates() -> None:
    found, log = run_fakes(Fake("jaxinfer", 0.01), Fake("hf-eager", 0.02), Fake("vllm", 0.03))
    trials = [e for e in found if isinstance(e, Trial) and e.case.name == "b2.in4"]
    order = ["jaxinfer", "hf-eager", "vllm"]
    assert [t.engine for t in trials] == order + order[1:] + order[:1] + order[2:] + order[:2]
    assert not any(t.compiled for t in trials)
    # Two calls to a repeat: each engine compiled in its first, and was warm after the second one.
    # Then the other case, warm after one, which not all can do; all before anything is timed.
    assert Counter(name for name, _ in log[:16]) == {"jaxinfer": 6, "hf-eager": 4, "vllm": 6}
    cannot = [e for e in found if isinstance(e, Failure)]
    assert [(e.engine, e.error) for e in cannot] == [("hf-eager", "cannot: ragged")]
    assert [e.engine for e in found if isinstance(e, Took)] == order


def test_one_that_breaks_leaves_and_the_others_go_on() -> None:
    found, _ = run_fakes(
        Fake("jaxinfer", 0.01), Fake("vllm", 0.02, fails="call"), Fake("sglang", 1, fails="missing")
    )
    failed = [(e.engine, e.error, e.missing) for e in found if isinstance(e, Failure)]
    assert failed == [("vllm", "it broke", False), ("sglang", "it is not installed", True)]
    trials = [e for e in found if isinstance(e, Trial)]
    assert {(t.engine, t.case.name) for t in trials} == {
        ("jaxinfer", "b2.in4"), ("jaxinfer", "ragged")
    }  # fmt: skip
    records = figures.summarise("m", found, greedy=True, exact=True, reference="jaxinfer")
    told = {r.name: r for r in records}
    assert told["compare.m.sglang.runs"].value == 0
    broken = told["compare.m.latency.b2.in4.vllm.failed"]
    assert (broken.error, broken.detail["output_tail"]) == ("it broke", "tail")


def test_times_that_make_no_sense_are_taken_again_and_then_are_a_failure() -> None:
    found, log = run_fakes(Fake("jaxinfer", 0.0), session=one_case(repeats=1))
    failed = {e.error for e in found if isinstance(e, Failure)}
    assert failed == {"3 times: 6 tokens took no longer than 2: use longer outputs"}
    # calls of both cases: until warm, then a brief one and three tries of two
    assert len(log) == (4 + 1 + 6) + (2 + 1 + 6)


def trials_of(found: Sequence[Any]) -> Counter[tuple[str, str]]:
    """How many there are of each engine and case."""
    return Counter((e.engine, e.case.name) for e in found if isinstance(e, Trial))


def late_of(found: Sequence[Any]) -> list[tuple[str, str]]:
    failed = [e for e in found if isinstance(e, Failure) and e.case is not None]
    return [(e.engine, e.case.name) for e in failed if e.error == OUT_OF_TIME]


def test_without_time_nothing_is_started() -> None:
    found, log = run_fakes(Fake("jaxinfer", 0.01), Fake("hf-eager", 0.01), seconds=0)
    assert log == []
    able = [("jaxinfer", "b2.in4"), ("jaxinfer", "ragged"), ("hf-eager", "b2.in4")]
    assert late_of(found) == able
    assert len(found) == len(able)


def test_an_engine_that_warms_up_too_slowly_is_cut_off_and_the_others_are_reported() -> None:
    quick = Fake("jaxinfer", 0.01)
    slow = Fake("torch-compile", 0.01, takes=[100, 1e6], after=quick)
    found, _ = run_fakes(quick, slow, session=replace(one_case(), cases=one_case().cases[:1]),
                         seconds=1000)  # fmt: skip
    assert slow.clock.seconds == pytest.approx(sessions.WARM_SHARE * 1000)
    assert not slow.alive
    assert trials_of(found) == {("jaxinfer", "b2.in4"): 3}
    assert late_of(found) == [("torch-compile", "b2.in4")]
    records = figures.summarise("m", found, greedy=True, exact=True, reference="jaxinfer")
    text = report.table(Run("2026-12-01", GPU, {}, "cmd", records=tuple(records)))
    assert "| b2.in4 | ms a step | 10 |" in text
    assert "- torch-compile: not run: out of time (latency b2.in4)" in text


def test_one_that_is_warm_for_some_cases_when_time_is_up_is_measured_in_these() -> None:
    found, _ = run_fakes(Fake("jaxinfer", 0.01, takes=[0] * (WARM_CALLS - 1) + [600]), seconds=1000)
    assert trials_of(found) == {("jaxinfer", "b2.in4"): 3}
    assert late_of(found) == [("jaxinfer", "ragged")]


@pytest.mark.parametrize(
    ("takes", "seconds", "repeats", "late"),
    [
        ([9, 9, 9, 9, 9, 9], 100, 3, []),  # no more than fits: 18 s each, thrice
        ([9, 9, 9, 9], 50, 2, []),  # the third would end too late, and is not begun
        ([9, 9, 9, 90], 50, 1, []),  # the second is cut off: the first is kept
        ([9, 90], 50, 0, ["b2.in4"]),
    ],
)
def test_repeats_end_in_time(
    takes: list[float], seconds: float, repeats: int, late: list[str]
) -> None:
    session = replace(one_case(), cases=one_case().cases[:1])
    before = [0.0] * (WARM_CALLS + 1)  # the brief one too
    fake = Fake("jaxinfer", 0.01, takes=[*before, *takes])
    found, _ = run_fakes(fake, session=session, seconds=seconds)
    assert trials_of(found).total() == repeats
    assert late_of(found) == [("jaxinfer", name) for name in late]
    assert sum(isinstance(e, Failure) for e in found) == len(late)


def test_a_slow_engine_repeats_a_case_less_often() -> None:
    slow = Fake("hf-continuous", 0.01, takes=[0] * (WARM_CALLS + 1) + [6] * 6)
    session = replace(one_case(), cases=one_case().cases[:1], case_seconds=30)
    found, _ = run_fakes(Fake("jaxinfer", 0.01), slow, session=session)
    assert trials_of(found) == {("jaxinfer", "b2.in4"): 3, ("hf-continuous", "b2.in4"): 2}
