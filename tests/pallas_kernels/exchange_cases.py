"""What `test_aot.py` compiles of `exchange`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.exchange_mosaic import exchange
from tests.pallas_kernels.aot_cases import Case


def cases(arch: str) -> list[Case]:
    """None before Hopper, which adds no pairs of bfloat16."""
    found = []
    if arch != "sm90":
        return found
    for devices, rows, name in ((2, 8, "bfloat16"), (4, 64, "bfloat16"), (8, 128, "float16")):

        def run(x: jax.Array, link: jax.Array, devices: int = devices) -> jax.Array:
            return exchange(x, link, devices=devices)

        x = jax.ShapeDtypeStruct((rows, 4096), jnp.dtype(name))
        link = jax.ShapeDtypeStruct((2 * devices + 3,), jnp.uint32)
        found.append(Case(f"exchange {rows} rows, {devices} devices, {name}", run, (x, link)))
    return found
