"""The two ceilings of a device: copy bandwidth and the rate of a large bf16 matrix product.

    python -m bench.ceilings

Bandwidth counts bytes read plus bytes written. Several forms are tried and each is reported; the
ceiling is the best. Calls are enqueued one after the other over rotating inputs, each larger than
the L2 cache, and waited for once: a single call's launch and allocation would count as time.
Inputs are random: zeros run faster than real data. Medians over repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import parts, record
from bench.parts import Part, emit
from bench.record import Record

BUFFERS = 4  # inputs that are rotated
REPEATS = 7


def make_parts(*, tiny: bool) -> list[Part]:
    """One process for jax, one for torch."""
    size = ("--bytes", str(1 << 20), "--matmul", "256") if tiny else ()
    return [
        Part("ceilings.jax", "bench.ceilings", ("--part", "jax", *size), 120),
        Part("ceilings.torch", "bench.ceilings", ("--part", "torch", *size), 120, torch=True),
    ]


def seconds_per_call(
    call: Callable[[int], Any],
    wait: Callable[[Any], Any],
    calls: int = 4 * BUFFERS,
    repeats: int = REPEATS,
) -> float:
    """Median over repeats of the mean time of `calls` calls enqueued before one wait."""
    wait(call(0))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        out = None
        for i in range(calls):
            out = call(i)
        wait(out)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def rotating(fn: Callable[..., Any], inputs: list[Any]) -> Callable[[int], Any]:
    """i → `fn` of input i, round and round."""
    return lambda i: fn(inputs[i % len(inputs)])


def _bandwidth(form: str, moved: int, seconds: float, *, ceiling: bool = True) -> Record:
    detail: dict[str, Any] = {"bytes_per_call": moved, "ms_per_call": 1000 * seconds}
    if ceiling:
        detail["ceiling"] = "copy_bytes_per_s"
    return Record(f"ceilings.{form}.bytes_per_s", moved / seconds, "bytes/s", detail)


def _rate(form: str, n: int, seconds: float) -> Record:
    detail = {"n": n, "ms_per_call": 1000 * seconds, "ceiling": "bf16_matmul_flops_per_s"}
    return Record(f"ceilings.{form}.flops_per_s", 2 * n**3 / seconds, "FLOP/s", detail)


def jax_part(path: Path | None, nbytes: int, n: int) -> None:
    """Copies, a read, and the matrix product through XLA."""
    import jax
    import jax.numpy as jnp

    parts.check_platform(jax.default_backend())
    wait = jax.block_until_ready
    keys = jax.random.split(jax.random.key(0), BUFFERS)

    def add1(x: jax.Array) -> jax.Array:
        return x + jnp.ones((), x.dtype)

    forms = {"copy": jax.jit(jnp.copy), "add1": jax.jit(add1)}
    in_place = jax.jit(add1, donate_argnums=0)
    for name, dtype in (("uint8", jnp.uint8), ("f32", jnp.float32), ("bf16", jnp.bfloat16)):
        draw = jax.random.bits if dtype == jnp.uint8 else jax.random.normal
        count = nbytes // jnp.dtype(dtype).itemsize
        arrays = [wait(draw(key, (count,), dtype)) for key in keys]
        for form, fn in forms.items():
            seconds = seconds_per_call(rotating(fn, arrays), wait)
            emit(path, _bandwidth(f"jax.{form}_{name}", 2 * nbytes, seconds))
        if dtype == jnp.bfloat16:  # reads alone: not a copy, but what decode mostly does
            total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
            seconds = seconds_per_call(rotating(total, arrays), wait)
            emit(path, _bandwidth("jax.read_sum_bf16", nbytes, seconds, ceiling=False))

        def donate(i: int, arrays: list[jax.Array] = arrays) -> jax.Array:
            arrays[i % BUFFERS] = in_place(arrays[i % BUFFERS])
            return arrays[i % BUFFERS]

        seconds = seconds_per_call(donate, wait)
        emit(path, _bandwidth(f"jax.add1_in_place_{name}", 2 * nbytes, seconds))
        arrays.clear()
    matrices = [jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys]
    pairs = list(zip(matrices, matrices[1:] + matrices[:1], strict=True))
    matmul = jax.jit(lambda pair: pair[0] @ pair[1])
    emit(path, _rate("jax.matmul_bf16", n, seconds_per_call(rotating(matmul, pairs), wait)))


def torch_part(path: Path | None, nbytes: int, n: int) -> None:
    """A copy and the matrix product through PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts.check_platform(device)

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    sources = [torch.randn(nbytes // 4, device=device) for _ in range(BUFFERS)]
    pairs = [(torch.full_like(s, float("nan")), s) for s in sources]
    seconds = seconds_per_call(rotating(lambda pair: pair[0].copy_(pair[1]), pairs), wait)
    if not all(torch.equal(*pair) for pair in pairs):
        raise RuntimeError("tensor.copy_ left bytes unwritten")
    emit(path, _bandwidth("torch.copy_f32", 2 * nbytes, seconds))
    del sources, pairs
    matrices = [torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(BUFFERS)]
    pairs = list(zip(matrices, matrices[1:] + matrices[:1], strict=True))
    seconds = seconds_per_call(rotating(lambda pair: pair[0] @ pair[1], pairs), wait)
    emit(path, _rate("torch.matmul_bf16", n, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the device's ceilings")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", choices=("jax", "torch"), help="run this part in this process")
    parser.add_argument("--bytes", type=int, default=1 << 30, help="of one buffer")
    parser.add_argument("--matmul", type=int, default=8192, help="rows and columns")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part is not None:
        part = jax_part if args.part == "jax" else torch_part
        part(args.records, args.bytes, args.matmul)
        return
    run = record.start(parts.command_line("bench.ceilings"))
    path = record.path_for(run, "ceilings", args.out)
    run = parts.run_parts(make_parts(tiny=args.tiny), run, path)
    parts.print_table(run)


if __name__ == "__main__":
    main()
