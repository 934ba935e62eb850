"""Finds the fastest config of the attention kernels and writes `pallas_kernels/tuning.json`.

    python -m bench.tune_attention --only sm90/decode/d128 --minutes 8

Every entry belongs to one (arch, kind, head_dim, group, kv): "kind" is `decode` (the rows of a KV
head's new tokens fit one tile) or `prefill`. Configs that do not compile or are too inaccurate are
left out. What was there for other keys stays, so a sweep may be done in pieces. A config changes no
bit of a result; the float32 reference is compared with all the same.

The file: `{"version": 1, "entries": [{arch, kind, head_dim, group, kv, config, us, device}]}`.
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

from bench import record
from bench.attention_cases import Case, Group

PATH = record.ROOT / "pallas_kernels" / "tuning.json"
VERSION = 1
HEAD_DIMS, GROUPS, KVS = (128, 64, 256), (4, 8, 1, 2, 5, 7, 16), ("bf16", "int8", "fp8")
KV_HEADS = 8

# Values of the fields of each backend's `Config`; every combination is tried. By kind, and by kind
# and bits of the pages where 8-bit ones have others.
GRIDS: dict[str, dict[str, dict[str, list[Any]]]] = {
    "sm90": {
        "decode": {"teams": [1, 2], "stages": [1, 2, 3], "defer": [False, True]},
        "decode8": {"teams": [1, 2], "stages": [2, 3, 4], "defer": [False, True]},
        "prefill": {
            "consumers": [1, 2], "stages": [1, 2], "overlap": [False, True],
            "ping_pong": [False, True],
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
    kv: str

    def __str__(self) -> str:
        return f"{self.arch}/{self.kind}/d{self.head_dim}/g{self.group}/{self.kv}"

    def case(self) -> Case:
        """What is timed: 64 × 4096 decode, or two prompts of 4096 tokens."""
        heads = max(1, min(KV_HEADS, 32 // self.group))
        groups = (Group(64, 4096),) if self.kind == "decode" else (Group(2, 4096, 4096),)
        return Case(f"tune.{self}", groups, self.kv, True, heads, self.group, self.head_dim)


def keys(archs: Sequence[str], only: str = "") -> list[Key]:
    """Every key whose name starts with `only`, the usual ones first."""
    found = [Key(*k) for k in product(archs, ("decode", "prefill"), HEAD_DIMS, GROUPS, KVS)]
    return [key for key in found if str(key).startswith(only)]


def configs(key: Key) -> list[dict[str, Any]]:
    """The combinations of the grid. Only two consumers that overlap can take turns."""
    grids = GRIDS[key.arch]
    grid = grids[key.kind] if key.kv == "bf16" else grids.get(f"{key.kind}8", grids[key.kind])
    made = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [c for c in made if not c.get("ping_pong") or (c["consumers"] == 2 and c["overlap"])]


def read(path: Path = PATH) -> dict[Key, dict[str, Any]]:
    """Entries by key; none where there is no file.

    Raises:
        ValueError: another version.
    """
    if not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data["version"] != VERSION:
        raise ValueError(f"{path}: version {data['version']}, expected {VERSION}")
    fields = Key.__dataclass_fields__
    return {Key(**{f: entry[f] for f in fields}): entry for entry in data["entries"]}


def write(entries: dict[Key, dict[str, Any]], path: Path = PATH) -> None:
    """Sorted, an entry a line, so that a change is a line in a diff."""
    lines = [json.dumps(entries[key]) for key in sorted(entries, key=str)]
    text = ",\n  ".join(lines)
    path.write_text(f'{{"version": {VERSION}, "entries": [\n  {text}\n]}}\n')


def fastest(timed: Iterable[tuple[dict[str, Any], float]]) -> tuple[dict[str, Any], float]:
    """The config to keep: of those within 1% of the best, the first in the grid.

    Noise would otherwise make every sweep choose another one.
    """
    rows = list(timed)
    best = min(us for _, us in rows)
    return next((config, us) for config, us in rows if us <= 1.01 * best)


def tune(key: Key) -> dict[str, Any] | None:
    """The entry of `key`, or None where no config works. Prints a line for each config."""
    import jax

    from bench.attention_parts import measure

    timed = []
    for config in configs(key):
        try:
            us, *_ = measure(key.case(), key.arch, config)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"[:160].replace("\n", " ")
            print(f"{key} {json.dumps(config)}: {told}", flush=True)
            continue
        assert us.value is not None
        print(f"{key} {json.dumps(config)}: {us.value:.1f} us", flush=True)
        timed.append((config, us.value))
    if not timed:
        return None
    config, us = fastest(timed)
    device = jax.devices()[0].device_kind
    return {**vars(key), "config": config, "us": round(us, 1), "device": device}


def main() -> None:
    parser = argparse.ArgumentParser(description="tune the attention kernels on this GPU")
    parser.add_argument("--arch", default="sm90", type=lambda text: text.split(","))
    parser.add_argument("--only", default="", help="keys that start so: sm90/decode/d128/g4/int8")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no key after this")
    parser.add_argument("--missing", action="store_true", help="keys without an entry alone")
    parser.add_argument("--path", type=Path, default=PATH)
    args = parser.parse_args()
    entries, last_start = read(args.path), time.monotonic() + 60 * args.minutes
    archs = [args.arch] if isinstance(args.arch, str) else args.arch
    for key in keys(archs, args.only):
        if args.missing and key in entries:
            continue
        if time.monotonic() > last_start:
            print(f"out of time before {key}")
            break
        found = tune(key)
        if found is not None:
            entries[key] = found
            write(entries, args.path)
    print(args.path.read_text() if args.path.exists() else "nothing was found")


if __name__ == "__main__":
    main()
