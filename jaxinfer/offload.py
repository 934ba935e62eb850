"""Weights that the device has no room for: they lie in the host's memory, and every step copies
them to the device, a layer at a time.

Of some layers all matrices are in pinned memory, which the device reads by itself; vectors, and
what is not of a layer, stay on the device. The step is one program all the same: `fetch` puts the
copies into it, two layers ahead. The compiler makes them asynchronous, and what orders them is what
they wait for: the layer whose buffers they take must have been computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Sharding

from jaxinfer.errors import CapacityError

BUFFERS = 2  # layers on the device at most that lie on the host: one computes, one is copied
DEVICE, HOST = "device", "pinned_host"  # JAX's names of the memories


class Split(NamedTuple):
    """Where the weights lie.

    Attributes:
        layers: whose matrices lie on the host.
        device: bytes on each device.
        host: bytes on the host, for each device.
        buffers: bytes of each device for layers on their way.
    """

    layers: tuple[int, ...]
    device: int
    host: int
    buffers: int


def split(weights: Any, sizes: Any, budget: int) -> Split:
    """Which layers are to lie on the host: as few as will do.

    Args:
        weights: of `models.weights.declare`.
        sizes: bytes on each device of each of these weights.
        budget: bytes that weights may take of each device, buffers included.

    Raises:
        CapacityError: it is too small for all layers on the host; says how much would do.
    """
    total, count = sum(jax.tree.leaves(sizes)), len(weights["layers"])
    matrices = [
        sum(size[name] for name, weight in layer.items() if _moves(weight))
        for layer, size in zip(weights["layers"], sizes["layers"], strict=True)
    ]
    found = Split((), total, 0, 0)
    for n in range(count + 1):
        layers = spread(n, count)
        host = sum(matrices[i] for i in layers)
        buffers = BUFFERS * max((matrices[i] for i in layers), default=0)
        found = Split(layers, total - host, host, buffers)
        if found.device + buffers <= budget:
            return found
    least = min(total, found.device + found.buffers)
    raise CapacityError(
        f"device_weight_bytes={budget}: this model needs at least {least}, for its embeddings and "
        f"{BUFFERS} layers on their way"
    )


def spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` of so many layers, evenly, the last among them.

    Copies go on while the layers between are computed; after the last copy, as little as can be.
    """
    return tuple(i for i in range(layers) if (i + 1) * count // layers > i * count // layers)


def host_places(weights: Any, places: Any, layers: Sequence[int]) -> Any:
    """Where the weights are to lie: matrices of these layers on the host.

    Args:
        weights: of `models.weights.declare`.
        places: a sharding for each; None: the default device.
    """
    if places is None:
        default = jnp.zeros(()).sharding
        places = jax.tree.map(lambda _: default, weights)
    moved = list(places["layers"])
    for i in layers:
        moved[i] = {
            name: place.with_memory_kind(HOST) if _moves(weights["layers"][i][name]) else place
            for name, place in moved[i].items()
        }
    return {**places, "layers": moved}


def lies(params: Any) -> Split:
    """Where the weights of a model lie that is loaded, packed or not."""
    layers = [[x for x in jax.tree.leaves(w) if on_host(x)] for w in params["layers"]]
    each = [sum(map(local_bytes, matrices)) for matrices in layers]
    total = sum(map(local_bytes, jax.tree.leaves(params)))
    return Split(
        tuple(i for i, size in enumerate(each) if size),
        total - sum(each), sum(each), BUFFERS * max(each, default=0),
    )  # fmt: skip


def local_bytes(x: jax.Array) -> int:
    """What an array takes for each device."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def on_host(x: Any) -> bool:
    """Whether an array, or what stands for one in a program, lies in the host's memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def place_of(place: Sharding, x: Any) -> Sharding:
    """Where an array of a quantised matrix lies, of which the codes lie in `place`."""
    return place if _moves(x) else place.with_memory_kind(DEVICE)


def moved(matrix: Any, kind: str) -> Any:
    """A matrix, quantised or not, in the memory `kind` of its devices."""

    def move(x: jax.Array) -> jax.Array:
        return jax.device_put(x, place_of(x.sharding.with_memory_kind(kind), x))

    return jax.tree.map(move, matrix)


def fetch(layers: Sequence[Any], count: int, after: jax.Array) -> list[Any]:
    """In a program: the weights of `layers`, the first `count` of those on the host on the device.

    Args:
        layers: pytrees of weights.
        count: layers to be copied, at most.
        after: what must have been computed before their copies begin; without it the compiler
            would begin all copies at once, and need memory for all of them.
    """
    waiting = [i for i, w in enumerate(layers) if any(map(on_host, jax.tree.leaves(w)))][:count]

    def copied(x: Any) -> Any:
        if not on_host(x):
            return x
        x, _ = lax.optimization_barrier((x, after))
        return jax.device_put(x, jax.memory.Space.Device)

    return [jax.tree.map(copied, w) if i in waiting else w for i, w in enumerate(layers)]


def _moves(x: Any) -> bool:
    """Vectors stay on the device: they are small, and a copy takes some time whatever its size."""
    return len(x.shape) > 1
