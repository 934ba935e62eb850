"""Every weight of a decoder, declared once: shape, logical axes, and where it lies on disk.

The abstract tree, the shardings and the loading all derive from `declare`. Matrices keep Hugging
Face's `[out, in]` order. Fused matrices are concatenations, along axis 0, of row ranges of the
tensors on disk; they are shard-major: the first 1/n of the rows is what shard 0 of n needs, so
that sharding axis 0 is all that tensor parallelism asks of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig

MATRICES = ("qkv", "o", "gate_up", "down")  # of each layer


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` (axis 0) of the tensor `name` of shape `shape` on disk."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Weight:
    """One weight: `shape`, a logical axis name (or None, or several) per dimension, and its pieces
    in order.

    The pieces' rows, one after the other, are the weight's rows. `stages`: so many layers' weights
    lie one behind the other along axis 0, one of each stage of a pipeline.
    """

    shape: tuple[int, ...]
    axes: tuple[str | tuple[str | None, ...] | None, ...]
    pieces: tuple[Piece, ...]
    stages: int = 1


def _whole(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Weight:
    return Weight(shape, axes, (Piece(name, shape, 0, shape[0]),))


def _fused(
    names: tuple[str, ...],
    blocks: tuple[int, ...],
    rows_per_block: tuple[int, ...],
    tail: tuple[int, ...],
    axes: tuple[str | None, ...],
    shards: int,
) -> Weight:
    """Concatenates tensors made of `blocks[i]` blocks (heads, columns) of `rows_per_block[i]`.

    A tensor with fewer blocks than shards (KV heads) is repeated: each shard gets the block that
    its queries use.
    """
    pieces = []
    for shard in range(shards):
        for name, count, rows in zip(names, blocks, rows_per_block, strict=True):
            first = shard * count // shards
            last = max(first + 1, (shard + 1) * count // shards)
            pieces.append(Piece(name, (count * rows, *tail), first * rows, last * rows))
    total = sum(p.stop - p.start for p in pieces)
    return Weight((total, *tail), axes, tuple(pieces))


def declare(config: ModelConfig, shards: int = 1, stages: int = 1) -> dict[str, Any]:
    """The parameter tree of `config`, with a `Weight` at every leaf.

    Args:
        config: the model.
        shards: degree of tensor parallelism that the fused matrices are laid out for.
        stages: of a pipeline. With n of them `layers` has an nth of the entries, each of one layer
            of every stage (`Weight.stages`), and the vocabulary is split over stages too.

    Raises:
        ValueError: `shards` does not divide the heads or the MLP's width, or `stages` the layers.
    """
    c = config
    if c.num_layers % stages:
        raise ValueError(f"{stages} stages must divide the layers ({c.num_layers})")
    if c.num_heads % shards or c.intermediate_size % shards:
        raise ValueError(
            f"tensor parallelism {shards} must divide num_heads ({c.num_heads}) and "
            f"intermediate_size ({c.intermediate_size})"
        )
    if c.num_kv_heads % shards and shards % c.num_kv_heads:
        raise ValueError(f"tensor parallelism {shards} and {c.num_kv_heads} KV heads do not divide")
    tree: dict[str, Any] = {
        "embed": _whole(
            "model.embed_tokens.weight", (c.vocab_size, c.hidden_size), ("vocab", "embed")
        ),
        "layers": [_declare_layer(c, i, shards) for i in range(c.num_layers)],
        "final_norm": _whole("model.norm.weight", (c.hidden_size,), ("embed",)),
    }
    if not c.tie_embeddings:
        tree["lm_head"] = _whole(
            "lm_head.weight", (c.vocab_size, c.hidden_size), ("vocab", "embed")
        )
    return tree if stages == 1 else _staged(tree, stages)


def _staged(tree: dict[str, Any], stages: int) -> dict[str, Any]:
    layers = tree["layers"]
    each = len(layers) // stages
    tree["layers"] = [jax.tree.map(_stacked, *layers[i::each]) for i in range(each)]
    for name in tree.keys() & {"embed", "lm_head"}:
        weight = tree[name]
        tree[name] = replace(weight, axes=(("stage", weight.axes[0]), *weight.axes[1:]))
    return tree


def _stacked(*weights: Weight) -> Weight:
    """The same weight of a layer of each stage as one."""
    (rows, *rest), (axis, *axes) = weights[0].shape, weights[0].axes
    pieces = tuple(piece for weight in weights for piece in weight.pieces)
    assert not isinstance(axis, tuple), "of one stage"
    return Weight((len(weights) * rows, *rest), (("stage", axis), *axes), pieces, len(weights))


def _declare_layer(c: ModelConfig, index: int, shards: int) -> dict[str, Weight]:
    at = f"model.layers.{index}."
    E, F, D = c.hidden_size, c.intermediate_size, c.head_dim
    attention = tuple(f"{at}self_attn.{p}_proj" for p in "qkv")
    heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    mlp = (f"{at}mlp.gate_proj", f"{at}mlp.up_proj")
    mlp_norm = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"

    def fused(names: tuple[str, ...], blocks: tuple[int, ...], rows: int, kind: str, axis: str):
        tail = (E,) if kind == "weight" else ()
        axes = (axis, "embed") if kind == "weight" else (axis,)
        return _fused(
            tuple(f"{n}.{kind}" for n in names), blocks, (rows,) * len(names), tail, axes, shards
        )

    layer = {
        "attn_norm": _whole(f"{at}input_layernorm.weight", (E,), ("embed",)),
        "qkv": fused(attention, heads, D, "weight", "heads"),
        "o": _whole(f"{at}self_attn.o_proj.weight", (E, c.num_heads * D), ("embed", "heads")),
        "mlp_norm": _whole(f"{at}{mlp_norm}.weight", (E,), ("embed",)),
        "gate_up": fused(mlp, (F, F), 1, "weight", "mlp"),
        "down": _whole(f"{at}mlp.down_proj.weight", (E, F), ("embed", "mlp")),
    }
    if c.post_norms:
        for name, tensor in (("attn", "post_attention"), ("mlp", "post_feedforward")):
            layer[f"{name}_post_norm"] = _whole(f"{at}{tensor}_layernorm.weight", (E,), ("embed",))
    if c.qkv_bias:
        layer["qkv_bias"] = fused(attention, heads, D, "bias", "heads")
    if c.o_bias:
        layer["o_bias"] = _whole(f"{at}self_attn.o_proj.bias", (E,), ("embed",))
    if c.mlp_bias:
        layer["gate_up_bias"] = fused(mlp, (F, F), 1, "bias", "mlp")
        layer["down_bias"] = _whole(f"{at}mlp.down_proj.bias", (E,), ("embed",))
    if c.qk_norm:
        layer["q_norm"] = _whole(f"{at}self_attn.q_norm.weight", (D,), (None,))
        layer["k_norm"] = _whole(f"{at}self_attn.k_norm.weight", (D,), (None,))
    return layer


def abstract_params(config: ModelConfig, dtype: Any, shards: int = 1) -> dict[str, Any]:
    """`declare`, with `jax.ShapeDtypeStruct` leaves of `dtype`."""
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), declare(config, shards))


def init_params(
    config: ModelConfig,
    key: jax.Array,
    dtype: Any = jnp.bfloat16,
    *,
    declared: Any = None,
    places: Any = None,
) -> dict[str, Any]:
    """Random parameters: matrices N(0, 1/fan_in), embeddings N(0, 0.02²), norms 1, biases 0 (as
    are norms that scale by 1 + weight).

    Args:
        config: the model.
        key: of the random numbers.
        dtype: of all of them.
        declared: a tree of `Weight`; None: `declare(config)`.
        places: a sharding for each: every device draws what it holds. None: the default device.
    """
    specs, treedef = jax.tree.flatten_with_path(declare(config) if declared is None else declared)
    where = [None] * len(specs) if places is None else jax.tree.leaves(places)
    drawers: dict[tuple[Any, ...], Any] = {}  # of alike weights one program

    def normal(key: jax.Array, shape: tuple[int, ...], scale: float, place: Any) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)

        if place is None:
            return draw(key)
        if (shape, scale, place) not in drawers:
            drawers[shape, scale, place] = jax.jit(draw, out_shardings=place)
        return drawers[shape, scale, place](key)

    leaves = []
    for (path, weight), k, place in zip(
        specs, jax.random.split(key, len(specs)), where, strict=True
    ):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name.endswith(("norm", "bias")):
            value = 1 if name.endswith("norm") and not config.norm_plus_one else 0
            leaves.append(jax.device_put(jnp.full(weight.shape, value, dtype), place))
        else:
            scale = 0.02 if name == "embed" else weight.shape[-1] ** -0.5
            leaves.append(normal(k, weight.shape, scale, place))
    return jax.tree.unflatten(treedef, leaves)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def count_params(config: ModelConfig) -> int:
    """Number of parameters, tied ones once."""
    sizes = jax.tree.map(lambda w: _size(w.shape), declare(config))
    return sum(jax.tree.leaves(sizes))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
