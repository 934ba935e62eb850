"""What `test_qkv_write.py` compiles for GPUs that are not there.

    python -m tests.pallas_kernels.qkv_write_cases

prints what a step that writes and then reads the pools, inside a loop as the decode steps do, needs
beside its arguments: one JSON object a case. A pool that is copied would show there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.qkv_heads import Heads
from pallas_kernels.qkv_write import qkv_write
from tests.pallas_kernels.aot import topology
from tests.pallas_kernels.aot_cases import Case

FORMATS = {
    "bf16": (jnp.bfloat16, None),
    "f32": (jnp.float32, None),
    "int8": (jnp.int8, "dynamic"),
    "fp8": (jnp.float8_e4m3fn, "dynamic"),
    "int8 static": (jnp.int8, "static"),
    "fp8 static": (jnp.float8_e4m3fn, "static"),
}
SHAPES = ((8, 128), (1, 64), (2, 256), (5, 128), (32, 128), (3, 32))  # K, D
GROUP = 4  # query heads of one of keys and values
PAGES, PAGE_SIZE = 1000, 64


def arguments(K: int, D: int, name: str, tokens: int = 16) -> tuple[Any, ...]:
    """Of `qkv_write` with all that is done to heads, as shapes."""
    dtype, scaling = FORMATS[name]
    pages = jax.ShapeDtypeStruct((PAGES, K, PAGE_SIZE, D), dtype)
    scales = None
    if scaling is not None:
        shape = (PAGES, K, PAGE_SIZE) if scaling == "dynamic" else (K,)
        scales = jax.ShapeDtypeStruct(shape, jnp.float32)
    qkv = jax.ShapeDtypeStruct((tokens, (GROUP + 2) * K * D), jnp.bfloat16)
    norm = jax.ShapeDtypeStruct((D,), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct(qkv.shape[1:], jnp.bfloat16)
    table = jax.ShapeDtypeStruct((tokens, D // 2), jnp.float32)
    slots = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    heads = Heads(bias, norm, norm, 1e-5, (table, table))
    return (pages, pages, scales, scales), qkv, slots, heads


def cases(arch: str) -> list[Case]:
    """Every format at one shape, every shape at one format."""
    write = partial(qkv_write, backend="mosaic")
    wanted = [(*SHAPES[0], name) for name in FORMATS] + [(*s, "fp8") for s in SHAPES[1:]]
    return [
        Case(f"qkv_write {name} K={K} D={D}", write, arguments(K, D, name)) for K, D, name in wanted
    ]


def steps(pools: Any, qkv: Any, slots: Any, heads: Any, n: Any) -> Any:
    """Writes, and reads what it wrote for the next write, n times."""

    def body(carry: Any) -> Any:
        i, pools, x = carry
        _, pools = qkv_write(pools, qkv + x, slots, heads, backend="mosaic")
        read = sum(p[slots // PAGE_SIZE, :, slots % PAGE_SIZE].astype(x.dtype) for p in pools[:2])
        return i + 1, pools, jnp.mean(read.reshape(len(slots), -1), 1, keepdims=True)

    start = (jnp.int32(0), pools, qkv[:, :1])
    return lax.while_loop(lambda carry: carry[0] < n, body, start)


def memory() -> Iterator[dict[str, Any]]:
    jax.devices()  # finds the plugin
    devices, _ = topology("sm90")
    mesh = jax.sharding.Mesh(np.array(devices), ("gpu",))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    run = jax.jit(steps, in_shardings=there, out_shardings=there, donate_argnums=0)
    for name in FORMATS:
        args = arguments(8, 128, name)
        with jax.default_device(devices[0]):
            compiled = run.lower(*args, jax.ShapeDtypeStruct((), jnp.int32)).compile()
        needs = compiled.memory_analysis()
        yield {
            "name": name,
            "pool_bytes": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(args[0])),
            "donated_bytes": needs.alias_size_in_bytes,
            "other_bytes": needs.temp_size_in_bytes,
        }


if __name__ == "__main__":
    for row in memory():
        print(json.dumps(row))
