"""Which backend computes an op that works row by row: `rms_norm`, `round_rows`."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.device import capability, has_kernels

Backend = Literal["auto", "reference", "mosaic"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "mosaic")

LANES = 32  # of a warp: the kernels' rows are a multiple of them
LONGEST = 16384  # a row lies in the registers of 128 threads


def check_rows(x: jax.Array, backend: str) -> None:
    """Raises ValueError for what no backend takes."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    if x.ndim == 0 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} {x.shape}: expected floats [..., E], not empty")


def choose(backend: Backend, E: int) -> Backend:
    """`reference` or `mosaic`; ValueError where the kernel is asked for and takes no such rows."""
    fits = E % LANES == 0 and E <= LONGEST
    if backend == "mosaic" and not fits:
        raise ValueError(f"backend='mosaic': E={E}, expected a multiple of {LANES} up to {LONGEST}")
    if backend != "auto":
        return backend
    return "mosaic" if fits and has_kernels(capability()) else "reference"
