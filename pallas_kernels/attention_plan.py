"""The work list of one attention call: which tile of queries meets which split of the KV axis.

Built on the device from the lengths, once a step, and walked by a persistent grid: one 128k request
among 64 short ones launches no empty blocks.

A *row* is one query head of one new token; rows of a KV head are packed token by token, so that a
decode row, a verification and a prefill chunk are all just tiles of rows. A *split* is SPLIT tokens
of the KV axis counted from position 0: where it is cut depends on a sequence's own positions alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_common import SPLIT, kv_range, most_splits, owner_of, row_tiles

# Columns of `Work.units`.
TOKEN, COUNT, POSITION, SEQUENCE, LENGTH, LOW, HIGH = range(7)
FIRST, PARTS, PART, SLOT, TILE_ID, ZERO = range(7, 13)
FIELDS = 13
COLUMNS = 128  # at least any KV tile
BUSY = 132  # rows times KV heads that fill a GPU without being cut along KV


class Work(NamedTuple):
    """int32 arrays. `units` [U, FIELDS]; `counts` [2]: how many are real, and how many *long*.

    Long ones, tiles of sequences of several tiles, come first; both sorts heaviest first. A long
    unit waits for no other, so they may be walked in any order. `columns` [COLUMNS] counts from 0,
    for kernels that had rather load that than compute it.

    A unit is `COUNT` new tokens from row `TOKEN` of q on, the first at `POSITION` of sequence
    `SEQUENCE`, which has `LENGTH` tokens, against KV positions `LOW` up to `HIGH` (exclusive),
    split `FIRST` on. With `PARTS` > 1 the unit is part number `PART` alone of a tile that several
    units share; `SLOT` is the first of their scratch slots and `TILE_ID` names their counter. With
    `PARTS` 1 the unit covers all of its tile's splits.
    """

    units: jax.Array
    counts: jax.Array
    columns: jax.Array


def splits_walked(T: int, K: int) -> int:
    """Splits that one unit may walk although its rows fit one tile: sharing them out costs more
    than it gains where there is work enough. T rows of q, K KV heads."""
    return 2 if T * K >= BUSY else 1


def max_units(T: int, S: int, tile_tokens: int, max_kv: int, window: int | None) -> int:
    """Bound of the units of a call: T tokens, S sequences of at most `max_kv` KV tokens each."""
    return T // tile_tokens + 1 + S * most_splits(max_kv, tile_tokens, window)


def plan(
    query_starts: jax.Array,
    kv_lengths: jax.Array,
    *,
    T: int,
    max_kv: int,
    tile_tokens: int,
    window: int | None = None,
    walked: int = 1,
    rest: bool = True,
) -> Work:
    """Cuts a ragged batch into units.

    A sequence whose new tokens fit one tile is shared out, one unit a split: that is what keeps
    every multiprocessor busy in decode. Longer ones make one unit a tile, which walks its splits in
    order; so do those with few splits. Rows of q that belong to nobody make units without keys,
    which write zeros.

    Args:
        query_starts, kv_lengths: int32 [S + 1] and [S], as in `paged_attention`.
        T: rows of q.
        max_kv: most KV tokens a sequence can have (columns of the page table times page size).
        tile_tokens: new tokens a tile.
        window: as in `paged_attention`.
        walked: the most splits of a tile that is not shared out, of `splits_walked`.
        rest: whether rows that belong to nobody are written.
    """
    S = kv_lengths.shape[0]
    U = max_units(T, S, tile_tokens, max_kv, window)
    end = jnp.full((1,), T, jnp.int32) if rest else query_starts[-1:]
    starts = jnp.concatenate([query_starts, end])
    new = starts[1:] - starts[:-1]  # [S + 1]: the last is what belongs to nobody
    lengths = jnp.concatenate([kv_lengths, jnp.zeros((1,), jnp.int32)])

    tiles = row_tiles(starts, lengths, T=T, tile_tokens=tile_tokens, max_query=T)
    low, high = kv_range(tiles, window)
    first = low // SPLIT
    splits = jnp.maximum(-(-high // SPLIT) - first, 1)
    long = new[tiles.sequence] > tile_tokens
    parts = jnp.where(long | (splits <= walked), 1, splits)
    parts = jnp.where(tiles.tokens > 0, parts, 0)

    unit_ends = jnp.cumsum(parts)
    unit = jnp.arange(U, dtype=jnp.int32)
    of = jnp.minimum(owner_of(unit_ends, unit), parts.shape[0] - 1)
    slot = (unit_ends - parts)[of]
    part = unit - slot
    shared = parts[of] > 1
    split = first[of] + part
    unit_low = jnp.where(shared, jnp.maximum(low[of], split * SPLIT), low[of])
    unit_high = jnp.where(shared, jnp.minimum(high[of], (split + 1) * SPLIT), high[of])
    units = jnp.stack(
        [
            tiles.token[of], tiles.tokens[of], tiles.position[of],
            jnp.minimum(tiles.sequence[of], S - 1), lengths[tiles.sequence[of]],
            unit_low, unit_high,
            jnp.where(shared, split, first[of]), parts[of], part, slot, of,
            jnp.zeros_like(of),
        ],
        axis=1,
    )  # fmt: skip
    # Heaviest first, so that the last units to start are short. The part that folds its tile waits
    # for the others: it must come after all of them, or blocks could wait for each other.
    cost = unit_high - unit_low
    first_cost = jnp.where(shared, cost[jnp.minimum(slot, U - 1)], cost)
    cost = jnp.where(part == parts[of] - 1, jnp.minimum(cost, first_cost), cost)
    real = unit < unit_ends[-1]
    is_long = real & long[of]
    cost = jnp.where(real, cost, -1) + jnp.where(is_long, 1 << 30, 0)
    order = jnp.argsort(-cost, stable=True)
    counts = jnp.stack([unit_ends[-1], is_long.sum()])
    columns = jnp.arange(COLUMNS, dtype=jnp.int32)
    return Work(units[order].astype(jnp.int32), counts.astype(jnp.int32), columns)


def item(at: Any, heads: int, long: Any) -> tuple[Any, Any]:
    """(unit, KV head) number `at`, of units of which the first `long` are long; None: none are.

    Units of one head share its keys: long ones go head by head, so that keys stay in L2. From head
    to head their costs rise and fall by turns, and fall in the last. So every n-th of them makes
    about the same sum wherever one starts, and no block is late.
    """
    unit, head = lax.div(at, jnp.int32(heads)), lax.rem(at, jnp.int32(heads))
    if long is None:
        return unit, head
    some = lax.max(long, jnp.int32(1))
    long_head, long_unit = lax.div(at, some), lax.rem(at, some)
    rises = lax.rem(heads - 1 - long_head, jnp.int32(2)) == 1
    long_unit = jnp.where(rises, some - 1 - long_unit, long_unit)
    is_long = at < long * heads
    return jnp.where(is_long, long_unit, unit), jnp.where(is_long, long_head, head)
