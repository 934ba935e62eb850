"""A unit's walk along its KV tiles: what its rows gather on the way, and how splits are merged."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention_plan as ap
from pallas_kernels import sm90_fragments as fragments
from pallas_kernels.attention_common import LOG2E, NEG, SPLIT
from pallas_kernels.sm90_shapes import (
    COLUMN,
    ROW,
    Place,
    Refs,
    Shape,
    along,
    nothing,
    tile_range,
)


def slot_of(s: Shape, team: Any, done: Any) -> Any:
    """Where a team finds its next tile after `done`."""
    return team * s.config.stages + lax.rem(done, jnp.int32(s.config.stages))


class Sums(NamedTuple):
    """What a unit's rows have gathered; `merged_peak`, `merged_total` of the splits before.

    `acc` [ROWS, D] is not normalised; `total` [ROWS, 8] is in parts; the others [ROWS]. Values
    merged so far wait in staging memory. `done` counts tiles. With quantised pages rows are
    columns: `acc` [D, rows], `total` [32, rows]; what was merged is in memory as a whole.
    """

    acc: Any
    peak: Any
    total: Any
    done: Any
    merged_peak: Any = None
    merged_total: Any = None


def attend_in_turn(way: Any, s: Shape, r: Refs, at: Place, done: Any) -> tuple[Any, Any, Any, Any]:
    """(unnormalised output, maximum, sum, tiles done) of a unit.

    `way` is how a tile is attended to, `sm90_rows` or `sm90_quantised`.
    """
    tile = partial(way.attend_tile, s, r, at, way.positions(s, at), scale_of(s, r, at))
    return end_sums(s, r, at, walk(s, at.fields, tile, begin_sums(s, done)))


def scale_of(s: Shape, r: Refs, at: Place) -> Any:
    """What products of queries and keys are multiplied by."""
    scale = jnp.float32(s.scale)
    return scale * r.k_scales[at.head] if s.static_scales else scale


def capped(s: Shape, x: Any, scale: Any) -> tuple[Any, Any]:
    """Products and their scale after the soft cap, if there is one; the scale is to base 2."""
    if s.softcap is None:
        return x, scale * LOG2E
    # tanh by exp2: the hardware's tanh is too coarse once multiplied by the cap.
    e = jnp.exp2(x * (scale * (2 * LOG2E / s.softcap)))
    return 1.0 - 2.0 / (1.0 + e), jnp.float32(s.softcap * LOG2E)


def walk(s: Shape, f: Any, tile: Any, carry: Any, begin: Any = None) -> Any:
    """`carry` after `tile(j, carry, edge=…)` of every KV tile of a unit, or from `begin` on.

    Tiles that every row sees in full need no mask.
    """
    first, end = tile_range(s, f)
    first = first if begin is None else begin
    clear, unmasked = first, lax.div(f[ap.POSITION] + 1, jnp.int32(s.tile))
    if s.window is not None:
        seen_by_all = f[ap.POSITION] + s.config.consumers * s.tokens - s.window
        clear = lax.div(seen_by_all + s.tile - 1, jnp.int32(s.tile))
        clear = lax.min(lax.max(clear, first), end)
        carry = lax.fori_loop(first, clear, partial(tile, edge=True), carry)
    unmasked = lax.max(lax.min(unmasked, end), clear)
    carry = lax.fori_loop(clear, unmasked, partial(tile, edge=False), carry)
    return lax.fori_loop(unmasked, end, partial(tile, edge=True), carry)


def begin_sums(s: Shape, done: Any) -> Sums:
    """Before any tile of a unit; `done` tiles of units before it."""
    sums = Sums(*nothing(s), done)
    if s.merge and not s.quantised:
        none = plgpu.layout_cast(jnp.zeros_like(sums.peak), ROW)
        sums = sums._replace(merged_peak=sums.peak, merged_total=none)
    return sums


def end_sums(s: Shape, r: Refs, at: Place, sums: Sums) -> tuple[Any, Any, Any, Any]:
    """(unnormalised output, maximum, sum, tiles done) after the unit's last tile."""
    if s.merge:
        sums = merge(s, r, at, sums, split_of(s, tile_range(s, at.fields)[1] - 1))
        return sums.acc, sums.peak, sums.total, sums.done
    return sums.acc, sums.peak, total_of(s, r, at, sums), sums.done


def begins_split(s: Shape, j: Any) -> Any:
    return lax.rem(j, jnp.int32(SPLIT // s.tile)) == 0


def next_split(s: Shape, r: Refs, at: Place, j: Any, sums: Sums) -> Sums:
    """`sums` as tile j finds them: from scratch if a split ended before it."""
    if not s.merge:
        return sums
    ended = (j > tile_range(s, at.fields)[0]) & begins_split(s, j)
    return lax.cond(ended, partial(set_aside, s, r, at, j), lambda same: same, sums)


def free_queries(s: Shape, r: Refs, at: Place, j: Any) -> None:
    """Tile j's keys are multiplied: after the last tile nobody reads the queries any more."""
    last = tile_range(s, at.fields)[1] - 1
    pl.when(j == last)(lambda: plgpu.barrier_arrive(r.q_free.at[at.team]))


def await_keys(s: Shape, r: Refs, at: Place, j: Any, sums: Sums) -> None:
    """Those of the tile after j, which `sums` do not count yet."""
    keys = r.k_full.at[slot_of(s, at.team, sums.done + 1)]
    pl.when(j + 1 < tile_range(s, at.fields)[1])(lambda: plgpu.barrier_wait(keys))


def split_of(s: Shape, j: Any) -> Any:
    return lax.div(j, jnp.int32(SPLIT // s.tile))


def merge(s: Shape, r: Refs, at: Place, sums: Sums, split: Any) -> Sums:
    """`split`, which the sums are of, after the unit's splits before it."""
    merged_peak, merged_total = sums.merged_peak, sums.merged_total
    if s.quantised:
        merged_peak, merged_total = _merged_rows(s, r, at, split)
    peak = jnp.maximum(merged_peak, sums.peak)
    before, now = jnp.exp2(merged_peak - peak), jnp.exp2(sums.peak - peak)
    total = merged_total * before + total_of(s, r, at, sums) * now

    def add() -> Any:
        return _merged(s, r, at)[...] * along(s, before) + sums.acc * along(s, now)

    acc = lax.cond(split > at.fields[ap.FIRST], add, lambda: sums.acc)
    return sums._replace(acc=acc, peak=peak, total=total)


def total_of(s: Shape, r: Refs, at: Place, sums: Sums) -> Any:
    """The sum of each row's weights, [ROWS]."""
    if s.quantised:
        return fragments.column_sum(s, sums.total, r.exchange.at[at.worker])
    return sums.total.sum(axis=1)


def _merged(s: Shape, r: Refs, at: Place) -> Any:
    return r.staging[4 if s.quantised else 0].at[at.stage]


def _merged_rows(s: Shape, r: Refs, at: Place, split: Any) -> tuple[Any, Any]:
    """(maximum, sum) of the splits before `split`, which the first split of a unit ignores."""

    def load() -> Any:
        rows = r.merged_rows.at[at.worker]
        return tuple(plgpu.load(rows.at[i], layout=COLUMN) for i in (0, 1))

    def none() -> Any:
        return tuple(
            plgpu.layout_cast(jnp.full((s.rows,), x, jnp.float32), COLUMN) for x in (NEG, 0.0)
        )

    return lax.cond(split > at.fields[ap.FIRST], load, none)


def set_aside(s: Shape, r: Refs, at: Place, j: Any, sums: Sums) -> Sums:
    """Merges the split that ended before tile j; the next begins from scratch."""
    merged = merge(s, r, at, sums, split_of(s, j) - 1)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    _merged(s, r, at)[...] = merged.acc
    if s.quantised:
        r.merged_rows.at[at.worker, 0][...] = merged.peak
        r.merged_rows.at[at.worker, 1][...] = merged.total
        return Sums(*nothing(s), sums.done)
    return Sums(*nothing(s), sums.done, merged.peak, merged.total)
