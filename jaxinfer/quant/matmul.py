"""x · wᵀ for a quantised w.

Letters: N rows of w (out), K its columns (in), G groups of columns.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.quant.arrays import Matrix, Ordered, Parts, QuantisedMatrix, in_code_order
from pallas_kernels.kv_quantise import LARGEST
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_packing import PackedMatrix
from pallas_kernels.round_rows import round_rows
from pallas_kernels.scaled_matmul import scaled_matmul

FP8_MAX = LARGEST[jnp.dtype(jnp.float8_e4m3fn)]


def matmul(x: jax.Array, matrix: Matrix) -> jax.Array:
    """x [..., K] · matrix [N, K] → [..., N] in x's dtype.

    The matrix is dequantised to x's dtype, or x is rounded to 8 bits where the scheme says so.
    Each row of x is computed alike whatever the others are.
    """
    if isinstance(matrix, Parts):
        return jnp.concatenate([matmul(x, part) for part in matrix.parts], axis=-1)
    if isinstance(matrix, Ordered):
        return quant_matmul(x[..., matrix.order], matrix.matrix)
    if isinstance(matrix, PackedMatrix):
        return quant_matmul(x, matrix)
    if not isinstance(matrix, QuantisedMatrix):
        return dot(x, matrix, x.dtype)
    if matrix.order is not None:
        x = x[..., matrix.order]
    if matrix.scheme.activations is None:
        return dot(x, in_code_order(matrix, x.dtype), x.dtype)
    if matrix.scheme.activations == "group":
        return _by_groups(x, matrix)
    return _rounded(x, matrix)


def dot(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """x [..., K] · w [N, K] → [..., N], summed in float32 (integers: in int32)."""
    return lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (1,)), ((), ())),
        # float32 means float32: without this a GPU would use TF32.
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )


def _rounded(x: jax.Array, matrix: QuantisedMatrix) -> jax.Array:
    """W8A8 with one scale a row of the matrix, and one a token or one for all."""
    if matrix.input_scale is None:
        codes, scale = round_rows(x, matrix.codes.dtype)
    else:
        given = jnp.asarray(matrix.input_scale, jnp.float32)
        codes = round_to(x, given, matrix.codes.dtype)
        scale = jnp.broadcast_to(given, x.shape[:-1])
    of_rows = matrix.scales[:, 0].astype(jnp.float32)
    return scaled_matmul(codes, matrix.codes, scale, of_rows, x.dtype)


def _by_groups(x: jax.Array, matrix: QuantisedMatrix) -> jax.Array:
    """FP8 in blocks (DeepSeek-V3): a scale for each token and group of columns."""
    groups = x.reshape(*x.shape[:-1], matrix.scales.shape[1], matrix.group)
    scale = _absmax(groups) / LARGEST[matrix.codes.dtype]
    values = round_to(groups, scale, matrix.codes.dtype).astype(jnp.float32) * scale
    wide = in_code_order(matrix, jnp.float32)
    return dot(values.reshape(x.shape), wide, jnp.float32).astype(x.dtype)


def round_to(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """x / scale as int8 or float8_e4m3fn, to the nearest (ties to even), clipped."""
    scaled = x.astype(jnp.float32) / scale
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(scaled), -128, 127).astype(jnp.int8)
    return jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(dtype)


def _absmax(x: jax.Array) -> jax.Array:
    """float32 [..., 1], never 0: largest |x| of the last axis."""
    return jnp.maximum(jnp.abs(x.astype(jnp.float32)).max(axis=-1, keepdims=True), 1e-12)
