"""Attention of a ragged batch of new tokens over a paged KV cache.

`paged_attention` is the op: it checks its arguments and picks a backend. `reference` is the
definition, in plain jnp; the kernels are in `paged_attention_sm90` and `paged_attention_sm80`.

Shapes: T new tokens in all, S sequences, H query heads, K key/value heads (H a multiple of K),
D head dim, N pages in the pool, P pages a sequence at most.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_plan import Work
from pallas_kernels.device import capability, has_kernels, sm_count
from pallas_kernels.kv_quantise import LARGEST
from pallas_kernels.qkv_write import check_scales

Backend = Literal["auto", "reference", "sm90", "sm80"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "sm90", "sm80")

# What the kernels are compiled and tested for.
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (32, 64, 128)
MAX_GROUP = 64  # query heads a KV head
MAX_WIDE_GROUP = 56  # the same, of quantised pages with head dim 256: no layouts found for 64
CHECK_PAGES = "JAXINFER_CHECK_PAGES"  # environment: 1 checks page ids on the device

# The KV axis is cut every PART tokens, counted from position 0. Each part is reduced by itself and
# the parts are summed pairwise in position order. What one sequence's parts are, and how they are
# summed, therefore depends on its own positions alone: a longer neighbour in the batch, or a wider
# page table, only adds parts of weight zero at the end.
PART = 256
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
    sinks: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    backend: Backend = "auto",
    plan: Work | None = None,
    invariant: bool = True,
    into: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of each sequence's newest tokens over all of its tokens.

    The new tokens' own keys and values must have been written to the pages already.

    Args:
        q: [T, H, D]; the new tokens of sequence s are rows query_starts[s] to query_starts[s + 1].
        k_pages, v_pages: [N, K, page_size, D], in q's dtype, or int8 or float8_e4m3fn. Token i of
            a sequence lies in slot i % page_size of its page i // page_size. Slots past a
            sequence's length, or before the windows of all its new tokens, may hold anything.
        page_table: int32 [S, P]; entries past a sequence's last page may be any page of the pool.
        query_starts: int32 [S + 1], ascending from 0. Rows of q past the last belong to nobody.
        kv_lengths: int32 [S]; tokens of each sequence, the new ones included.
        max_query: most new tokens that a sequence has in this call (static).
        scale: of the scores; 1/sqrt(D) by default.
        window: a token sees itself and the window - 1 tokens before it; None: all before it.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: float32 [H]; exp(sink) is added to the sum that a head's weights are divided by, as
            of a token without a value. Neither scaled nor soft-capped.
        k_scales, v_scales: what quantised pages are multiplied by, float32: [N, K, page_size], one
            a token and head, or [K], one a head. None for pages in q's dtype.
        backend: `sm90` (Hopper) and `sm80` (Ampere and later) are kernels for 16-bit q; `reference`
            is plain XLA. `auto` is the fastest of them that can run; where that is `reference` on
            a GPU, the log says so once.
        plan: of `plan_attention`, for the same lengths, shapes and options; made here if None.
            Calls that share lengths, such as a model's layers, should share it.
        invariant: a token's output has the same bits whatever is in the batch and however its
            sequence is cut into calls. False may be faster in long prefill.
        into: as q; what rows that belong to nobody are to hold. Its memory is that of the result
            where nobody else needs it.

    Returns:
        [T, H, D] in q's dtype; without `into` zero for rows that belong to nobody.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, named with what would; a backend
            asked for by name that cannot run here.
    """
    _check(q, k_pages, v_pages, page_table, query_starts, kv_lengths, max_query, window, softcap)
    _check_sinks_and_scales(q, k_pages, sinks, k_scales, v_scales)
    if into is not None and (into.shape, into.dtype) != (q.shape, q.dtype):
        raise ValueError(f"into is {into.dtype} {into.shape}: expected {q.dtype} {q.shape}")
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale={scale}: expected more than 0")
    chosen = _choose(backend, q, k_pages)
    if os.environ.get(CHECK_PAGES) == "1":
        page_table = _checked_pages(page_table, kv_lengths, k_pages)
    options: dict[str, Any] = {
        "max_query": max_query, "scale": scale, "window": window, "softcap": softcap,
        "sinks": sinks, "k_scales": k_scales, "v_scales": v_scales,
    }  # fmt: skip
    arrays = (q, k_pages, v_pages, page_table, query_starts, kv_lengths)
    if chosen == "sm90":
        from pallas_kernels import paged_attention_sm90

        return paged_attention_sm90.attend(
            *arrays, **options, plan=plan, invariant=invariant, into=into,
            sm_count=sm_count() or paged_attention_sm90.FEWEST_SMS,
        )  # fmt: skip
    if chosen == "sm80":
        from pallas_kernels import paged_attention_sm80

        out = paged_attention_sm80.attend(*arrays, **options)
    else:
        out = reference(*arrays, **options)
    if into is None:
        return out
    owned = jnp.arange(q.shape[0]) < query_starts[-1]
    return jnp.where(owned[:, None, None], out, into)


def plan_attention(
    q: jax.Array,
    k_pages: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    kv_lengths: jax.Array,
    *,
    max_query: int,
    window: int | None = None,
    backend: Backend = "auto",
    into: bool = False,
) -> Work | None:
    """What `paged_attention` needs to know of a batch's lengths; None if its backend needs nothing.

    Arguments as there; `into`: whether it will be given one. Only the shapes and dtypes of q,
    k_pages and page_table matter.
    """
    if _choose(backend, q, k_pages) != "sm90":
        return None
    from pallas_kernels import paged_attention_sm90

    _, K, page_size, D = k_pages.shape
    return paged_attention_sm90.make_plan(
        query_starts, kv_lengths, T=q.shape[0], H=q.shape[1], K=K, D=D,
        max_kv=page_table.shape[1] * page_size, max_query=max_query, window=window,
        quantised=k_pages.dtype != q.dtype, into=into,
    )  # fmt: skip


def _choose(backend: Backend, q: jax.Array, k_pages: jax.Array) -> Backend:
    """The backend that runs; `auto` says once why it is not a kernel on a GPU."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    if backend == "reference":
        return backend
    found = capability()
    why_not = _unsupported(q, k_pages)
    if backend != "auto":
        needed = {"sm90": (9, 10), "sm80": (8, 10)}[backend]  # wgmma is Hopper's alone
        if found is None or not needed[0] <= found < needed[1]:
            raise ValueError(
                f"backend={backend!r} needs a GPU of compute capability {needed[0]}; here "
                f"{'is none' if found is None else f'it is {found}'}"
            )
        if why_not:
            raise ValueError(f"backend={backend!r}: {why_not}")
        return backend
    if found is None:
        return "reference"
    if not why_not and has_kernels(found):
        return "sm90" if found >= 9 else "sm80"
    why_not = why_not or f"no kernel for compute capability {found}"
    _say_once(f"paged_attention: backend 'reference' (plain XLA) is used: {why_not}")
    return "reference"


def _unsupported(q: jax.Array, k_pages: jax.Array) -> str | None:
    """Why the kernels cannot serve these arrays, with what they accept."""
    _, K, page_size, D = k_pages.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype}: expected bfloat16 or float16"
    if D not in HEAD_DIMS:
        return f"head_dim {D}: expected one of {HEAD_DIMS}"
    if page_size not in PAGE_SIZES:
        return f"page_size {page_size}: expected one of {PAGE_SIZES}"
    if q.shape[1] // K > MAX_GROUP:
        return f"{q.shape[1] // K} query heads a KV head: expected at most {MAX_GROUP}"
    if k_pages.dtype != q.dtype and D == 256 and q.shape[1] // K > MAX_WIDE_GROUP:
        return (
            f"{q.shape[1] // K} query heads a KV head: expected at most {MAX_WIDE_GROUP} with "
            "quantised pages and head_dim 256"
        )
    return None


def _checked_pages(page_table: jax.Array, kv_lengths: jax.Array, k_pages: jax.Array) -> jax.Array:
    """The table, once every page id that will be read is known to be in the pool."""
    pages, page_size = k_pages.shape[0], k_pages.shape[2]
    column = jnp.arange(page_table.shape[1], dtype=jnp.int32)
    read = column < -(-kv_lengths[:, None] // page_size)
    bad = read & ((page_table < 0) | (page_table >= pages))

    def report(bad: Any, table: Any) -> None:
        if bad.any():
            s, p = (int(x[0]) for x in bad.nonzero())
            raise ValueError(
                f"page_table[{s}, {p}] = {int(table[s, p])}: expected 0 to {pages - 1}"
            )

    jax.debug.callback(report, bad, page_table)
    return jnp.where(bad, 0, page_table)


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
    sinks: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
) -> jax.Array:
    """The definition of `paged_attention`; same arguments. Scores and sums are float32."""
    T, H, D = q.shape
    S = page_table.shape[0]
    K = k_pages.shape[1]
    new = query_starts[1:] - query_starts[:-1]  # [S]
    offset = jnp.arange(max_query, dtype=jnp.int32)  # [Q]
    rows = jnp.minimum(query_starts[:-1, None] + offset, T - 1)  # [S, Q]
    positions = jnp.where(offset < new[:, None], (kv_lengths - new)[:, None] + offset, -1)

    length = -(-page_table.shape[1] * k_pages.shape[2] // PART) * PART
    k = _gather(k_pages, page_table, length)  # [S, K, L, D]
    v = _gather(v_pages, page_table, length)
    slot = jnp.arange(length, dtype=jnp.int32)
    read = slot < kv_lengths[:, None]  # [S, L]
    if window is not None:
        read &= slot > (kv_lengths - new)[:, None] - window
    v = jnp.where(read[:, None, :, None], v, 0)  # 0 * NaN is NaN
    by = [_gather_scales(x, page_table, length) for x in (k_scales, v_scales)]
    if by[1] is not None:
        by[1] = jnp.where(read[:, None], by[1], 0)
    group_sinks = None if sinks is None else sinks.reshape(K, H // K)
    queries = q[rows].reshape(S, max_query, K, H // K, D)

    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend(
            *block, k, v, *by, scale=scale, window=window, softcap=softcap, sinks=group_sinks
        )

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
    k_by: jax.Array | None,
    v_by: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """q [S, Q, K, G, D], positions [S, Q] (-1: padding), k and v [S, K, L, D] → [S, Q, K, G, D].

    `k_by`, `v_by`: scales of k and v, [S, K, L], or None. `sinks`: [K, G].
    """
    S, Q, K, G, D = q.shape
    parts = k.shape[2] // PART

    def multiply(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
        precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return jnp.einsum(pattern, a, b, precision=precision, preferred_element_type=jnp.float32)

    # Parts are a batch dimension of both products: however many there are, each is computed alike.
    queries = q.transpose(0, 2, 1, 3, 4).reshape(S, K, 1, Q * G, D)
    queries = jnp.broadcast_to(queries, (S, K, parts, Q * G, D))
    # int8 and e4m3 are exact in any of q's dtypes; their scales then multiply float32 scores.
    keys = k.reshape(S, K, parts, PART, D).astype(q.dtype)
    scores = multiply("skprd,skptd->skprt", queries, keys) * scale
    if k_by is not None:
        scores *= k_by.reshape(S, K, parts, 1, PART)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    slot = jnp.arange(parts * PART, dtype=jnp.int32).reshape(parts, 1, PART)
    at = jnp.repeat(positions, G, axis=1)[:, None, :, None]  # [S, 1, QG, 1]
    seen = slot <= at
    if window is not None:
        seen &= slot > at - window
    scores = jnp.where(seen[:, None], scores, -jnp.inf)  # [S, K, parts, QG, PART]

    peak = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - _finite(peak)[..., None])
    total = jnp.sum(weights, axis=-1)
    kind = q.dtype
    if v_by is not None:
        weights *= v_by.reshape(S, K, parts, 1, PART)
        kind = jnp.float32  # float16 would lose the smaller weights times a small scale
    v = v.reshape(S, K, parts, PART, D).astype(kind)
    values = multiply("skprt,skptd->skprd", weights.astype(kind), v)
    top = jnp.max(peak, axis=2)  # [S, K, QG]
    if sinks is not None:
        sinks = jnp.tile(sinks, (1, Q))
        top = jnp.maximum(top, sinks)
    rescale = jnp.exp(peak - _finite(top)[:, :, None])
    total = _sum_in_order(total * rescale, axis=2)
    if sinks is not None:
        total += jnp.exp(sinks - _finite(top))
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


def _gather_scales(
    scales: jax.Array | None, page_table: jax.Array, length: int
) -> jax.Array | None:
    """Scales [N, K, page_size] or [K] → those of the first `length` slots, [S, K, length]."""
    if scales is None:
        return None
    if scales.ndim == 1:
        return jnp.broadcast_to(scales[:, None], (page_table.shape[0], scales.shape[0], length))
    return _gather(scales[..., None], page_table, length)[..., 0]


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
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in (q.dtype, *LARGEST):
        raise ValueError(
            f"k_pages is {k_pages.dtype} and v_pages {v_pages.dtype}: expected both in q's dtype, "
            f"{q.dtype}, or both int8 or float8_e4m3fn"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize < 2:
        raise ValueError(f"q is {q.dtype}: expected bfloat16, float16 or float32")
    if any(x.dtype != jnp.int32 for x in (page_table, query_starts, kv_lengths)):
        raise ValueError("page_table, query_starts and kv_lengths must be int32")
    if not 1 <= max_query <= T:
        raise ValueError(f"max_query={max_query}: expected 1 to T={T}")
    if PART % page_size and page_size % PART:
        raise ValueError(f"page_size={page_size}: expected a divisor or a multiple of {PART}")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1, or None")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: expected more than 0, or None")
    if P < 1:
        raise ValueError("page_table has no columns")


def _check_sinks_and_scales(
    q: jax.Array,
    k_pages: jax.Array,
    sinks: jax.Array | None,
    k_scales: jax.Array | None,
    v_scales: jax.Array | None,
) -> None:
    H = q.shape[1]
    if sinks is not None and (sinks.shape != (H,) or sinks.dtype != jnp.float32):
        raise ValueError(f"sinks is {sinks.dtype} {sinks.shape}: expected float32 [{H}], or None")
    check_scales(k_pages, k_scales, v_scales)


@cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
