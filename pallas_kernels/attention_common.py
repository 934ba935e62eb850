"""What backends of `paged_attention` agree on: tile sizes, and how partial results are folded."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SPLIT = 1024  # KV tokens of a split, counted from position 0; a multiple of every tile
ROWS = 64  # query rows of a tile: (token, head of the group), token-major
SCRATCH_BYTES = 256 << 20  # partial results of `sm80`, at most: more run one after the other
NEG = -1e30  # where a running maximum starts: finite, so that nothing subtracts infinities
LOG2E = 1.4426950408889634


def kv_tile(head_dim: int) -> int:
    """KV tokens multiplied at once. Part of what fixes a row's bits, so not a tuning value."""
    return 128 if head_dim <= 128 else 64


def most_splits(max_kv: int, tile_tokens: int, window: int | None, split: int = SPLIT) -> int:
    """Splits that the queries of one tile see at most, of sequences of at most `max_kv` tokens."""
    splits = -(-max_kv // split)
    return splits if window is None else min(splits, -(-(window + tile_tokens) // split) + 1)


class Partial(NamedTuple):
    """Softmax over part of the KV axis, in the log2 domain, before the division.

    `peak` (an integer, so that rescaling is exact) and `total` float32 [...], `values` [..., D].
    """

    peak: jax.Array
    total: jax.Array
    values: jax.Array


class RowTiles(NamedTuple):
    """Tiles of at most ROWS // G new tokens each. int32 [tiles], but for the last three: [T].

    A tile past the last one has no tokens. Of a token that belongs to nobody `owned` is False.
    """

    sequence: jax.Array
    token: jax.Array  # its first row of q
    tokens: jax.Array  # how many it holds
    position: jax.Array  # of its first token in the sequence
    token_tile: jax.Array
    token_offset: jax.Array  # in tokens from the start of the tile
    owned: jax.Array


def row_tiles(
    query_starts: jax.Array, kv_lengths: jax.Array, *, T: int, tile_tokens: int, max_query: int
) -> RowTiles:
    """Cuts each sequence's new tokens into tiles; [S + 1] and [S], as in `paged_attention`.

    Those of a sequence are neighbours, in the order of its tokens.
    """
    S = kv_lengths.shape[0]
    new = query_starts[1:] - query_starts[:-1]
    per_sequence = -(-new // tile_tokens)
    ends = jnp.cumsum(per_sequence)
    starts = ends - per_sequence

    tiles = max(1, min(S * -(-max_query // tile_tokens), T // tile_tokens + S))
    tile = jnp.arange(tiles, dtype=jnp.int32)
    of = owner_of(ends, tile)
    real = of < S
    of = jnp.minimum(of, S - 1)
    offset = (tile - starts[of]) * tile_tokens
    count = jnp.where(real, jnp.clip(new[of] - offset, 0, tile_tokens), 0)
    first = jnp.where(real, query_starts[of] + offset, 0)
    position = kv_lengths[of] - new[of] + offset

    token = jnp.arange(T, dtype=jnp.int32)
    owner = owner_of(query_starts, token) - 1
    owned = owner < S
    owner = jnp.minimum(owner, S - 1)
    at = token - query_starts[owner]
    return RowTiles(
        of, first, count, position,
        jnp.minimum(starts[owner] + at // tile_tokens, tiles - 1).astype(jnp.int32),
        at % tile_tokens, owned,
    )  # fmt: skip


def owner_of(ends: jax.Array, index: jax.Array) -> jax.Array:
    """Which of the ranges that end at `ends` (ascending) each index lies in."""
    return jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)


def kv_range(tiles: RowTiles, window: int | None) -> tuple[jax.Array, jax.Array]:
    """KV positions (low, high) that some row of each tile sees; high is exclusive. None: (0, 0)."""
    seen = jnp.maximum(tiles.position + tiles.tokens, 0)
    high = jnp.where(tiles.tokens > 0, seen, 0)
    if window is None:
        return jnp.zeros_like(high), high
    return jnp.clip(tiles.position - window + 1, 0, high), high


def power_of_two(x: jax.Array) -> jax.Array:
    """2**x for integers x <= 0 held as float32; 0 below 2**-126. Exact, unlike some exp2."""
    exponent = jnp.maximum(x, -127.0).astype(jnp.int32) + 127
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def fold(a: Partial, b: Partial) -> Partial:
    """`b` after `a`. Both scales are powers of two: fused or not, the bits are the same."""
    peak = jnp.maximum(a.peak, b.peak)
    left, right = power_of_two(a.peak - peak), power_of_two(b.peak - peak)
    values = a.values * left[..., None] + b.values * right[..., None]
    return Partial(peak, a.total * left + b.total * right, values)


def finish(x: Partial, sinks: jax.Array | None) -> jax.Array:
    """float32 [..., H, D]; `x` has trailing axis H, `sinks` is float32 [H] or None."""
    if sinks is not None:
        sink = sinks.astype(jnp.float32) * LOG2E
        peak = jnp.ceil(sink)
        total = jnp.broadcast_to(jnp.exp2(sink - peak), x.total.shape)
        peak = jnp.broadcast_to(peak, x.peak.shape)
        x = fold(x, Partial(peak, total, jnp.zeros_like(x.values)))
    return x.values / jnp.where(x.total > 0, x.total, 1.0)[..., None]
