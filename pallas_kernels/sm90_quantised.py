"""One tile of quantised keys and values: queries are the matrix's columns, not its rows.

Decode has few query rows, and a matrix instruction 64 rows at least. With tokens as rows and
queries as columns, S^T = K Q^T and O^T += V^T P^T, the softmax of 4 rows is that of 8 columns, and
both 8-bit operands come from registers (`sm90_fragments`). Decode, chunks and prompts differ in the
number of columns alone, which changes no column's bits.

Letters: D head dim, N query rows of a unit, a multiple of 8.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention_plan as ap
from pallas_kernels import sm90_fragments as fragments
from pallas_kernels.sm90_shapes import (
    ACC,
    COLUMN,
    ROW,
    WGMMA,
    Place,
    Refs,
    Shape,
    along,
    widened_by,
)
from pallas_kernels.sm90_sums import Sums, await_keys, capped, free_queries, next_split, slot_of

EARLY_COLUMNS = 16  # so few leave registers for the values while scores are computed


def positions(s: Shape, at: Place) -> Any:
    """Of the first query row's token."""
    return at.fields[ap.POSITION] + at.member * s.tokens


def attend_tile(
    s: Shape, r: Refs, at: Place, position: Any, scale: Any, j: Any, sums: Sums, *, edge: bool
) -> Sums:
    """The sums after KV tile j. Which rows are masked must not change the arithmetic of others."""
    slot = slot_of(s, at.team, sums.done)
    early = s.rows <= EARLY_COLUMNS
    value_load = partial(_load_values, s, r, slot)
    x, loaded = _products(s, r, at, slot, value_load if early else lambda: None)
    x, scale = capped(s, x, scale * (1 / widened_by(s)))
    free_queries(s, r, at, j)
    sums = next_split(s, r, at, j, sums)
    seen = _seen(s, r, position, j) if edge else None
    if seen is not None:
        x = jnp.where(seen, x, -jnp.inf)

    # As for 16-bit pages: one multiply-add for each score, and powers of two for all rescaling.
    peak = fragments.column_max(s, x, r.exchange.at[at.worker])
    m = jnp.maximum(sums.peak, jnp.round(peak * scale))
    fade = jnp.exp2(sums.peak - m)
    p = jnp.exp2(x * scale - _to_all(s, m))
    total = fragments.add_rows(s, sums.total, fade, p)
    acc = sums.acc * along(s, fade)
    values, scales = loaded or value_load()
    if scales is not None:
        p = p * _of_tokens(s, scales)
        if seen is not None:
            p = jnp.where(seen, p, 0.0)  # the scale of a slot nobody wrote may be NaN
    fragments.store_weights(s, p.astype(s.dtype), r.weights.at[at.worker])
    # The next tile's keys are waited for under cover of this product.
    acc = _add_values(s, r, at, acc, values, partial(await_keys, s, r, at, j, sums))
    return sums._replace(acc=acc, peak=m, total=total, done=sums.done + 1)


def _scales(s: Shape, of_slots: Any, slot: Any) -> Any:
    """Scales of a tile's tokens, [tile]; None where there is one for all."""
    return plgpu.load(of_slots.at[slot], layout=ROW) if s.token_scales else None


def _load_values(s: Shape, r: Refs, slot: Any) -> tuple[list[Any], Any]:
    """A tile's values, [D, 64] for each 64 tokens, and their scales."""
    plgpu.barrier_wait(r.v_full.at[slot])
    scales = _scales(s, r.v_scale_smem, slot)
    values = [fragments.values(s, r.v_smem.at[slot], half) for half in range(s.tile // 64)]
    plgpu.barrier_arrive(r.v_free.at[slot])
    return values, scales


def _products(s: Shape, r: Refs, at: Place, slot: Any, meanwhile: Any) -> tuple[Any, Any]:
    """Products of scaled keys and queries, [tile, N], and what `meanwhile` made during them."""
    keys, queries = r.k_smem.at[slot], r.queries[0].at[at.worker]
    scales = _scales(s, r.k_scale_smem, slot)

    def multiply(acc: Any) -> Any:
        for part in range(s.D // 64):
            plgpu.wgmma(acc, fragments.keys(s, keys, part), queries.at[part].transpose((1, 0)))
        plgpu.barrier_arrive(r.k_free.at[slot])
        made = meanwhile()
        return acc[...], made

    def plainly() -> Any:
        all_keys = jnp.concatenate([fragments.keys(s, keys, i) for i in range(s.D // 64)], 1)
        all_queries = jnp.concatenate([queries[i] for i in range(s.D // 64)], 1)
        plgpu.barrier_arrive(r.k_free.at[slot])
        return jnp.dot(all_keys, all_queries.T, preferred_element_type=jnp.float32), meanwhile()

    shape = (s.tile, s.rows)
    x, made = pl.run_scoped(multiply, ACC(shape, jnp.float32)) if s.on_gpu else plainly()
    return (x if scales is None else x * _of_tokens(s, scales)), made


def _add_values(s: Shape, r: Refs, at: Place, acc: Any, values: Any, meanwhile: Any) -> Any:
    """acc + values · weights; `meanwhile` runs before the result is there."""
    weights = r.weights.at[at.worker]
    if not s.on_gpu:
        meanwhile()
        for half, value in enumerate(values):
            part = weights[:, half * 64 : (half + 1) * 64].T
            acc = acc + jnp.dot(value, part, preferred_element_type=jnp.float32)
        return acc

    def multiply(ref: Any) -> None:
        for half, value in enumerate(values):
            plgpu.wgmma(ref, value, weights.at[:, pl.ds(half * 64, 64)].transpose((1, 0)))
        meanwhile()

    return pl.run_state(multiply)(ACC.init(acc))


def _to_all(s: Shape, x: Any) -> Any:
    """[N] to [tile, N]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (s.tile, s.rows), (1,)), WGMMA)


def _of_tokens(s: Shape, x: Any) -> Any:
    """[tile] to [tile, N]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (s.tile, s.rows), (0,)), WGMMA)


def _seen(s: Shape, r: Refs, position: Any, j: Any) -> Any:
    """Which slots of KV tile j each row attends to, [tile, N]; `position` is that of row 0."""
    # Loaded, not computed: computed, they would be held in registers through everything.
    row = plgpu.load(r.columns.at[pl.ds(0, s.rows)], layout=COLUMN, optimized=False)
    position = position + lax.div(row, jnp.int32(s.G))
    slots = plgpu.load(r.columns.at[pl.ds(0, s.tile)], layout=ROW, optimized=False)
    slots = _of_tokens(s, slots)
    last = _to_all(s, position - j * s.tile)
    seen = slots <= last
    return seen if s.window is None else seen & (slots > last - s.window)
