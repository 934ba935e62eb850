"""The two ceilings of a device: copy bandwidth and the rate of a large bf16 matrix product.

    python -m bench.ceilings

`jaxinfer.profiling.ceilings` says how. Each form is reported; the ceiling is the best of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import parts, record
from bench.parts import Part, emit
from bench.record import Record
from jaxinfer.profiling.ceilings import (
    BUFFERS,
    DTYPES,
    copies,
    product_seconds,
    random_buffers,
    rotating,
    seconds_per_call,
)


def make_parts(*, tiny: bool) -> list[Part]:
    """One process for jax, one for torch."""
    size = ("--bytes", str(1 << 20), "--matmul", "256") if tiny else ()
    return [
        Part("ceilings.jax", "bench.ceilings", ("--part", "jax", *size), 120),
        Part("ceilings.torch", "bench.ceilings", ("--part", "torch", *size), 120, torch=True),
    ]


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
    for name, dtype in DTYPES.items():
        for copy in copies(nbytes, dtype):
            emit(path, _bandwidth(f"jax.{copy.form}_{name}", copy.bytes, copy.seconds))
    # Reads alone: not a copy, but what decode mostly does.
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    arrays = random_buffers(nbytes, "bfloat16")
    seconds = seconds_per_call(rotating(total, arrays), jax.block_until_ready)
    emit(path, _bandwidth("jax.read_sum_bf16", nbytes, seconds, ceiling=False))
    arrays.clear()
    emit(path, _rate("jax.matmul_bf16", n, product_seconds(n, "bfloat16")))


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
