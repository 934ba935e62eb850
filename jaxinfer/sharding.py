"""One table: logical axis → mesh axis. Every weight names its logical axes once, where it is
declared (`models.weights`)."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.models.weights import Weight

TENSOR = "tensor"

MESH_AXES: dict[str | None, str | None] = {
    "vocab": TENSOR,
    "heads": TENSOR,
    "mlp": TENSOR,
    "embed": None,
    None: None,
}


def partition_spec(weight: Weight) -> PartitionSpec:
    """How a declared weight is split."""
    return PartitionSpec(*(MESH_AXES[axis] for axis in weight.axes))


def shardings(weights: Any, mesh: Mesh) -> Any:
    """The tree of `Weight` with a `NamedSharding` at every leaf."""
    return jax.tree.map(lambda w: NamedSharding(mesh, partition_spec(w)), weights)
