"""The kernels of quantised weights against the device's limits.

    python -m bench.quant_matmul --only int4,fp8

Each case's time is the kernel's own on the device, as a profiler sees it, the median over inputs
that are rotated and together larger than the L2 cache; `with_gaps_us` in its detail counts what
lies between one kernel and the next of the same program too. Beside it: the share of the copy
bandwidth of the same run, counting packed weights and scales; bf16 through XLA on the same shape,
and how much faster we are (`.over_bf16`); the error, relative to the largest value of float32.
"""

from __future__ import annotations

import argparse
import glob
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import ceilings, parts, record
from bench.attention_cases import L2_BYTES
from bench.parts import Part, emit
from bench.record import Record

ROUNDS = 6  # that a profile sees
LEAST = 3  # inputs that are rotated
# Matrices of a layer of an 8B model.
GATE_UP, DOWN, QKV, OUT = (28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096)


@dataclass(frozen=True)
class Case:
    """x [tokens, K] times a matrix [N, K] of `bench.shapes.QUANTISED`."""

    kind: str
    N: int
    K: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.N}x{self.K}.t{self.tokens}"


def cases() -> list[Case]:
    """What the bars of issue 6 name, and more tokens in between."""
    calls = [("int4", GATE_UP, t) for t in (1, 8, 16, 32, 64, 128, 256, 512, 4096)]
    calls += [("int4", shape, t) for shape in (QKV, DOWN, OUT) for t in (1, 16, 64, 256, 512, 4096)]
    calls += [("int8", GATE_UP, t) for t in (1, 8, 32, 64, 512, 4096)]
    calls += [("nf4", GATE_UP, t) for t in (1, 8, 16, 64)]
    calls += [("fp8", GATE_UP, t) for t in (1, 8, 64, 512, 4096)]
    calls += [("fp8", shape, t) for shape in (QKV, DOWN, OUT) for t in (1, 64)]
    return [Case(kind, *shape, t) for kind, shape, t in calls]


def profile(program: Callable[[], Any]) -> list[tuple[float, float, str]]:
    """What ROUNDS runs of a program, compiled before, did on the GPU: (start, duration, name) of
    each kernel, in order; in nanoseconds."""
    import jax

    jax.block_until_ready(program())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([program() for _ in range(ROUNDS)])
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        return sorted(gpu_events(file))


def of_kernel(events: Sequence[tuple[float, float, str]], name: str) -> tuple[float, float]:
    """Median time of the kernels whose names contain `name`, and from one's start to the next
    one's, in microseconds.

    Raises:
        RuntimeError: no such kernel ran.
    """
    found = [(start, took) for start, took, kernel in events if name in kernel]
    if len(found) < 2:
        raise RuntimeError(f"no kernel {name!r} among {sorted({e[2] for e in events})}")
    steps = statistics.median(b[0] - a[0] for a, b in pairwise(found))
    return statistics.median(took for _, took in found) / 1e3, steps / 1e3


def gpu_events(file: str) -> list[tuple[float, float, str]]:
    """(start, duration, name) of what ran on the GPU, in nanoseconds."""
    from jax.profiler import ProfileData

    planes = [p for p in ProfileData.from_file(file).planes if "GPU" in p.name]
    lines = [line for plane in planes for line in plane.lines if "Stream" in line.name]
    return [(e.start_ns, e.duration_ns, e.name) for line in lines for e in line.events]


def measure(case: Case) -> list[Record]:
    """`.us` and `.over_bf16` of one case."""
    import jax
    import jax.numpy as jnp

    from bench import shapes
    from jaxinfer.quant import dequantise, matmul
    from jaxinfer.quant.make import Recipe, round_to_nearest
    from jaxinfer.quant.packing import pack_matrix

    key = jax.random.key(0)
    recipe = Recipe(**shapes.QUANTISED[case.kind][0])
    nbytes = round(case.N * case.K * shapes.QUANTISED[case.kind][1])

    def dense(i: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, i), (case.N, case.K), jnp.bfloat16)

    def quantised(i: int) -> Any:
        return round_to_nearest(dense(i), recipe, jnp.bfloat16)

    def many(make: Callable[[int], Any], size: int) -> list[Any]:
        return [make(i) for i in range(max(LEAST, -(-4 * L2_BYTES // size)))]

    x = jax.random.normal(key, (case.tokens, case.K), jnp.bfloat16)
    run = jax.jit(lambda x, ws: [matmul(x, w) for w in ws])

    def ours() -> tuple[float, float]:
        weights = many(lambda i: pack_matrix(quantised(i)), nbytes)
        kernel = "scaled_matmul" if recipe.activations else "quant_matmul"
        return of_kernel(profile(lambda: run(x, weights)), kernel)

    def xla() -> float:
        """Of a bf16 product, whatever kernels that is."""
        weights = many(dense, 2 * case.N * case.K)
        events = profile(lambda: run(x, weights))
        return sum(took for _, took, _ in events) / 1e3 / (ROUNDS * len(weights))

    (us, with_gaps), bf16 = ours(), xla()
    exact = jnp.dot(x.astype(jnp.float32), dequantise(quantised(0)).T, precision="highest")
    error = jnp.abs(run(x, [pack_matrix(quantised(0))])[0] - exact).max() / jnp.abs(exact).max()
    detail = {
        "bytes_per_step": nbytes,
        "with_gaps_us": with_gaps,
        "bf16_us": bf16,
        "relative_error": float(error),
        "tflops": 2e-6 * case.tokens * case.N * case.K / us,
    }
    name = f"quant_matmul.{case.name}"
    return [
        Record(f"{name}.us", us, "us", detail),
        Record(f"{name}.over_bf16", bf16 / us, "ratio", {"us": us, "bf16_us": bf16}),
    ]


def run_part(args: argparse.Namespace, chosen: Sequence[Case]) -> None:
    """Measures the cases. One that fails is recorded, and the next one runs."""
    import jax

    parts.check_platform(jax.default_backend())
    for case in chosen:
        try:
            for found in measure(case):
                emit(args.records, found)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"[:600]
            emit(args.records, Record(f"quant_matmul.{case.name}.failed", None, error=told))


def print_cases(run: record.Run) -> None:
    """One line a case: µs, with gaps, % of copy, times bf16, error."""
    values = {r.name: r for r in run.records}
    print(f"{'case':<28} {'us':>9} {'w/ gaps':>9} {'% copy':>7} {'x bf16':>7}  error")
    for name, r in values.items():
        if r.error:
            print(f"FAILED {name}: {r.error}")
        if r.unit != "us" or r.value is None:
            continue
        stem, d = name.removesuffix(".us"), r.detail
        share, over = (values[f"{stem}.{x}"].value for x in ("pct_copy", "over_bf16"))
        told = f"{r.value:>9.2f} {d['with_gaps_us']:>9.2f} {share:>7.1f} {over:>7.2f}"
        print(f"{stem.removeprefix('quant_matmul.'):<28} {told}  {d['relative_error']:.1e}")
    for name, value in run.ceilings.items():
        print(f"{name:<46} {value:>10.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="kernels of quantised weights")
    parser.add_argument("--only", default="", help="starts of cases' names, by commas")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    chosen = [case for case in cases() if case.name.startswith(tuple(args.only.split(",")))]
    if not chosen:
        parser.error(f"--only {args.only}: no such case; {', '.join(c.name for c in cases())}")
    if args.part:
        run_part(args, chosen)
        return
    run = record.start(parts.command_line("bench.quant_matmul"))
    if run.device["kind"] == "cpu":
        parser.error("there is no GPU here")
    path = record.path_for(run, "quant_matmul", args.out)
    words = ("--part", "--only", args.only)
    own = Part("quant_matmul", "bench.quant_matmul", words, 60 + 8 * len(chosen))
    todo = [*ceilings.make_parts(tiny=False)[:1], own]
    run = parts.run_parts(todo, run, path, minutes=args.minutes)
    print_cases(run)


if __name__ == "__main__":
    main()
