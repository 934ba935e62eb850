"""What the parts of the Hopper attention kernel share: its static shape, refs and layouts.

Letters: T new tokens, H query heads, K key/value heads, G = H / K, D head dim, P pages a sequence,
R rows of a unit in scratch memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention_plan as ap
from pallas_kernels.attention_common import NEG, ROWS, kv_tile
from pallas_kernels.sm90_config import Config

# Pyright takes the transforms for abstract, and the accumulator for private.
Tile: Any = plgpu.TilingTransform
Swizzle: Any = plgpu.SwizzleTransform
ACC: Any = plgpu.WGMMAAccumulatorRef
WGMMA = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
# A row of scratch memory to each warp, two neighbouring columns to each of its lanes.
FOLD = plgpu.Layout.TILED(plgpu.Tiling(((4, 64), (2,))), (-3,), (-2,), -1)
# Of quantised pages. Partial sums of columns: a row to each eighth of a warp.
SUMS = plgpu.Layout.TILED(plgpu.Tiling(((32, 8), (8, 8), (2,))), (-5,), (-3, -2), -1)
# Rows of results that were accumulated as columns: two neighbouring values of two rows to a lane.
TURNED = plgpu.Layout.TILED(plgpu.Tiling(((8, 64), (8, 16), (2, 2))), (-5,), (-3, -4), -1)
BITS16 = (Tile((8, 64)), Swizzle(128))


def bytes_of(head_dim: int) -> tuple[Any, Any]:
    """How a tile of 8-bit keys or values lies in shared memory."""
    return Tile((8, min(128, head_dim))), Swizzle(min(128, head_dim))


@dataclass(frozen=True)
class Shape:
    """Everything static that the kernel is specialised to."""

    T: int
    H: int
    K: int
    D: int
    page_size: int
    columns: int  # P
    max_units: int
    max_tiles: int
    scratch_rows: int  # R; 0 when no unit can be part of a shared tile
    dtype: Any
    kv_dtype: Any
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool
    token_scales: bool
    rows: int  # of a consumer's matrices of queries
    box: int  # tokens of q that one copy brings
    whole: bool  # some units may walk several splits
    merge: bool  # and each is reduced from scratch, then merged
    blocks: int
    config: Config
    on_gpu: bool
    into: bool = False  # the output is there already

    @property
    def G(self) -> int:  # noqa: N802
        return self.H // self.K

    @property
    def tile(self) -> int:
        """KV tokens of a tile."""
        return kv_tile(self.D)

    @property
    def tokens(self) -> int:
        """New tokens of one consumer's rows."""
        return self.rows // self.G

    @property
    def padding(self) -> int:
        """Bytes between a box of q's rows and the next; alignment makes up for less than a KiB."""
        return (self.rows - self.tokens * self.G) // 8 * 1024

    @property
    def quantised(self) -> bool:
        return self.kv_dtype != self.dtype

    @property
    def static_scales(self) -> bool:
        return self.quantised and not self.token_scales

    @property
    def copies(self) -> int:
        """Page copies that fill one tile of keys, or of values."""
        return max(1, self.tile // self.page_size)


class Place(NamedTuple):
    """Who computes what: warpgroup, its team, its place there; the unit's fields and KV head.

    `stage` is the worker again, as the index of its staging memory. `counters`: of parts in memory;
    None where no tile is shared, or without a GPU.
    """

    worker: Any
    team: Any
    member: Any
    fields: Any
    head: Any
    stage: Any
    counters: Any


class Refs:
    """The kernel's refs by name; None for those that this variant lacks."""

    def __init__(self, refs: dict[str, Any]) -> None:
        self._refs = refs

    def __getattr__(self, name: str) -> Any:
        return self._refs.get(name)


def count_items(s: Shape, r: Refs, team: Any) -> Any:
    """How many units times KV heads this team walks: every so many."""
    teams = s.blocks * s.config.teams
    left = r.counts[0] * s.K - (lax.axis_index("block") + team * s.blocks)
    return lax.max(lax.div(left + teams - 1, jnp.int32(teams)), jnp.int32(0))


def read_item(s: Shape, r: Refs, team: Any, i: Any) -> tuple[Any, Any]:
    """(unit's fields, KV head) of this team's i-th item."""
    at = lax.axis_index("block") + (team + i * s.config.teams) * s.blocks
    unit, head = ap.item(at, s.K, r.counts[1] if s.whole else None)
    return [r.units[unit, f] for f in range(ap.FIELDS)], head


def tile_range(s: Shape, f: Any) -> tuple[Any, Any]:
    """The first KV tile of a unit, and one past the last."""
    return lax.div(f[ap.LOW], jnp.int32(s.tile)), lax.div(
        f[ap.HIGH] + s.tile - 1, jnp.int32(s.tile)
    )


def widened_by(s: Shape) -> float:
    """What 8-bit numbers have been multiplied by, exactly, once they are 16-bit ones."""
    if s.kv_dtype != jnp.int8:
        return 1.0
    return 2.0**-6 if s.dtype == jnp.bfloat16 else 2.0**-9


def nothing(s: Shape) -> tuple[Any, Any, Any]:
    """(unnormalised output, running maximum, sum) before any key."""
    if s.quantised:
        return (
            plgpu.layout_cast(jnp.zeros((s.D, s.rows), jnp.float32), WGMMA),
            plgpu.layout_cast(jnp.full((s.rows,), NEG, jnp.float32), COLUMN),
            plgpu.layout_cast(jnp.zeros((32, s.rows), jnp.float32), SUMS),
        )
    return (
        plgpu.layout_cast(jnp.zeros((ROWS, s.D), jnp.float32), WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), NEG, jnp.float32), ROW),
        plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), WGMMA),
    )


def across(rows: Any, columns: int) -> Any:
    return lax.broadcast_in_dim(rows, (ROWS, columns), (0,))


def along(s: Shape, x: Any) -> Any:
    """One factor a query row as factors of the accumulators, which `nothing` shows."""
    if s.quantised:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (s.D, s.rows), (1,)), WGMMA)
    return across(x, s.D)


def box_of(s: Shape, boxes: Any, worker: int, part: int) -> Any:
    """64 columns of a worker's rows as [tokens, G, 64]. `boxes`: each followed by its padding."""
    of_worker = len(boxes) // (s.config.teams * s.config.consumers)
    each = 2 if s.padding else 1
    return boxes[worker * of_worker + part * each]
