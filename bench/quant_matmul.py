"""The kernels of quantised weights against the device's limits.

    python -m bench.quant_matmul --only int4,fp8

Each case's time is the kernel's own on the device, as a profiler sees it, the median over inputs
that are rotated and together larger than the L2 cache; `with_gaps_us` in its detail counts what
lies between one kernel and the next of the same program too. Beside it: the share of the copy
bandwidth of the same run, counting packed weights and scales; bf16 through XLA on the same shape,
and how much faster we are (`.over_bf16`), where tokens are rounded with what that takes; the error,
relative to the largest value of float32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench import ceilings, parts, record, shapes
from bench.attention_cases import L2_BYTES
from bench.parts import Part, emit
from bench.record import Record
from jaxinfer.known_models import RECIPES
from jaxinfer.profiling.trace import Event, record_events
from jaxinfer.quant import QuantisedMatrix, dequantise, matmul
from jaxinfer.quant.make import Recipe, round_to_nearest
from jaxinfer.quant.packing import pack_matrix

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


def profile(program: Callable[[], Any]) -> list[Event]:
    """What ROUNDS runs of a program, compiled before, did on the GPU."""
    jax.block_until_ready(program())
    return record_events(lambda: jax.block_until_ready([program() for _ in range(ROUNDS)]))


def of_kernel(events: Sequence[Event], name: str) -> tuple[float, float]:
    """Median time of the kernels whose names contain `name`, and from one's start to the next
    one's, in microseconds.

    Raises:
        RuntimeError: no such kernel ran.
    """
    found = [(e.start_ns, e.duration_ns) for e in events if name in e.name]
    if len(found) < 2:
        raise RuntimeError(f"no kernel {name!r} among {sorted({e.name for e in events})}")
    steps = statistics.median(b[0] - a[0] for a, b in pairwise(found))
    return statistics.median(took for _, took in found) / 1e3, steps / 1e3


def make_recipe(case: Case) -> Recipe:
    """What the case's matrices are rounded to."""
    return Recipe(**RECIPES[case.kind])


def stored_bytes(case: Case) -> int:
    """Of one of them, with its scales."""
    return round(case.N * case.K * shapes.QUANTISED[case.kind])


def dense_matrix(case: Case, seed: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(0), seed)
    return jax.random.normal(key, (case.N, case.K), jnp.bfloat16)


def quantised_matrix(case: Case, seed: int) -> QuantisedMatrix:
    return round_to_nearest(dense_matrix(case, seed), make_recipe(case), jnp.bfloat16)


def packed_matrices(case: Case) -> list[Any]:
    """As many as `rotated`, in the form that the kernels read."""
    return rotated(lambda seed: pack_matrix(quantised_matrix(case, seed)), stored_bytes(case))


def rotated(make: Callable[[int], Any], nbytes: int) -> list[Any]:
    """make(0), make(1), ...: so many that none is still in the L2 cache when its turn comes."""
    return [make(i) for i in range(max(LEAST, -(-4 * L2_BYTES // nbytes)))]


def tokens(case: Case) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (case.tokens, case.K), jnp.bfloat16)


def measure(case: Case) -> list[Record]:
    """`.us` and `.over_bf16` of one case."""
    x = tokens(case)
    run = jax.jit(lambda x, ws: [matmul(x, w) for w in ws])

    def ours() -> tuple[float, float, float]:
        """Of the kernel, with gaps, and of the tokens' rounding."""
        weights, rounded = packed_matrices(case), make_recipe(case).activations
        events = profile(lambda: run(x, weights))
        rounding = of_kernel(events, "round_rows")[0] if rounded else 0.0
        return *of_kernel(events, "scaled_matmul" if rounded else "quant_matmul"), rounding

    def xla() -> float:
        """Of a bf16 product, whatever kernels that is."""
        weights = rotated(partial(dense_matrix, case), 2 * case.N * case.K)
        events = profile(lambda: run(x, weights))
        return sum(event.duration_ns for event in events) / 1e3 / (ROUNDS * len(weights))

    (us, with_gaps, rounding), bf16 = ours(), xla()
    first = quantised_matrix(case, 0)
    exact = jnp.dot(x.astype(jnp.float32), dequantise(first).T, precision="highest")
    error = jnp.abs(run(x, [pack_matrix(first)])[0] - exact).max() / jnp.abs(exact).max()
    detail = {
        "bytes_per_step": stored_bytes(case),
        "with_gaps_us": with_gaps,
        "bf16_us": bf16,
        "rounding_us": rounding,
        "relative_error": float(error),
        "tflops": 2e-6 * case.tokens * case.N * case.K / us,
    }
    name = f"quant_matmul.{case.name}"
    return [
        Record(f"{name}.us", us, "us", detail),
        Record(f"{name}.over_bf16", bf16 / (us + rounding), "ratio", detail),
    ]


def run_part(args: argparse.Namespace, chosen: Sequence[Case]) -> None:
    """Measures the cases. One that fails is recorded, and the next one runs."""
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
