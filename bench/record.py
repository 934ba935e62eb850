"""Results of a measurement: one JSON file per run, in `bench/results/`.

A file holds `{"version": 1, "date", "device", "versions", "command", "ceilings", "records"}`; see
`Run`. Its name is `<date>T<time>-<device>-<bench>.json`, so that names sort by time. Scripts that
measure something outside this package add a figure with

    python -m bench.record NAME VALUE UNIT --command "make test"
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

VERSION = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "numpy", "torch", "transformers")


@dataclass(frozen=True)
class Record:
    """One figure.

    Attributes:
        name: dotted, such as `decode.8b.b1.ctx1024.tok_s`.
        value: None for a part that failed.
        unit: of `value`.
        detail: whatever explains it; JSON values.
        error: what went wrong, for a part that failed.
    """

    name: str
    value: float | None
    unit: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """What one command measured on one machine.

    Attributes:
        date: UTC, ISO 8601, to the millisecond.
        device: `kind` (as the driver names it, or `cpu`), `count` (GPUs, or CPU cores), `memory`
            (bytes of one GPU, or of the host).
        versions: packages, `driver`, `python`, and `commit` of jaxinfer. None: not known.
        command: what was run.
        ceilings: `copy_bytes_per_s`, `bf16_matmul_flops_per_s`, where measured in this run.
        records: in the order in which they came.
    """

    date: str
    device: dict[str, Any]
    versions: dict[str, str | None]
    command: str
    ceilings: dict[str, float] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    version: int = VERSION


def start(command: str) -> Run:
    """A run without records, of this machine, now. Does not start the GPU's backend."""
    date = datetime.now(UTC).isoformat(timespec="milliseconds")
    return Run(date, device(), versions(), command)


def path_for(run: Run, bench: str, directory: Path = RESULTS) -> Path:
    """Where `run` of the script `bench` is written."""
    # To the millisecond: several may begin at once, each on a GPU of its own.
    stamp = re.sub(r"[:.]", "", run.date.partition("+")[0])
    kind = re.sub(r"[^a-z0-9]+", "-", run.device["kind"].lower()).strip("-")
    return directory / f"{stamp}-{kind}-{bench}.json"


def write(run: Run, path: Path) -> None:
    """Writes `run` under a temporary name, then renames it: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"version": run.version, **asdict(run)}, indent=1) + "\n")
    temporary.replace(path)


def read(path: Path) -> Run:
    """Reads one result file.

    Raises:
        ValueError: it is not JSON, not of this version, or has other fields.
    """
    try:
        data = json.loads(path.read_text())
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}, expected {VERSION}")
        return Run(**{**data, "records": tuple(Record(**r) for r in data["records"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result file: {error}") from error


def read_all(directory: Path = RESULTS) -> list[Run]:
    """Every run in `directory`, oldest first."""
    return sorted((read(path) for path in directory.glob("*.json")), key=lambda run: run.date)


def device() -> dict[str, Any]:
    """The machine's GPU as nvidia-smi names it, or `cpu`, without starting a backend."""
    found = _nvidia_smi("name,memory.total")
    if found:
        kind, mebibytes = found[0]
        return {"kind": kind, "count": len(found), "memory": int(mebibytes) << 20}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"kind": "cpu", "count": os.cpu_count(), "memory": memory}


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on; None for what is absent."""
    driver = _nvidia_smi("driver_version")
    return {
        **{name: _version_of(name) for name in PACKAGES},
        "driver": driver[0][0] if driver else None,
        "python": sys.version.split()[0],
        "commit": os.environ.get("BENCH_COMMIT") or _commit(),
    }


def _nvidia_smi(fields: str) -> list[list[str]]:
    lines = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return [[cell.strip() for cell in line.split(",")] for line in lines or ()]


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout; `-dirty` where a tracked file differs from it."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return None
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return head[0] + ("-dirty" if changed else "")


def _output(*command: str) -> list[str] | None:
    """Lines of stdout, or None where the command is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="record one figure measured elsewhere")
    parser.add_argument("name")
    parser.add_argument("value", type=float)
    parser.add_argument("unit")
    parser.add_argument("--command", required=True, help="what measured it")
    parser.add_argument("--device", help="what it was measured on, where that is not this GPU: cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    run = start(args.command)
    kind = {"kind": args.device} if args.device else {}
    run = replace(
        run,
        device={**run.device, **kind},
        records=(Record(args.name, args.value, args.unit),),
    )
    path = path_for(run, args.name.replace(".", "-"), args.out)
    write(run, path)
    print(path)


if __name__ == "__main__":
    main()
