"""Result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import record
from bench.record import Record, Run

RUN = Run(
    date="2026-01-02T03:04:05.006+00:00",
    device={"kind": "NVIDIA H100 80GB HBM3", "count": 1, "memory": 80 << 30},
    versions={"jax": "0.11.2", "torch": None},
    command="python -m bench.decode",
    ceilings={"copy_bytes_per_s": 2.96e12},
    records=(Record("a.ms", 1.5, "ms", {"n": 3}), Record("b.failed", None, error="exit code 1")),
)


def test_round_trip_under_the_documented_name(tmp_path: Path) -> None:
    path = record.path_for(RUN, "decode", tmp_path / "results")
    assert path.name == "2026-01-02T030405006-nvidia-h100-80gb-hbm3-decode.json"
    record.write(RUN, path)
    assert record.read(path) == RUN
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_file_has_the_documented_fields(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.write(RUN, path)
    data = json.loads(path.read_text())
    assert data["version"] == 1
    assert set(data) == {
        "version", "date", "device", "versions", "command", "ceilings", "records",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 2}'])
def test_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.json: not a result file"):
        record.read(path)


def test_read_all_is_sorted_by_date(tmp_path: Path) -> None:
    for name, date in (("a", "2026-02-01T00:00:00+00:00"), ("b", "2026-01-01T00:00:00+00:00")):
        record.write(Run(date, {"kind": "cpu"}, {}, name), tmp_path / f"{name}.json")
    assert [run.command for run in record.read_all(tmp_path)] == ["b", "a"]
    assert record.read_all(tmp_path / "nothing") == []


def test_start_describes_this_machine() -> None:
    run = record.start("cmd")
    assert run.device["kind"]
    assert run.device["memory"] > 1 << 28
    assert run.versions["jax"]
    assert run.records == ()


def test_command_line_records_one_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["record", "test.wall_s", "312.5", "s", "--command", "make test", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path)])
    record.main()
    run = record.read(Path(capsys.readouterr().out.strip()))
    assert run.command == "make test"
    assert run.device["kind"] == "cpu"
    assert run.records == (Record("test.wall_s", 312.5, "s"),)
