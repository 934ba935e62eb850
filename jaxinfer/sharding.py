"""One table: logical axis → mesh axis. Every weight names its logical axes once, where it is
declared (`models.weights`)."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.models.weights import Weight
from jaxinfer.types import Axis

STAGE, TENSOR = "stage", "tensor"

MESH_AXES: dict[str | None, str | None] = {
    "stage": STAGE,
    "vocab": TENSOR,
    "heads": TENSOR,
    "mlp": TENSOR,
    "embed": None,
    None: None,
}


def partition_spec(weight: Weight) -> PartitionSpec:
    """How a declared weight is split."""
    return PartitionSpec(*map(_mesh_axes, weight.axes))


def _mesh_axes(axis: str | tuple[str | None, ...] | None) -> str | tuple[str, ...] | None:
    if not isinstance(axis, tuple):
        return MESH_AXES[axis]
    return tuple(name for name in map(MESH_AXES.__getitem__, axis) if name is not None)


def shardings(weights: Any, mesh: Mesh) -> Any:
    """The tree of `Weight` with a `NamedSharding` at every leaf."""
    return jax.tree.map(lambda w: NamedSharding(mesh, partition_spec(w)), weights)


def degree(mesh: Mesh | None, axis: str) -> int:
    """Over how many devices of a mesh an axis goes; 1 where there is none."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def mesh_axes(mesh: Mesh | None) -> Axis:
    """The names that functions under `shard_map` over a mesh are given."""
    if mesh is None:
        return None
    return (STAGE, TENSOR) if STAGE in mesh.axis_names else TENSOR
