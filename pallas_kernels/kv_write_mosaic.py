"""The kernel behind `kv_write`: keys, values and their scales written in place, in one launch.

Apart from `kv_write`, because importing Mosaic changes the environment of the process.

Letters: T new tokens, K key/value heads, D head dim, N pages of page_size slots.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_quantise import Pools, choose_scale, to_page_type

BLOCK_ELEMENTS = 2048  # of K, and of V, in one block of 128 threads: 16 registers each


@jax.jit  # so that a model's layers, which are alike, are lowered once
def write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k_scales: jax.Array | None,
    v_scales: jax.Array | None,
    k_new: jax.Array,
    v_new: jax.Array,
    kv_index: jax.Array,
) -> Pools:
    """As `kv_write`, whose checks have passed. Block (t, b) writes the b-th heads of token t."""
    T, K, D = k_new.shape
    heads = max(h for h in range(1, K + 1) if K % h == 0 and (h == 1 or h * D <= BLOCK_ELEMENTS))
    given = k_scales is not None and k_scales.ndim == 1
    # Refs are what the kernel may write to: their arrays are updated in place, or copied once
    # where somebody still needs the old ones.
    arrays = [k_pages, v_pages]
    if k_scales is not None and v_scales is not None and not given:
        arrays += [k_scales, v_scales]
    pools = [jax.new_ref(array) for array in arrays]
    plgpu.kernel(
        partial(_block, heads=heads, given=given),
        out_type=(),
        grid=(T, K // heads),
        grid_names=("token", "heads"),
    )(kv_index, k_new, v_new, *pools, *([k_scales, v_scales] if given else []))
    written = [jax.freeze(pool) for pool in pools]
    if len(written) == 4:
        k_scales, v_scales = written[2:]
    return written[0], written[1], k_scales, v_scales


def _block(kv_index: Any, k_new: Any, v_new: Any, *pools: Any, heads: int, given: bool) -> None:
    """kv_index [T]; k_new, v_new [T, K, D]; pools: the two of pages [N, K, page_size, D] and, where
    they are quantised, the two of scales [N, K, page_size] or [K]."""
    token = lax.axis_index("token")
    some = pl.ds(lax.axis_index("heads") * heads, heads)
    pages, scales = pools[:2], pools[2:] or (None, None)
    size = pages[0].shape[2]
    index = kv_index[token]
    page, slot = lax.div(index, size), lax.rem(index, size)
    layout = row_layout(heads, k_new.shape[2])
    # Both are loaded before either is stored: the second load then does not wait for the first.
    loaded = [plgpu.load(x.at[token, some], layout=layout, optimized=False) for x in (k_new, v_new)]
    for x, pool, scale in zip(loaded, pages, scales, strict=True):
        if scale is None:
            pool[page, some, slot] = x.astype(pool.dtype)
            continue
        x = x.astype(jnp.float32)
        if given:
            by = plgpu.load(scale.at[some], layout=layout.reduce(1), optimized=False)
        else:
            by = choose_scale(jnp.max(jnp.abs(x), axis=1), pool.dtype)
            scale[page, some, slot] = by
        by = plgpu.layout_cast(lax.broadcast_in_dim(by, x.shape, (0,)), layout)
        pool[page, some, slot] = to_page_type(x / by, pool.dtype)


def row_layout(rows: int, columns: int) -> Any:
    """Registers of a [rows, columns] array: a row lies in one warp, so that its maximum needs no
    shared memory, and neighbouring lanes hold neighbouring columns. With fewer than four rows the
    warps left over do the same work again."""
    tile = next(r for r in (4, 2, 1) if rows % r == 0)
    tiling = plgpu.Tiling(((tile, columns), (columns // 32,)))
    warps = ((-3,) if tile > 1 else ()) + ((plgpu.Replicated(4 // tile),) if tile < 4 else ())
    return plgpu.Layout.TILED(tiling, warps, (-2,), -1)
