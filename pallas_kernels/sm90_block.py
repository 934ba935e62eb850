"""One block of the Hopper attention kernel: the warpgroup that copies and those that compute."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention_plan as ap
from pallas_kernels import sm90_quantised as quantised
from pallas_kernels.attention_common import LOG2E, ROWS, SPLIT
from pallas_kernels.sm90_results import finish, signal
from pallas_kernels.sm90_shapes import (
    ACC,
    COLUMN,
    ROW,
    WGMMA,
    Place,
    Refs,
    Shape,
    across,
    box_of,
    count_items,
    nothing,
    read_item,
    tile_range,
)
from pallas_kernels.sm90_sums import (
    Sums,
    merge,
    set_aside,
    slot_of,
    split_of,
    total_of,
)

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
    """Pages of KV tile j, of `what` "k" or "v"; those without a token of this unit are not read."""
    pages, scales, tiles, scale_tiles, full = (
        getattr(r, what + name) for name in ("_pages", "_scales", "_smem", "_scale_smem", "_full")
    )
    span = min(s.page_size, s.tile)
    for p, page in enumerate(ids):
        start = j * s.tile + p * span
        wanted = (start < f[ap.HIGH]) & (start + span > f[ap.LOW])

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


def consume(s: Shape, r: Refs, worker: Any) -> None:
    team, member = lax.div(worker, jnp.int32(s.config.consumers)), jnp.int32(0)
    if s.config.consumers > 1:
        member = lax.rem(worker, jnp.int32(s.config.consumers))

    counters = None
    if s.scratch_rows and s.on_gpu:
        # One for each tile, KV head and consumer: parts in memory. Zero before and after a call.
        # Every `get_global` makes new ones, so there is one.
        count = s.max_tiles * s.K * s.config.consumers
        counters = pl.get_global(plgpu.SemaphoreType.REGULAR((count,)))

    def item(i: Any, carry: Any) -> Any:
        done, pending = carry
        f, head = read_item(s, r, team, i)
        first, end = tile_range(s, f)
        # The zero, which the compiler cannot see through, keeps it from computing addresses that
        # are needed once a unit ahead of everything, and spilling them.
        at = Place(worker, team, member, f, head, worker + f[ap.ZERO], counters)
        if s.quantised:
            position = f[ap.POSITION] + member * s.tokens
        else:
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
            position = f[ap.POSITION] + member * s.tokens + lax.div(row, jnp.int32(s.G))

        @pl.when(end > first)
        def _begin() -> None:
            plgpu.barrier_wait(r.q_full.at[team])
            plgpu.barrier_wait(r.k_full.at[slot_of(s, team, done)])
            if not s.on_gpu:
                for w in range(s.config.consumers):
                    pl.when(worker == w)(partial(_regroup, s, r, w))
            if s.config.ping_pong:
                pl.when(member == 1)(lambda: _take_turn(r))

        acc, m, total, done = _attend(s, r, at, position, done)

        @pl.when(end > first)
        def _end() -> None:
            if s.config.ping_pong:
                pl.when(member == 0)(lambda: _take_turn(r))

        return done, finish(s, r, at, acc, m, total, pending)

    begin = (jnp.int32(0), jnp.int32(-1))
    _, pending = lax.fori_loop(0, count_items(s, r, team), item, begin)
    signal(counters, pending)
    plgpu.wait_smem_to_gmem(0)


def _attend(s: Shape, r: Refs, at: Place, position: Any, done: Any) -> tuple[Any, Any, Any, Any]:
    """(unnormalised output, maximum, sum, tiles done) of a unit: its tiles, in order."""
    scale = jnp.float32(s.scale)
    if s.static_scales:
        scale = scale * r.k_scales[at.head]
    attend_tile = quantised.attend_tile if s.quantised else _attend_tile
    tile = partial(attend_tile, s, r, at, position, scale)
    sums = Sums(*nothing(s), done)
    if s.merge and not s.quantised:
        sums = sums._replace(merged_peak=sums.peak, merged_total=sums.total)
    # Tiles that every row sees in full need no mask.
    f = at.fields
    first, end = tile_range(s, f)
    clear, unmasked = first, lax.div(f[ap.POSITION] + 1, jnp.int32(s.tile))
    if s.window is not None:
        seen_by_all = f[ap.POSITION] + s.config.consumers * s.tokens - s.window
        clear = lax.div(seen_by_all + s.tile - 1, jnp.int32(s.tile))
        clear = lax.min(lax.max(clear, first), end)
        sums = lax.fori_loop(first, clear, partial(tile, masked=True), sums)
    unmasked = lax.max(lax.min(unmasked, end), clear)
    sums = lax.fori_loop(clear, unmasked, partial(tile, masked=False), sums)
    sums = lax.fori_loop(unmasked, end, partial(tile, masked=True), sums)
    if s.merge:
        sums = merge(s, r, at, sums, split_of(s, end - 1))
        return sums.acc, sums.peak, sums.total, sums.done
    return sums.acc, sums.peak, total_of(s, r, at, sums), sums.done


def _attend_tile(
    s: Shape, r: Refs, at: Place, position: Any, scale: Any, j: Any, sums: Sums, *, masked: bool
) -> Sums:
    slot, (first, end) = slot_of(s, at.team, sums.done), tile_range(s, at.fields)
    x, scale = _scores(s, r, at, slot, scale)
    pl.when(j == end - 1)(lambda: plgpu.barrier_arrive(r.q_free.at[at.team]))
    if s.merge:  # here, while the other consumer multiplies
        new_split = (j > first) & (lax.rem(j, jnp.int32(SPLIT // s.tile)) == 0)
        sums = lax.cond(new_split, partial(set_aside, s, r, at, j), lambda same: same, sums)
    seen = _seen(s, r, position, j) if masked else None
    if seen is not None:
        x = jnp.where(seen, x, -jnp.inf)

    # Masked or not, the same multiply-add meets each score: scaled once, here, and nowhere else.
    m = jnp.maximum(sums.peak, jnp.round(x.max(axis=1) * scale))
    fade = jnp.exp2(sums.peak - m)
    p = jnp.exp2(x * scale - across(m, s.tile))
    total = sums.total * fade + p.sum(axis=1)
    acc = sums.acc * across(fade, s.D)
    p = p.astype(s.dtype)
    if s.config.ping_pong:
        acc, total, m, p = lax.optimization_barrier((acc, total, m, p))
        plgpu.barrier_arrive(r.turn)
    plgpu.barrier_wait(r.v_full.at[slot])
    if s.config.ping_pong:
        plgpu.barrier_wait(r.turn)
    values = r.v_smem.at[slot]
    if masked:
        _clear_unwritten(s, at.fields, j, values)

    def await_keys() -> None:  # the next tile's, under cover of this product
        next_keys = r.k_full.at[slot_of(s, at.team, sums.done + 1)]
        pl.when(j + 1 < end)(lambda: plgpu.barrier_wait(next_keys))

    acc = _add_product(s, acc, p, values, await_keys)
    plgpu.barrier_arrive(r.v_free.at[slot])
    return sums._replace(acc=acc, peak=m, total=total, done=sums.done + 1)


def _scores(s: Shape, r: Refs, at: Place, slot: Any, scale: Any) -> tuple[Any, Any]:
    """Products of queries and keys, [ROWS, tile], and what makes them logarithms to base 2."""
    keys = r.k_smem.at[slot]

    def multiply(acc: Any) -> Any:
        for part in range(s.D // 64):
            columns = keys.at[:, pl.ds(part * 64, 64)]
            plgpu.wgmma(acc, r.queries[0].at[at.worker, part], columns.transpose((1, 0)))
        if s.config.ping_pong:
            _take_turn(r)
        return acc[...]

    x = pl.run_scoped(multiply, ACC((ROWS, s.tile), jnp.float32))
    plgpu.barrier_arrive(r.k_free.at[slot])
    if s.softcap is None:
        return x, scale * LOG2E
    # tanh by exp2: the hardware's tanh is too coarse once multiplied by the cap.
    e = jnp.exp2(x * (scale * (2 * LOG2E / s.softcap)))
    return 1.0 - 2.0 / (1.0 + e), jnp.float32(s.softcap * LOG2E)


def _seen(s: Shape, r: Refs, position: Any, j: Any) -> Any:
    """Which slots of KV tile j each row attends to, [ROWS, tile]."""
    # Loaded, not computed: computed, they would be held in registers through everything.
    slots = plgpu.load(r.columns.at[pl.ds(0, s.tile)], layout=COLUMN, optimized=False)
    slots = lax.broadcast_in_dim(slots, (ROWS, s.tile), (1,))
    at = across(position - j * s.tile, s.tile)
    seen = slots <= at
    return seen if s.window is None else seen & (slots > at - s.window)


def _add_product(s: Shape, acc: Any, p: Any, values: Any, meanwhile: Any) -> Any:
    """acc + p · values, p from registers; `meanwhile` runs before the result is there."""
    if not s.on_gpu:
        meanwhile()
        return acc + jnp.dot(p, values[...], preferred_element_type=jnp.float32)

    def multiply(ref: Any) -> None:
        plgpu.wgmma(ref, p, values)
        meanwhile()

    return pl.run_state(multiply)(ACC.init(acc))


def _take_turn(r: Refs) -> None:
    plgpu.barrier_arrive(r.turn)
    plgpu.barrier_wait(r.turn)


def _clear_unwritten(s: Shape, f: Any, j: Any, values: Any) -> None:
    """Zeroes values of slots that nobody may read: 0 * NaN is NaN."""
    low, high = f[ap.LOW] - j * s.tile, f[ap.HIGH] - j * s.tile

    @pl.when((low > 0) | (high < s.tile))
    def _clear() -> None:
        for half in range(s.tile // 64):
            part = values.at[pl.ds(half * 64, 64)]
            slots = plgpu.broadcasted_iota(jnp.int32, (64, s.D), 0, layout=WGMMA) + half * 64
            value = plgpu.load(part, layout=WGMMA)
            keep = (slots >= low) & (slots < high)
            part[...] = jnp.where(keep, value, jnp.zeros_like(value))
        plgpu.commit_smem()
