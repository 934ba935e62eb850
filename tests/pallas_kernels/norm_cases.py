"""What `test_aot.py` compiles of `rms_norm`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rms_norm import rms_norm
from tests.pallas_kernels.aot_cases import Case

# Rows that lie in a warp, in four, with small pieces, and the longest.
SHAPES = ((128, "bfloat16"), (320, "float32"), (4096, "bfloat16"), (1152, "bfloat16"))
LONGEST = ((16384, "bfloat16"), (8192, "float32"))


def cases(arch: str) -> list[Case]:
    """With a sum before, which needs the most registers."""

    def norm(x: jax.Array, weight: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rms_norm(x, weight, 1e-5, delta, backend="mosaic")

    def plus_one(x: jax.Array, weight: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rms_norm(x, weight, 1e-5, delta, plus_one=True, backend="mosaic")

    x = jax.ShapeDtypeStruct((64, 3072), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((3072,), x.dtype)
    found = [Case("rms_norm E=3072 plus one", plus_one, (x, weight, x))]
    for E, name in SHAPES + LONGEST:
        x = jax.ShapeDtypeStruct((64, E), jnp.dtype(name))
        weight = jax.ShapeDtypeStruct((E,), x.dtype)
        found.append(Case(f"rms_norm E={E} {name}", norm, (x, weight, x)))
    return found
