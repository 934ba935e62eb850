"""x · wᵀ of 8-bit codes, int8 or FP8, with a scale for each row of either (W8A8).

`scaled_matmul` is the op: it checks its arguments and picks a backend. `reference` is the
definition, in plain jnp; `scaled_matmul_sm90` is the kernel.

Letters: N rows of the matrix (out), K its columns (in).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import capability, sm_count
from pallas_kernels.quant_packing import BLOCK, COLUMNS

Backend = Literal["auto", "reference", "mosaic"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "mosaic")
CODES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


def scaled_matmul(
    x: jax.Array,
    w: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    out_dtype: Any,
    *,
    backend: Backend = "auto",
) -> jax.Array:
    """x [..., K] · w [N, K] · x_scale [...] · w_scale [N] → [..., N].

    Args:
        x, w: int8, or float8_e4m3fn; both the same.
        x_scale, w_scale: float32.
        out_dtype: of the result; the kernel's are of 16 bits.
        backend: `mosaic`: one kernel launch, on a Hopper GPU (or in Pallas's GPU interpreter), for
            N a multiple of 64 and K of 128; the bits of a row of x's result depend on that row
            alone. `auto` is that where it can run, and `reference` elsewhere.

    Returns:
        Integers are summed exactly, FP8 in float32: the kernel's sums of FP8 have the precision of
        the tensor cores (about 14 bits).

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit, named with what would.
    """
    _check(x, w, x_scale, w_scale, backend)
    N, K = w.shape
    fits = N % BLOCK == 0 and K % COLUMNS == 0 and jnp.dtype(out_dtype).itemsize == 2
    if backend == "mosaic" and not fits:
        raise ValueError(
            f"backend='mosaic': w is {w.shape}, out {out_dtype}; expected N a multiple of {BLOCK},"
            f" K of {COLUMNS}, and 16 bits"
        )
    if backend == "auto":
        backend = "mosaic" if fits and has_kernel(capability()) else "reference"
    if backend == "reference":
        return reference(x, w, x_scale, w_scale, out_dtype)
    from pallas_kernels import scaled_matmul_sm90  # importing Mosaic changes the environment

    out = scaled_matmul_sm90.matmul(
        x.reshape(-1, K), w, x_scale.reshape(-1), w_scale, out_dtype=jnp.dtype(out_dtype),
        sms=sm_count(), on_gpu=capability() is not None,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], N)


def has_kernel(capability: float | None) -> bool:
    """Whether the kernel runs on a GPU of this compute capability; None is no GPU."""
    return capability is not None and 9 <= capability < 10


def reference(
    x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array, out_dtype: Any
) -> jax.Array:
    """The definition of `scaled_matmul`; same arguments."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    if x.dtype == jnp.int8:
        sums = lax.dot_general(x, w, dims, preferred_element_type=jnp.int32).astype(jnp.float32)
    else:  # every FP8 number is a bfloat16 number too
        wide = (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
        sums = lax.dot_general(*wide, dims, preferred_element_type=jnp.float32)
    return (sums * x_scale[..., None] * w_scale).astype(out_dtype)


def _check(
    x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array, backend: str
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    if x.dtype not in CODES or w.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, w {w.dtype}: expected both int8 or float8_e4m3fn")
    if w.ndim != 2 or x.shape[-1:] != w.shape[1:] or 0 in x.shape:
        raise ValueError(f"x is {x.shape}, w {w.shape}: expected [..., K], not empty, and [N, K]")
    if x_scale.shape != x.shape[:-1] or w_scale.shape != w.shape[:1]:
        raise ValueError(
            f"scales are {x_scale.shape} and {w_scale.shape}: expected {x.shape[:-1]} and"
            f" {w.shape[:1]}"
        )
