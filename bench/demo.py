"""The demo pair: size, held-out compression beside xz, and time to the first token on a CPU.

    python -m bench.demo

The first token is timed from the start of the process that `jaxinfer generate` is, with an empty
compilation cache (cold) and with the one it left (warm). The compression was measured when the
pair was trained, by `checkpoints.demo.evaluate`; here its report is read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import parts, record
from bench.parts import Part, emit
from bench.record import Record

DEMO = record.ROOT / "checkpoints" / "demo"
ROLES = ("target", "draft")
PROMPT = "def read_config("


def make_parts() -> list[Part]:
    """One process per figure."""
    return [
        Part(f"demo.{part}", "bench.demo", ("--part", part))
        for part in ("size", "heldout", "first_token")
    ]


def size_record(demo: Path) -> Record:
    """Bytes of both models' directories."""
    sizes = {
        role: sum(file.stat().st_size for file in (demo / role).rglob("*") if file.is_file())
        for role in ROLES
    }
    if not all(sizes.values()):
        raise FileNotFoundError(f"no demo model: {sizes} bytes under {demo.name}")
    return Record("demo.size_bytes", sum(sizes.values()), "bytes", dict(sizes))


def heldout_record(evaluation: Path) -> Record:
    """The target's bits per byte over xz's, from the evaluation's report."""
    report = json.loads(evaluation.read_text())
    target, xz = report["target"]["bits_per_byte"], report["xz_bits_per_byte"]
    detail = {
        "target_bits_per_byte": target,
        "draft_bits_per_byte": report["draft"]["bits_per_byte"],
        "xz_bits_per_byte": xz,
        "xz_after_training_text_bits_per_byte": report["xz_after_training_text_bits_per_byte"],
        "held_out_bytes": report["held_out_bytes"],
    }
    return Record("demo.heldout.bits_per_byte_over_xz", target / xz, "ratio", detail)


def first_token_records() -> list[Record]:
    """`demo.first_token_cold_s` and `demo.first_token_warm_s`."""
    parts.check_platform("cpu")
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as cache:
        return [
            Record(f"demo.first_token_{kind}_s", _seconds_to_first_byte(cache), "s")
            for kind in ("cold", "warm")
        ]


def _seconds_to_first_byte(cache: str) -> float:
    """Runs `jaxinfer generate` to its end; seconds until it wrote to stdout."""
    env = {**os.environ, "XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    program = "from jaxinfer.cli import main; main()"
    command = [sys.executable, "-c", program, "generate", PROMPT, "--max-tokens", "32"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        took = time.perf_counter() - began
        process.stdout.read()
    if process.returncode or not first:
        raise RuntimeError(f"jaxinfer generate: exit code {process.returncode}, output {first!r}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="figures of the demo pair")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", choices=("size", "heldout", "first_token"))
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part == "size":
        emit(args.records, size_record(DEMO))
    elif args.part == "heldout":
        emit(args.records, heldout_record(DEMO / "evaluation.json"))
    elif args.part == "first_token":
        for found in first_token_records():
            emit(args.records, found)
    else:
        run = record.start(parts.command_line("bench.demo"))
        run = parts.run_parts(make_parts(), run, record.path_for(run, "demo", args.out))
        parts.print_table(run)


if __name__ == "__main__":
    main()
