"""What `test_aot.py` compiles of `quant_matmul`, `scaled_matmul` and `round_rows`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant_packing import PackedMatrix
from pallas_kernels.round_rows import round_rows
from pallas_kernels.scaled_matmul import scaled_matmul
from tests.pallas_kernels.aot_cases import Case
from tests.pallas_kernels.quant_problems import KINDS, packed

# (N, K): K whole, in four chains, in one because it is odd.
WIDE, NARROW, ODD = (28672, 4096), (4096, 14336), (192, 896)
TOKENS = (1, 5, 16, 40, 64, 128, 200, 512, 4096)


def cases(arch: str) -> list[Case]:
    """Each way of each kernel: few tokens, more, many; every format in two of them."""
    calls = [("int4", shape, T) for shape in (WIDE, NARROW) for T in TOKENS]
    calls += [(name, WIDE, T) for name in KINDS for T in (8, 4096)]
    calls += [("int4-zeros", ODD, T) for T in (8, 40, 512)]
    if arch == "sm80":  # tokens change nothing there
        calls = [(name, WIDE, 40) for name in KINDS]
    codes = (jnp.float8_e4m3fn, jnp.int8)
    found = [_rounded(d, E) for d in codes for E in (320, 16384)]
    found += [_packed(arch, *call) for call in calls]
    if arch == "sm80":
        return found
    return found + [
        _scaled(d, *shape, T) for d in codes for shape in (WIDE, NARROW) for T in TOKENS
    ]


def _rounded(dtype: Any, E: int) -> Case:
    x = jax.ShapeDtypeStruct((64, E), jnp.bfloat16)
    name = f"round_rows {jnp.dtype(dtype).name} E={E}"
    return Case(name, lambda x: round_rows(x, dtype, backend="mosaic"), (x,))


def _packed(arch: str, name: str, shape: tuple[int, int], T: int) -> Case:
    from pallas_kernels import quant_matmul_sm80, quant_matmul_sm90

    N, K = shape
    small = jax.eval_shape(lambda: packed(name, 64, K))
    words = jax.ShapeDtypeStruct((N // 16, *small.words.shape[1:]), jnp.int32)
    scale = jax.ShapeDtypeStruct((N,), jnp.float32)

    def multiply(x: jax.Array, words: jax.Array, scale: jax.Array) -> jax.Array:
        matrix = PackedMatrix(words, scale, small.format)
        if arch == "sm80":
            return quant_matmul_sm80.matmul(x, matrix)
        return quant_matmul_sm90.matmul(x, matrix, sms=132)

    x = jax.ShapeDtypeStruct((T, K), jnp.bfloat16)
    return Case(f"quant_matmul {name} {N}x{K} T={T}", multiply, (x, words, scale))


def _scaled(dtype: Any, N: int, K: int, T: int) -> Case:
    def multiply(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return scaled_matmul(x, w, a, b, jnp.bfloat16, backend="mosaic")

    x, w = (jax.ShapeDtypeStruct((n, K), dtype) for n in (T, N))
    scales = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (T, N)]
    return Case(f"scaled_matmul {jnp.dtype(dtype).name} {N}x{K} T={T}", multiply, (x, w, *scales))
