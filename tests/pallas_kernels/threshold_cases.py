"""What `test_threshold.py` compiles for GPUs that are not there."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.threshold import threshold
from tests.pallas_kernels.aot_cases import Case

SHAPES = ((64, 128_256), (1, 151_936), (3, 37), (2, 2**18 + 1))  # S, V


def cases(arch: str) -> list[Case]:
    """A few vocabularies; the largest has masses of fewer bits."""
    find = partial(threshold, backend="mosaic")
    return [Case(f"threshold S={S} V={V}", find, arguments(S, V)) for S, V in SHAPES]


def arguments(S: int, V: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of `threshold`, as shapes."""
    rows = [jax.ShapeDtypeStruct((S,), t) for t in (jnp.int32, jnp.float32, jnp.float32)]
    return (jax.ShapeDtypeStruct((S, V), jnp.float32), *rows)
