"""What `test_aot.py` compiles of `exchange`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import exchange_large, exchange_small
from tests.pallas_kernels.aot_cases import Case


def cases(arch: str) -> list[Case]:
    """None before Hopper, which adds no pairs of bfloat16."""
    found = []
    if arch != "sm90":
        return found
    sizes = ((2, 8, "bfloat16"), (8, 256, "float16"), (2, 4096, "bfloat16"), (8, 1001, "float16"))
    for devices, rows, name in sizes:
        kernel = exchange_small if rows <= 256 else exchange_large

        def run(
            x: jax.Array, link: jax.Array, kernel: Any = kernel, devices: int = devices
        ) -> jax.Array:
            return kernel.exchange(x, link, devices=devices)

        x = jax.ShapeDtypeStruct((rows, 4096), jnp.dtype(name))
        link = jax.ShapeDtypeStruct((2 * devices + 3,), jnp.uint32)
        found.append(Case(f"exchange {rows} rows, {devices} devices, {name}", run, (x, link)))
    return found
