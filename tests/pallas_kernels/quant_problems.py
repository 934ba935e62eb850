"""Matrices for `quant_matmul` and `scaled_matmul`, rows for `round_rows`; what is right; and that a
row's bits are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_packing import PackedMatrix, pack, unpack
from pallas_kernels.round_rows import round_rows
from pallas_kernels.scaled_matmul import scaled_matmul

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
# name: (kind, bits, columns of a group or 0 for all, what comes with scales)
KINDS: dict[str, tuple[Any, Any, int, str]] = {
    "int4": ("int", 4, 128, ""),
    "int4-row": ("int", 4, 0, ""),
    "int4-zeros": ("int", 4, 64, "zeros"),
    "int4-mins": ("int", 4, 32, "mins"),
    "int8-row": ("int", 8, 0, ""),
    "int8-group": ("int", 8, 16, ""),
    "int8-zeros": ("int", 8, 128, "zeros"),
    "int8-mins": ("int", 8, 32, "mins"),
    "nf4": ("table", 4, 64, ""),
    "fp8": ("float", 8, 128, ""),
}
COUNTS = (1, 3, 8, 16, 20, 33, 64, 100, 130, 200, 256, 513, 1100, 2000)  # tokens
TOLERANCE = 5e-3  # of the largest value: what a bfloat16 result is rounded by, twice


def arguments(name: str, N: int, K: int, seed: int = 0) -> dict[str, Any]:
    """Of `pack`."""
    kind, bits, group, extra = KINDS[name]
    rng, G = np.random.default_rng(seed), K // (group or K)
    if bits == 4:
        codes = rng.integers(0, 256, (N, K // 2)).astype(np.uint8)
    elif kind == "float":
        codes = rng.normal(size=(N, K)).astype(jnp.float8_e4m3fn)
    else:
        codes = rng.integers(0 if extra == "mins" else -128, 128, (N, K)).astype(np.int8)
    scales = (rng.uniform(0.1, 1, (N, G)) * 0.02 * rng.choice([1, 8], (N, 1))).astype(jnp.bfloat16)
    found: dict[str, Any] = {"codes": codes, "scales": scales, "kind": kind, "bits": bits}
    if kind == "table":
        found["table"] = NF4
    if extra == "zeros":
        low, high = (0, 16) if bits == 4 else (-128, 128)
        found["zeros"] = rng.integers(low, high, (N, G)).astype(np.uint8 if bits == 4 else np.int8)
    elif extra == "mins":
        found["mins"] = rng.uniform(0, 0.1, (N, G)).astype(jnp.bfloat16)
    return found


def packed(name: str, N: int, K: int, seed: int = 0) -> PackedMatrix:
    return pack(**{k: _on_device(v) for k, v in arguments(name, N, K, seed).items()})


def _on_device(value: Any) -> Any:
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def dense(name: str, N: int, K: int, seed: int = 0) -> np.ndarray:
    """What the arguments stand for, float64 [N, K]: nothing is rounded."""
    a = arguments(name, N, K, seed)
    codes = a["codes"]
    if a["bits"] == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(N, K)
    values = np.asarray(NF4)[codes] if a["kind"] == "table" else codes.astype(np.float64)
    values = values.reshape(N, a["scales"].shape[1], -1)
    wide = {k: a[k].astype(np.float64)[..., None] for k in ("scales", "zeros", "mins") if k in a}
    if "zeros" in a:
        values = values - wide["zeros"]
    elif a["kind"] == "int" and a["bits"] == 4 and "mins" not in a:
        values = values - 8
    return (values * wide["scales"] - wide.get("mins", 0)).reshape(N, K)


def tokens(T: int, K: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(T, K)), jnp.bfloat16)


def relative_error(got: Any, want: np.ndarray) -> float:
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def invariance(name: str, N: int, K: int, multiply: Callable[..., jax.Array]) -> str:
    """Raises AssertionError where results are wrong, or a row's bits depend on how many come."""
    matrix = packed(name, N, K)
    weights = np.asarray(unpack(matrix).astype(jnp.float32), np.float64)
    weights *= np.asarray(matrix.row_scale)[:, None]
    return _invariance(lambda x: multiply(x, matrix), tokens(max(COUNTS), K), weights)


def scaled_invariance(dtype: Any, N: int, K: int) -> str:
    """The same of `scaled_matmul`."""
    x, w, x_scale, w_scale = scaled_arguments(dtype, max(COUNTS), N, K)
    want = np.asarray(w, np.float64) * np.asarray(w_scale)[:, None]

    def multiply(x: jax.Array) -> jax.Array:
        return scaled_matmul(x, w, x_scale[: len(x)], w_scale, jnp.bfloat16, backend="mosaic")

    return _invariance(multiply, x, want, np.asarray(x_scale)[:, None])


def scaled_arguments(dtype: Any, T: int, N: int, K: int) -> tuple[jax.Array, ...]:
    """(x, w, x_scale, w_scale) of `scaled_matmul`."""
    rng = np.random.default_rng(0)
    size = 40 if dtype == jnp.int8 else 1
    x, w = (jnp.asarray(rng.normal(size=(n, K)) * size, dtype) for n in (T, N))
    return x, w, *(jnp.asarray(rng.uniform(0.5, 2, n), jnp.float32) for n in (T, N))


def rows_to_round(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers: rows of very different sizes, one of zeros."""
    rng = np.random.default_rng(0)
    # Not so small that float16 has subnormal ones, which the definition takes for zeros.
    x = rng.normal(size=shape) * 2.0 ** rng.integers(2, 12, (*shape[:-1], 1))
    x[..., -1, :] = 0
    return jnp.asarray(x, dtype)


def compare_rounding(run: Callable[[jax.Array, Any], Any], x: jax.Array, dtype: Any) -> str:
    """Raises AssertionError where `run` gives other bits than the definition of `round_rows`."""
    want = jax.jit(lambda x: round_rows(x, dtype, backend="reference"))(x)
    for got, right in zip(run(x, dtype), want, strict=True):
        assert got.dtype == right.dtype
        np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (got, right)))
    return f"{x.shape}: bits equal"


def _invariance(
    multiply: Callable[[jax.Array], jax.Array], x: jax.Array, weights: np.ndarray, scale: Any = 1.0
) -> str:
    want = np.asarray(x, np.float64) @ weights.T * scale
    longest, worst = b"", 0.0
    for count in COUNTS:
        got = np.asarray(multiply(x[:count]))
        worst = max(worst, relative_error(got, want[:count]))
        bits = got.tobytes()
        assert bits[: len(longest)] == longest, f"{count} tokens change the bits of the first"
        longest = bits
    assert worst <= TOLERANCE, f"error {worst:.1e}"
    return f"error {worst:.1e}, {len(COUNTS)} numbers of tokens"
