"""Finds the fastest config of the attention kernels and writes `pallas_kernels/tuning.json`.

    python -m bench.tune_attention --only sm90/decode/d128/g4

Every entry belongs to one (arch, kind, head_dim, group, kv_bits); `pallas_kernels.tuning` says what
they mean and reads them. All configs of a key are compiled side by side and timed by turns. Those
that do not compile or are too inaccurate are left out. What was there for other keys stays, so a
sweep may be done in pieces. A config changes no bit of a result; the float32 reference is compared
with all the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench import parts, record
from bench.attention_cases import Case, Group
from bench.parts import Part
from bench.record import Record
from pallas_kernels import tuning

HEAD_DIMS, GROUPS, BITS = (128, 64, 256), (4, 8, 1, 2, 5, 7, 16), (16, 8)
KV_HEADS = 8

# Values of the fields of each backend's `Config`; every combination is tried. By kind, and by kind
# and bits of the pages where 8-bit ones have others.
GRIDS: dict[str, dict[str, dict[str, list[Any]]]] = {
    "sm90": {
        "decode": {"teams": [1, 2], "stages": [2, 1, 3]},
        "decode8": {"teams": [2, 1], "stages": [2, 3, 4]},
        "prefill": {
            "consumers": [1, 2], "stages": [1, 2], "overlap": [False, True],
        },
        "prefill8": {"consumers": [1, 2], "stages": [2, 4], "columns": [16, 32, 48]},
    },
    "sm80": {"decode": {"stages": [2, 3, 4]}, "prefill": {"stages": [2, 3, 4]}},
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """What a config belongs to."""

    arch: str
    kind: str
    head_dim: int
    group: int
    kv_bits: int

    def __str__(self) -> str:
        return f"{self.arch}/{self.kind}/d{self.head_dim}/g{self.group}/{self.kv_bits}"

    def case(self) -> Case:
        """What is timed: 32 × 4096 decode, or two prompts of 4096 tokens."""
        heads = max(1, min(KV_HEADS, 32 // self.group))
        groups = (Group(32, 4096),) if self.kind == "decode" else (Group(2, 4096, 4096),)
        kv = "bf16" if self.kv_bits == 16 else "int8"
        return Case(f"tune.{self}", groups, kv, True, heads, self.group, self.head_dim)


def keys(archs: Sequence[str], only: Sequence[str] = ("",)) -> list[Key]:
    """Every key whose name starts with one of `only`, the usual ones first."""
    found = [Key(*k) for k in product(archs, ("decode", "prefill"), HEAD_DIMS, GROUPS, BITS)]
    return [key for key in found if str(key).startswith(tuple(only))]


def configs(key: Key) -> list[dict[str, Any]]:
    """The combinations of the grid."""
    grids = GRIDS[key.arch]
    grid = grids[key.kind] if key.kv_bits == 16 else grids.get(f"{key.kind}8", grids[key.kind])
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def read(path: Path = tuning.PATH) -> dict[Key, dict[str, Any]]:
    """Entries by key; none where there is no file. Raises as `tuning.entries`."""
    return {Key(*key): dict(entry) for key, entry in tuning.entries(path).items()}


def write(entries: dict[Key, dict[str, Any]], path: Path = tuning.PATH) -> None:
    """Sorted, an entry a line, so that a change is a line in a diff."""
    lines = [json.dumps(entries[key]) for key in sorted(entries, key=str)]
    text = ",\n  ".join(lines)
    path.write_text(f'{{"version": {tuning.VERSION}, "entries": [\n  {text}\n]}}\n')


def fastest(timed: Iterable[tuple[dict[str, Any], float]]) -> tuple[dict[str, Any], float]:
    """The config to keep: of those within 1% of the best, the first in the grid.

    Noise would otherwise make every sweep choose another one.
    """
    rows = list(timed)
    best = min(us for _, us in rows)
    return next((config, us) for config, us in rows if us <= 1.01 * best)


def tune(todo: Sequence[Key]) -> dict[Key, dict[str, Any]]:
    """Entries of keys for which some config works. Prints a line for each config."""
    jobs = [(key, config) for key in todo for config in configs(key)]
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    found = parts.run_together(
        [
            Part(f"{i}", "bench.tune_attention", ("--part", str(key), json.dumps(config)), 200, env)
            for i, (key, config) in enumerate(jobs)
        ]
    )
    times: dict[Key, list[tuple[dict[str, Any], float]]] = {key: [] for key in todo}
    for key, config in jobs:
        name = _name(str(key), config)
        us = next((r.value for r in found if r.name == name and r.value), None)
        print(f"{name}: {us}", flush=True)
        if us:
            times[key].append((config, us))
    device, made = record.device()["kind"], {}
    for key, rows in times.items():
        if rows:
            config, us = fastest(rows)
            made[key] = {**vars(key), "config": config, "us": round(us, 1), "device": device}
    return made


def _name(key: str, config: dict[str, Any]) -> str:
    return f"{key} {json.dumps(config)}"


def _time(key: str, config: str, records: Path | None) -> None:
    """One config, in a process of its own."""
    from bench.attention_parts import prepare

    arch, *_ = key.split("/")
    case = next(k for k in keys([arch]) if str(k) == key).case()
    timed = prepare(case, arch, json.loads(config))
    with parts.turn():
        us, *_ = timed()
    parts.emit(records, Record(_name(key, json.loads(config)), us.value, "us"))


def main() -> None:
    parser = argparse.ArgumentParser(description="tune the attention kernels on this GPU")
    parser.add_argument("--arch", default="sm90")
    parser.add_argument("--only", default="", help="keys that start so, separated by commas")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no keys after this")
    parser.add_argument("--at-once", type=int, default=2, help="keys whose configs run together")
    parser.add_argument("--missing", action="store_true", help="keys without an entry alone")
    parser.add_argument("--path", type=Path, default=tuning.PATH)
    parser.add_argument("--part", nargs=2, metavar=("KEY", "CONFIG"), help="time one, here")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        key, config = args.part
        _time(key, config, args.records)
        return
    entries, last_start = read(args.path), time.monotonic() + 60 * args.minutes
    todo = [
        key
        for key in keys(args.arch.split(","), args.only.split(","))
        if not (args.missing and key in entries)
    ]
    for i in range(0, len(todo), args.at_once):
        if time.monotonic() > last_start:
            print(f"out of time before {todo[i]}")
            break
        entries |= tune(todo[i : i + args.at_once])
        write(entries, args.path)
    print(args.path.read_text() if args.path.exists() else "nothing was found")


if __name__ == "__main__":
    main()
