"""Holds the bars of `bars.toml` against the newest results: `make bars`.

The verdict on a bar, from the newest result of each device:

- Measured on the device it was asked on: the figure is held against the threshold as asked, and
  nothing else counts. `met` or `short`.
- Never measured there, but on another GPU, and the bar scales with copy bandwidth: the threshold
  is multiplied (a time: divided) by the other run's own copy bandwidth over the asked device's
  reference figure, and the figure is held against that: `met (scaled)` or `short (scaled)`. With
  several such GPUs the newest result decides. The literal comparison is printed beside it, and
  counts for nothing.
- Where the bar scales with nothing (`scales_with = "nothing"`: both sides of a ratio were measured
  in one run), the newest result of any GPU counts, against the threshold as asked; of another than
  the device asked: `met (elsewhere)` or `short (elsewhere)`.
- Otherwise `missing`: no result, or none on a device that says anything about this bar.

A CPU never stands for a GPU. Exit code 0: every bar is met, here or elsewhere; 1: one is not;
2: `bars.toml` or a result file is wrong. Failed parts of the newest run of each device are listed
below the table.
"""

from __future__ import annotations

import argparse
import operator
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import record
from bench.record import Run

DIRECTIONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
BARS = Path(__file__).with_name("bars.toml")


@dataclass(frozen=True)
class Bar:
    """One entry of `bars.toml`; its head explains the fields."""

    name: str
    what: str
    asked: float
    direction: str
    unit: str
    device: str
    issue: int
    scales_with: str | None = None
    record: str | None = None

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"{self.name}: direction {self.direction!r}, not one of >=, <=, <")
        if self.scales_with not in (None, "copy_bandwidth", "nothing"):
            raise ValueError(
                f"{self.name}: scales_with {self.scales_with!r}, not copy_bandwidth or nothing"
            )

    @property
    def measured_by(self) -> str:
        """The name of the record."""
        return self.record or self.name


@dataclass(frozen=True)
class Row:
    """A bar held against the newest result of one device.

    Attributes:
        scaled: the threshold for this device, where it differs from the one asked.
        literal, derived: whether the figure meets the threshold as asked; as scaled.
    """

    bar: Bar
    run: Run
    value: float
    literal: bool
    scaled: float | None = None
    derived: bool | None = None


def load_bars(path: Path = BARS) -> tuple[tuple[Bar, ...], dict[str, dict[str, float]]]:
    """The bars, and the reference ceilings by device.

    Raises:
        ValueError: an entry is wrong, or two have the same name.
    """
    data = tomllib.loads(path.read_text())
    try:
        bars = tuple(Bar(**entry) for entry in data["bar"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    names = [bar.name for bar in bars]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: a bar occurs twice")
    reference = data.get("reference", {})
    for bar in bars:
        if bar.scales_with == "copy_bandwidth" and bar.device not in reference:
            raise ValueError(f"{path}: {bar.name} scales, but {bar.device} has no reference")
    return bars, reference


def judge(
    bar: Bar, runs: Sequence[Run], reference: dict[str, dict[str, float]]
) -> tuple[str, list[Row]]:
    """The verdict on `bar` (see the module's head) and a row for each device, newest first.

    Args:
        bar: what is asked.
        runs: results, oldest first.
        reference: ceilings of the devices that bars were asked on.
    """
    newest: dict[str, Row] = {}
    for run in runs:
        for r in run.records:
            if r.name == bar.measured_by and r.value is not None:
                newest[run.device["kind"]] = _row(bar, run, r.value, reference)
    rows = sorted(newest.values(), key=lambda row: row.run.date, reverse=True)
    if bar.device == "any" and rows:
        return _verdict(rows[0].literal), rows
    if bar.scales_with == "nothing":
        gpus = [row for row in rows if row.run.device["kind"] != "cpu"]
        if not gpus:
            return "missing", rows
        where = "" if gpus[0].run.device["kind"] == bar.device else " (elsewhere)"
        return _verdict(gpus[0].literal) + where, rows
    if bar.device in newest:
        return _verdict(newest[bar.device].literal), rows
    for row in rows:
        if row.derived is not None:
            return f"{_verdict(row.derived)} (scaled)", rows
    return "missing", rows


def _verdict(met: bool) -> str:
    return "met" if met else "short"


def _row(bar: Bar, run: Run, value: float, reference: dict[str, dict[str, float]]) -> Row:
    compare = DIRECTIONS[bar.direction]
    literal = bool(compare(value, bar.asked))
    kind, copy = run.device["kind"], run.ceilings.get("copy_bytes_per_s")
    if bar.scales_with != "copy_bandwidth" or kind in (bar.device, "cpu") or copy is None:
        return Row(bar, run, value, literal)
    ratio = copy / reference[bar.device]["copy_bytes_per_s"]
    scaled = bar.asked * ratio if bar.direction == ">=" else bar.asked / ratio
    return Row(bar, run, value, literal, scaled, bool(compare(value, scaled)))


def table(judged: Sequence[tuple[Bar, str, list[Row]]]) -> str:
    """Asked beside measured, with device, date, command and verdict."""
    lines = []
    for bar, verdict, rows in judged:
        lines.append(f"{verdict.upper():<15} {bar.name} (issue {bar.issue}): {bar.what}")
        asked = f"{bar.direction} {bar.asked:g} {bar.unit}"
        lines.append(f"    asked    {asked} on {bar.device}")
        lines += [f"    measured {_describe(row)}" for row in rows]
        asked_on = bar.device != "any"
        if asked_on and all(row.run.device["kind"] != bar.device for row in rows):
            lines.append(f"    not measured on {bar.device}")
    return "\n".join(lines)


def _describe(row: Row) -> str:
    bar, run = row.bar, row.run
    yes = {True: "yes", False: "no"}
    parts = [f"{row.value:.5g} {bar.unit} on {run.device['kind']}, {run.date[:10]}, {run.command}"]
    if row.scaled is None:
        parts.append(f"meets {bar.direction} {bar.asked:g}: {yes[row.literal]}")
    else:
        ratio = row.run.ceilings["copy_bytes_per_s"] / 1e12
        parts.append(f"as asked ({bar.direction} {bar.asked:g}): {yes[row.literal]}")
        parts.append(
            f"scaled by this run's copy bandwidth of {ratio:.2f} TB/s "
            f"({bar.direction} {row.scaled:.4g}): {yes[bool(row.derived)]}"
        )
    return "; ".join(parts)


def failures(runs: Sequence[Run]) -> list[str]:
    """Failed parts of each device's newest run."""
    newest: dict[str, Run] = {run.device["kind"]: run for run in runs}
    return [
        f"{kind}, {run.date}: {r.name}: {r.error}"
        for kind, run in newest.items()
        for r in run.records
        if r.error is not None
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compare what was asked with what was measured")
    parser.add_argument("--bars", type=Path, default=BARS)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    try:
        bars, reference = load_bars(args.bars)
        runs = record.read_all(args.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    judged: list[tuple[Bar, str, Any]] = [(bar, *judge(bar, runs, reference)) for bar in bars]
    print(table(judged))
    for line in failures(runs):
        print(f"failed part: {line}")
    short = [bar.name for bar, verdict, _ in judged if not verdict.startswith("met")]
    far = sum(verdict in ("met (scaled)", "met (elsewhere)") for _, verdict, _ in judged)
    met = len(bars) - len(short)
    print(f"{met} of {len(bars)} bars met, {far} of them on another GPU than was asked")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
