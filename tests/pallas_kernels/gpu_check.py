"""What a GPU must show of the attention kernels: numerics and bit invariance. The same of
`rms_norm`, `quant_matmul` and `scaled_matmul`; of `threshold` and `round_rows` the definition's
results.

    python -m tests.pallas_kernels.gpu_check --quick --backend sm90

Prints a table, failures first; exit code 1 if there are any. `test_paged_attention_gpu.py` runs
the same checks one by one. Compiling is most of the time, so several processes run checks.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, pairwise, product
from multiprocessing import active_children, get_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.backend import default_cache_directory, use_compilation_cache
from pallas_kernels import quant_matmul_sm80
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.round_rows import round_rows
from pallas_kernels.threshold_mosaic import Config
from tests.pallas_kernels import norm_problems as norms
from tests.pallas_kernels import quant_problems as quant
from tests.pallas_kernels.attention_problems import (
    Item,
    Options,
    make_call,
    make_world,
    relative_errors,
    run,
    truth,
)
from tests.pallas_kernels.threshold_problems import compare, problem

BACKENDS = ("sm90", "sm80")  # of attention
OTHERS = ("rms_norm", "threshold", "quant_matmul", "scaled_matmul", "round_rows")
GROUPS = (1, 2, 4, 5, 7, 8, 16, 32)
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (32, 64, 128)
WORST_ROW = 8  # times the tolerance of the whole: one wrong row among long ones must not hide

# Decode rows, chunks, verifications and whole prompts; lengths about tiles, splits and pages.
MIXED = (
    *((n, 1) for n in (1, 2, 64, 127, 128, 129, 1024, 1025, 2700)),
    (40, 40), (333, 333), (1100, 70), (2050, 5), (1026, 3), (0, 0), (300, 128),
)  # fmt: skip
DECODE = tuple((n, 1) for n in (1, 31, 33, 128, 1023, 1025, 3100))


@dataclass(frozen=True)
class Check:
    """`run` returns what to print, or raises AssertionError saying what is wrong."""

    name: str
    run: Callable[[], str]


def checks(backend: str, *, quick: bool = False) -> Iterator[Check]:
    """Every check of one backend, those that cover most first; or of one of the other ops."""
    if backend == "rms_norm":
        for E, dtype in product((64, 320, 896, 1152, 4096, 8192), ("bfloat16", "float32")):
            yield Check(f"rms_norm E={E} {dtype}", lambda E=E, t=dtype: norms.invariance(E, t))
        return
    if backend == "quant_matmul":
        shapes = ((28672, 512), (1024, 1536), (192, 896), (4096, 4096))
        for name, (N, K) in product(quant.KINDS, shapes[:1] if quick else shapes):
            if K % (quant.KINDS[name][2] or K):
                continue
            for arch, multiply in (
                ("sm90", partial(quant_matmul, backend="mosaic")),
                ("sm80", partial(quant_matmul_sm80.matmul, arch="sm90")),
            ):
                yield Check(
                    f"quant_matmul {arch} {name} {N}x{K}",
                    partial(quant.invariance, name, N, K, multiply),
                )
        return
    if backend == "round_rows":
        for dtype, E in product((jnp.int8, jnp.float8_e4m3fn), (64, 896, 4096, 14336)):
            yield Check(
                f"round_rows {jnp.dtype(dtype).name} E={E}",
                lambda dtype=dtype, E=E: quant.compare_rounding(
                    partial(round_rows, backend="mosaic"),
                    quant.rows_to_round((67, E), jnp.bfloat16),
                    dtype,
                ),
            )
        return
    if backend == "scaled_matmul":
        for dtype, (N, K) in product(("int8", "float8_e4m3fn"), ((1024, 1536), (28672, 512))):
            yield Check(
                f"scaled_matmul {dtype} {N}x{K}",
                partial(quant.scaled_invariance, jnp.dtype(dtype), N, K),
            )
        return
    if backend == "threshold":
        for V, config in product((128_256, 151_936, 37, 2**18 + 1), (None, Config(8, 1024))):
            yield Check(
                f"threshold V={V} {config or 'default'}",
                lambda V=V, config=config: compare(problem(V), config),
            )
        return
    for options in numerics_options(quick):
        for kind, items in (("mixed", MIXED), ("decode", DECODE)):
            if kind == "decode" and quick and options.G not in (1, 4):
                continue
            yield Check(
                f"{backend} numerics {kind} {options}",
                lambda o=options, i=items: numerics(backend, o, i),
            )
    for options in invariance_options(quick):
        yield Check(f"{backend} bits {options}", lambda o=options: invariance(backend, o))


def _kv_heads(group: int) -> int:
    return 1 if group >= 16 else 2


def numerics_options(quick: bool) -> Iterator[Options]:
    """Groups, head dims and page sizes; each option alone and all together; quantised pages."""
    pages, dtypes = cycle(PAGE_SIZES), cycle(("bfloat16", "float16"))
    for G, D in product((1, 4, 5) if quick else GROUPS, HEAD_DIMS):
        base = Options(G=G, K=_kv_heads(G), D=D, page_size=next(pages), dtype=next(dtypes))
        yield base
        if not quick and G in (4, 5):
            yield from (replace(base, page_size=p) for p in PAGE_SIZES if p != base.page_size)
    together = {"window": 300, "softcap": 5.0, "scale": 0.2, "sinks": True}
    single = [{"window": 5}, {"window": 1024}, {"softcap": 2.0}, {"scale": 0.3}, {"sinks": True}]
    for D in (128,) if quick else HEAD_DIMS:
        yield from (Options(D=D, **option) for option in ([] if quick else single))
        yield Options(D=D, **together)
        for kv, per_head in product(("int8", "float8_e4m3fn"), (False, True)):
            yield Options(D=D, page_size=next(pages), kv=kv, per_head=per_head)
            if not quick:
                yield Options(D=D, G=8, page_size=64, kv=kv, per_head=per_head, **together)


def invariance_options(quick: bool) -> Iterator[Options]:
    """One of each group and head dim, options together, quantised pages."""
    pages, dtypes = cycle(PAGE_SIZES), cycle(("bfloat16", "bfloat16", "float16"))
    for G, D in product((4, 5) if quick else GROUPS, HEAD_DIMS):
        if not quick or D == 128 or G == 4:
            yield Options(G=G, K=_kv_heads(G), D=D, page_size=next(pages), dtype=next(dtypes))
    together = {"window": 700, "softcap": 5.0, "scale": 0.2, "sinks": True}
    yield Options(**together)
    for kv, D in product(("int8", "float8_e4m3fn"), (128,) if quick else HEAD_DIMS):
        yield Options(D=D, kv=kv, page_size=next(pages))
        if not quick:
            yield Options(D=D, kv=kv, page_size=next(pages), per_head=True, **together)


def numerics(backend: str, options: Options, batch: Sequence[tuple[int, int]]) -> str:
    """The relative error of a poisoned, permuted batch; twice the same bits; inert padding."""
    world = make_world(options, [length for length, _ in batch])
    items = [Item(s, length, new) for s, (length, new) in enumerate(batch)]
    call = make_call(world, items, spare_rows=3, columns=2)
    got = run(call, backend)
    again = run(call, backend)
    assert np.isfinite(got.astype(np.float32)).all(), _where("not finite", got, items)
    assert got.tobytes() == again.tobytes(), "two runs of the same call differ"
    assert not got[call.used_rows :].any(), "rows that belong to nobody are not zero"
    if call.max_query == 1:
        into = np.ones_like(call.arrays["q"])
        beside = run(replace(call, arrays={**call.arrays, "into": into}), backend)
        assert beside[: call.used_rows].tobytes() == got[: call.used_rows].tobytes(), "into: bits"
        assert (beside[call.used_rows :] == 1).all(), "rows of nobody do not keep what they hold"
    want = truth(world, items)
    whole, worst = relative_errors(got[: call.used_rows], want)
    told = f"error {whole:.1e}, worst row {worst:.1e}"
    if whole > options.tolerance or worst > WORST_ROW * options.tolerance:
        raise AssertionError(f"{told} of {options.tolerance:.0e}: {_worst_items(got, want, items)}")
    return told


def _where(what: str, got: np.ndarray, items: Sequence[Item]) -> str:
    """Which items of the batch hold values that are not finite."""
    ends = np.cumsum([item.new for item in items])
    bad = [
        f"length {item.length} new {item.new}"
        for item, end in zip(items, ends, strict=True)
        if not np.isfinite(got[end - item.new : end].astype(np.float32)).all()
    ]
    return f"{what}: {', '.join(bad) or 'rows that belong to nobody'}"


def _worst_items(got: np.ndarray, want: np.ndarray, items: Sequence[Item]) -> str:
    ends = np.cumsum([item.new for item in items])
    errors = [
        (relative_errors(got[end - i.new : end], want[end - i.new : end])[0], i)
        for i, end in zip(items, ends, strict=True)
        if i.new
    ]
    worst = sorted(errors, key=lambda pair: -pair[0])[:3]
    return "; ".join(f"length {i.length} new {i.new}: {error:.1e}" for error, i in worst)


WHOLE = 2100  # tokens: three splits, the last not full
# Positions about the edges of pages, tiles and splits.
ROWS = (0, 1, 31, 63, 64, 127, 128, 700, 1022, 1023, 1024, 1025, 1151, 1152, 2047, 2048, 2099)


def arrangements() -> dict[str, tuple[tuple[Item, ...], dict[str, Any]]]:
    """Ways in which rows of sequence 0 can be computed: the batch, and how it is laid out."""
    cuts = (0, 1, 100, 612, 1030, 1093, WHOLE)
    others = (Item(1, 900, 1), Item(2, 2900, 1), Item(1, 500, 500), Item(2, 1600, 200))
    decode = tuple(Item(0, row + 1, 1) for row in ROWS)
    verify = tuple(Item(0, row + 1, min(5, row + 1)) for row in ROWS)
    chunks = tuple(Item(0, b, b - a) for a, b in pairwise(cuts))
    mixed = (others[2], *decode[5:13:2], others[0], chunks[3], *verify[4:15:3], *others[1::2])
    return {
        "decode alone": ((Item(0, WHOLE, 1),), {}),
        "decode alone, short": ((Item(0, 700, 1),), {"columns": 40}),
        "decode rows": (decode, {"seed": 2}),
        "many decode rows": (decode * 5, {"seed": 6}),  # enough for units of several splits
        "decode among others": ((others[1], *decode[::3], others[0]), {"spare_rows": 5}),
        "verification": (verify, {"seed": 3, "columns": 5}),
        "chunks": (chunks, {"seed": 4}),
        "one chunk": ((Item(0, 1500, 470),), {"columns": 17}),
        "mixed": (mixed, {"seed": 5, "spare_rows": 7}),
        "whole among others": ((others[1], Item(0, WHOLE, WHOLE), others[3]), {"columns": 50}),
        "rows alone in wide tiles": (decode[::4], {"max_query": len(decode[::4])}),
    }


def invariance(backend: str, options: Options) -> str:
    """Rows of one sequence have the bits of its whole prompt in every arrangement."""
    world = make_world(options, [WHOLE, 1000, 3000], seed=7)
    call = make_call(world, [Item(0, WHOLE, WHOLE)])
    want = run(call, backend)
    assert np.isfinite(want.astype(np.float32)).all(), "the whole prompt's output is not finite"
    compared, wrong = 0, []
    for name, (items, layout) in arrangements().items():
        got = run(make_call(world, items, **layout), backend)
        end = 0
        for item in items:
            end += item.new
            if item.sequence:
                continue
            rows = got[end - item.new : end]
            same = _bits(rows) == _bits(want[item.length - item.new : item.length])
            compared += item.new
            if not same.all():
                token, head, _ = np.argwhere(~same)[0]
                position = item.length - item.new + token
                wrong.append(f"{name} (position {position}, head {head}, {(~same).mean():.0%})")
    assert not wrong, "bits differ: " + "; ".join(wrong[:6])
    return f"{compared} rows"


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="check the attention kernels on this GPU")
    parser.add_argument("--quick", action="store_true", help="a small selection")
    parser.add_argument("--backend", action="append", help="several may be given")
    parser.add_argument("--only", default="", help="checks whose names contain this")
    parser.add_argument("--minutes", type=float, default=3.0, help="start no check after this")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds, then it hangs")
    parser.add_argument("--jobs", type=int, default=6, help="processes")
    parser.add_argument("--verbose", action="store_true", help="what passed, too, and tracebacks")
    args = parser.parse_args(argv)
    began = time.monotonic()
    # Processes share the GPU. Threads would not do: lowering a kernel holds Python's lock.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    todo = [
        (backend, args.quick, check.name)
        for backend in args.backend or (*BACKENDS, *OTHERS)
        for check in checks(backend, quick=args.quick)
        if args.only in check.name
    ]
    if not todo:
        parser.error(f"no check's name contains {args.only!r}")
    jobs = min(args.jobs, len(todo))
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin_worker)
    last_start = began + 60 * args.minutes  # the clock is the machine's, not the process's
    running = [pool.submit(_verdict, *what, last_start, args.verbose) for what in todo]
    if args.verbose:  # as they come: a hang must not take the others' verdicts with it
        for future in running:
            future.add_done_callback(lambda f: _tell(*f.result()))
    wait(running, 60 * args.minutes + args.patience)
    results = [
        future.result() if future.done() else ("HANGS", name, "or waits for one that does")
        for (*_, name), future in zip(todo, running, strict=True)
    ]
    order = {v: i for i, v in enumerate(("HANGS", "ERROR", "FAILED", "NOT RUN", "ok"))}
    for verdict, name, told in sorted(results, key=lambda row: order[row[0]]):
        if verdict != "ok":
            _tell(verdict, name, told)
    counts = {v: n for v in order if (n := sum(row[0] == v for row in results))}
    device, seconds = jax.devices()[0].device_kind, time.monotonic() - began
    print(f"{counts} of {len(results)} on {device} in {seconds:.0f} s", flush=True)
    if "HANGS" in counts:
        for process in active_children():  # what waits for the GPU ends in no other way
            process.kill()
        os._exit(1)
    pool.shutdown()
    return int(set(counts) != {"ok"})


def _begin_worker() -> None:
    use_compilation_cache(default_cache_directory())


def _tell(verdict: str, name: str, told: str) -> None:
    print(f"{verdict:<7} {name:<58} {told}", flush=True)


def _verdict(
    backend: str, quick: bool, name: str, last_start: float, verbose: bool
) -> tuple[str, str, str]:
    """(verdict, name, what it says)."""
    began = time.monotonic()
    if began > last_start:
        return "NOT RUN", name, "out of time"
    check = next(check for check in checks(backend, quick=quick) if check.name == name)
    try:
        verdict, told = "ok", check.run()
    except AssertionError as error:
        verdict, told = "FAILED", str(error)
    except Exception as error:
        verdict, told = "ERROR", f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
        if verbose:
            told += "\n" + traceback.format_exc()
    return verdict, check.name, f"{told} [{time.monotonic() - began:.1f} s]"


if __name__ == "__main__":
    sys.exit(main())
