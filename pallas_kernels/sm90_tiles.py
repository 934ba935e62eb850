"""What Hopper's matrix kernels share: how blocks walk tiles, and how a tile is turned.

The weights' rows are the rows of what is computed, tokens its columns; results lie the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils

from pallas_kernels.sm90_ir import inline_mgpu
from pallas_kernels.sm90_shapes import BITS16, WGMMA, Refs

SHARED_BYTES = 225 << 10  # of a block, less what barriers and alignment need
FEWEST_SMS = 78  # of any Hopper GPU (H20)


class Tiled(Protocol):
    """A kernel's static shape: T tokens times N rows, in tiles of `box` times `rows`."""

    @property
    def T(self) -> int: ...  # noqa: N802
    @property
    def N(self) -> int: ...  # noqa: N802
    @property
    def box(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def row_tiles(self) -> int: ...
    @property
    def token_tiles(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def on_gpu(self) -> bool: ...


def persistent(s: Tiled, item: Callable[[Any, Any, Any], None]) -> Any:
    """Runs item(first row, first token, stages so far) for each tile of this block's; how many
    stages there were.

    Neighbouring blocks have the same rows: what their tokens are multiplied by comes from the L2
    cache. The last tile begins earlier than it would: what it repeats has the same bits.
    """

    def run(i: Any, done: Any) -> Any:
        at = lax.axis_index("block") + i * s.blocks
        token = lax.rem(at, jnp.int32(s.token_tiles)) * s.box
        row = lax.div(at, jnp.int32(s.token_tiles)) * s.rows
        item(lax.min(row, jnp.int32(s.N - s.rows)), lax.min(token, jnp.int32(s.T - s.box)), done)
        return done + s.steps

    total = s.row_tiles * s.token_tiles
    count = lax.div(total - lax.axis_index("block") + s.blocks - 1, jnp.int32(s.blocks))
    return lax.fori_loop(0, count, run, jnp.int32(0))


def drain(s: Tiled, r: Refs, done: Any) -> None:
    """Sees the last stages freed, which the interpreter wants of everything that is signalled."""
    if s.on_gpu:
        return

    def see(i: Any, _: Any) -> None:
        plgpu.barrier_wait(r.free.at[lax.rem(i, jnp.int32(s.stages))])

    lax.fori_loop(lax.max(done - s.stages, jnp.int32(0)), done, see, None)


def store_transposed(s: Tiled, made: Any, matrix: Any, box: Any) -> None:
    """made [64, columns], 16 bits, to [columns, 64] in shared memory.

    That is `matrix`, and `box` the part of its bytes that is copied; the interpreter, where they
    are not the same bytes, writes to `box`.
    """
    if not s.on_gpu:
        box[...] = made.T[: box.shape[0]]
        return

    @inline_mgpu(arg_types=(WGMMA, plgpu.RefType(BITS16)))
    def store(ctx: Any, made: Any, into: Any) -> None:
        made.store_tiled(utils.memref_transpose(into, (1, 0, 3, 2)), swizzle=128)
        utils.commit_shared()

    store(made, matrix)
