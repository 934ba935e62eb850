"""Several devices while the engine runs: which they are, and how what they hold is laid out.

Under tensor parallelism weights and KV heads are split, everything else is whole on every device
(ADR 011). One device is no mesh at all: what is made for `None` is what was made before there were
any meshes. Only a replica of several (ADR 013) names its one device, by a mesh of that size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxinfer.cache import PagedCache, init_cache
from jaxinfer.config import ModelConfig
from jaxinfer.models.weights import Weight, declare
from jaxinfer.offload import host_places, local_bytes, on_host
from jaxinfer.sharding import TENSOR, shardings


def tensor_mesh(size: int) -> Mesh | None:
    """The first `size` devices of this process, along the axis `tensor`; None for one device.

    Raises:
        ValueError: there are fewer.
    """
    if size == 1:
        return None
    devices = jax.local_devices()
    if size > len(devices):
        raise ValueError(
            f"tensor_parallel_size={size}: this process has {len(devices)} device(s) "
            f"({devices[0].device_kind}): expected 1 to {len(devices)}"
        )
    return Mesh(np.array(devices[:size]), (TENSOR,))


def replica_meshes(size: int, replicas: int) -> tuple[Mesh | None, ...]:
    """The devices of each replica: of those of this process, replica i has [i * size, (i + 1) *
    size). One replica alone: see `tensor_mesh`.

    Raises:
        ValueError: there are fewer devices.
    """
    first, devices = tensor_mesh(size), jax.local_devices()
    if replicas == 1:
        return (first,)
    if replicas * size > len(devices):
        raise ValueError(
            f"data_parallel_size={replicas}: replicas of tensor_parallel_size={size} need "
            f"{replicas * size} devices, this process has {len(devices)} "
            f"({devices[0].device_kind}): expected 1 to {len(devices) // size}"
        )
    starts = range(0, replicas * size, size)
    return tuple(Mesh(np.array(devices[at : at + size]), (TENSOR,)) for at in starts)


def reading_mesh(meshes: Sequence[Mesh | None]) -> Mesh | None:
    """Over which weights are split when they are read, for the first replica; None where each has
    one device."""
    first = meshes[0]
    return None if first is None or first.size == 1 else first


def copy_to(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays of one replica on the devices of another, split alike; None: as they are."""
    if mesh is None:
        return tree

    def copy(leaf: jax.Array) -> jax.Array:
        place = leaf.sharding
        spec = place.spec if isinstance(place, NamedSharding) else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec, memory_kind=place.memory_kind))

    return jax.tree.map(copy, tree)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays, whole on every device of the mesh."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def new_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    kv_dtype: Any,
    *,
    mesh: Mesh | None,
    with_tokens: bool = False,
) -> PagedCache:
    """`cache.init_cache`, split over the mesh by KV heads.

    Fewer KV heads than devices are held several times: head h of the returned arrays is what
    `declare(config, n)` gives its shard, model's head h * num_kv_heads // n.
    """
    make = partial(
        init_cache, cache_config(config, mesh), num_pages, page_size, kv_dtype,
        with_tokens=with_tokens,
    )  # fmt: skip
    if mesh is None:
        return make()
    heads = NamedSharding(mesh, PartitionSpec(None, TENSOR))
    whole = NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda _: heads, jax.eval_shape(make))
    if with_tokens:
        places = places._replace(tokens=whole)
    return jax.jit(make, out_shardings=places)()  # nothing is ever whole on one device


def cache_config(config: ModelConfig, mesh: Mesh | None) -> ModelConfig:
    """The model with as many KV heads as the cache of all devices together holds."""
    shards = 1 if mesh is None else mesh.size
    return replace(config, num_kv_heads=max(config.num_kv_heads, shards))


def arrange(params: Any, config: ModelConfig, shards: int) -> Any:
    """The tree of `declare(config)` as one of `declare(config, shards)`, on the host.

    Fused matrices get their rows in another order, some several times: they are copied. The others
    are as they were.
    """
    return _each(params, config, shards, lambda leaf: leaf)


def lay_out(params: Any, config: ModelConfig, mesh: Mesh, layers: Sequence[int] = ()) -> Any:
    """The tree of `declare(config)`, dense and whole, on the mesh: one weight after the other.

    `layers`: of which the matrices are to lie on the host; see `offload`.
    """
    declared = declare(config, mesh.size)
    places = host_places(declared, shardings(declared, mesh), layers)

    def put(leaf: np.ndarray, place: Sharding) -> jax.Array:
        return jax.block_until_ready(jax.device_put(leaf, place))

    return _each(params, config, mesh.size, put, places)


def _each(
    params: Any, config: ModelConfig, shards: int, use: Callable[..., Any], *others: Any
) -> Any:
    """`use` of every weight, its rows in order, and of what `others` have in its place."""

    def one(leaf: Any, whole: Weight, split: Weight, *rest: Any) -> Any:
        host = np.asarray(leaf)
        return use(host if whole.pieces == split.pieces else host[_rows(whole, split)], *rest)

    return jax.tree.map(one, params, declare(config), declare(config, shards), *others)


def _rows(whole: Weight, split: Weight) -> np.ndarray:
    """Which row of `whole` each row of `split` is; both are fused from whole tensors on disk."""
    lengths = [piece.stop - piece.start for piece in whole.pieces]
    first = dict(zip((p.name for p in whole.pieces), np.cumsum([0, *lengths[:-1]]), strict=True))
    return np.concatenate([first[p.name] + np.arange(p.start, p.stop) for p in split.pieces])


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a tree take on each device."""
    return sum(local_bytes(leaf) for leaf in jax.tree.leaves(tree) if not on_host(leaf))


def device_share(config: ModelConfig, mesh: Mesh | None) -> float:
    """Of a dense model's weights, the part that each device holds: norms and some biases whole."""
    if mesh is None:
        return 1.0
    declared = declare(config, mesh.size)
    places: list[Sharding] = jax.tree.leaves(shardings(declared, mesh))
    mine = sum(
        math.prod(place.shard_shape(weight.shape))
        for weight, place in zip(jax.tree.leaves(declared), places, strict=True)
    )
    return mine / sum(math.prod(weight.shape) for weight in jax.tree.leaves(declare(config)))
