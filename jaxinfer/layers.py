"""The layers of a decoder as free functions on arrays.

They run per shard: with `axis` naming a mesh axis, arrays are this shard's part and the functions
add the collectives; head counts are read from the arrays' shapes.

Letters: T tokens, E hidden size, F MLP width, V vocabulary, H query heads, K key/value heads,
D head dim.

`jax.named_scope` names the parts of a step in a compiled program; `jaxinfer.profiling` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.quant import Matrix, matmul
from jaxinfer.types import Axis
from pallas_kernels.exchange import exchange

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def linear(x: jax.Array, weight: Matrix, bias: jax.Array | None = None) -> jax.Array:
    """x [..., in] · weight [out, in] (+ bias [out]) → [..., out] in x's dtype.

    `weight` is an array, or quantised. What follows sees the rounded product: a GPU's matmul could
    add a bias or a residual before it rounds, and then gives a row other bits from one number of
    rows to another (ADR 003).
    """
    y = lax.optimization_barrier(matmul(x, weight))
    return y if bias is None else y + bias


@jax.named_scope("collectives")
def reduce_shards(x: jax.Array, axis: str | None, peers: jax.Array | None = None) -> jax.Array:
    """Sums a row-parallel projection's partial results over the shards, in rank order; `peers`: see
    `pallas_kernels.exchange`."""
    return x if axis is None else exchange(x, axis, peers)


@jax.named_scope("rope")
def rope_tables(
    positions: jax.Array, frequencies: np.ndarray, factor: float
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [..., D/2], of positions [...] at frequencies [D/2], times `factor`."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def gated(x: jax.Array, layer: dict[str, Any], activation: str) -> jax.Array:
    """The neurons of a gated MLP (Shazeer 2020), act(gate(x)) · up(x): [..., E] → [..., F].

    Gate and up are one matrix.
    """
    with jax.named_scope("gate_up"):
        both = linear(x, layer["gate_up"], layer.get("gate_up_bias"))
    with jax.named_scope("activation"):
        gate, up = jnp.split(both, 2, axis=-1)
        hidden = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return hidden.astype(x.dtype)


@jax.named_scope("down")
def down(
    hidden: jax.Array,
    layer: dict[str, Any],
    axis: str | None = None,
    peers: jax.Array | None = None,
) -> jax.Array:
    """What the neurons [..., F] of a gated MLP add to the residual stream: [..., E]."""
    y = reduce_shards(linear(hidden, layer["down"]), axis, peers)
    return y if "down_bias" not in layer else y + layer["down_bias"]


@jax.named_scope("embed")
def embed(table: jax.Array, tokens: jax.Array, axis: Axis = None) -> jax.Array:
    """Rows of the embedding table [V, E] (this shard's rows of it under `axis`)."""
    if axis is None:
        return table[tokens]
    local = tokens - lax.axis_index(axis) * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    return lax.psum(jnp.where(mine[..., None], table[jnp.where(mine, local, 0)], 0), axis)


@jax.named_scope("output")
def unembed(table: Matrix, hidden: jax.Array, axis: Axis = None) -> jax.Array:
    """hidden [..., E] → logits [..., V], gathered over the shards under `axis`."""
    logits = linear(hidden, table)
    return logits if axis is None else lax.all_gather(logits, axis, axis=-1, tiled=True)


def softcapped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(x / cap), float32 inside; x where there is none."""
    return x if cap is None else (jnp.tanh(x.astype(jnp.float32) / cap) * cap).astype(x.dtype)
