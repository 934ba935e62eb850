"""8-bit weights times 8-bit activations for Hopper: both factors go from TMA to wgmma.

The weights' rows are the matrix instruction's rows, tokens its columns. A persistent grid walks
tiles of the result; in each block one warpgroup issues copies, the others multiply 64 rows each
with the same tokens. FP8 sums have the precision that the tensor cores give them (some 14 bits from
one instruction to the next), int8 sums are exact.

A token's bits depend on that token alone: K is summed by one accumulator, in order, and the number
of columns of an instruction changes nothing.

Letters: T tokens, N rows of the matrix (out), K its columns (in).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant_packing import BLOCK, COLUMNS
from pallas_kernels.sm90_config import SHARED_BYTES
from pallas_kernels.sm90_shapes import ACC, BITS16, COLUMN, ROW, WGMMA, Refs, Swizzle, Tile
from pallas_kernels.sm90_tiles import (
    FEWEST_SMS,
    Tiles,
    drain,
    fill,
    persistent,
    run_wgmma,
    share_work,
    slot_of,
    store_transposed,
)

BYTES = (Tile((8, COLUMNS)), Swizzle(128))


@dataclass(frozen=True)
class Config:
    """Tuning. None of it changes a bit of the result.

    Attributes:
        consumers: warpgroups that multiply, 64 rows each.
        tokens: the most of a tile.
        depth: of a stage, in pieces of 128 columns.
        stages: copies in flight, at most.
    """

    consumers: int = 2
    tokens: int = 256
    depth: int = 1
    stages: int = 16


@dataclass(frozen=True)
class Shape:
    """Everything static that the kernel is specialised to."""

    T: int
    N: int
    K: int
    dtype: Any  # of codes
    out_dtype: Any
    config: Config
    sms: int
    on_gpu: bool

    @property
    def box(self) -> int:
        """Tokens of a tile."""
        return min(self.T, self.config.tokens)

    @property
    def columns(self) -> int:
        """Of the matrix instruction, which of more than 32 integers has multiples of 16."""
        least = 16 if self.dtype == jnp.int8 and self.box > 32 else 8
        return -(-self.box // least) * least

    @property
    def padding(self) -> int:
        """Bytes between one box of results and the next; alignment makes up for less than a KiB."""
        return (self.columns - self.box) // 8 * 1024

    @property
    def rows(self) -> int:
        """Of a tile."""
        return BLOCK * self.config.consumers

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.T, self.N, self.box, self.rows, self.sms)

    @property
    def steps(self) -> int:
        """Stages to go through for one tile."""
        return self.K // (COLUMNS * self.config.depth)

    @property
    def stages(self) -> int:
        stage = self.config.depth * COLUMNS * (self.rows + self.columns)
        most = (SHARED_BYTES - 2 * self.rows * self.columns) // stage
        if most < 2:
            raise ValueError(f"{self.config}: two stages of {stage} bytes are too much")
        return min(self.config.stages, most, max(2, self.steps))

    @property
    def sums(self) -> Any:
        return jnp.int32 if self.dtype == jnp.int8 else jnp.float32


def default_config(T: int, N: int, K: int, sms: int) -> Config:
    """By what was measured on an H100."""
    depth = next(d for d in (4, 2, 1) if K % (d * COLUMNS) == 0) if T <= 64 else 1
    if 2 * sms > N // BLOCK and T <= 256:
        return Config(1, 128, depth)
    return Config(min(2, N // BLOCK), 128 if T <= 128 else 256, min(depth, 2))


@partial(jax.jit, static_argnames=("out_dtype", "config", "sms", "on_gpu"))
def matmul(
    x: jax.Array,
    w: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    *,
    out_dtype: Any,
    config: Config | None = None,
    sms: int | None = None,
    on_gpu: bool = True,
) -> jax.Array:
    """x [T, K] · w [N, K], times x_scale [T] and w_scale [N] → [T, N]; see `scaled_matmul`."""
    T, K = x.shape
    N = w.shape[0]
    sms = sms or FEWEST_SMS
    config = config or default_config(T, N, K, sms)
    if not on_gpu:  # plain products want host threads, of which consumers block one each
        config = replace(config, consumers=1)
    # Of several tiles, each begins at a multiple of eight; a single one has no row too many.
    rows = T if config.tokens >= T else -(-T // 8) * 8
    s = Shape(rows, N, K, x.dtype, out_dtype, config, sms if on_gpu else 1, on_gpu)
    more = max(s.columns, rows) - T
    if more:
        x, x_scale = jnp.pad(x, ((0, more), (0, 0))), jnp.pad(x_scale, (0, more))
    return _kernel(s)(x, w, x_scale, w_scale)[:T]


def _kernel(s: Shape) -> Any:
    stages, columns, c = s.stages, s.config.depth * COLUMNS, s.config
    box = plgpu.SMEM((s.box, BLOCK), s.out_dtype, transforms=(Swizzle(128),))
    boxes = [box, plgpu.SMEM((s.padding,), jnp.int8)] if s.padding else [box]
    scratch = {
        "weights": plgpu.SMEM((stages, s.rows, columns), s.dtype, transforms=BYTES),
        "tokens": plgpu.SMEM((stages, s.columns, columns), s.dtype, transforms=BYTES),
        # The same bytes as what is written transposed, and as what is copied.
        "staging": plgpu.RefUnion(
            plgpu.SMEM((c.consumers, s.columns, BLOCK), s.out_dtype, transforms=BITS16),
            boxes * c.consumers,
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=c.consumers, num_barriers=stages),
    }

    def body(*refs: Any, **scoped: Any) -> None:
        names = ["x", "w", "x_scale", "w_scale", "out"]
        r = Refs(dict(zip(names, refs, strict=True)) | scoped)

        def copy() -> None:
            drain(s, r, persistent(s.tiles, s.steps, partial(_produce, s, r)))

        def compute(worker: Any) -> None:
            persistent(s.tiles, s.steps, partial(_consume, s, r, worker))
            plgpu.wait_smem_to_gmem(0)

        share_work(c.consumers, copy, compute)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((s.T, s.N), s.out_dtype),
        scratch_types=scratch,
        grid=(s.tiles.blocks,),
        grid_names=("block",),
        num_threads=c.consumers + 1,
        thread_name="warpgroup",
        kernel_name="scaled_matmul",
    )


def _produce(s: Shape, r: Refs, row: Any, token: Any, done: Any) -> None:
    columns = s.config.depth * COLUMNS

    def copy(step: Any, slot: Any, full: Any) -> None:
        at = pl.ds(step * columns, columns)
        plgpu.copy_gmem_to_smem(r.w.at[pl.ds(row, s.rows), at], r.weights.at[slot], full)
        plgpu.copy_gmem_to_smem(r.x.at[pl.ds(token, s.columns), at], r.tokens.at[slot], full)

    fill(s, r, done, s.steps, copy)


def _consume(s: Shape, r: Refs, worker: Any, row: Any, token: Any, done: Any) -> None:
    sums = _sums(s, r, worker, done).astype(jnp.float32)
    first = row + worker * BLOCK
    w_scale = plgpu.load(r.w_scale.at[pl.ds(first, BLOCK)], layout=ROW, optimized=False)
    of_tokens = r.x_scale.at[pl.ds(token, s.columns)]
    x_scale = plgpu.load(of_tokens, layout=COLUMN, optimized=False)
    scales = []
    for scale, axis in ((w_scale, 0), (x_scale, 1)):
        scale = lax.broadcast_in_dim(scale, sums.shape, (axis,))
        scales.append(plgpu.layout_cast(scale, WGMMA) if s.on_gpu else scale)
    made = (sums * scales[1] * scales[0]).astype(s.out_dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    matrices, boxes = r.staging
    store_transposed(s, made, matrices.at[worker], boxes[0])
    plgpu.commit_smem()
    for index in range(s.config.consumers):

        @pl.when(worker == index)
        def _copy_out(index: int = index) -> None:
            box = boxes[index * (2 if s.padding else 1)]
            to = r.out.at[pl.ds(token, s.box), pl.ds(row + index * BLOCK, BLOCK)]
            plgpu.copy_smem_to_gmem(box, to)


def _sums(s: Shape, r: Refs, worker: Any, done: Any) -> Any:
    """Of a warpgroup, [64, columns]."""

    def weights(slot: Any) -> Any:
        return r.weights.at[slot, pl.ds(pl.multiple_of(worker * BLOCK, BLOCK), BLOCK)]

    def multiply(acc: Any) -> Any:
        def operands(slot: Any) -> Any:
            yield acc, partial(weights, slot), r.tokens.at[slot]

        run_wgmma(s, r, done, s.steps, operands)
        return acc[...]

    def plainly(step: Any, acc: Any) -> Any:
        slot = slot_of(s, done + step)
        plgpu.barrier_wait(r.full.at[slot])
        w, x = (ref[...].astype(s.sums) for ref in (weights(slot), r.tokens.at[slot]))
        plgpu.barrier_arrive(r.free.at[slot])
        return acc + jnp.dot(w, x.T, preferred_element_type=s.sums)

    shape = (BLOCK, s.columns)
    if s.on_gpu:
        return pl.run_scoped(multiply, ACC(shape, s.sums))
    return lax.fori_loop(0, s.steps, plainly, jnp.zeros(shape, s.sums))
