"""The one decoder. `forward` runs the engine's ragged batches over the paged cache; `apply` runs
plain [B, T] tokens without a cache and is differentiable. Both walk the same `_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.batch import Batch, Ragged
from jaxinfer.cache import PagedCache, join_layers, note_tokens, split_layers
from jaxinfer.config import LayerConfig, ModelConfig, RopeConfig
from jaxinfer.errors import InvalidRequest
from jaxinfer.layers import (
    down,
    embed,
    gated,
    linear,
    reduce_shards,
    rope_tables,
    softcapped,
    unembed,
)
from jaxinfer.models.sites import EMBED, FINAL_NORM, At, Change, layer_site, match, visit
from jaxinfer.offload import BUFFERS, fetch, on_host
from jaxinfer.rope import rope_frequencies
from jaxinfer.types import Axis
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
PEERS = "peers"  # beside the weights, where devices reach each other's memory: see `exchange`


@dataclass(frozen=True)
class AttentionOptions:
    """Static choices of one compiled step.

    Attributes:
        backend: of `pallas_kernels.paged_attention`; `reference` is that of the other ops too.
        invariant: of `pallas_kernels.paged_attention`.
        max_query: most new tokens that a sequence has, of those that `Batch.decode` does not serve;
            None: as many as the batch has.
    """

    backend: Backend = "auto"
    invariant: bool = True
    max_query: int | None = None


DEFAULT_ATTENTION = AttentionOptions()
NO_CHANGE: Change = MappingProxyType({})


class Ops(NamedTuple):
    """What `forward` and `apply` compute in ways of their own. `at` is called at each of `sites`;
    the sums of the residual stream are computed for it there, which are part of a norm else."""

    attend: Attend
    norm: Norm
    at: At
    sites: frozenset[str]


class Residual(NamedTuple):
    """The residual stream [..., E] and what is still to be added to it: the norm that follows
    does so."""

    x: jax.Array
    delta: jax.Array | None


class StepOutput(NamedTuple):
    """`hidden` [R, E]: after the final norm, at `Batch.logit_rows`. `activations`: by site, of
    all tokens: [T, width]."""

    hidden: jax.Array
    activations: dict[str, jax.Array]


class ForwardOutput(NamedTuple):
    """`logits` float32 [..., T, V]. `activations`: by site, [..., T, width]."""

    logits: jax.Array
    activations: dict[str, jax.Array]


def forward(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    cache: PagedCache,
    *,
    attention: AttentionOptions = DEFAULT_ATTENTION,
    axis: str | None = None,
    capture: Sequence[str] = (),
    change: Change = NO_CHANGE,
) -> tuple[StepOutput, PagedCache]:
    """Runs a flat batch of T new tokens of S sequences; their K/V go into the cache.

    Serves prefill, chunked prefill, decode and verification alike.

    Args:
        params: tree of `models.weights.declare(config)`, or one shard of it.
        config: the model.
        batch: tokens and where they belong; see `Batch`.
        cache: donated by the compiled step; the returned one replaces it.
        attention: static choices of the attention op.
        axis: mesh axis of tensor parallelism when run under `shard_map`.
        capture: sites whose activations to return, each by its name; see `models.sites`.
        change: by site, what to make of x [T, width] there; before it is captured.
    """
    pools = split_layers(cache)
    at, kept = visit(capture, change)
    ops = _paged(config, batch, pools, attention, at, frozenset((*capture, *change)))
    if change:
        ops = ops._replace(attend=partial(_finite, ops.attend))
    x = ops.at(EMBED, embedded(params, config, batch.tokens, axis))
    last = _layers(params, config, x, batch.positions, ops, axis)

    def finish(stream: Residual) -> jax.Array:
        return ops.norm(stream.x, params["final_norm"], stream.delta)[1]

    if FINAL_NORM in ops.sites:
        hidden = at(FINAL_NORM, finish(last))[batch.logit_rows]
    else:
        hidden = finish(jax.tree.map(lambda x: x[batch.logit_rows], last))
    tokens = note_tokens(cache.tokens, batch.kv_index, batch.tokens)
    return StepOutput(hidden, kept), join_layers(pools, tokens)


def forward_stage(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    batch: Batch,
    cache: PagedCache,
    *,
    attention: AttentionOptions = DEFAULT_ATTENTION,
    axis: str | None = None,
) -> tuple[jax.Array, PagedCache]:
    """The layers alone, those of one stage of a pipeline: the residual stream [T, E] before them →
    after them. Arguments as of `forward`; text beside the pages stays as it is."""
    pools = split_layers(cache)
    ops = _paged(config, batch, pools, attention, visit((), NO_CHANGE)[0], frozenset())
    last = _layers(params, config, x, batch.positions, ops, axis)
    # The norm that follows would add the same, rounded alike.
    after = last.x if last.delta is None else last.x + last.delta
    return after, join_layers(pools, cache.tokens)


def final_norm(
    params: Params, config: ModelConfig, x: jax.Array, attention: AttentionOptions
) -> jax.Array:
    """What `forward` returns as hidden, of the residual stream [..., E] after all layers."""
    return _norm(config, _others(attention))(x, params["final_norm"], None)[1]


def _others(attention: AttentionOptions) -> Literal["auto", "reference"]:
    """The backend of the other ops."""
    return "reference" if attention.backend == "reference" else "auto"


def _paged(
    config: ModelConfig,
    batch: Batch,
    pools: list[Pools],
    attention: AttentionOptions,
    at: At,
    sites: frozenset[str],
) -> Ops:
    """Attention over pages, which replaces each of `pools` by what it has become."""
    plans: Plans = {}

    def attend(qkv: jax.Array, heads: Heads, index: int) -> jax.Array:
        with jax.named_scope("kv_write"):
            q, pools[index] = qkv_write(
                pools[index], qkv, batch.kv_index, heads, backend=_others(attention)
            )
        with jax.named_scope("attention"):
            return _attend(q, pools[index], batch, config, index, attention, plans)

    return Ops(attend, _norm(config, _others(attention)), at, sites)


def _finite(attend: Attend, qkv: jax.Array, heads: Heads, index: int) -> jax.Array:
    """float16 that a change made overflow, as 0; see `hooked.LARGEST`."""
    if qkv.dtype == jnp.float16:
        qkv = jnp.where(jnp.isfinite(qkv), qkv, 0)
    return attend(qkv, heads, index)


def _attend(
    q: jax.Array,
    pools: Pools,
    batch: Batch,
    config: ModelConfig,
    index: int,
    attention: AttentionOptions,
    plans: Plans,
) -> jax.Array:
    """Attention of decode rows and of chunks, each in a call of its own: q [T, H, D] → the same."""
    k_pages, v_pages, k_scales, v_scales = pools
    window = config.layers[index].window

    def call(part: str, q: jax.Array, ragged: Ragged, into: jax.Array | None = None) -> jax.Array:
        lengths = (ragged.page_table[0], ragged.query_starts, ragged.kv_lengths)
        static: dict[str, Any] = {
            "max_query": 1 if part == "decode" else attention.max_query or q.shape[0],
            "window": window,
            "backend": attention.backend,
        }  # fmt: skip
        if (part, window) not in plans:  # layers with the same window share one
            beside = into is not None
            plans[part, window] = plan_attention(q, k_pages, *lengths, **static, into=beside)
        return paged_attention(
            q, k_pages, v_pages, *lengths, **static, k_scales=k_scales, v_scales=v_scales,
            scale=config.attention_scale, softcap=config.attention_softcap,
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


def logits(
    params: Params, config: ModelConfig, hidden: jax.Array, *, axis: Axis = None
) -> jax.Array:
    """Output projection: hidden [..., E] → [..., V], in hidden's dtype."""
    found = unembed(params.get("lm_head", params["embed"]), hidden, axis)
    return softcapped(found, config.logit_softcap)


def apply(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    capture: Sequence[str] = (),
    change: Change = NO_CHANGE,
    axis: str | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> ForwardOutput:
    """Causal forward without a cache: works under `jit`, `grad`, `vmap` and `shard_map`.

    In float32 its logits are those of the engine but for rounding. In bfloat16 they differ by what
    attention rounds: scores and probabilities stay float32 in the engine's kernels.

    Args:
        params: as for `forward`; the compute dtype is theirs.
        config: the model.
        tokens: int32 [..., T], with at most one axis before T. Padding on the right does not change
            what comes before it.
        positions: int32 [T] or as `tokens`; by what keys and queries are turned. None: 0 to T - 1.
            What attends to what is decided by places, not by positions.
        capture: sites whose activations to return, patterns among them: `layers.*.resid`; see
            `models.sites`.
        change: by site, what to make of x [..., T, width] there; before it is captured.
        axis: mesh axis of tensor parallelism when run under `shard_map`.
        implementation: of `jax.nn.dot_product_attention`; `cudnn` needs a GPU and 16-bit params.

    Raises:
        InvalidRequest: `capture` or `change` names no site.
    """

    def attend(qkv: jax.Array, heads: Heads, index: int) -> jax.Array:
        H = config.num_heads // (1 if axis is None else jax.lax.axis_size(axis))
        kv_heads = (qkv.shape[-1] // config.head_dim - H) // 2  # this shard's
        q, k, v = prepare(qkv, H, kv_heads, heads)
        window = config.layers[index].window
        with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else None):
            if config.attention_softcap is not None:
                return _capped_attention(q, k, v, config, window)
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation=implementation,
                scale=config.attention_scale,
                local_window_size=None if window is None else (window - 1, 0),
            )  # fmt: skip

    wanted, changed = match(capture, config), match(change, config, field="change")
    if set(changed) != set(change):
        raise InvalidRequest(f"{set(change) - set(changed)}: name each site", field="change")
    at, kept = visit(wanted, change)
    norm = _norm(config, "reference")  # the kernel has no gradient
    if positions is None:
        positions = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
    ops = Ops(attend, norm, at, frozenset((*wanted, *changed)))
    x = ops.at(EMBED, embedded(params, config, tokens, axis))
    last = _layers(params, config, x, positions, ops, axis)
    hidden = at(FINAL_NORM, norm(last.x, params["final_norm"], last.delta)[1])
    return ForwardOutput(logits(params, config, hidden, axis=axis).astype(jnp.float32), kept)


def _capped_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, config: ModelConfig, window: int | None
) -> jax.Array:
    """Causal attention with soft-capped scores, which `jax.nn` has none of: q [..., T, H, D], k and
    v [..., T, K, D] → as q; scores float32."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    grouped = q.reshape(*q.shape[:-2], k.shape[-2], -1, q.shape[-1])
    scores = jnp.einsum("...tkgd,...skd->...kgts", grouped, k, preferred_element_type=jnp.float32)
    scores = softcapped(scores * scale, config.attention_softcap)
    row, column = jnp.indices(scores.shape[-2:])
    seen = (column <= row) & (column > row - (scores.shape[-1] if window is None else window))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("...kgts,...skd->...tkgd", weights, v).reshape(q.shape)


def _norm(config: ModelConfig, backend: norms.Backend) -> Norm:
    @jax.named_scope("norm")
    def norm(x: jax.Array, weight: jax.Array, delta: jax.Array | None) -> Any:
        return norms.rms_norm(
            x, weight, config.norm_eps, delta, plus_one=config.norm_plus_one, backend=backend
        )

    return norm


def embedded(params: Params, config: ModelConfig, tokens: jax.Array, axis: Axis) -> jax.Array:
    """The residual stream [..., E] before the first layer."""
    x = embed(params["embed"], tokens, axis)
    return x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, x.dtype)


def _layers(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    positions: jax.Array,
    ops: Ops,
    axis: str | None,
) -> Residual:
    """All of them, unrolled; see `offload` for those that lie on the host."""
    layers, peers = params["layers"], params.get(PEERS)
    ropes: RopeTables = {
        rope: rope_tables(positions, *rope_frequencies(rope, config.head_dim))
        # Not a set, whose order and with it the program differ from process to process.
        for rope in dict.fromkeys(layer.rope for layer in config.layers)
        if rope is not None
    }
    stream = Residual(x, None)
    near = fetch(layers, BUFFERS, x)
    for index, (far, layer) in enumerate(zip(layers, config.layers, strict=True)):
        stream = _layer(stream, near[index], config, layer, ropes, ops, index, axis, peers)
        if any(map(on_host, jax.tree.leaves(far))):  # its buffers are free
            near = fetch(near, 1, stream.x if stream.delta is None else stream.delta)
    return stream


def _layer(
    stream: Residual,
    w: Params,
    config: ModelConfig,
    layer: LayerConfig,
    ropes: RopeTables,
    ops: Ops,
    index: int,
    axis: str | None,
    peers: jax.Array | None,
) -> Residual:
    def at(name: str, x: jax.Array) -> jax.Array:
        return ops.at(layer_site(index, name), x)

    def stream_at(name: str, x: jax.Array, delta: jax.Array) -> Residual:
        if layer_site(index, name) not in ops.sites:
            return Residual(x, delta)
        return Residual(at(name, x + delta), None)

    x, h = ops.norm(stream.x, w["attn_norm"], stream.delta)
    rope = None if layer.rope is None else ropes[layer.rope]
    heads = Heads(
        w.get("qkv_bias"), w.get("q_norm"), w.get("k_norm"), config.norm_eps, rope,
        config.norm_plus_one,
    )  # fmt: skip
    with jax.named_scope("qkv"):
        qkv = linear(at("attn_norm", h), w["qkv"])
    out = ops.attend(qkv, heads, index)
    out = at("attn_heads", out.reshape(*x.shape[:-1], -1))
    with jax.named_scope("o"):
        out = reduce_shards(linear(out, w["o"]), axis, peers)
    out = out if "o_bias" not in w else out + w["o_bias"]
    if "attn_post_norm" in w:
        out = ops.norm(out, w["attn_post_norm"], None)[1]
    middle = stream_at("resid_mid", x, at("attn_out", out))
    x, h = ops.norm(middle.x, w["mlp_norm"], middle.delta)
    hidden = at("mlp_hidden", gated(at("mlp_norm", h), w, config.activation))
    out = down(hidden, w, axis, peers)
    if "mlp_post_norm" in w:
        out = ops.norm(out, w["mlp_post_norm"], None)[1]
    return stream_at("resid", x, at("mlp_out", out))
