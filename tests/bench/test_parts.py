"""Parts in their own processes: what one finds survives its own end and the others' failures."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench import parts, record
from bench.parts import Part
from bench.record import Record, Run

PROGRAM = """
import os, pathlib, sys, time
from bench.parts import STARTED, emit
from bench.record import Record
path = pathlib.Path(sys.argv[sys.argv.index("--records") + 1])
assert float(os.environ[STARTED]) <= time.time()
emit(path, Record("copy", 2e12, "bytes/s", {"ceiling": "copy_bytes_per_s"}))
emit(path, Record("x.ms_per_step", 2.0, "ms", {"bytes_per_step": 10**9}))
if "--fail" in sys.argv:
    raise SystemExit("no such thing")
if "--hang" in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_up_part.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(record.ROOT)]))
    return "made_up_part"


def test_failure_keeps_what_was_found(program: str) -> None:
    found = parts.run_part(Part("p", program, ("--fail",), timeout_s=60))
    assert [r.name for r in found] == ["copy", "x.ms_per_step", "p.failed"]
    assert found[-1].error == "exit code 1"
    assert "no such thing" in found[-1].detail["output_tail"]


def test_hanging_part_is_ended(program: str) -> None:
    began = time.monotonic()
    found = parts.run_part(Part("p", program, ("--hang",), timeout_s=1))
    assert time.monotonic() - began < 30
    assert found[-1].error == "ended after 1 s"


def test_later_parts_run_after_a_failed_one(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    run = Run("2026-01-01T00:00:00+00:00", {"kind": "cpu"}, {}, "cmd")
    path = tmp_path / "results" / "run.json"
    todo = [Part("broken", "no_such_module"), Part("good", program, timeout_s=60)]
    run = parts.run_parts(todo, run, path)
    assert [r.name for r in run.records] == [
        "broken.failed", "copy", "x.ms_per_step", "x.pct_copy",
    ]  # fmt: skip
    assert run.ceilings == {"copy_bytes_per_s": 2e12}
    assert run.records[-1].value == 25.0  # 1e9 bytes in 2 ms are 0.5e12 a second
    assert record.read(path) == run
    assert record.read(tmp_path / "out" / "run.json") == run


TURN_PROGRAM = """
import os, sys
from bench import parts
if "--fail" in sys.argv:
    raise SystemExit("no such thing")
def note(what):
    with open(os.environ["JOURNAL"], "a") as file:
        file.write(f"{what} {os.getpid()}\\n")
note("ready")
with parts.turn():
    note("begin")
    note("end")
"""


def test_parts_that_run_together_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_turn.py").write_text(TURN_PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(record.ROOT)]))
    journal = tmp_path / "journal"
    monkeypatch.setenv("JOURNAL", str(journal))
    group = [Part(f"p{i}", "made_up_turn", timeout_s=60) for i in range(4)]
    found = parts.run_together([*group, Part("bad", "made_up_turn", ("--fail",), timeout_s=60)])
    assert [r.name for r in found] == ["bad.failed"]
    lines = [line.split() for line in journal.read_text().splitlines()]
    assert [what for what, _ in lines] == ["ready"] * 4 + ["begin", "end"] * 4
    assert all(a[1] == b[1] for a, b in zip(lines[4::2], lines[5::2], strict=True))


def test_no_time_left_is_recorded(program: str, tmp_path: Path) -> None:
    run = Run("2026-01-01T00:00:00+00:00", {"kind": "cpu"}, {}, "cmd")
    run = parts.run_parts([Part("late", program)], run, tmp_path / "run.json", minutes=0)
    assert run.records == (Record("late.failed", None, error="not started: out of time"),)


def test_best_form_is_the_ceiling() -> None:
    found = [
        Record("a", 1.0, detail={"ceiling": "copy_bytes_per_s"}),
        Record("b", 3.0, detail={"ceiling": "copy_bytes_per_s"}),
        Record("c", 9.0),
        Record("d", None, detail={"ceiling": "copy_bytes_per_s"}),
    ]
    assert parts.best_ceilings(found) == {"copy_bytes_per_s": 3.0}


def test_cpu_is_not_timed_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "device", lambda: {"kind": "NVIDIA H200"})
    parts.check_platform("gpu")
    with pytest.raises(RuntimeError, match="runs on the CPU"):
        parts.check_platform("cpu")


def test_command_line_leaves_out_where_results_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x.py", "--batch", "1", "--out", "/somewhere", "--hf"])
    assert parts.command_line("bench.decode") == "python -m bench.decode --batch 1 --hf"


def test_share_of_copy_knows_milliseconds_and_microseconds_and_nothing_else() -> None:
    counted = {"bytes_per_step": 10**6}
    found = parts.share_of_copy(
        [
            Record("a.b.us", 10.0, "us", counted),
            Record("c.ms_per_step", 1.0, "ms", counted),
            Record("d.us", 1.0, "us"),
            Record("e.over_bf16", 2.0, "ratio", counted),
        ],
        1e12,
    )
    assert [(r.name, r.value) for r in found] == [("a.b.pct_copy", 10.0), ("c.pct_copy", 0.1)]
