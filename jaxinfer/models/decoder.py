"""The one decoder. `forward` runs the engine's ragged batches over the paged cache; `apply` runs
plain [B, T] tokens without a cache and is differentiable. Both walk the same `_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.batch import Batch, Ragged
from jaxinfer.cache import PagedCache, join_layers, split_layers
from jaxinfer.config import LayerConfig, ModelConfig, RopeConfig
from jaxinfer.layers import (
    embed,
    gated_mlp,
    linear,
    reduce_shards,
    rope_tables,
    unembed,
)
from jaxinfer.rope import rope_frequencies
from pallas_kernels import rms_norm as norms
from pallas_kernels.kv_quantise import Pools
from pallas_kernels.paged_attention import (
    Backend,
    paged_attention,
    plan_attention,
)
from pallas_kernels.qkv_heads import Heads, prepare
from pallas_kernels.qkv_write import qkv_write

Params = dict[str, Any]
# (qkv [..., (H + 2K) * D], what its heads still need, layer index) -> [..., H, D]
Attend = Callable[[jax.Array, Heads, int], jax.Array]
# (x [..., E], weight [E], delta [..., E] or None) -> (x + delta, its norm)
Norm = Callable[[jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]
RopeTables = dict[RopeConfig, tuple[jax.Array, jax.Array]]
Plans = dict[tuple[str, int | None], Any]


@dataclass(frozen=True)
class AttentionOptions:
    """Static choices of one compiled step.

    Attributes:
        backend: of `pallas_kernels.paged_attention`; `reference` is that of the other ops too.
        invariant: of `pallas_kernels.paged_attention`.
    """

    backend: Backend = "auto"
    invariant: bool = True


DEFAULT_ATTENTION = AttentionOptions()


class Ops(NamedTuple):
    """What `forward` and `apply` compute in ways of their own."""

    attend: Attend
    norm: Norm


class Residual(NamedTuple):
    """The residual stream [..., E] and what is still to be added to it: the norm that follows
    does so."""

    x: jax.Array
    delta: jax.Array | None

    @property
    def total(self) -> jax.Array:
        return self.x if self.delta is None else self.x + self.delta


class ForwardOutput(NamedTuple):
    """`hidden` [R, E]: after the final norm, at `Batch.logit_rows`. `taps`: site → activations."""

    hidden: jax.Array
    taps: dict[str, jax.Array]


def forward(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    cache: PagedCache,
    *,
    attention: AttentionOptions = DEFAULT_ATTENTION,
    axis: str | None = None,
    taps: Sequence[str] = (),
) -> tuple[ForwardOutput, PagedCache]:
    """Runs a flat batch of T new tokens of S sequences; their K/V go into the cache.

    Serves prefill, chunked prefill, decode and verification alike.

    Args:
        params: tree of `models.weights.declare(config)`, or one shard of it.
        config: the model.
        batch: tokens and where they belong; see `Batch`.
        cache: donated by the compiled step; the returned one replaces it.
        attention: static choices of the attention op.
        axis: mesh axis of tensor parallelism when run under `shard_map`.
        taps: names of activations to return; `resid` is the residual stream after each layer,
            [L, T, E].
    """
    pools = split_layers(cache)
    others = "reference" if attention.backend == "reference" else "auto"
    plans: Plans = {}

    def attend(qkv: jax.Array, heads: Heads, index: int) -> jax.Array:
        q, pools[index] = qkv_write(pools[index], qkv, batch.kv_index, heads, backend=others)
        return _attend(q, pools[index], batch, config.layers[index].window, attention, plans)

    norm = _norm(config, others)
    ops = Ops(attend, norm)
    last, resid = _decode(params, config, batch.tokens, batch.positions, ops, axis)
    wanted = jax.tree.map(lambda x: x[batch.logit_rows], last)
    hidden = norm(wanted.x, params["final_norm"], wanted.delta)[1]
    found = {"resid": jnp.stack(resid)} if "resid" in taps else {}
    return ForwardOutput(hidden, found), join_layers(pools)


def _attend(
    q: jax.Array,
    pools: Pools,
    batch: Batch,
    window: int | None,
    attention: AttentionOptions,
    plans: Plans,
) -> jax.Array:
    """Attention of decode rows and of chunks, each in a call of its own: q [T, H, D] → the same."""
    k_pages, v_pages, k_scales, v_scales = pools

    def call(part: str, q: jax.Array, ragged: Ragged, into: jax.Array | None = None) -> jax.Array:
        lengths = (ragged.page_table[0], ragged.query_starts, ragged.kv_lengths)
        static: dict[str, Any] = {
            "max_query": 1 if part == "decode" else q.shape[0], "window": window,
            "backend": attention.backend,
        }  # fmt: skip
        if (part, window) not in plans:  # layers with the same window share one
            beside = into is not None
            plans[part, window] = plan_attention(q, k_pages, *lengths, **static, into=beside)
        return paged_attention(
            q, k_pages, v_pages, *lengths, **static, k_scales=k_scales, v_scales=v_scales,
            plan=plans[part, window], invariant=attention.invariant, into=into,
        )  # fmt: skip

    decode, chunks = batch.decode, batch.chunks
    if decode is None or chunks is None:
        ragged = decode or chunks
        assert ragged is not None
        rows = q if chunks else q[: ragged.kv_lengths.shape[0]]
        out = call("chunks" if chunks else "decode", rows, ragged)
        return jnp.pad(out, ((0, q.shape[0] - rows.shape[0]), (0, 0), (0, 0)))
    return call("decode", q, decode, into=call("chunks", q, chunks))


def logits(params: Params, hidden: jax.Array, *, axis: str | None = None) -> jax.Array:
    """Output projection: hidden [..., E] → [..., V], in hidden's dtype."""
    return unembed(params.get("lm_head", params["embed"]), hidden, axis)


def apply(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    capture: Sequence[str] = (),
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Any:
    """Causal forward without a cache: works under `jit`, `grad` and `vmap`.

    Args:
        params: as for `forward`; the compute dtype is theirs.
        config: the model.
        tokens: int32 [B, T]. Padding on the right does not change what comes before it.
        capture: `resid` adds the residual stream after every layer.
        implementation: of `jax.nn.dot_product_attention`; `cudnn` needs a GPU and 16-bit params.

    Returns:
        logits float32 [B, T, V]; with `capture`, (logits, {"resid": [L, B, T, E]}).
    """

    def attend(qkv: jax.Array, heads: Heads, index: int) -> jax.Array:
        q, k, v = prepare(qkv, config.num_heads, config.num_kv_heads, heads)
        window = config.layers[index].window
        with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else None):
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation=implementation,
                local_window_size=None if window is None else (window - 1, 0),
            )  # fmt: skip

    norm = _norm(config, "reference")  # the kernel has no gradient
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    last, resid = _decode(params, config, tokens, positions, Ops(attend, norm), None)
    out = logits(params, norm(last.x, params["final_norm"], last.delta)[1]).astype(jnp.float32)
    return (out, {"resid": jnp.stack(resid)}) if "resid" in capture else out


def _norm(config: ModelConfig, backend: norms.Backend) -> Norm:
    return lambda x, weight, delta: norms.rms_norm(
        x, weight, config.norm_eps, delta, backend=backend
    )


def _decode(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    ops: Ops,
    axis: str | None,
) -> tuple[Residual, list[jax.Array]]:
    """Embedding and layers, unrolled. Returns the last residual and that after each layer."""
    ropes: RopeTables = {
        rope: rope_tables(positions, *rope_frequencies(rope, config.head_dim))
        for rope in {layer.rope for layer in config.layers}
        if rope is not None
    }
    stream = Residual(embed(params["embed"], tokens, axis), None)
    resid = []
    for index, (weights, layer) in enumerate(zip(params["layers"], config.layers, strict=True)):
        stream = _layer(stream, weights, config, layer, ropes, ops, index, axis)
        resid.append(stream.total)  # computed only where a tap wants it
    return stream, resid


def _layer(
    stream: Residual,
    w: Params,
    config: ModelConfig,
    layer: LayerConfig,
    ropes: RopeTables,
    ops: Ops,
    index: int,
    axis: str | None,
) -> Residual:
    x, h = ops.norm(stream.x, w["attn_norm"], stream.delta)
    rope = None if layer.rope is None else ropes[layer.rope]
    heads = Heads(w.get("qkv_bias"), w.get("q_norm"), w.get("k_norm"), config.norm_eps, rope)
    out = ops.attend(linear(h, w["qkv"]), heads, index)
    out = reduce_shards(linear(out.reshape(*x.shape[:-1], -1), w["o"]), axis)
    out = out if "o_bias" not in w else out + w["o_bias"]
    x, h = ops.norm(x, w["mlp_norm"], out)
    return Residual(x, gated_mlp(h, w, config.activation, axis))
