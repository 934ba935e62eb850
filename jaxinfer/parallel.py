"""Several devices while the engine runs: which, and how what they hold is laid out.

Weights and the KV cache are split, by heads over the devices that share a layer (ADR 011) and by
layers over the stages of a pipeline (ADR 012); everything else is whole on every device. One device
is no mesh at all: what is made for `None` is what was made before there were any meshes. Only a
replica of several (ADR 013) names its one device, by a mesh of that size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxinfer.cache import PagedCache, init_cache
from jaxinfer.config import ModelConfig
from jaxinfer.models.weights import Piece, Weight, declare
from jaxinfer.offload import host_places, local_bytes, on_host
from jaxinfer.sharding import STAGE, TENSOR, degree, shardings
from pallas_kernels.exchange import Peers, connect, connectable

logger = logging.getLogger(__name__)

# Options of `LLM`.
TENSOR_SIZE, STAGES = "tensor_parallel_size", "pipeline_parallel_size"
REPLICAS = "data_parallel_size"


def replica_meshes(size: int, stages: int = 1, replicas: int = 1) -> tuple[Mesh | None, ...]:
    """The devices of each replica, of those of all processes as they are numbered.

    Along the axis `tensor`, or, of several stages, along `stage` and `tensor`: neighbours are in
    one stage, and stages of one replica follow each other. None: one device, of one replica alone.

    Raises:
        ValueError: there are fewer devices; or several processes, and more devices.
    """
    devices, each, processes = jax.devices(), size * stages, jax.process_count()
    who = "this process has" if processes == 1 else f"{processes} processes have"
    has = f"{who} {len(devices)} device(s) ({devices[0].device_kind})"
    if processes > 1 and each != len(devices):
        raise ValueError(
            f"{TENSOR_SIZE}={size} * {STAGES}={stages}: {has}: expected {len(devices)}, so that "
            "each has its part"
        )
    if each > len(devices):
        asked = ((TENSOR_SIZE, size), (STAGES, stages))
        counts = " * ".join(f"{name}={n}" for name, n in asked if n > 1)
        raise ValueError(f"{counts}: {has}: expected 1 to {len(devices)}")
    if each * replicas > len(devices):
        raise ValueError(
            f"{REPLICAS}={replicas}: replicas of {each} device(s) need {replicas * each}, {has}: "
            f"expected 1 to {len(devices) // each}"
        )
    if each * replicas == 1:
        return (None,)
    shape, axes = ((size,), (TENSOR,)) if stages == 1 else ((stages, size), (STAGE, TENSOR))
    chosen = np.array(devices[: each * replicas]).reshape(replicas, *shape)
    return tuple(Mesh(own, axes) for own in chosen)


def connected(mesh: Mesh | None) -> Peers | None:
    """By what GPUs that share layers reach each other's memory. None: exchanges are XLA's, or there
    are none."""
    if mesh is None or mesh.shape[TENSOR] == 1:
        return None
    if connectable(mesh):
        return connect(mesh)
    if mesh.devices.flat[0].platform == "gpu":
        logger.info(
            "exchanges between GPUs are XLA's: those by kernels need Hopper GPUs of one process "
            "that reach each other's memory"
        )
    return None


def reading_mesh(meshes: Sequence[Mesh | None]) -> Mesh | None:
    """Over which weights are split when they are read, for the first replica; None where each has
    one device."""
    first = meshes[0]
    return None if first is None or first.size == 1 else first


def sizes(mesh: Mesh | None) -> dict[str, int]:
    """By the names of `LLM`'s options, how a model is shared out; without those that are 1."""
    found = {TENSOR_SIZE: degree(mesh, TENSOR), STAGES: degree(mesh, STAGE)}
    return {name: n for name, n in found.items() if n > 1}


def said(mesh: Mesh | None) -> str:
    """`sizes` in words."""
    return ", ".join(f"{name}={n}" for name, n in sizes(mesh).items())


def stage_config(config: ModelConfig, mesh: Mesh | None) -> ModelConfig:
    """The model of which each stage is one: with the layers of one, which are alike in all."""
    return replace(config, layers=config.layers[: config.num_layers // degree(mesh, STAGE)])


def declared_on(config: ModelConfig, mesh: Mesh | None) -> Any:
    """`models.weights.declare` for the devices of a mesh."""
    return declare(config, degree(mesh, TENSOR), degree(mesh, STAGE))


def copy_to(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays of one replica on the devices of another, split alike; None: as they are."""
    if mesh is None:
        return tree

    def copy(leaf: jax.Array) -> jax.Array:
        place = leaf.sharding
        spec = place.spec if isinstance(place, NamedSharding) else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec, memory_kind=place.memory_kind))

    return jax.tree.map(copy, tree)


def put(x: Any, place: Sharding | None) -> jax.Array:
    """An array to where it is to lie; one of the host to devices of several processes, each of
    which has the whole of it and places what its devices hold.

    There `jax.device_put` would first compare it over all processes, by a collective.
    """
    if place is None or place.is_fully_addressable:
        return jax.device_put(x, place)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays, whole on every device of the mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, PartitionSpec())), tree)


def new_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    kv_dtype: Any,
    *,
    mesh: Mesh | None,
    with_tokens: bool = False,
) -> PagedCache:
    """`cache.init_cache`, split over the mesh by KV heads, and by layers over its stages.

    Fewer KV heads than devices are held several times: head h of the returned arrays is what
    `declare(config, n)` gives its shard, model's head h * num_kv_heads // n. Each array has the
    pages of one layer of every stage, one stage's behind the other's.
    """
    stages = degree(mesh, STAGE)

    def make() -> PagedCache:
        made = init_cache(cache_config(config, mesh), stages * num_pages, page_size, kv_dtype)
        text = jnp.zeros((num_pages, page_size), jnp.int32) if with_tokens else None
        return made._replace(tokens=text)

    if mesh is None:
        return make()
    split = NamedSharding(mesh, PartitionSpec(STAGE if stages > 1 else None, TENSOR))
    whole = NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda _: split, jax.eval_shape(make))
    if with_tokens:
        places = places._replace(tokens=whole)
    return jax.jit(make, out_shardings=places)()  # nothing is ever whole on one device


def cache_config(config: ModelConfig, mesh: Mesh | None) -> ModelConfig:
    """A stage of the model with as many KV heads as the cache of all devices together holds."""
    heads = max(config.num_kv_heads, degree(mesh, TENSOR))
    return replace(stage_config(config, mesh), num_kv_heads=heads)


def arrange(params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """The tree of `declare(config)` as one of `declared_on(config, mesh)`, on the host.

    Fused matrices get their rows in another order, some several times, and layers of several stages
    become one: they are copied. The others are as they were.
    """
    return _each(params, config, declared_on(config, mesh), lambda leaf: leaf)


def lay_out(params: Any, config: ModelConfig, mesh: Mesh, layers: Sequence[int] = ()) -> Any:
    """The tree of `declare(config)`, dense and whole, on the mesh: one weight after the other.

    `layers`: of which the matrices are to lie on the host; see `offload`.
    """
    declared = declared_on(config, mesh)
    places = host_places(declared, shardings(declared, mesh), layers)

    def placed(leaf: np.ndarray, place: Sharding) -> jax.Array:
        return jax.block_until_ready(put(leaf, place))

    return _each(params, config, declared, placed, places)


def _each(
    params: Any, config: ModelConfig, declared: Any, use: Callable[..., Any], *others: Any
) -> Any:
    """`use` of every weight as `declared`, and of what `others` have in its place."""
    found: dict[str, tuple[Any, int]] = {}  # by name on disk: the leaf, and where it begins there

    def note(leaf: Any, whole: Weight) -> None:
        first = 0
        for piece in whole.pieces:
            found[piece.name] = leaf, first
            first += piece.stop - piece.start

    def rows(piece: Piece) -> np.ndarray:
        leaf, first = found[piece.name]
        return np.asarray(leaf)[first + piece.start : first + piece.stop]

    def one(weight: Weight, *rest: Any) -> Any:
        parts = [rows(piece) for piece in weight.pieces]
        return use(parts[0] if len(parts) == 1 else np.concatenate(parts), *rest)

    jax.tree.map(note, params, declare(config))
    return jax.tree.map(one, declared, *others)


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a tree take on each device."""
    return sum(local_bytes(leaf) for leaf in jax.tree.leaves(tree) if not on_host(leaf))


def device_share(config: ModelConfig, mesh: Mesh | None) -> float:
    """Of a dense model's weights, the part that each device holds: norms and some biases whole."""
    if mesh is None:
        return 1.0
    declared = declared_on(config, mesh)
    places: list[Sharding] = jax.tree.leaves(shardings(declared, mesh))
    mine = sum(
        math.prod(place.shard_shape(weight.shape))
        for weight, place in zip(jax.tree.leaves(declared), places, strict=True)
    )
    return mine / sum(math.prod(weight.shape) for weight in jax.tree.leaves(declare(config)))
