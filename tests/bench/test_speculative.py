"""What is made of measured speculation: bounds, prompts, a table and a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import speculative_report as report
from bench.record import Record, Run
from bench.speculative import demo_prompts, in_turn, lower_bound


def test_a_lower_bound_lies_below_the_median_and_within_the_data() -> None:
    ratios = [0.9, 1.0, 1.02, 1.04, 1.3]
    assert 0.9 <= lower_bound(ratios) < 1.02
    assert lower_bound([1.5] * 4) == 1.5
    assert lower_bound(ratios * 20) > lower_bound(ratios)


def test_prompts_come_in_turn_and_none_twice() -> None:
    prompts = demo_prompts(12, 96)
    assert len({tuple(p) for p in prompts}) == 12
    assert all(90 < len(p) <= 96 for p in prompts)
    assert in_turn(prompts, 4, 1) == prompts[4:8]
    assert in_turn(prompts, 4, 3) == prompts[:4]
    assert in_turn(prompts, 2, -1) == prompts[-2:]


def one(proposer: str, requests: int, value: float | None, acceptance: float | None) -> Record:
    detail = {
        "proposer": proposer, "temperature": 0.7, "requests": requests, "tokens_a_step": 2.5,
        "acceptance": acceptance,
    }  # fmt: skip
    return Record(f"{report.PREFIX}.{proposer}.t0.7.b{requests}.speedup", value, "ratio", detail)


@pytest.fixture
def run() -> Run:
    records = (
        one("draft", 1, 1.5, 0.7), one("draft", 8, 1.25, 0.7), one("lookup", 1, 1.0, None),
        Record("speculation.report.failed", None, error="ended"),
    )  # fmt: skip
    return Run("2026-01-01T00:00:00+00:00", {"kind": "cpu"}, {}, "cmd", {}, records)


def test_table(run: Run) -> None:
    lines = report.table(run).splitlines()
    assert lines[2] == "| draft | 0.7 | 1 | 1.50 | 70 % | 2.5 |"
    assert lines[4] == "| lookup | 0.7 | 1 | 1.00 |  | 2.5 |"
    assert len(lines) == 5


def test_plot(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "found.svg"
    report.plot(run, path)
    text = path.read_text()
    assert "draft" in text or "<path" in text
    assert path.stat().st_size > 1000
