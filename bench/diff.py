"""What got faster or slower from one result file to another, beyond the noise of their repeats.

    python -m bench.diff bench/results/A.json bench/results/B.json

A figure's noise is how far its repeats lie apart, over their median, in the file where that is
more; `--noise` where it was measured once. A change counts that is larger. Exit code 1: something
got worse. Runs of different devices are refused: their figures say nothing about a change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from bench import record
from bench.figures import spread
from bench.record import Record, Run

NOISE = 0.05
# Less is better of these; more of every other unit.
LESS = ("ms", "us", "s", "bytes")
NEITHER = ("",)


class Change(NamedTuple):
    """A figure in both files. `ratio`: new over old; `noise`: relative."""

    name: str
    old: float
    new: float
    unit: str
    ratio: float
    noise: float
    verdict: Literal["better", "worse", "same"]


def noise_of(r: Record, least: float) -> float:
    """Relative; `least` where there are no repeats."""
    each = r.detail.get("each", ())
    return spread(each) if len(each) > 1 else least


def compare(old: Run, new: Run, noise: float = NOISE) -> list[Change]:
    """Every figure that both have, the largest changes first.

    Raises:
        ValueError: the runs are of different devices.
    """
    kinds = [run.device["kind"] for run in (old, new)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"one run is of {kinds[0]}, the other of {kinds[1]}: expected one device")
    before = {r.name: r for r in old.records if r.value and r.unit not in NEITHER}
    changes = []
    for r in new.records:
        was = before.get(r.name)
        if was is None or not was.value or not r.value:
            continue
        ratio = r.value / was.value
        most = max(noise_of(was, noise), noise_of(r, noise))
        verdict: Literal["better", "worse", "same"] = "same"
        if max(ratio, 1 / ratio) > 1 + most:
            verdict = "better" if (ratio < 1) == (r.unit in LESS) else "worse"
        changes.append(Change(r.name, was.value, r.value, r.unit, ratio, most, verdict))
    return sorted(changes, key=lambda c: max(c.ratio, 1 / c.ratio), reverse=True)


def gone(old: Run, new: Run) -> list[str]:
    """Figures that the old run has and the new one has not."""
    left = {r.name for r in new.records if r.value is not None}
    return [r.name for r in old.records if r.value is not None and r.name not in left]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what got faster or slower")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=float, default=NOISE, help="of figures without repeats")
    parser.add_argument("--all", action="store_true", help="what is within the noise as well")
    args = parser.parse_args(words)
    old, new = record.read(args.old), record.read(args.new)
    try:
        changes = compare(old, new, args.noise)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for c in changes:
        if args.all or c.verdict != "same":
            print(f"{c.verdict:<7}{c.name:<64} {c.old:>10.5g} → {c.new:>10.5g} {c.unit:<6} "
                  f"×{c.ratio:.3f} (noise {c.noise:.1%})")  # fmt: skip
    count = {kind: sum(c.verdict == kind for c in changes) for kind in ("better", "worse", "same")}
    for name in gone(old, new):
        print(f"gone   {name}")
    print(", ".join(f"{n} {kind}" for kind, n in count.items()))
    return 1 if count["worse"] else 0


if __name__ == "__main__":
    sys.exit(main())
