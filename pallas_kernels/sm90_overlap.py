"""A unit of the Hopper attention kernel with both products in flight at once.

A tile's softmax runs while the tensor core multiplies the values of the tile before, and that
product's accumulators are rescaled while it multiplies the keys. What is added to what, and in
which order, is as in `attend_in_turn`; so are the bits.

ptxas would move the softmax to the other side of the wait for the values' product. So it writes its
sums to shared memory before that wait, where nobody reads them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_common import ROWS
from pallas_kernels.sm90_registers import faded, masked, pin_sums
from pallas_kernels.sm90_rows import (
    add_product,
    add_scores,
    clear_unwritten,
    positions,
    softmax,
)
from pallas_kernels.sm90_shapes import ACC, Place, Refs, Shape, nothing, tile_range
from pallas_kernels.sm90_sums import (
    Sums,
    begin_sums,
    begins_split,
    capped,
    end_sums,
    free_queries,
    scale_of,
    set_aside,
    slot_of,
    walk,
)

# Sums without the last tile's values, that tile's weights, and what accumulators still fade by.
Walked = tuple[Sums, Any, Any]


def attend_overlapped(s: Shape, r: Refs, at: Place, done: Any) -> tuple[Any, Any, Any, Any]:
    """As `attend_in_turn`, for pages of the queries' type."""
    first, end = tile_range(s, at.fields)
    scale, position = scale_of(s, r, at), positions(s, at)
    sums = begin_sums(s, done)

    def unit() -> Sums:
        begun = _begin(s, r, at, position, scale, first, sums)
        tile = partial(_tile, s, r, at, position, scale)
        now, p, fade = walk(s, at.fields, tile, begun, begin=first + 1)
        before = slot_of(s, at.team, now.done - 1)
        _await_values(s, r, at, end - 1, before)
        acc = add_product(s, faded(s, now.acc, fade), p, r.v_smem.at[before], lambda: None)
        plgpu.barrier_arrive(r.v_free.at[before])
        return now._replace(acc=acc)

    return end_sums(s, r, at, lax.cond(end > first, unit, lambda: sums))


def _begin(s: Shape, r: Refs, at: Place, position: Any, scale: Any, j: Any, sums: Sums) -> Walked:
    """The weights of a unit's first tile, whose values are not multiplied yet."""
    slot = slot_of(s, at.team, sums.done)
    x = _scores(s, r, at, slot)
    _free_operands(s, r, at, j, slot)
    x, scale = capped(s, x, scale)
    x = masked(s, x, position - j * s.tile)
    p, m, total, fade = softmax(s, x, scale, sums.peak, sums.total)
    return sums._replace(peak=m, total=total, done=sums.done + 1), p.astype(s.dtype), fade


def _tile(
    s: Shape,
    r: Refs,
    at: Place,
    position: Any,
    scale: Any,
    j: Any,
    carry: Walked,
    *,
    edge: bool,
) -> Walked:
    """Tile j's weights, and tile j - 1's values multiplied by its own."""
    sums, p_before, fade_before = carry
    slot, before = (slot_of(s, at.team, sums.done + i) for i in (0, -1))
    peak, total, new_split = sums.peak, sums.total, None
    if s.merge:
        new_split = begins_split(s, j)
        peak, total = lax.cond(new_split, lambda: nothing(s)[1:], lambda: (sums.peak, sums.total))
    plgpu.barrier_wait(r.k_full.at[slot])

    def weigh(x: Any) -> tuple[Any, Any, Any, Any]:
        _free_operands(s, r, at, j, slot)
        x, base2 = capped(s, x, scale)
        x = masked(s, x, position - j * s.tile) if edge else x
        p, *rest = softmax(s, x, base2, peak, total)
        return p.astype(s.dtype), *rest

    def multiply(scores: Any, acc: Any) -> tuple[Any, Any]:
        add_scores(s, r, at, r.k_smem.at[slot], scores)
        acc[...] = faded(s, sums.acc, fade_before)
        _await_values(s, r, at, j - 1, before)
        plgpu.wgmma(acc, p_before, r.v_smem.at[before])
        weighed = weigh(plgpu.wgmma_accumulator_load(scores, wait_n=1))
        pin_sums(s, r.pins.at[at.worker], weighed[2])
        return weighed, acc[...]

    if s.on_gpu:
        accumulators = ACC((ROWS, s.tile), jnp.float32), ACC((ROWS, s.D), jnp.float32)
        (p, m, total, fade), acc = pl.run_scoped(multiply, *accumulators)
    else:
        acc = faded(s, sums.acc, fade_before)
        (p, m, total, fade), acc = _on_cpu(s, r, at, j, weigh, acc, p_before, sums.done)
    plgpu.barrier_arrive(r.v_free.at[before])
    sums = sums._replace(acc=acc)
    if s.merge:
        sums = lax.cond(new_split, partial(set_aside, s, r, at, j), lambda same: same, sums)
    else:  # never so; but over a branch ptxas does not move what makes the products wait in line
        pl.when(sums.done < 0)(lambda: plgpu.barrier_arrive(r.v_free.at[before]))
    return sums._replace(peak=m, total=total, done=sums.done + 1), p, fade


def _on_cpu(
    s: Shape, r: Refs, at: Place, j: Any, weigh: Any, acc: Any, p_before: Any, done: Any
) -> tuple[Any, Any]:
    """The interpreter has no product with its left side in registers."""
    slot, before = (slot_of(s, at.team, done + i) for i in (0, -1))
    weighed = weigh(_scores(s, r, at, slot))
    _await_values(s, r, at, j - 1, before)
    return weighed, add_product(s, acc, p_before, r.v_smem.at[before], lambda: None)


def _scores(s: Shape, r: Refs, at: Place, slot: Any) -> Any:
    """Products of queries and the keys in `slot`, [ROWS, tile], with nothing else in flight."""

    def multiply(scores: Any) -> Any:
        add_scores(s, r, at, r.k_smem.at[slot], scores)
        return scores[...]

    return pl.run_scoped(multiply, ACC((ROWS, s.tile), jnp.float32))


def _free_operands(s: Shape, r: Refs, at: Place, j: Any, slot: Any) -> None:
    """Tile j's keys are multiplied."""
    plgpu.barrier_arrive(r.k_free.at[slot])
    free_queries(s, r, at, j)


def _await_values(s: Shape, r: Refs, at: Place, j: Any, slot: Any) -> None:
    plgpu.barrier_wait(r.v_full.at[slot])
    clear_unwritten(s, at.fields, j, r.v_smem.at[slot])
