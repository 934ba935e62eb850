"""Bars against made-up results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import bars, record
from bench.bars import Bar, judge
from bench.record import Record, Run

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
REFERENCE = {H100: {"copy_bytes_per_s": 3e12}}
RATE = Bar("a.tok_s", "rate", 160, ">=", "tok/s", H100, 2, "copy_bandwidth")
TIME = Bar("a.ms", "time", 6, "<=", "ms", H100, 2, "copy_bandwidth")
SIZE = Bar("a.bytes", "size", 20, "<", "bytes", "any", 2)
COLD = Bar("a.cold_s", "start", 10, "<", "s", "cpu", 2)


def run(
    kind: str, name: str, value: float | None, *, day: int = 1, copy: float | None = None
) -> Run:
    ceilings = {} if copy is None else {"copy_bytes_per_s": copy}
    failed = "broke" if value is None else None
    found = Record(name, value, error=failed)
    return Run(f"2026-01-{day:02}T00:00:00+00:00", {"kind": kind}, {}, "cmd", ceilings, (found,))


def verdict(bar: Bar, *runs: Run) -> str:
    return judge(bar, runs, REFERENCE)[0]


@pytest.mark.parametrize(
    ("bar", "value", "expected"),
    [(RATE, 160, "met"), (RATE, 159.9, "short"), (TIME, 6, "met"), (TIME, 6.1, "short")],
)
def test_asked_device_is_judged_literally(bar: Bar, value: float, expected: str) -> None:
    # Its own copy bandwidth, better or worse than the reference, changes nothing.
    assert verdict(bar, run(H100, bar.name, value, copy=6e12)) == expected


def test_other_gpu_is_judged_by_the_scaled_threshold() -> None:
    assert verdict(RATE, run(H200, "a.tok_s", 239, copy=4.5e12)) == "short (scaled)"
    assert verdict(RATE, run(H200, "a.tok_s", 240, copy=4.5e12)) == "met (scaled)"
    assert verdict(RATE, run("NVIDIA A100", "a.tok_s", 80, copy=1.5e12)) == "met (scaled)"
    assert verdict(TIME, run(H200, "a.ms", 4, copy=4.5e12)) == "met (scaled)"
    assert verdict(TIME, run(H200, "a.ms", 4.1, copy=4.5e12)) == "short (scaled)"


def test_a_ratio_of_one_run_counts_on_any_gpu_and_the_newest_decides() -> None:
    ratio = Bar("a.times", "times", 1.4, ">=", "ratio", H100, 11, "nothing")
    far = [run(H200, "a.times", value, day=2, copy=9e12) for value in (1.4, 1.3)]
    assert [verdict(ratio, one) for one in far] == ["met (elsewhere)", "short (elsewhere)"]
    assert verdict(ratio, run(H100, "a.times", 1.5, day=1), far[1]) == "short (elsewhere)"
    assert verdict(ratio, far[1], run(H100, "a.times", 1.5, day=3)) == "met"
    assert verdict(ratio, run("cpu", "a.times", 1.5)) == "missing"


def test_a_figure_may_have_several_bars() -> None:
    more = Bar("gap.a.tok_s", "rate", 182, ">=", "tok/s", H100, 10, "copy_bandwidth", "a.tok_s")
    found = run(H100, "a.tok_s", 170)
    assert (verdict(RATE, found), verdict(more, found)) == ("met", "short")


def test_asked_device_outweighs_newer_results_elsewhere() -> None:
    here = run(H100, "a.tok_s", 100, day=1)
    there = run(H200, "a.tok_s", 900, day=2, copy=4.5e12)
    assert verdict(RATE, here, there) == "short"


def test_newest_result_counts_and_a_failed_one_does_not() -> None:
    old, new = run("cpu", "a.cold_s", 5, day=1), run("cpu", "a.cold_s", 11, day=2)
    failed = run("cpu", "a.cold_s", None, day=3)
    assert verdict(COLD, old, new, failed) == "short"
    assert verdict(COLD, failed) == "missing"


@pytest.mark.parametrize(
    "stand_in",
    [
        run("cpu", "a.tok_s", 1e9, copy=1e10),  # a CPU never stands for a GPU
        run(H200, "a.tok_s", 1e9),  # without its ceiling nothing can be scaled
        run(H100, "other", 1e9),
    ],
)
def test_missing(stand_in: Run) -> None:
    assert verdict(RATE, stand_in) == "missing"
    assert verdict(RATE) == "missing"


def test_bar_that_does_not_scale_says_nothing_about_another_device() -> None:
    assert verdict(COLD, run(H200, "a.cold_s", 1, copy=4e12)) == "missing"
    assert verdict(SIZE, run(H200, "a.bytes", 19)) == "met"
    assert verdict(SIZE, run("cpu", "a.bytes", 20)) == "short"


def test_table_shows_literal_and_scaled() -> None:
    judged = [(RATE, *judge(RATE, [run(H200, "a.tok_s", 200, copy=4.5e12)], REFERENCE))]
    text = bars.table(judged)
    assert "as asked (>= 160): yes" in text
    assert "4.50 TB/s (>= 240): no" in text
    assert f"not measured on {H100}" in text


def test_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "bars.toml"
    toml.write_text(
        '[[bar]]\nname = "a.bytes"\nwhat = "size"\nasked = 20\ndirection = "<"\n'
        'unit = "bytes"\ndevice = "any"\nissue = 2\n'
    )
    results = tmp_path / "results"
    arguments = ["--bars", str(toml), "--results", str(results)]
    assert bars.main(arguments) == 1
    good = run("cpu", "a.bytes", 19)
    record.write(good, record.path_for(good, "size", results))
    assert bars.main(arguments) == 0
    broken = replace(
        good, date="2026-01-02T00:00:00+00:00", records=(Record("p.failed", None, error="no"),)
    )
    record.write(broken, record.path_for(broken, "size", results))
    assert bars.main(arguments) == 0
    assert "failed part: cpu" in capsys.readouterr().out
    (results / "x.json").write_text("{}")
    assert bars.main(arguments) == 2


def test_shipped_bars_are_well_formed() -> None:
    shipped, reference = bars.load_bars()
    assert {bar.issue for bar in shipped} >= {2}
    assert reference[H100]["copy_bytes_per_s"] == 2.96e12


def test_wrong_bars_are_refused(tmp_path: Path) -> None:
    entry = (
        '[[bar]]\nname = "a"\nwhat = "w"\nasked = 1\ndirection = "{d}"\nunit = "s"\n'
        'device = "any"\nissue = 2\n'
    )
    path = tmp_path / "bars.toml"
    path.write_text(entry.format(d="=="))
    with pytest.raises(ValueError, match="direction '=='"):
        bars.load_bars(path)
    path.write_text(2 * entry.format(d="<"))
    with pytest.raises(ValueError, match="twice"):
        bars.load_bars(path)
    path.write_text(entry.format(d="<") + 'scales_with = "copy_bandwidth"\n')
    with pytest.raises(ValueError, match="no reference"):
        bars.load_bars(path)
