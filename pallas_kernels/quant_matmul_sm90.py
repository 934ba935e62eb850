"""Packed weights times 16-bit activations for Hopper: TMA, registers, wgmma.

The weights' rows are the matrix instruction's rows, tokens its columns: from 8 to 128 of them,
which changes no column's bits. A persistent grid walks tiles of the result; in each block one
warpgroup issues copies, the others dequantise chunks of 64 rows into registers and multiply them
with the same tokens.

What fixes a token's bits is that every row is summed over all of K in one order, by one accumulator.

Letters: T tokens, N rows of the matrix (out), K its columns (in).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils

from pallas_kernels import sm90_dequantise as registers
from pallas_kernels.quant_packing import COLUMNS, ROWS, WORDS, Format, PackedMatrix, unpack_chunks
from pallas_kernels.sm90_ir import inline_mgpu
from pallas_kernels.sm90_shapes import ACC, BITS16, ROW, WGMMA, Refs, Swizzle, Tile

SHARED_BYTES = 225 << 10  # of a block, less what barriers and alignment need
PARTS = COLUMNS // 64  # of a chunk: as many columns as a swizzled line has


@dataclass(frozen=True)
class Config:
    """Tuning. None of it changes a bit of the result.

    Attributes:
        consumers: warpgroups that compute.
        blocks: of 64 rows, of each consumer.
        depth: chunks of a stage.
        tokens: the most of a tile.
        stages: copies in flight, at most.
        warps: each warp multiplies by itself.
    """

    consumers: int = 2
    blocks: int = 2
    depth: int = 1
    tokens: int = 128
    stages: int = 12
    warps: bool = False
    debug: str = ""


@dataclass(frozen=True)
class Shape:
    """Everything static that the kernel is specialised to."""

    T: int
    N: int
    K: int
    format: Format
    dtype: Any
    config: Config
    sms: int
    on_gpu: bool

    @property
    def box(self) -> int:
        """Tokens of a tile: fewer than eight, or a multiple of eight."""
        return min(self.T, self.config.tokens)

    @property
    def columns(self) -> int:
        """Of the matrix instruction."""
        return -(-self.box // 8) * 8

    @property
    def padding(self) -> int:
        """Bytes between one box of results and the next; alignment makes up for less than a KiB."""
        return (self.columns - self.box) // 8 * 1024

    @property
    def tile_blocks(self) -> int:
        """Blocks of 64 rows of one tile."""
        return self.config.consumers * self.config.blocks

    @property
    def row_tiles(self) -> int:
        return self.N // ROWS // self.tile_blocks

    @property
    def token_tiles(self) -> int:
        return -(-self.T // self.box)

    @property
    def depth(self) -> int:
        return self.config.depth

    @property
    def steps(self) -> int:
        """Stages to go through for one tile."""
        return self.K // (COLUMNS * self.depth)

    @property
    def parts(self) -> int:
        """Of a stage: as many columns as a swizzled line has."""
        return self.depth * PARTS

    @property
    def stages(self) -> int:
        lut = registers.PAIRS * 128 if self.format.table else 0
        staged = self.tile_blocks * self.columns * ROWS * 2
        stage = self.tile_blocks * self.depth * self.format.lines * 128
        stage += self.columns * self.depth * COLUMNS * 2
        most = (SHARED_BYTES - lut - staged) // stage
        return min(self.config.stages, most, max(2, self.steps), 32)


def default_config(T: int, N: int, K: int, form: Format, sms: int) -> Config:
    few = T <= 32
    depth = next(d for d in (4, 2, 1) if K % (COLUMNS * d) == 0) if few else 1
    blocks = N // ROWS
    shapes = ((4, 1), (3, 1), (2, 1), (1, 1)) if few else ((2, 2), (2, 1), (1, 1))
    for consumers, each in shapes:
        tiles, left = divmod(blocks, consumers * each)
        if not left and (T > 128 or tiles >= sms * 0.7):
            return Config(consumers, each, depth, warps=few)
    return Config(1, 1, depth, warps=few)


@partial(jax.jit, static_argnames=("config", "sms", "on_gpu"))
def matmul(
    x: jax.Array,
    packed: PackedMatrix,
    *,
    config: Config | None = None,
    sms: int = 132,
    on_gpu: bool = True,
) -> jax.Array:
    """x [T, K] · packed [N, K] → [T, N] in x's dtype."""
    T, K = x.shape
    N, _ = packed.shape
    if T > 8 and T % 8:
        x = jnp.pad(x, ((0, -T % 8), (0, 0)))
    config = config or default_config(T, N, K, packed.format, sms)
    s = Shape(x.shape[0], N, K, packed.format, x.dtype, config, sms if on_gpu else 1, on_gpu)
    inputs = [x, packed.words, packed.row_scale]
    if s.format.table and on_gpu:
        inputs.append(_pairs(s.format))
    return _kernel(s)(*inputs)[:T]


def _pairs(form: Format) -> jax.Array:
    """int32 [256]: the two values that a byte stands for, the lower code's in the lower half."""
    values = np.asarray(form.table, jnp.bfloat16).view(np.uint16).astype(np.uint32)
    return jnp.asarray((values[None, :] | (values[:, None] << 16)).reshape(-1).view(np.int32))


def _boxes(s: Shape, count: int) -> list[Any]:
    """`count` boxes of 64 columns of the tile's tokens, as copies bring them: see `Shape.padding`."""
    box = plgpu.SMEM((s.box, 64), s.dtype, transforms=(Swizzle(128),))
    padding = [plgpu.SMEM((s.padding,), jnp.int8)] if s.padding else []
    return [box, *padding] * count


def _kernel(s: Shape) -> Any:
    c = s.config
    stages = s.stages
    matrices = partial(plgpu.SMEM, dtype=s.dtype, transforms=BITS16)
    scratch: dict[str, Any] = {
        "words": plgpu.SMEM((stages, s.tile_blocks, s.depth, s.format.lines, WORDS), jnp.int32),
        "tokens": plgpu.SMEM(
            (stages, s.box, s.depth * COLUMNS),
            s.dtype,
            transforms=(Tile((min(8, s.box), 64)), Swizzle(128)),
        ),
        "staging": plgpu.RefUnion(
            matrices((s.tile_blocks, s.columns, ROWS)), _boxes(s, s.tile_blocks)
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=c.consumers, num_barriers=stages),
    }
    if s.format.table and s.on_gpu:
        scratch["table"] = plgpu.SMEM((registers.PAIRS, WORDS), jnp.int32)
        scratch["table_full"] = plgpu.Barrier(num_arrivals=1)

    def body(*refs: Any, **scoped: Any) -> None:
        names = ["x", "packed", "row_scale"]
        names += ["pairs"] if s.format.table and s.on_gpu else []
        r = Refs(dict(zip([*names, "out"], refs, strict=True)) | scoped)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == c.consumers)
        def _copy() -> None:
            if c.consumers > 1:  # what it gives up, the others take
                plgpu.set_max_registers(40, action="decrease")
            _produce(s, r)

        @pl.when(warpgroup < c.consumers)
        def _compute() -> None:
            if c.consumers > 1:
                at_launch = 65536 // (128 * (c.consumers + 1)) // 8 * 8
                most = (at_launch * (c.consumers + 1) - 40) // c.consumers // 8 * 8
                plgpu.set_max_registers(min(232, most), action="increase")
            _consume(s, r, warpgroup)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((s.T, s.N), s.dtype),
        scratch_types=scratch,
        grid=(min(s.sms, s.row_tiles * s.token_tiles),),
        grid_names=("block",),
        num_threads=c.consumers + 1,
        thread_name="warpgroup",
        kernel_name="quant_matmul",
    )


def _items(s: Shape, item: Any, carry: Any) -> None:
    """Runs item(tile of rows, first token, carry) for each tile of this block's."""
    total, blocks = s.row_tiles * s.token_tiles, min(s.sms, s.row_tiles * s.token_tiles)

    def run(i: Any, carry: Any) -> Any:
        at = lax.axis_index("block") + i * blocks
        token = lax.rem(at, jnp.int32(s.token_tiles)) * s.box
        # The last tile begins earlier: what it repeats has the same bits.
        return item(lax.div(at, jnp.int32(s.token_tiles)), lax.min(token, s.T - s.box), carry)

    count = lax.div(total - lax.axis_index("block") + blocks - 1, jnp.int32(blocks))
    lax.fori_loop(0, count, run, carry)


def _produce(s: Shape, r: Refs) -> None:
    stages, blocks = s.stages, s.tile_blocks

    def item(tile: Any, token: Any, done: Any) -> Any:
        def copy(step: Any, _: Any) -> None:
            count = done + step
            slot = lax.rem(count, jnp.int32(stages))

            @pl.when(count >= stages)
            def _wait() -> None:
                plgpu.barrier_wait(r.free.at[slot])

            full = r.full.at[slot]
            chunks = pl.ds(step * s.depth, s.depth)
            plgpu.copy_gmem_to_smem(
                r.packed.at[pl.ds(tile * blocks, blocks), chunks], r.words.at[slot], full
            )
            columns = pl.ds(step * s.depth * COLUMNS, s.depth * COLUMNS)
            plgpu.copy_gmem_to_smem(r.x.at[pl.ds(token, s.box), columns], r.tokens.at[slot], full)

        lax.fori_loop(0, s.steps, copy, None)
        return done + s.steps

    _items(s, item, jnp.int32(0))


def _consume(s: Shape, r: Refs, worker: Any) -> None:
    if s.format.table and s.on_gpu:

        @pl.when(worker == 0)
        def _prepare() -> None:
            registers.store_table(r.pairs, r.table)
            plgpu.barrier_arrive(r.table_full)

        plgpu.barrier_wait(r.table_full)

    def item(tile: Any, token: Any, done: Any) -> Any:
        sums = _sums(s, r, worker, done)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for block, acc in enumerate(sums):
            _stage(s, r, tile, worker, block, acc)
        plgpu.commit_smem()
        for index in range(s.tile_blocks):
            owner, _ = divmod(index, s.config.blocks)
            pl.when(worker == owner)(partial(_copy_out, s, r, tile, token, index))
        return done + s.steps

    _items(s, item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _sums(s: Shape, r: Refs, worker: Any, done: Any) -> list[Any]:
    """Of the consumer's blocks, float32 [64, columns]."""
    c = s.config
    shape = (ROWS, s.columns)

    def slot_of(step: Any) -> Any:
        return lax.rem(done + step, jnp.int32(s.stages))

    def chunk_of(slot: Any, block: int, part: int) -> Any:
        return r.words.at[slot, worker * c.blocks + block, part // PARTS]

    def multiply(*accs: Any) -> list[Any]:
        def add(step: Any, _: Any) -> None:
            slot = slot_of(step)
            plgpu.barrier_wait(r.full.at[slot])
            for part in range(s.parts):
                tokens = r.tokens.at[slot].at[:, pl.ds(part * 64, 64)].transpose((1, 0))
                for block, acc in enumerate(accs):
                    chunk = chunk_of(slot, block, part)
                    plgpu.wgmma(acc, registers.weights(s.format, chunk, part % PARTS, r.table), tokens)
                    # The registers of what was multiplied before may now be written again.
                    plgpu.wgmma_wait(1)
                    if block == part == 0:

                        @pl.when(step > 0)
                        def _release() -> None:
                            plgpu.barrier_arrive(r.free.at[slot_of(step - 1)])

        lax.fori_loop(0, s.steps, add, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(r.free.at[slot_of(s.steps - 1)])
        return [acc[...] for acc in accs]

    def by_warps(step: Any, accs: tuple[Any, ...]) -> tuple[Any, ...]:
        slot = slot_of(step)
        plgpu.barrier_wait(r.full.at[slot])
        made = list(accs)
        for part in range(s.parts):
            for block, acc in enumerate(made):
                chunk = chunk_of(slot, block, part)
                made[block] = registers.add_products(
                    s.format, acc, chunk, r.tokens.at[slot], part, r.table
                )
        plgpu.barrier_arrive(r.free.at[slot])
        return tuple(made)

    def plainly(step: Any, accs: tuple[Any, ...]) -> tuple[Any, ...]:
        slot = slot_of(step)
        plgpu.barrier_wait(r.full.at[slot])
        made = []
        for block, acc in enumerate(accs):
            words = r.words[slot, worker * c.blocks + block][None]
            w = unpack_chunks(words, s.format)
            made.append(acc + jnp.dot(w, r.tokens[slot].T, preferred_element_type=jnp.float32))
        plgpu.barrier_arrive(r.free.at[slot])
        return tuple(made)

    if s.on_gpu and not c.warps:
        return pl.run_scoped(multiply, *[ACC(shape, jnp.float32)] * c.blocks)
    nothing = jnp.zeros(shape, jnp.float32)
    if s.on_gpu:
        nothing = plgpu.layout_cast(nothing, WGMMA)
    run = by_warps if s.on_gpu else plainly
    return list(lax.fori_loop(0, s.steps, run, (nothing,) * c.blocks))


def _stage(s: Shape, r: Refs, tile: Any, worker: Any, block: int, acc: Any) -> None:
    """Scales rows and puts them, transposed, where they are copied from."""
    index = worker * s.config.blocks + block
    first = (tile * s.tile_blocks + index) * ROWS
    scale = plgpu.load(r.row_scale.at[pl.ds(first, ROWS)], layout=ROW, optimized=False)
    scale = lax.broadcast_in_dim(scale, acc.shape, (0,))
    if s.on_gpu:
        scale = plgpu.layout_cast(scale, WGMMA)
    made = (acc * scale).astype(s.dtype)
    into = r.staging[0].at[index]
    if not s.on_gpu:
        into[...] = made.T
        return

    @inline_mgpu(arg_types=(WGMMA, plgpu.RefType(BITS16)))
    def store(ctx: Any, made: Any, into: Any) -> None:
        made.store_tiled(utils.memref_transpose(into, (1, 0, 3, 2)), swizzle=128)
        utils.commit_shared()

    store(made, into)


def _copy_out(s: Shape, r: Refs, tile: Any, token: Any, index: int) -> None:
    box = r.staging[1][index * (2 if s.padding else 1)]
    columns = pl.ds((tile * s.tile_blocks + index) * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(box, r.out.at[pl.ds(token, s.box), columns])
