"""Sums of partial results over the devices of a mesh axis, in the order of the devices.

`exchange` is the op: it picks a backend. In the kernels of `exchange_small` and `exchange_large`
devices write into each other's memory, by addresses that `connect` collects; elsewhere it is
collectives of XLA's, whose sums have the same bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.exchange_layout import LARGE, LINE, SMALL, VECTOR, memory_words

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


@dataclass(frozen=True)
class Peers:
    """Memory of each device that the others write into.

    Attributes:
        table: uint32 [devices, 2n + 3], a row on each device: addresses of the memory of the n
            devices of its group and of its own, in two words each, and its place in the group.
        memory: what the addresses are of. It must live as long as anybody uses the table. None
            where programs are only compiled.
    """

    table: jax.Array | jax.ShapeDtypeStruct
    memory: jax.Array | None


def connectable(mesh: Mesh) -> bool:
    """Whether `connect` can: Hopper GPUs, several along the last axis, all of them this process's,
    that reach each other's memory."""
    if mesh.devices.shape[-1] == 1 or mesh.is_multi_process:
        return False
    if any(d.platform != "gpu" or d.compute_capability != "9.0" for d in mesh.devices.flat):
        return False
    return all(map(_reach_each_other, mesh.devices.reshape(-1, mesh.devices.shape[-1]).tolist()))


def _reach_each_other(group: Sequence[Any]) -> bool:
    """Whether CUDA lets each of these GPUs write into the memory of the others."""
    cuda, handles, yes = ctypes.CDLL("libcuda.so.1"), [], ctypes.c_int()
    for device in group:
        handle = ctypes.c_int()
        if cuda.cuDeviceGet(ctypes.byref(handle), device.local_hardware_id):
            return False
        handles.append(handle)
    return all(
        cuda.cuDeviceCanAccessPeer(ctypes.byref(yes), one, other) == 0 and yes.value
        for one, other in permutations(handles, 2)
    )


def memory_bytes(mesh: Mesh) -> int:
    """Bytes that `connect` takes of each device."""
    return 4 * memory_words(mesh.devices.shape[-1])


def table_shape(mesh: Mesh) -> tuple[int, int]:
    """Of `Peers.table`."""
    return mesh.size, 2 * mesh.devices.shape[-1] + 3


def connect(mesh: Mesh) -> Peers:
    """Connects the devices along the last axis of a mesh. All must be this process's, GPUs that can
    reach each other's memory. What uses the result must run in the same order on each of them."""
    axes, n = mesh.axis_names, mesh.devices.shape[-1]
    place = NamedSharding(mesh, PartitionSpec(axes))
    memory = jax.jit(
        lambda: jnp.zeros((mesh.size, memory_words(n)), jnp.uint32), out_shardings=place
    )()
    jax.block_until_ready(memory)
    at = {s.device: s.data.unsafe_buffer_pointer() for s in memory.addressable_shards}
    rows = [
        [*_words(*(at[peer] for peer in group), at[own]), place]
        for group in mesh.devices.reshape(-1, n)
        for place, own in enumerate(group)
    ]
    return Peers(jax.device_put(np.array(rows, np.uint32), place), memory)


def _words(*addresses: int) -> list[int]:
    return [word for a in addresses for word in (a & 0xFFFFFFFF, a >> 32)]


def exchange(x: jax.Array, axis: str, peers: jax.Array | None = None) -> jax.Array:
    """The sum of x over the devices of a mesh axis, under `shard_map`; the same on all of them.

    Summed in x's dtype and in the order of the devices, so that no size of a message changes bits.

    Args:
        x: a float type.
        peers: this device's row of `Peers.table`, whose groups are along `axis`; None: by XLA.
    """
    n = lax.axis_size(axis)
    kernel = None if peers is None else kernel_for(x)
    if peers is not None and kernel is not None:
        # Importing Mosaic changes the environment.
        from pallas_kernels import exchange_large, exchange_small

        run = exchange_small.exchange if kernel == "small" else exchange_large.exchange
        return run(x, peers.reshape(-1), devices=n)
    if n == 2:
        return lax.psum(x, axis)  # the order of two does not matter
    first, *others = lax.all_gather(x, axis)
    for part in others:
        first = first + part
    return first


def kernel_for(x: jax.Array) -> Literal["small", "large"] | None:
    """Which of the kernels takes it; None: neither."""
    count = math.prod(x.shape)
    if x.dtype not in DTYPES:
        return None
    if count % LINE == 0 and count <= SMALL:
        return "small"
    return "large" if count % VECTOR == 0 and count <= LARGE else None
