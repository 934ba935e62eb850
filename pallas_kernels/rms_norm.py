"""Root-mean-square norm, and the sum of a residual stream that comes before it.

`rms_norm` is the op: it checks its arguments and picks a backend. `reference` is the definition, in
plain jnp; `rms_norm_mosaic` is one kernel that adds and normalises. The kernel is there for its
bits: XLA chooses the order in which it sums a row by how many rows there are, and a sum that
rounds differently once in some thousand tokens changes all the tokens after it.

Zhang & Sennrich 2019, Root mean square layer normalization.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_backend import Backend, check_rows, choose


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    eps: float,
    delta: jax.Array | None = None,
    *,
    plus_one: bool = False,
    backend: Backend = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Adds `delta` to x and normalises over the last axis, float32 inside.

    Args:
        x: [..., E], a float type.
        weight: [E], of the same type; scales what is normalised, after that is rounded.
        eps: added to the mean of the squares.
        delta: as x; None adds nothing.
        plus_one: scales by 1 + weight, in float32, and rounds what comes of it (Gemma).
        backend: `mosaic`: one kernel launch, on a GPU from sm_80 on (or in Pallas's GPU
            interpreter), for E a multiple of 32 up to 16384; a row's bits depend on that row
            alone. `auto` is that where it can run, and `reference` elsewhere. Only `reference` can
            be differentiated.

    Returns:
        (x + delta, its norm), each as x.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit, named with what would.
    """
    _check(x, weight, delta, backend)
    if choose(backend, x.shape[-1]) == "reference":
        return reference(x, weight, eps, delta, plus_one=plus_one)
    from pallas_kernels import rms_norm_mosaic  # importing Mosaic changes the environment

    return rms_norm_mosaic.norm(x, weight, delta, eps=float(eps), plus_one=plus_one)


def reference(
    x: jax.Array,
    weight: jax.Array,
    eps: float,
    delta: jax.Array | None = None,
    *,
    plus_one: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The definition of `rms_norm`; same arguments."""
    x = x if delta is None else x + delta
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if plus_one:
        return x, (y * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return x, y.astype(x.dtype) * weight


def _check(x: jax.Array, weight: jax.Array, delta: jax.Array | None, backend: str) -> None:
    check_rows(x, backend)
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight is {weight.dtype} {weight.shape}: expected {x.dtype} [{x.shape[-1]}]"
        )
    if delta is not None and (delta.shape, delta.dtype) != (x.shape, x.dtype):
        raise ValueError(f"delta is {delta.dtype} {delta.shape}: expected {x.dtype} {x.shape}")
