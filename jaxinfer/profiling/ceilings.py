"""The two ceilings of a device: copy bandwidth and the rate of a large matrix product.

Bandwidth counts bytes read plus bytes written; of several forms of a copy the best is the ceiling.
Calls are enqueued one after the other over rotating inputs, each larger than the L2 cache, and
waited for once: a single call's launch and allocation would count as time. Inputs are random: zeros
run faster than real data. Medians over repeats.

JAX is imported by the functions that need it: PyTorch's ceilings are timed in the same way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

BUFFERS = 4  # inputs that are rotated
REPEATS = 7
DTYPES = {"uint8": "uint8", "f32": "float32", "bf16": "bfloat16"}  # that are copied
# By platform: bytes of a buffer; rows and columns of the product.
SIZES = {"gpu": (1 << 28, 8192), "cpu": (1 << 23, 512)}


@dataclass(frozen=True)
class Ceilings:
    """What this device was measured to do; `dtype`: of the product."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    dtype: str


class Copy(NamedTuple):
    """One form of a copy: bytes that a call reads and writes, and the seconds it takes."""

    form: str
    bytes: int
    seconds: float


def seconds_per_call(
    call: Callable[[int], Any],
    wait: Callable[[Any], Any],
    calls: int = 4 * BUFFERS,
    repeats: int = REPEATS,
) -> float:
    """Median over repeats of the mean time of `calls` calls enqueued before one wait."""
    wait(call(0))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        out = None
        for i in range(calls):
            out = call(i)
        wait(out)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def rotating(fn: Callable[..., Any], inputs: list[Any]) -> Callable[[int], Any]:
    """i → `fn` of input i, round and round."""
    return lambda i: fn(inputs[i % len(inputs)])


def random_buffers(nbytes: int, dtype: str) -> list[Any]:
    """`BUFFERS` arrays of so many bytes each."""
    import jax
    import jax.numpy as jnp

    draw = jax.random.bits if dtype == "uint8" else jax.random.normal
    count, kind = nbytes // jnp.dtype(dtype).itemsize, jnp.dtype(dtype)
    keys = jax.random.split(jax.random.key(0), BUFFERS)
    return [jax.block_until_ready(draw(key, (count,), kind)) for key in keys]


def copies(nbytes: int, dtype: str) -> Iterator[Copy]:
    """A copy, x + 1, and x + 1 in place."""
    import jax
    import jax.numpy as jnp

    def add1(x: jax.Array) -> jax.Array:
        return x + jnp.ones((), x.dtype)

    arrays, wait = random_buffers(nbytes, dtype), jax.block_until_ready
    for form, fn in {"copy": jax.jit(jnp.copy), "add1": jax.jit(add1)}.items():
        yield Copy(form, 2 * nbytes, seconds_per_call(rotating(fn, arrays), wait))
    in_place = jax.jit(add1, donate_argnums=0)

    def donate(i: int) -> jax.Array:
        arrays[i % BUFFERS] = in_place(arrays[i % BUFFERS])
        return arrays[i % BUFFERS]

    yield Copy("add1_in_place", 2 * nbytes, seconds_per_call(donate, wait))


def product_seconds(n: int, dtype: str) -> float:
    """Of a product of two [n, n]; float32 is not rounded to TF32."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), BUFFERS)
    matrices = [jax.random.normal(key, (n, n), jnp.dtype(dtype)) for key in keys]
    pairs = list(zip(matrices, matrices[1:] + matrices[:1], strict=True))
    precision = "highest" if dtype == "float32" else None
    matmul = jax.jit(lambda pair: jnp.matmul(*pair, precision=precision))
    return seconds_per_call(rotating(matmul, pairs), jax.block_until_ready)


def measure_ceilings(dtype: str) -> Ceilings:
    """Of the default device; `dtype`: of the model's activations. Its memory is free afterwards."""
    import jax

    nbytes, n = SIZES[jax.devices()[0].platform]
    rates = (c.bytes / c.seconds for kind in DTYPES.values() for c in copies(nbytes, kind))
    return Ceilings(max(rates), 2 * n**3 / product_seconds(n, dtype), dtype)
