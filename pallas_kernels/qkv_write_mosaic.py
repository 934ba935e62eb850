"""The kernel behind `qkv_write`: queries made, keys and values written in place, in one launch.

Apart from `qkv_write`, because importing Mosaic changes the environment of the process.

Letters: T new tokens, H query heads, K key/value heads, D head dim, N pages of page_size slots.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_quantise import Pools, choose_scale, to_page_type
from pallas_kernels.qkv_heads import Heads

BLOCK_ELEMENTS = 2048  # of a block of 128 threads: 16 each, so that one token is soon done
WARPS, LANES = 4, 32

Halves = tuple[Any, Any]  # [heads, D/2] each: what is rotated together lies in one thread


class Inputs(NamedTuple):
    """Of the kernel, in its order; None where there is nothing to do."""

    qkv: Any
    kv_index: Any
    bias: Any = None
    q_norm: Any = None
    k_norm: Any = None
    cos: Any = None
    sin: Any = None
    k_scale: Any = None  # given ones, [K]
    v_scale: Any = None


@jax.jit  # so that a model's layers, which are alike, are lowered once
def write(
    pools: Pools, qkv: jax.Array, kv_index: jax.Array, heads: Heads
) -> tuple[jax.Array, Pools]:
    """As `qkv_write`, whose checks have passed."""
    k_pages, v_pages, k_scales, v_scales = pools
    (T, width), (_, K, _, D) = qkv.shape, k_pages.shape
    H = width // D - 2 * K
    given = k_scales is not None and k_scales.ndim == 1
    inputs = Inputs(
        qkv.reshape(T, -1, D), kv_index,
        None if heads.bias is None else heads.bias.reshape(-1, D), heads.q_norm, heads.k_norm,
        *(heads.rope or (None, None)), *((k_scales, v_scales) if given else (None, None)),
    )  # fmt: skip
    there = [name for name, x in inputs._asdict().items() if x is not None]
    # Refs are what the kernel may write to: their arrays are updated in place, or copied once
    # where somebody still needs the old ones.
    arrays = [k_pages, v_pages]
    if k_scales is not None and v_scales is not None and not given:
        arrays += [k_scales, v_scales]
    refs = [jax.new_ref(array) for array in arrays]
    parts = block_count(H, K, D)
    (q,) = plgpu.kernel(
        partial(_block, there=there, H=H, K=K, parts=parts, eps=heads.eps, plus_one=heads.plus_one),
        out_type=[jax.ShapeDtypeStruct((T, H, D), qkv.dtype)],
        grid=(T, parts),
        grid_names=("token", "part"),
        kernel_name="qkv_write",
    )(*[x for x in inputs if x is not None], *refs)
    written = [jax.freeze(ref) for ref in refs]
    if len(written) == 4:
        k_scales, v_scales = written[2:]
    return q, (written[0], written[1], k_scales, v_scales)


def block_count(H: int, K: int, D: int) -> int:
    """Blocks of a token: each takes as many heads of each of the three kinds as the others."""
    even = [p for p in range(1, K + 1) if H % p == K % p == 0]
    return next((p for p in even if p * BLOCK_ELEMENTS >= (H + 2 * K) * D), even[-1])


def _block(
    *refs: Any, there: list[str], H: int, K: int, parts: int, eps: float, plus_one: bool
) -> None:
    """Block (t, p): the p-th heads of token t, of queries, keys and values."""
    x = Inputs(**dict(zip(there, refs, strict=False)))
    *pools, q_out = refs[len(there) :]
    pages, scales = pools[:2], pools[2:] or (x.k_scale, x.v_scale)
    token, part = lax.axis_index("token"), lax.axis_index("part")
    index, size = x.kv_index[token], pages[0].shape[2]
    page, slot = lax.div(index, size), lax.rem(index, size)
    q_rows, kv_rows = H // parts, K // parts
    of_q, of_kv = pl.ds(part * q_rows, q_rows), pl.ds(part * kv_rows, kv_rows)
    some = (of_q, *(pl.ds(first + part * kv_rows, kv_rows) for first in (H, H + K)))  # of qkv
    # These are loaded before anything is computed: none then waits for another.
    loaded = [_load(x.qkv.at[token, at]) for at in some]
    tables = [
        [_load_row(table.at[token], n) for table in (x.cos, x.sin) if table is not None]
        for n in (q_rows, kv_rows)
    ]
    if x.bias is not None:
        biases = [_load(x.bias.at[at]) for at in some]
        loaded = [(a + c, b + d) for (a, b), (c, d) in zip(loaded, biases, strict=True)]
    q, k, v = loaded
    if x.q_norm is not None:
        q, k = (_normed(y, weight, eps, plus_one) for y, weight in ((q, x.q_norm), (k, x.k_norm)))
    if x.cos is not None:
        q, k = _rotated(q, *tables[0]), _rotated(k, *tables[1])
    _store(q_out.at[token, of_q], q)
    for new, pool, scale in zip((k, v), pages, scales, strict=True):
        at = pool.at[page, of_kv, slot]
        if scale is None:
            _store(at, new)
            continue
        a, b = (half.astype(jnp.float32) for half in new)
        if len(scale.shape) == 1:
            layout = half_layout(*a.shape).reduce(1)
            by = plgpu.load(scale.at[of_kv], layout=layout, optimized=False)
        else:
            peak = jnp.maximum(jnp.max(jnp.abs(a), axis=1), jnp.max(jnp.abs(b), axis=1))
            by = choose_scale(peak, pool.dtype)
            scale[page, of_kv, slot] = by
        by = _spread(by, a.shape, 0)
        _store(at, (to_page_type(a / by, pool.dtype), to_page_type(b / by, pool.dtype)))


def _normed(x: Halves, weight: Any, eps: float, plus_one: bool) -> Halves:
    """As `rms_norm.reference`, over both halves of each head."""
    a, b = (half.astype(jnp.float32) for half in x)
    mean = (jnp.sum(a * a, axis=1) + jnp.sum(b * b, axis=1)) / weight.shape[0]
    by = _spread(lax.rsqrt(mean + eps), a.shape, 0)
    rows, half = a.shape
    scales = [_load_row(weight.at[pl.ds(i * half, half)], rows) for i in (0, 1)]
    if plus_one:
        wide = [scale.astype(jnp.float32) + 1 for scale in scales]
        return (a * by * wide[0]).astype(x[0].dtype), (b * by * wide[1]).astype(x[0].dtype)
    return (a * by).astype(x[0].dtype) * scales[0], (b * by).astype(x[0].dtype) * scales[1]


def _rotated(x: Halves, cos: Any, sin: Any) -> Halves:
    a, b = (half.astype(jnp.float32) for half in x)
    return (a * cos - b * sin).astype(x[0].dtype), (b * cos + a * sin).astype(x[0].dtype)


# -- halves of heads in registers ---------------------------------------------------------------


def _load(ref: Any) -> Halves:
    """[rows, D]"""
    rows, half = ref.shape[0], ref.shape[1] // 2
    layout = half_layout(rows, half)
    a, b = (
        plgpu.load(ref.at[:, pl.ds(i * half, half)], layout=layout, optimized=False) for i in (0, 1)
    )
    return a, b


def _load_row(ref: Any, rows: int) -> Any:
    """[D/2] → [rows, D/2], all rows alike."""
    shape = (rows, ref.shape[0])
    row = plgpu.load(ref, layout=half_layout(*shape).reduce(0), optimized=False)
    return _spread(row, shape, 1)


def _store(ref: Any, x: Halves) -> None:
    half = x[0].shape[1]
    for i, values in enumerate(x):
        ref[:, pl.ds(i * half, half)] = values.astype(ref.dtype)


def _spread(vector: Any, shape: tuple[int, int], axis: int) -> Any:
    """A vector along `axis` of an array of that shape."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (axis,)), half_layout(*shape))


def half_layout(rows: int, columns: int) -> Any:
    """Registers of a [rows, columns] array: a row lies in one warp, so that what is summed over it
    needs no shared memory, and neighbouring lanes hold neighbouring columns. Where four do not
    divide the rows, every warp does all of them, and with fewer than 32 columns lanes do the same
    work as others."""
    warps, lanes = (WARPS if rows % WARPS == 0 else 1), min(LANES, columns)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((warps, columns), (columns // lanes,))),
        (-3,) if warps > 1 else (plgpu.Replicated(WARPS),),
        ((plgpu.Replicated(LANES // lanes),) if lanes < LANES else ()) + (-2,),
        -1,
    )
