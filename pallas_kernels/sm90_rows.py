"""One tile of 16-bit keys and values: queries are the matrix's rows, and wgmma reads what came."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention_plan as ap
from pallas_kernels.attention_common import ROWS
from pallas_kernels.sm90_registers import add_octets, faded, masked
from pallas_kernels.sm90_shapes import (
    ACC,
    ROW,
    WGMMA,
    Place,
    Refs,
    Shape,
    across,
)
from pallas_kernels.sm90_sums import Sums, await_keys, capped, free_queries, next_split, slot_of


def positions(s: Shape, at: Place) -> Any:
    """Position of each row's token, [ROWS]."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
    return at.fields[ap.POSITION] + at.member * s.tokens + lax.div(row, jnp.int32(s.G))


def attend_tile(
    s: Shape, r: Refs, at: Place, position: Any, scale: Any, j: Any, sums: Sums, *, edge: bool
) -> Sums:
    """The sums after KV tile j."""
    slot = slot_of(s, at.team, sums.done)
    keys = r.k_smem.at[slot]

    def multiply(acc: Any) -> Any:
        add_scores(s, r, at, keys, acc)
        return acc[...]

    x = pl.run_scoped(multiply, ACC((ROWS, s.tile), jnp.float32))
    plgpu.barrier_arrive(r.k_free.at[slot])
    x, scale = capped(s, x, scale)
    free_queries(s, r, at, j)
    sums = next_split(s, r, at, j, sums)
    x = masked(s, x, position - j * s.tile) if edge else x
    p, m, total, fade = softmax(s, x, scale, sums.peak, sums.total)
    acc, p = faded(s, sums.acc, fade), p.astype(s.dtype)
    plgpu.barrier_wait(r.v_full.at[slot])
    values = r.v_smem.at[slot]
    if edge:
        clear_unwritten(s, at.fields, j, values)
    # The next tile's keys are waited for under cover of this product.
    acc = add_product(s, acc, p, values, partial(await_keys, s, r, at, j, sums))
    plgpu.barrier_arrive(r.v_free.at[slot])
    return sums._replace(acc=acc, peak=m, total=total, done=sums.done + 1)


def add_scores(s: Shape, r: Refs, at: Place, keys: Any, acc: Any) -> None:
    """Begins to add to `acc` [ROWS, tile] the products of queries and `keys` [tile, D]."""
    for part in range(s.D // 64):
        columns = keys.at[:, pl.ds(part * 64, 64)]
        plgpu.wgmma(acc, r.queries[0].at[at.worker, part], columns.transpose((1, 0)))


def softmax(s: Shape, x: Any, scale: Any, peak: Any, total: Any) -> tuple[Any, Any, Any, Any]:
    """(weights [ROWS, tile], maximum, sum, what earlier sums fade by) of a tile's scores `x`.

    Masked or not, the same multiply-add meets each score: scaled once, here, and nowhere else.
    """
    m = jnp.maximum(peak, jnp.round(x.max(axis=1) * scale))
    fade = jnp.exp2(peak - m)
    p = jnp.exp2(x * scale - across(m, s.tile))
    return p, m, add_octets(s, total, fade, p), fade


def add_product(s: Shape, acc: Any, p: Any, values: Any, meanwhile: Any) -> Any:
    """acc + p · values, p from registers; `meanwhile` runs before the result is there."""
    if not s.on_gpu:
        meanwhile()
        return acc + jnp.dot(p, values[...], preferred_element_type=jnp.float32)

    def multiply(ref: Any) -> None:
        plgpu.wgmma(ref, p, values)
        meanwhile()

    return pl.run_state(multiply)(ACC.init(acc))


def clear_unwritten(s: Shape, f: Any, j: Any, values: Any) -> None:
    """Zeroes values of slots that nobody may read: 0 * NaN is NaN."""
    low, high = f[ap.LOW] - j * s.tile, f[ap.LENGTH] - j * s.tile

    @pl.when((low > 0) | (high < s.tile))
    def _clear() -> None:
        for half in range(s.tile // 64):
            part = values.at[pl.ds(half * 64, 64)]
            slots = plgpu.broadcasted_iota(jnp.int32, (64, s.D), 0, layout=WGMMA) + half * 64
            value = plgpu.load(part, layout=WGMMA)
            keep = (slots >= low) & (slots < high)
            part[...] = jnp.where(keep, value, jnp.zeros_like(value))
        plgpu.commit_smem()
