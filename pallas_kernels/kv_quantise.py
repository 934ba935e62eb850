"""Quantisation of keys and values: int8 or float8_e4m3fn values, and float32 scales for them.

A value stands for `value.astype(float32) * scale`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The largest magnitude of each quantised page type.
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}

# k_pages, v_pages, k_scales, v_scales
Pools = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def quantise(
    x: jax.Array, dtype: Any, scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """x → (values, scale) with x ≈ values.astype(float32) * scale[..., None].

    Computed in float32, rounded to nearest even; what is beyond the type's largest saturates.
    A NaN in x makes a chosen scale NaN: it is not hidden.

    Args:
        x: [..., D], a float type.
        dtype: int8 or float8_e4m3fn.
        scale: float32, of a shape that broadcasts to [...]. None: the largest |x| over the
            type's largest; 1 where that is 0 or less than float32 holds in full precision.

    Returns:
        values of `dtype` [..., D], and the scale, float32 [...] where it was chosen.

    Raises:
        ValueError: another dtype.
    """
    largest_of(dtype)
    exact = jnp.finfo(x.dtype)
    x = x.astype(jnp.float32)
    if exact.bits == 16:
        # XLA may drop the rounding of a 16-bit x that it computed in float32, in one program and
        # not in the next; this rounding it keeps.
        x = lax.reduce_precision(x, exact.nexp, exact.nmant)
    if scale is None:
        scale = choose_scale(jnp.max(jnp.abs(x), axis=-1), dtype)
    return to_page_type(x / scale[..., None], dtype), scale


def calibrate(observed: jax.Array, dtype: Any) -> jax.Array:
    """Static scales, float32 [K], with which nothing that was observed saturates.

    Args:
        observed: [..., K, D], keys or values of one layer. Of several batches, take the
            `jnp.maximum` of their scales.
        dtype: int8 or float8_e4m3fn.

    Raises:
        ValueError: another dtype.
    """
    largest_of(dtype)
    peak = jnp.max(jnp.abs(observed.astype(jnp.float32)), axis=-1)  # [..., K]
    return choose_scale(jnp.max(peak.reshape(-1, peak.shape[-1]), axis=0), dtype)


def choose_scale(peak: jax.Array, dtype: Any) -> jax.Array:
    """The scale of values whose largest magnitude is `peak`; float32, elementwise."""
    # An infinite scale would turn infinity into NaN, a subnormal one may be flushed to 0.
    scale = jnp.minimum(peak, jnp.finfo(jnp.float32).max) / largest_of(dtype)
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, jnp.float32(1), scale)


def to_page_type(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 → int8 or e4m3, to nearest even, saturating. Works inside the kernel too."""
    limit = largest_of(dtype)
    if jnp.dtype(dtype) == jnp.int8:
        return lax.round(_clip(x, limit), lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int8)
    # By its bits: sm_80 has no instruction for it, and XLA's conversion overflows to NaN.
    sign = lax.bitcast_convert_type(x, jnp.int32) >> 24 & 0x80
    size = jnp.minimum(jnp.abs(x), limit)
    bits = lax.bitcast_convert_type(size, jnp.int32)
    normal = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (127 - 7) * 8
    # e4m3's subnormals are multiples of 2^-9, which is the spacing of float32 from 2^14 on.
    shifted = lax.bitcast_convert_type(size + jnp.float32(2**14), jnp.int32)
    small = shifted - 0x46800000  # 2^14
    magnitude = jnp.where(size < 2**-6, small, normal)
    magnitude = jnp.where(x != x, 0x7F, magnitude)
    return lax.bitcast_convert_type((sign | magnitude).astype(jnp.int8), jnp.float8_e4m3fn)


def _clip(x: jax.Array, limit: float) -> jax.Array:
    return jnp.maximum(jnp.minimum(x, limit), -limit)


def largest_of(dtype: Any) -> float:
    if jnp.dtype(dtype) not in LARGEST:
        raise ValueError(f"dtype={jnp.dtype(dtype).name}: expected int8 or float8_e4m3fn")
    return LARGEST[jnp.dtype(dtype)]
