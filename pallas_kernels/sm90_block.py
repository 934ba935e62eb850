"""One block of the Hopper attention kernel: the warpgroup that copies and those that compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention_plan as ap
from pallas_kernels.sm90_results import finish
from pallas_kernels.sm90_shapes import (
    Place,
    Refs,
    Shape,
    box_of,
    count_items,
    read_item,
    tile_range,
)
from pallas_kernels.sm90_sums import slot_of

# -- the warpgroup that copies -------------------------------------------------------------------


def produce(s: Shape, r: Refs, team: Any) -> None:
    stages, items = s.config.stages, count_items(s, r, team)

    def item(i: Any, carry: Any) -> Any:
        f, head, copied, queries = carry
        first, end = tile_range(s, f)
        following = read_item(s, r, team, lax.min(i + 1, items - 1))  # on its way meanwhile

        def tile(j: Any, carry: Any) -> Any:
            copied, queries, pages = carry
            ahead = _pages(s, r, f, j + 1)  # a tile early: no copy waits for them
            slot = team * stages + lax.rem(copied, jnp.int32(stages))
            pl.when(copied >= stages)(lambda: plgpu.barrier_wait(r.k_free.at[slot]))
            _copy_tile(s, r, f, head, j, pages, slot, "k")

            @pl.when(j == first)
            def _queries() -> None:
                pl.when(queries > 0)(lambda: plgpu.barrier_wait(r.q_free.at[team]))
                for t in range(s.config.teams):
                    pl.when(team == t)(partial(_copy_queries, s, r, t, f, head))

            pl.when(copied >= stages)(lambda: plgpu.barrier_wait(r.v_free.at[slot]))
            _copy_tile(s, r, f, head, j, pages, slot, "v")
            return copied + 1, jnp.where(j == first, queries + 1, queries), ahead

        carry = (copied, queries, _pages(s, r, f, first))
        return (*following, *lax.fori_loop(first, end, tile, carry)[:2])

    begin = (*read_item(s, r, team, 0), jnp.int32(0), jnp.int32(0))
    *_, copied, queries = lax.fori_loop(0, items, item, begin)
    # A barrier may not be given up before everyone who waits on it has seen its last phase.
    pl.when(queries > 0)(lambda: plgpu.barrier_wait(r.q_free.at[team]))

    @pl.loop(lax.max(copied - stages, jnp.int32(0)), copied)
    def _drain(j: Any) -> None:
        slot = team * stages + lax.rem(j, jnp.int32(stages))
        plgpu.barrier_wait(r.k_free.at[slot])
        plgpu.barrier_wait(r.v_free.at[slot])


def _copy_queries(s: Shape, r: Refs, team: int, f: Any, head: Any) -> None:
    """Whole boxes: tokens past the tile's are some other sequence's, computed and never stored."""
    for c in range(s.config.consumers):
        tokens = pl.ds(f[ap.TOKEN] + c * s.tokens, s.box)
        for part in range(s.D // 64):
            plgpu.copy_gmem_to_smem(
                r.q.at[tokens, pl.ds(head * s.G, s.G), pl.ds(part * 64, 64)],
                box_of(s, r.queries[1], team * s.config.consumers + c, part).at[pl.ds(0, s.box)],
                r.q_full.at[team],
            )


def _regroup(s: Shape, r: Refs, worker: int) -> None:
    """What sharing memory does on a GPU; the interpreter keeps the members of a union apart."""
    for part in range(s.D // 64):
        rows = box_of(s, r.queries[1], worker, part)[pl.ds(0, s.box)].reshape(s.box * s.G, 64)
        r.queries[0].at[worker, part, pl.ds(0, s.box * s.G)][...] = rows


def _pages(s: Shape, r: Refs, f: Any, j: Any) -> list[Any]:
    """Page ids of KV tile j; where the table has no column for one, that of the last."""
    last = jnp.int32(s.columns - 1)
    span = min(s.page_size, s.tile)
    starts = [j * s.tile + p * span for p in range(s.copies)]
    return [
        r.page_table[f[ap.SEQUENCE], lax.min(lax.div(start, jnp.int32(s.page_size)), last)]
        for start in starts
    ]


def _copy_tile(
    s: Shape, r: Refs, f: Any, head: Any, j: Any, ids: list[Any], slot: Any, what: str
) -> None:
    """Pages of KV tile j, of `what` "k" or "v"; those without a token that may be read are not."""
    pages, scales, tiles, scale_tiles, full = (
        getattr(r, what + name) for name in ("_pages", "_scales", "_smem", "_scale_smem", "_full")
    )
    span = min(s.page_size, s.tile)
    for p, page in enumerate(ids):
        start = j * s.tile + p * span
        wanted = (start < f[ap.LENGTH]) & (start + span > f[ap.LOW])

        @pl.when(wanted)
        def _read(start: Any = start, p: int = p, page: Any = page) -> None:
            tokens = pl.ds(lax.rem(start, jnp.int32(s.page_size)), span)
            source, into = (page, head, tokens), pl.ds(p * span, span)
            if span == s.page_size:
                source = (page, head)
            plgpu.copy_gmem_to_smem(pages.at[source], tiles.at[slot, into], full.at[slot])
            if s.token_scales:
                plgpu.copy_gmem_to_smem(
                    scales.at[source], scale_tiles.at[slot, into], full.at[slot]
                )

        @pl.when(~wanted)
        def _skip() -> None:
            for _ in range(2 if s.token_scales else 1):
                plgpu.barrier_arrive(full.at[slot])


# -- the warpgroups that compute -----------------------------------------------------------------

# (shape, refs, place, tiles done so far) → (unnormalised output, each row's maximum and sum, tiles
# done).
Attend = Callable[[Shape, Refs, Place, Any], tuple[Any, Any, Any, Any]]


def consume(s: Shape, r: Refs, worker: Any, attend: Attend) -> None:
    """Walks the team's units; `attend` computes each."""
    team, member = lax.div(worker, jnp.int32(s.config.consumers)), jnp.int32(0)
    if s.config.consumers > 1:
        member = lax.rem(worker, jnp.int32(s.config.consumers))

    counters = None
    if s.scratch_rows and s.on_gpu:
        # One for each tile, KV head and consumer: parts in memory. Zero before and after a call.
        # Every `get_global` makes new ones, so there is one.
        count = s.max_tiles * s.K * s.config.consumers
        counters = pl.get_global(plgpu.SemaphoreType.REGULAR((count,)))

    def item(i: Any, done: Any) -> Any:
        f, head = read_item(s, r, team, i)
        first, end = tile_range(s, f)
        # The zero, which the compiler cannot see through, keeps it from computing addresses that
        # are needed once a unit ahead of everything, and spilling them.
        at = Place(worker, team, member, f, head, worker + f[ap.ZERO], counters)

        @pl.when(end > first)
        def _begin() -> None:
            plgpu.barrier_wait(r.q_full.at[team])
            plgpu.barrier_wait(r.k_full.at[slot_of(s, team, done)])
            if not s.on_gpu:
                for w in range(s.config.consumers):
                    pl.when(worker == w)(partial(_regroup, s, r, w))

        acc, m, total, done = attend(s, r, at, done)
        finish(s, r, at, acc, m, total)
        return done

    lax.fori_loop(0, count_items(s, r, team), item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
