"""Attention of a ragged batch of new tokens over a paged KV cache.

`paged_attention` is the op: it checks its arguments and picks a backend. `reference` is the
definition, in plain jnp.

Shapes: T new tokens in all, S sequences, H query heads, K key/value heads (H a multiple of K),
D head dim, N pages in the pool, P pages a sequence at most.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Backend = Literal["auto", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference")

# The KV axis is cut every SPLIT tokens, counted from position 0. Each part is reduced by itself and
# the parts are summed pairwise in position order. What one sequence's parts are, and how they are
# summed, therefore depends on its own positions alone: a longer neighbour in the batch, or a wider
# page table, only adds parts of weight zero at the end.
SPLIT = 256
QUERY_BLOCK = 128  # queries scored at once: bounds the memory of the scores


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    kv_lengths: jax.Array,
    *,
    max_query: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Causal attention of each sequence's newest tokens over all of its tokens.

    The new tokens' own keys and values must have been written to the pages already.

    Args:
        q: [T, H, D]; the new tokens of sequence s are rows query_starts[s] to query_starts[s + 1].
        k_pages, v_pages: [N, K, page_size, D]. Token i of a sequence lies in slot i % page_size
            of its page i // page_size. Slots past a sequence's length may hold anything.
        page_table: int32 [S, P]; entries past a sequence's last page may be any page of the pool.
        query_starts: int32 [S + 1], ascending from 0. Rows of q past the last belong to nobody.
        kv_lengths: int32 [S]; tokens of each sequence, the new ones included.
        max_query: most new tokens that a sequence has in this call (static).
        scale: of the scores; 1/sqrt(D) by default.
        window: a token sees itself and the window - 1 tokens before it; None: all before it.
        softcap: scores become softcap * tanh(scores / softcap).
        backend: `reference`; `auto` is `reference` too, and says so once in the log on a GPU.

    Returns:
        [T, H, D] in q's dtype; zero for rows that belong to nobody.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, named with what would.
    """
    _check(q, k_pages, v_pages, page_table, query_starts, kv_lengths, max_query, window, softcap)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    if backend == "auto" and jax.default_backend() == "gpu":
        _say_once("paged_attention: no GPU kernel yet; backend 'reference' (plain XLA) is used")
    return reference(
        q, k_pages, v_pages, page_table, query_starts, kv_lengths,
        max_query=max_query, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        window=window, softcap=softcap,
    )  # fmt: skip


def reference(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    kv_lengths: jax.Array,
    *,
    max_query: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """The definition of `paged_attention`; same arguments. Scores and sums are float32."""
    T, H, D = q.shape
    S = page_table.shape[0]
    K = k_pages.shape[1]
    new = query_starts[1:] - query_starts[:-1]  # [S]
    offset = jnp.arange(max_query, dtype=jnp.int32)  # [Q]
    rows = jnp.minimum(query_starts[:-1, None] + offset, T - 1)  # [S, Q]
    positions = jnp.where(offset < new[:, None], (kv_lengths - new)[:, None] + offset, -1)

    length = -(-page_table.shape[1] * k_pages.shape[2] // SPLIT) * SPLIT
    k = _gather(k_pages, page_table, length)  # [S, K, L, D]
    v = _gather(v_pages, page_table, length)
    written = jnp.arange(v.shape[2], dtype=jnp.int32) < kv_lengths[:, None]  # [S, L]
    v = jnp.where(written[:, None, :, None], v, 0)  # 0 * NaN is NaN
    queries = q[rows].reshape(S, max_query, K, H // K, D)

    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend(*block, k, v, scale=scale, window=window, softcap=softcap)

    blocks = -(-max_query // QUERY_BLOCK)
    if blocks == 1:
        out = attend((queries, positions))
    else:
        pad = blocks * QUERY_BLOCK - max_query
        queries = jnp.pad(queries, ((0, 0), (0, pad), (0, 0), (0, 0), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=-1)
        split = (S, blocks, QUERY_BLOCK)
        out = lax.map(
            attend,
            (
                jnp.moveaxis(queries.reshape(*split, K, H // K, D), 1, 0),
                jnp.moveaxis(positions.reshape(split), 1, 0),
            ),
        )
        out = jnp.moveaxis(out, 0, 1).reshape(S, -1, K, H // K, D)

    token = jnp.arange(T, dtype=jnp.int32)
    owner = jnp.searchsorted(query_starts, token, side="right").astype(jnp.int32) - 1
    owned = owner < S
    owner = jnp.minimum(owner, S - 1)
    flat = out[owner, jnp.minimum(token - query_starts[owner], max_query - 1)]
    return jnp.where(owned[:, None, None], flat.reshape(T, H, D), 0)


def _attend(
    q: jax.Array,
    positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """q [S, Q, K, G, D], positions [S, Q] (-1: padding), k and v [S, K, L, D] → [S, Q, K, G, D]."""
    S, Q, K, G, D = q.shape
    parts = k.shape[2] // SPLIT
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def multiply(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(pattern, a, b, precision=precision, preferred_element_type=jnp.float32)

    # Parts are a batch dimension of both products: however many there are, each is computed alike.
    queries = q.transpose(0, 2, 1, 3, 4).reshape(S, K, 1, Q * G, D)
    queries = jnp.broadcast_to(queries, (S, K, parts, Q * G, D))
    scores = multiply("skprd,skptd->skprt", queries, k.reshape(S, K, parts, SPLIT, D)) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    slot = jnp.arange(parts * SPLIT, dtype=jnp.int32).reshape(parts, 1, SPLIT)
    at = jnp.repeat(positions, G, axis=1)[:, None, :, None]  # [S, 1, QG, 1]
    seen = slot <= at
    if window is not None:
        seen &= slot > at - window
    scores = jnp.where(seen[:, None], scores, -jnp.inf)  # [S, K, parts, QG, SPLIT]

    peak = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - _finite(peak)[..., None])
    total = jnp.sum(weights, axis=-1)
    v = v.reshape(S, K, parts, SPLIT, D)
    values = multiply("skprt,skptd->skprd", weights.astype(v.dtype), v)
    rescale = jnp.exp(peak - _finite(jnp.max(peak, axis=2, keepdims=True)))
    total = _sum_in_order(total * rescale, axis=2)
    values = _sum_in_order(values * rescale[..., None], axis=2)
    out = values / jnp.where(total > 0, total, 1.0)[..., None]
    return out.reshape(S, K, Q, G, D).transpose(0, 2, 1, 3, 4).astype(q.dtype)


def _finite(peak: jax.Array) -> jax.Array:
    """The peak, or 0 where everything is masked: exp(-inf - 0) is the 0 that is wanted there."""
    return jnp.where(jnp.isfinite(peak), peak, 0.0)


def _sum_in_order(x: jax.Array, axis: int) -> jax.Array:
    """Sums neighbours, then neighbours of those: zeros added at the end never change the bits."""
    while (n := x.shape[axis]) > 1:
        if n % 2:
            pad = [(0, 0)] * x.ndim
            pad[axis] = (0, 1)
            x = jnp.pad(x, pad)
        x = lax.slice_in_dim(x, 0, None, 2, axis) + lax.slice_in_dim(x, 1, None, 2, axis)
    return lax.squeeze(x, (axis,))


def _gather(pages: jax.Array, page_table: jax.Array, length: int) -> jax.Array:
    """[N, K, page_size, D] and [S, P] → the first `length` slots in order, [S, K, length, D].

    Slots past the page table come from page 0.
    """
    S, P = page_table.shape
    _, K, page_size, D = pages.shape
    wanted = -(-length // page_size)
    table = jnp.pad(page_table, ((0, 0), (0, max(0, wanted - P))))[:, :wanted]
    x = pages[table].transpose(0, 2, 1, 3, 4)
    return x.reshape(S, K, -1, D)[:, :, :length]


def whole_prompt_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None = None
) -> jax.Array:
    """Causal attention of one sequence whose every token is new, by cuDNN. No pages are read.

    A stop-gap until a kernel of this package serves prompts: GPU and 16-bit types only.

    Args:
        q: [T, H, D].
        k, v: [T, K, D].
        window: as in `paged_attention`.

    Raises:
        ValueError: another dtype.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"q is {q.dtype}: expected bfloat16 or float16")
    return jax.nn.dot_product_attention(
        q[None], k[None], v[None], is_causal=True, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )[0]  # fmt: skip


def _check(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    kv_lengths: jax.Array,
    max_query: int,
    window: int | None,
    softcap: float | None,
) -> None:
    if q.ndim != 3 or k_pages.ndim != 4 or page_table.ndim != 2:
        raise ValueError(
            "expected q [T, H, D], k_pages [N, K, page_size, D], page_table [S, P]; got "
            f"{q.shape}, {k_pages.shape}, {page_table.shape}"
        )
    T, H, D = q.shape
    S, P = page_table.shape
    _, K, page_size, width = k_pages.shape
    if k_pages.shape != v_pages.shape:
        raise ValueError(f"k_pages {k_pages.shape} and v_pages {v_pages.shape} differ")
    if width != D or H % K:
        raise ValueError(f"q has {H} heads of {D}, the pages {K} of {width}: H % K and D must fit")
    if query_starts.shape != (S + 1,) or kv_lengths.shape != (S,):
        raise ValueError(
            f"{S} sequences need query_starts [{S + 1}] and kv_lengths [{S}]; got "
            f"{query_starts.shape} and {kv_lengths.shape}"
        )
    if not (q.dtype == k_pages.dtype == v_pages.dtype) or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k_pages and v_pages must share a float dtype; got {q.dtype}, "
                         f"{k_pages.dtype}, {v_pages.dtype}")  # fmt: skip
    if any(x.dtype != jnp.int32 for x in (page_table, query_starts, kv_lengths)):
        raise ValueError("page_table, query_starts and kv_lengths must be int32")
    if not 1 <= max_query <= T:
        raise ValueError(f"max_query={max_query}: expected 1 to T={T}")
    if SPLIT % page_size and page_size % SPLIT:
        raise ValueError(f"page_size={page_size}: expected a divisor or a multiple of {SPLIT}")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1, or None")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: expected more than 0, or None")
    if P < 1:
        raise ValueError("page_table has no columns")


@cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
