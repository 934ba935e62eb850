"""The work list of the Hopper kernel, for arbitrary ragged batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import attention_plan as ap
from pallas_kernels.attention_plan import SPLIT, item

# Few distinct shapes: each compiles.
ROWS_OF_Q = 160
MAX_KV = 6 * SPLIT
plan = partial(jax.jit, static_argnames=("T", "max_kv", "tile_tokens", "window", "walked"))(ap.plan)


@dataclass(frozen=True)
class Batch:
    """Sequences of `lengths` tokens, the last `new` of which are queries."""

    new: tuple[int, ...]
    lengths: tuple[int, ...]
    tile_tokens: int
    window: int | None
    walked: int = 1


@dataclass(frozen=True)
class Unit:
    """One row of the work list, in its words."""

    token: int
    count: int
    position: int
    sequence: int
    length: int
    low: int
    high: int
    first: int
    parts: int
    part: int
    slot: int
    tile_id: int
    zero: int


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """At most three sequences; new tokens and lengths around what tiles and splits hold."""
    size = draw(st.integers(1, 3))
    tile_tokens = draw(st.sampled_from([1, 16, 24]))
    options = st.sampled_from([(None, 1), (None, 2), (1, 1), (1500, 1), (1500, 2)])
    edges = st.sampled_from([0, 1, tile_tokens, tile_tokens + 1, 2 * tile_tokens])
    new = draw(st.lists(edges | st.integers(0, 32), min_size=size, max_size=size))
    length = st.builds(
        lambda splits, by: min(max(splits * SPLIT + by, 0), MAX_KV),
        st.integers(0, 6),
        st.sampled_from([-1, 0, 1]) | st.integers(-SPLIT, SPLIT),
    )
    lengths = [max(n, draw(length)) for n in new]
    return Batch(tuple(new), tuple(lengths), tile_tokens, *draw(options))


def work(b: Batch, T: int = ROWS_OF_Q, pad: int = 3) -> list[Unit]:
    """The units that are real. Batches are filled up with empty sequences, as the engine does."""
    spare = [0] * (pad - len(b.new))
    starts = jnp.asarray(np.cumsum([0, *b.new, *spare]), jnp.int32)
    lengths = jnp.asarray([*b.lengths, *spare], jnp.int32)
    made = plan(
        starts, lengths, T=T, max_kv=MAX_KV, tile_tokens=b.tile_tokens, window=b.window,
        walked=b.walked,
    )  # fmt: skip
    real, long = (int(n) for n in made.counts)
    assert made.units.shape == (
        ap.max_units(T, pad, b.tile_tokens, MAX_KV, b.window),
        ap.FIELDS,
    )
    assert made.units.dtype == made.counts.dtype == jnp.int32
    assert real <= made.units.shape[0]
    units = [Unit(*unit) for unit in np.asarray(made.units)[:real].tolist()]
    assert long == sum(is_long(b, unit) for unit in units)
    return units


def by_tile(units: list[Unit]) -> dict[int, list[Unit]]:
    """Units in the order of the list, by the first row of their tile."""
    tiles = defaultdict(list)
    for unit in units:
        tiles[unit.token].append(unit)
    return tiles


def is_long(b: Batch, unit: Unit) -> bool:
    """Whether the sequence that the unit's rows belong to has more than one tile."""
    ends = np.cumsum(b.new)
    of = int(np.searchsorted(ends, unit.token, side="right"))
    new = b.new[of] if of < len(b.new) else ROWS_OF_Q - int(ends[-1])
    return new > b.tile_tokens


def visible(b: Batch, unit: Unit) -> tuple[int, int]:
    """KV positions that some query of the unit's tile attends to."""
    high = unit.position + unit.count
    low = 0 if b.window is None else max(0, unit.position - b.window + 1)
    return low, high


@given(batches())
def test_every_row_of_q_belongs_to_one_tile(b: Batch) -> None:
    tiles = by_tile(work(b))
    for units in tiles.values():
        same = {(u.count, u.position, u.sequence, u.parts, u.slot, u.tile_id) for u in units}
        assert len(same) == 1
        assert 0 < units[0].count <= b.tile_tokens
    rows = Counter(token + i for token, units in tiles.items() for i in range(units[0].count))
    assert rows == Counter(range(ROWS_OF_Q))
    assert len({units[0].tile_id for units in tiles.values()}) == len(tiles)

    starts = np.cumsum([0, *b.new])
    for token, units in tiles.items():
        unit = units[0]
        if token >= starts[-1]:
            continue
        s = unit.sequence
        assert starts[s] <= token <= token + unit.count <= starts[s + 1]
        assert unit.position == b.lengths[s] - b.new[s] + token - starts[s]
        assert unit.length == b.lengths[s]


@given(batches())
def test_units_cover_what_their_tile_may_see(b: Batch) -> None:
    used = sum(b.new)
    for token, units in by_tile(work(b)).items():
        if token >= used:  # rows that belong to nobody
            assert [(u.low, u.high, u.parts) for u in units] == [(0, 0, 1)]
            continue
        low, high = visible(b, units[0])
        ranges = sorted((u.low, u.high) for u in units)
        assert (ranges[0][0], ranges[-1][1]) == (low, high)
        assert all(a < b for a, b in ranges)
        for (_, cut), (begin, _) in pairwise(ranges):
            assert cut == begin
            assert cut % SPLIT == 0
        assert all(u.first == u.low // SPLIT for u in units)
        if len(units) > 1 or units[0].parts > 1:  # shared: one split each
            assert all((u.high - 1) // SPLIT == u.low // SPLIT for u in units)


@given(batches())
def test_few_new_tokens_are_shared_out_and_many_are_not(b: Batch) -> None:
    used = sum(b.new)
    for token, units in by_tile(work(b)).items():
        low, high = visible(b, units[0])
        shared = token < used and b.new[units[0].sequence] <= b.tile_tokens
        splits = -(-high // SPLIT) - low // SPLIT
        assert units[0].parts == (splits if shared and splits > b.walked else 1)


@given(batches())
def test_parts_come_before_the_one_that_folds_them(b: Batch) -> None:
    units = work(b)
    for tile in by_tile(units).values():
        assert sorted(u.part for u in tile) == list(range(tile[0].parts))
        assert tile[-1].part == tile[-1].parts - 1
    slots = [u.slot + u.part for u in units if u.parts > 1]
    assert len(set(slots)) == len(slots)
    room = ap.max_units(ROWS_OF_Q, 3, b.tile_tokens, MAX_KV, b.window)
    assert all(0 <= slot < room for slot in slots)


@given(batches())
def test_units_that_wait_for_nobody_are_heaviest_first(b: Batch) -> None:
    units = work(b)
    long = sum(is_long(b, u) for u in units)
    assert all(is_long(b, u) for u in units[:long])
    for some in units[:long], units[long:]:
        cost = [u.high - u.low for u in some if u.part < u.parts - 1 or u.parts == 1]
        assert cost == sorted(cost, reverse=True)


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_every_unit_meets_every_head_and_only_long_ones_change_places(
    heads: int, long: int, others: int
) -> None:
    count = long + others
    every = jnp.arange(80 * 9, dtype=jnp.int32)  # of one shape, so that little is compiled
    units, of = (np.asarray(x).tolist() for x in item(every, heads, jnp.int32(long)))
    walk = list(zip(units, of, strict=True))[: count * heads]
    assert sorted(walk) == [(u, h) for u in range(count) for h in range(heads)]
    assert {u for u, _ in walk[: long * heads]} == set(range(long))
    for head in range(heads):  # of what may wait for another, no place is changed
        assert [u for u, h in walk if h == head][long:] == list(range(long, count))


@pytest.mark.parametrize(("prompts", "tokens"), [(1, 4096), (2, 4096), (4, 4096), (1, 8192)])
def test_no_block_has_much_more_to_do_than_the_others(prompts: int, tokens: int) -> None:
    blocks, heads, tile_tokens = 132, 8, 32
    starts = jnp.arange(prompts + 1, dtype=jnp.int32) * tokens
    lengths = jnp.full((prompts,), tokens, jnp.int32)
    T = prompts * tokens
    made = plan(starts, lengths, T=T, max_kv=tokens, tile_tokens=tile_tokens)
    count, long = (int(n) for n in made.counts)
    assert count == long == T // tile_tokens
    unit, _ = item(jnp.arange(count * heads, dtype=jnp.int32), heads, made.counts[1])
    cost = (np.asarray(made.units)[:, ap.HIGH] - np.asarray(made.units)[:, ap.LOW])[
        np.asarray(unit)
    ]
    work = [cost[block::blocks].sum() for block in range(blocks)]
    assert max(work) <= 1.01 * np.mean(work)


@given(batches())
def test_a_sequence_does_not_depend_on_its_neighbours(b: Batch) -> None:
    """Its tiles are cut alike, and so are their KV ranges, alone and in the batch."""

    def cuts(units: list[Unit], sequence: int, start: int, new: int) -> set[tuple[int, ...]]:
        return {
            (u.token - start, u.count, u.position, u.low, u.high, u.first, u.parts, u.part)
            for u in units
            if u.sequence == sequence and start <= u.token < start + new
        }

    together, start = work(b), 0
    for s, (new, length) in enumerate(zip(b.new, b.lengths, strict=True)):
        alone = replace(b, new=(new,), lengths=(length,))
        assert cuts(together, s, start, new) == cuts(work(alone), 0, 0, new)
        start += new


@pytest.mark.parametrize("window", [None, 1, 1500])
def test_the_bound_holds_where_every_sequence_is_as_long_as_can_be(window: int | None) -> None:
    b = Batch((16, 16, 16), (MAX_KV,) * 3, 16, window)
    units = work(b)
    assert len({u.token for u in units}) == ROWS_OF_Q // 16
    assert sum(u.parts > 1 for u in units) == (18 if window is None else 6 if window > 1 else 0)


def test_one_long_request_among_short_ones() -> None:
    """Decode: its splits are spread over the grid, and nothing else is launched."""
    b = Batch((1,) * 8, (131072,) + (300,) * 7, 16, None)
    starts = jnp.arange(9, dtype=jnp.int32)
    made = plan(starts, jnp.asarray(b.lengths), T=8, max_kv=131072, tile_tokens=16, window=None)
    assert int(made.counts[0]) == 131072 // SPLIT + 7
    units = [Unit(*u) for u in np.asarray(made.units)[: int(made.counts[0])].tolist()]
    assert [u.sequence for u in units[:128]] == [0] * 128
    assert units[127].part == 127
