"""The attention kernels against the device's limits and against PyTorch's and JAX's own.

    python -m bench.attention --only decode,chunk
    python -m bench.attention --only decode.64x4096 --no-torch --config '{"stages": 3}'

Prints and records of each case: µs, % of the copy bandwidth measured in the same run, TFLOP/s. The
output is checked against the float32 reference before it is timed.

One program runs the op on several input sets in turn, together far larger than the L2 cache, over
and over, each call after the one before it: the device is timed, not what it costs to launch.
`attention.decode.launch.us` is the least that a call takes, timed the same way and not subtracted.
The work list is built beforehand, as the engine builds one a step for all layers; what building it
takes is in the detail. cuDNN and FlashAttention get the same work on contiguous keys and values,
without a page table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import attention_cases, attention_parts, ceilings, parts, record
from bench.parts import Part, emit
from bench.record import Record

SERIAL = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
UNTUNED = "--xla_gpu_autotune_level=0"  # our part's matrix products only check: no time for them
CUDNN = ("torch_cudnn", "jax_cudnn")
PREFILL = "attention.prefill.4x4096"
DECODE = "attention.decode.64x4096"


def make_parts(
    only: Sequence[str] | None, *, backend: str = "auto", config: str = "", torch: bool = True
) -> list[Part | list[Part]]:
    """A process for each case of ours, together; JAX's cuDNN attention, and PyTorch's."""
    ours_env, env = (
        {"XLA_FLAGS": " ".join(filter(None, (os.environ.get("XLA_FLAGS"), *flags)))}
        for flags in ((SERIAL, UNTUNED), (SERIAL,))
    )
    ours_env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # they share the GPU's memory
    options = ("--backend", backend, *(("--config", config) if config else ()))
    names = [attention_cases.LAUNCH.name, *(case.name for case in attention_cases.select(only))]
    if only is None or any(attention_cases.QKV_WRITE.startswith(word) for word in only):
        names += [f"{attention_cases.QKV_WRITE}.{kv}" for kv in attention_cases.WIDTHS]
    ours = [
        Part(f"attention.{name}", "bench.attention", ("--part", name, *options), 300, ours_env)
        for name in names
    ]
    words = ("--only", ",".join(only)) if only else ()
    args = ("--part", "jax_cudnn", *words)
    made = [ours, Part("attention.jax_cudnn", "bench.attention", args, 180, env)]
    if torch:
        args = ("--part", "torch", *words)
        made.append(Part("attention.torch", "bench.attention", args, 180, torch=True))
    return made


def derived(records: Sequence[Record]) -> list[Record]:
    """Figures that compare two cases: the speed-up of quantised pages; prefill against cuDNN."""
    us = {r.name.removesuffix(".us"): r.value for r in records if r.unit == "us" and r.value}
    found = []
    for kv in ("int8", "fp8"):
        if (fast := us.get(f"{DECODE}.{kv}")) and (slow := us.get(DECODE)):
            found.append(Record(f"{DECODE}.{kv}.speedup", slow / fast, "ratio", {"bf16_us": slow}))
    cudnn = {name: us[f"{PREFILL}.{name}"] for name in CUDNN if f"{PREFILL}.{name}" in us}
    if cudnn and (ours := us.get(PREFILL)):
        best = min(cudnn.values())
        found.append(Record(f"{PREFILL}.over_cudnn", best / ours, "ratio", {"cudnn_us": cudnn}))
    return found


def print_cases(run: record.Run) -> None:
    """One line a case: µs, GB, % of copy, TFLOP/s, and the same of each baseline."""
    values = {r.name: r for r in run.records}
    print(f"{'case':<46} {'us':>10} {'MB':>9} {'% copy':>7} {'TFLOP/s':>8}  error")
    for name, r in values.items():
        if r.unit != "us" or r.value is None:
            continue
        stem = name.removesuffix(".us")
        share, rate = (
            values[n].value if (n := f"{stem}.{x}") in values else math.nan
            for x in ("pct_copy", "tflops")
        )
        size = r.detail.get("bytes_per_step", math.nan) / 1e6
        error = r.detail.get("relative_error", "")
        print(f"{stem:<46} {r.value:>10.2f} {size:>9.1f} {share:>7.1f} {rate:>8.1f}  {error}")
    for r in run.records:
        if r.name.endswith((".speedup", ".over_cudnn")):
            print(f"{r.name:<46} {r.value:>10.3f}")
        if r.error:
            print(f"FAILED {r.name}: {r.error}")
            print("    " + str(r.detail.get("output_tail", ""))[-1200:].replace("\n", "\n    "))
    for name, value in run.ceilings.items():
        print(f"{name:<46} {value:>10.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="attention kernels against the device's limits")
    parser.add_argument("--only", type=lambda text: text.split(","), help="starts of cases' names")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--config", default="", help="fields of the backend's Config, as JSON")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-baselines", action="store_true", help="nor JAX's cuDNN")
    parser.add_argument("--no-ceilings", action="store_true", help="no % of copy then")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", help="in this process: jax_cudnn, torch, or a case of ours")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    cases = attention_cases.select(args.only)
    if args.part is not None:
        run_part(args, cases)
        return
    if args.config:
        json.loads(args.config)
    run = record.start(parts.command_line("bench.attention"))
    if run.device["kind"] == "cpu":
        parser.error("there is no GPU here")
    path = record.path_for(run, "attention", args.out)
    torch = not (args.no_torch or args.no_baselines)
    todo = [] if args.no_ceilings else ceilings.make_parts(tiny=False)[: 1 + torch]
    made = make_parts(args.only, backend=args.backend, config=args.config, torch=torch)
    todo += made[:1] if args.no_baselines else made
    run = parts.run_parts(todo, run, path, minutes=args.minutes)
    run = replace(run, records=(*run.records, *derived(run.records)))
    parts.keep(run, path)
    print_cases(run)
    print(path)


def _time_ours(args: argparse.Namespace) -> list[Record]:
    if args.part.startswith(attention_cases.QKV_WRITE):
        timed = attention_parts.prepare_qkv_write(
            args.part.removeprefix(f"{attention_cases.QKV_WRITE}.")
        )
    else:
        config = json.loads(args.config) if args.config else None
        every = {case.name: case for case in (attention_cases.LAUNCH, *attention_cases.CASES)}
        timed = attention_parts.prepare(every[args.part], args.backend, config)
    with parts.turn():
        return timed()


def run_part(args: argparse.Namespace, cases: list[attention_cases.Case]) -> None:
    """What one of the processes does. A case that fails is recorded, and the next one runs."""

    def attempt(name: str, measure: Any, *arguments: Any) -> None:
        try:
            for found in measure(*arguments):
                emit(args.records, found)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"[:600]
            emit(args.records, Record(f"attention.{name}.failed", None, error=told))

    if args.part not in ("jax_cudnn", "torch"):
        import jax

        parts.check_platform(jax.default_backend())
        attempt(args.part, _time_ours, args)
        return
    if args.part == "torch":
        importlib.import_module("torch")  # one failure where it is missing, not one a case
    backends = ("jax_cudnn",) if args.part == "jax_cudnn" else ("torch_cudnn", "torch_flash")
    # Pages of 8 bits, or bits that may vary, are nothing that the baselines know.
    for case in cases:
        if case.kv == "bf16" and case.invariant:
            for name in backends:
                attempt(f"{case.name}.{name}", attention_parts.measure_baseline, case, name)


if __name__ == "__main__":
    main()
