"""Rounding of rows to 8 bits, each with a scale of its own: what activations are before W8A8.

`round_rows` is the op: it checks its arguments and picks a backend. `kv_quantise.quantise` is the
definition; `round_rows_mosaic` is one kernel where XLA launches four.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kv_quantise import largest_of, quantise
from pallas_kernels.row_backend import Backend, check_rows, choose


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
    check_rows(x, backend)
    if choose(backend, x.shape[-1]) == "reference":
        return quantise(x, dtype)
    from pallas_kernels import round_rows_mosaic  # importing Mosaic changes the environment

    return round_rows_mosaic.round_rows(x, dtype=jnp.dtype(dtype))
