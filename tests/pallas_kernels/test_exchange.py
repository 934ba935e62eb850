"""Sums over devices: by XLA on simulated devices, by the kernel on GPUs that reach each other."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.exchange import connect, connectable, exchange, kernel_for
from pallas_kernels.exchange_layout import LARGE, SMALL
from tests.conftest import env_of_devices

DTYPES = ("bfloat16", "float16", "float32")


def in_order(parts: jax.Array) -> np.ndarray:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return np.asarray(total)


def parts_of(devices: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), (devices, *shape), dtype)


def run_here(devices: int) -> None:
    """What `test_by_collectives` runs in a process with so many devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tensor",))
    assert not connectable(mesh)
    same = []
    for dtype in DTYPES:
        parts = parts_of(devices, (8, 48), dtype)

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False)
        def run(x: jax.Array) -> jax.Array:
            return exchange(x[0], "tensor")[None]

        found = np.asarray(run(jax.device_put(parts, NamedSharding(mesh, P("tensor")))))
        same.append(all(np.array_equal(in_order(parts), each) for each in found))
    print(json.dumps(same))


@pytest.mark.parametrize("devices", [2, 4])
def test_by_collectives(devices: int) -> None:
    """Bits of the sum in order; of two devices too, whose sum is an all-reduce."""
    words = [sys.executable, "-m", "tests.pallas_kernels.test_exchange", str(devices)]
    done = subprocess.run(
        words, env=env_of_devices(devices), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [True] * len(DTYPES)


@pytest.mark.parametrize(
    ("shape", "dtype", "kernel"),
    [
        ((8, 4096), "bfloat16", "small"),
        ((SMALL,), "float16", "small"),
        ((SMALL + 8,), "float16", "large"),
        ((LARGE,), "bfloat16", "large"),
        ((LARGE + 8,), "bfloat16", None),
        ((SMALL + 4,), "bfloat16", None),
        ((3, 5), "bfloat16", None),
        ((8, 4096), "float32", None),
    ],
)
def test_what_the_kernels_take(shape: tuple[int, ...], dtype: str, kernel: str | None) -> None:
    assert kernel_for(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))) == kernel


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kernels_sum_in_order(dtype: str) -> None:
    """Messages of several sizes after each other, whose turns and counters are the same: both
    kernels', of fewer vectors than threads, and of slices and tiles that are not full."""
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one GPU: nothing to exchange with")
    mesh = Mesh(np.array(devices), ("tensor",))
    assert connectable(mesh)
    link = connect(mesh)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False)
    def run(x: jax.Array, table: jax.Array) -> jax.Array:
        return exchange(x[0], "tensor", table)[None]

    for rows in (8, 257, 128, 1, 4096, 1001, 3, 256, 8192) * 3:
        parts = parts_of(len(devices), (rows, 4096), dtype)
        found = np.asarray(run(jax.device_put(parts, link.table.sharding), link.table))
        for each in found:
            np.testing.assert_array_equal(each, in_order(parts))


if __name__ == "__main__":
    run_here(int(sys.argv[1]))
