"""The scheduler's event log: what an engine wrote is replayed to the same actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinfer import LLM, InvalidRequest, SamplingParams
from jaxinfer.batcher import Guess, Progress, Run
from jaxinfer.cli import main
from jaxinfer.eventlog import Step, describe, replay
from tests.conftest import TinyModel, small_llm

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def log(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of prompts that share a beginning, with preemptions and a cancellation."""
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    options: dict[str, Any] = {
        "dtype": "float32", "max_num_seqs": 2, "max_model_len": 48, "max_steps": 4,
        "max_num_batched_tokens": 16, "page_size": 8, "kv_cache_bytes": 8 * 2048,
        "event_log": str(path),
    }  # fmt: skip
    with LLM.from_params(tiny.params, tiny.config, **options) as llm:
        llm.generate([[*range(20, 30), i] for i in range(6)], PARAMS)
        stream = llm.stream([1, 2, 3], PARAMS)
        next(stream)
        stream.close()
        llm.generate([[4, 5]], PARAMS)
    return path


def test_replay(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = list(replay(log))
    assert [step.number for step in steps] == list(range(2, 2 + len(steps)))
    told = "\n".join(map(describe, steps))
    for word in (
        "6 submitted", "read 0 [0:11]", "8 shared", "4 steps of", "preempted: no pages left",
        "returns with", "wait", "cancelled", "finished",
    ):  # fmt: skip
        assert word in told
    assert main(["replay", str(log)]) == 0
    assert capsys.readouterr().out == told + "\n"


def test_replay_of_guesses(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    options = {"speculative": "lookup,tokens=2,adapt=false", "event_log": str(path)}
    with small_llm(tiny, **options) as llm:
        llm.generate([[7, 8, 9] * 4, [5] * 20], PARAMS)
    steps = list(replay(path))
    events, actions = ([x for s in steps for x in getattr(s, kind)] for kind in Step._fields[1:3])
    assert [e.tokens for e in events if isinstance(e, Guess)][:1] == [2]
    runs = [a for a in actions if isinstance(a, Run)]
    assert {run.guesses for run in runs} == {0, 2}
    told_of = [e for e in events if isinstance(e, Progress)]
    assert 0 < len(told_of) <= sum(run.guesses > 0 for run in runs)
    for e in told_of:
        assert (e.ids.dtype, e.least.dtype, e.most.dtype) == (np.int64,) * 3
        assert (e.least <= e.most).all()
    told = "\n".join(map(describe, steps))
    for word in ("2 guesses a step", "0 1 got on", "2 steps with 2 guesses of 0 1"):
        assert word in told
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        line["events"] = [e for e in line["events"] if e["kind"] != "Progress"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InvalidRequest, match="the scheduler now does"):
        list(replay(path))


def test_a_line_cut_off_by_a_kill_is_left_out(log: Path, tmp_path: Path) -> None:
    whole = log.read_text()
    (cut := tmp_path / "cut.jsonl").write_text(whole[:-20])
    assert len(list(replay(cut))) == len(list(replay(log))) - 1


def test_an_engine_that_was_reset_begins_again(log: Path, tmp_path: Path) -> None:
    lines = log.read_text().splitlines(keepends=True)
    (twice := tmp_path / "twice.jsonl").write_text("".join(lines[:5] + lines))
    assert len(list(replay(twice))) == 4 + len(lines) - 1


@pytest.mark.parametrize(
    "bad",
    ["", "x", "[]\n", "{}\n", '{"version": 1, "config": {}}\n', '{"version": 2, "config": {}}\n'],
)
def test_no_event_log(bad: str, tmp_path: Path) -> None:
    (path := tmp_path / "bad.jsonl").write_text(bad)
    if not bad.endswith("\n"):
        assert list(replay(path)) == []
        return
    with pytest.raises(InvalidRequest, match="line 1"):
        list(replay(path))


def test_a_scheduler_that_does_something_else_is_noticed(log: Path, tmp_path: Path) -> None:
    lines = log.read_text().splitlines(keepends=True)
    step = json.loads(lines[3])
    step["actions"][0]["row"] = 99
    lines[3] = json.dumps(step) + "\n"
    (path := tmp_path / "other.jsonl").write_text("".join(lines))
    with pytest.raises(InvalidRequest, match="line 4: the scheduler now does"):
        list(replay(path))


def test_where_a_log_cannot_be(tiny: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="event_log="):
        LLM.from_params(tiny.params, tiny.config, event_log=str(tmp_path / "none" / "log"))
