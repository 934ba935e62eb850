"""What Hopper's matrix kernels share: what each warpgroup does, how blocks walk tiles and stages,
and how a tile of results is turned.

The weights' rows are the rows of what is computed, tokens its columns; results lie the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils

from pallas_kernels.sm90_ir import inline_mgpu
from pallas_kernels.sm90_shapes import BITS16, WGMMA, Refs

FEWEST_SMS = 78  # of any Hopper GPU (H20)
COPIER = 40  # registers of a copying thread


@dataclass(frozen=True)
class Tiles:
    """T tokens times N rows, in tiles of `box` times `rows`, on `sms` multiprocessors."""

    T: int
    N: int
    box: int
    rows: int
    sms: int

    @property
    def of_tokens(self) -> int:
        return -(-self.T // self.box)

    @property
    def of_rows(self) -> int:
        return -(-self.N // self.rows)

    @property
    def count(self) -> int:
        return self.of_rows * self.of_tokens

    @property
    def blocks(self) -> int:
        """Of the grid."""
        return min(self.sms, self.count)


class Staged(Protocol):
    """A kernel's static shape. Its refs have barriers for each stage: `full`, `free`."""

    @property
    def stages(self) -> int: ...
    @property
    def on_gpu(self) -> bool: ...


def consumer_registers(workers: int, copiers: int, copier: int) -> int:
    """What is left of the launch's registers, which are the same for all, in steps of 8."""
    all_ = workers + copiers
    at_launch = 65536 // (128 * all_) // 8 * 8
    return min(232, (at_launch * all_ - copiers * copier) // workers // 8 * 8)


def share_work(consumers: int, copy: Callable[[], None], compute: Callable[[Any], None]) -> None:
    """The last of the block's warpgroups runs copy(), the others compute(their number)."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == consumers)
    def _copy() -> None:
        if consumers > 1:  # what it gives up, the others take
            plgpu.set_max_registers(COPIER, action="decrease")
        copy()

    @pl.when(warpgroup < consumers)
    def _compute() -> None:
        if consumers > 1:
            plgpu.set_max_registers(consumer_registers(consumers, 1, COPIER), action="increase")
        compute(warpgroup)


def persistent(tiles: Tiles, steps: int, item: Callable[[Any, Any, Any], None]) -> Any:
    """Runs item(first row, first token, stages so far) for each tile of this block's, which takes
    `steps` stages; how many stages there were.

    Neighbouring blocks have the same rows: what their tokens are multiplied by comes from the L2
    cache. The last tile begins earlier than it would: what it repeats has the same bits.
    """
    t = tiles

    def run(i: Any, done: Any) -> Any:
        at = lax.axis_index("block") + i * t.blocks
        token = lax.rem(at, jnp.int32(t.of_tokens)) * t.box
        row = lax.div(at, jnp.int32(t.of_tokens)) * t.rows
        item(lax.min(row, jnp.int32(t.N - t.rows)), lax.min(token, jnp.int32(t.T - t.box)), done)
        return done + steps

    count = lax.div(t.count - lax.axis_index("block") + t.blocks - 1, jnp.int32(t.blocks))
    return lax.fori_loop(0, count, run, jnp.int32(0))


def slot_of(s: Staged, count: Any) -> Any:
    """Where the stage with this number lies."""
    return lax.rem(count, jnp.int32(s.stages))


def fill(s: Staged, r: Refs, done: Any, steps: int, copy: Callable[[Any, Any, Any], None]) -> None:
    """Runs copy(step, slot, its `full` barrier) for each of a tile's stages, as slots come free."""

    def one(step: Any, _: Any) -> None:
        count = done + step
        slot = slot_of(s, count)

        @pl.when(count >= s.stages)
        def _wait() -> None:
            plgpu.barrier_wait(r.free.at[slot])

        copy(step, slot, r.full.at[slot])

    lax.fori_loop(0, steps, one, None)


def drain(s: Staged, r: Refs, done: Any) -> None:
    """Sees the last stages freed, which the interpreter wants of everything that is signalled."""
    if s.on_gpu:
        return

    def see(i: Any, _: Any) -> None:
        plgpu.barrier_wait(r.free.at[slot_of(s, i)])

    lax.fori_loop(lax.max(done - s.stages, jnp.int32(0)), done, see, None)


def run_wgmma(
    s: Staged,
    r: Refs,
    first: Any,
    steps: int,
    operands: Callable[[Any], Iterable[tuple[Any, Callable[[], Any], Any]]],
) -> None:
    """Adds `steps` stages to accumulators. operands(slot): each product's accumulator, what loads
    its weights [64, k], and its tokens [columns, k]."""

    def add(step: Any, _: Any) -> None:
        slot = slot_of(s, first + step)
        plgpu.barrier_wait(r.full.at[slot])
        for i, (acc, load, tokens) in enumerate(operands(slot)):
            plgpu.wgmma(acc, load(), tokens.transpose((1, 0)))
            # What was multiplied before, registers too, may now be written again.
            plgpu.wgmma_wait(1)
            if i == 0:

                @pl.when(step > 0)
                def _release() -> None:
                    plgpu.barrier_arrive(r.free.at[slot_of(s, first + step - 1)])

    lax.fori_loop(0, steps, add, None)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(r.free.at[slot_of(s, first + steps - 1)])


def store_transposed(s: Staged, made: Any, matrix: Any, box: Any) -> None:
    """made [64, columns], 16 bits, to [columns, 64] in shared memory.

    That is `matrix`, and `box` the part of its bytes that is copied; the interpreter, where they
    are not the same bytes, writes to `box`.
    """
    if s.on_gpu:
        store_columns(made, matrix)
    else:
        box[...] = made.T[: box.shape[0]]


def store_columns(made: Any, into: Any) -> None:
    """made [rows, columns], 16 bits, transposed to swizzled shared memory, where wgmma and copies
    may read it."""

    @inline_mgpu(arg_types=(WGMMA, plgpu.RefType(BITS16)))
    def store(ctx: Any, made: Any, into: Any) -> None:
        made.store_tiled(utils.memref_transpose(into, (1, 0, 3, 2)), swizzle=128)
        utils.commit_shared()

    store(made, into)
