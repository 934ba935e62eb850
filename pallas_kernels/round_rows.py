"""Rounding of rows to 8 bits, each with a scale of its own: what activations are before W8A8.

`round_rows` is the op: it checks its arguments and picks a backend. `kv_quantise.quantise` is the
definition; `round_rows_mosaic` is one kernel where XLA launches four.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.device import LANES, LONGEST_ROW, capability, has_kernels
from pallas_kernels.kv_quantise import largest_of, quantise

Backend = Literal["auto", "reference", "mosaic"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "mosaic")


def round_rows(
    x: jax.Array, dtype: Any, *, backend: Backend = "auto"
) -> tuple[jax.Array, jax.Array]:
    """x → (codes, scales) with x ≈ codes.astype(float32) * scales[..., None].

    Args:
        x: [..., E], a float type.
        dtype: int8 or float8_e4m3fn.
        backend: `mosaic`: one kernel launch, on a GPU from sm_80 on (or in Pallas's GPU
            interpreter), for E a multiple of 32 up to 16384. `auto` is that where it can run, and
            `reference` elsewhere. Both give the same bits, but that `reference` takes float16's
            subnormal numbers for zeros.

    Returns:
        codes of `dtype` [..., E], to nearest even; scales, float32 [...]: the largest |x| of the
        row over the type's largest number.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit, named with what would.
    """
    largest_of(dtype)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    if x.ndim == 0 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} {x.shape}: expected floats [..., E], not empty")
    E = x.shape[-1]
    fits = E % LANES == 0 and E <= LONGEST_ROW
    if backend == "mosaic" and not fits:
        raise ValueError(
            f"backend='mosaic': E={E}, expected a multiple of {LANES} up to {LONGEST_ROW}"
        )
    if backend == "reference" or (backend == "auto" and not (fits and has_kernels(capability()))):
        return quantise(x, dtype)
    from pallas_kernels import round_rows_mosaic  # importing Mosaic changes the environment

    return round_rows_mosaic.round_rows(x, dtype=jnp.dtype(dtype))
