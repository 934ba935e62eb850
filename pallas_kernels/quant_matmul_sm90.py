"""Packed weights times 16-bit activations for Hopper: TMA, registers, matrix instructions.

The weights' rows are the matrix instruction's rows, tokens its columns. A persistent grid walks
tiles of the result; in each block one warpgroup issues copies, the others dequantise chunks of
weights into registers and multiply them with the same tokens. For few tokens warps work by
themselves, 16 rows each (`mma`), where a warpgroup's instruction would wait for its own latency.

What fixes a token's bits: K is summed in `chains` of every so manyth chunk, by one accumulator each
and in order; then the chains are added up, in order. Their number depends on the matrix alone, and
both instructions, whatever their number of columns, give the same bits.

Letters: T tokens, N rows of the matrix (out), K its columns (in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import weight_registers as registers
from pallas_kernels.quant_packing import (
    BLOCK,
    COLUMNS,
    DTYPE,
    UNIT,
    Format,
    PackedMatrix,
    unpack_chunks,
)
from pallas_kernels.sm90_config import SHARED_BYTES
from pallas_kernels.sm90_shapes import ACC, BITS16, ROW, WGMMA, Refs, Swizzle, Tile
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
from pallas_kernels.weight_registers import PAD, PARTS, Work

WIDE = 16384  # rows that keep all multiprocessors busy without splitting K


@dataclass(frozen=True)
class Config:
    """Tuning. None of it changes a bit of the result.

    Attributes:
        way: who multiplies 16 or 64 rows: `warp`; `group`, a warpgroup, in both cases for one
            chain; `tile`, a warpgroup for all chains in turn.
        units: of 16 rows, of a block's tile.
        tokens: the most of a tile.
        depth: chunks of a stage.
        blocks: of 16 or 64 rows, of each worker.
        stages: copies in flight, at most.
    """

    way: Literal["warp", "group", "tile"]
    units: int
    tokens: int
    depth: int = 1
    blocks: int = 1
    stages: int = 16


def chains_of(N: int, K: int) -> int:
    """Into how many K is split: as many as keep the latency of a sum from showing."""
    chunks = K // COLUMNS
    return 1 if N > WIDE else next(n for n in (4, 2, 1) if chunks % n == 0)


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
    def chains(self) -> int:
        return chains_of(self.N, self.K)

    @property
    def in_turn(self) -> bool:
        """Whether a worker goes through the chains one after the other."""
        return self.config.way == "tile"

    @property
    def work(self) -> Work:
        c = self.config
        warps = c.way == "warp"
        each = c.blocks if warps else 1
        return Work(self.format, c.units, c.depth, self.chains, not self.in_turn, warps, each)

    @property
    def consumers(self) -> int:
        return self.work.consumers // (self.config.blocks if self.in_turn else 1)

    @property
    def box(self) -> int:
        """Tokens of a tile: fewer than eight, or a multiple of eight."""
        return min(self.T, self.config.tokens)

    @property
    def columns(self) -> int:
        """Of the matrix instruction."""
        return -(-self.box // 8) * 8

    @property
    def rows(self) -> int:
        """Of a tile."""
        return UNIT * self.config.units

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.T, self.N, self.box, self.rows, self.sms)

    @property
    def steps(self) -> int:
        """Stages to go through for one tile."""
        return self.K // (COLUMNS * self.config.depth)

    @property
    def result_bytes(self) -> int:
        """Of shared memory, where results are put together."""
        if self.in_turn:
            return 2 * self.rows * self.columns
        return 4 * self.chains * self.columns * (self.rows + PAD)

    @property
    def most_stages(self) -> int:
        """That shared memory has room for."""
        table = registers.PAIRS * 128 if self.format.table else 0
        weights, tokens = self.config.units * self.format.words * 4, self.columns * COLUMNS * 2
        left = SHARED_BYTES - table - self.result_bytes
        return left // (self.config.depth * (weights + tokens))

    @property
    def stages(self) -> int:
        if self.most_stages < 2:
            raise ValueError(f"{self.config}: shared memory has no room for two stages")
        return min(self.config.stages, self.most_stages, max(2, self.steps), 32)


def default_config(T: int, N: int, K: int, form: Format, sms: int) -> Config:
    """By what was measured on an H100. Units are as many as keep copies at multiples of 128 bytes,
    and stages as deep as leave room for two."""
    chains, units = chains_of(N, K), N // UNIT
    if T <= 16 or (T <= 32 and chains > 1):
        for depth in (8, 4, 2, 1) if chains > 1 else (4, 2, 1):
            if depth % chains or K % (depth * COLUMNS):
                continue
            aligned = 4 // math.gcd(4, depth)
            most = 16 // chains if form.bits == 4 or chains > 1 else 8
            each = -(-min(most, -(-units // sms)) // aligned) * aligned
            config = Config("warp", each, 32, depth, 2 if chains == 1 and each % 2 == 0 else 1)
            if Shape(max(8, T), N, K, form, jnp.dtype(DTYPE), config, sms, True).most_stages >= 2:
                return config
    if T <= 64 or (chains > 1 and T <= 128):
        group = Config(
            "group", min(16 // chains, units // 4 * 4), 64 if chains == 1 else 32, chains
        )
        if chains == 1 or units // group.units * -(-T // group.tokens) <= sms:
            return group  # all of it at once; else it pays to go through fewer, larger tiles
    most = 4 if chains > 1 and T <= 256 else 8 if chains > 1 or T <= 1024 else 12
    return Config("tile", min(most, units // 4 * 4), 128)


@partial(jax.jit, static_argnames=("config", "sms", "on_gpu"))
def matmul(
    x: jax.Array,
    packed: PackedMatrix,
    *,
    config: Config | None = None,
    sms: int | None = None,
    on_gpu: bool = True,
) -> jax.Array:
    """x [T, K] · packed [N, K] → [T, N] in x's dtype."""
    T, K = x.shape
    N, _ = packed.shape
    sms = sms or FEWEST_SMS
    config = config or default_config(T, N, K, packed.format, sms)
    if not on_gpu:  # plain products want host threads, of which consumers block one each
        config = Config("tile", 4, config.tokens)
    # Copies bring eight rows at a time, or the few that there are, of which four chunks are aligned
    if T % 8 and (T > 8 or config.depth % 4):
        x = jnp.pad(x, ((0, -T % 8), (0, 0)))
    s = Shape(x.shape[0], N, K, packed.format, x.dtype, config, sms if on_gpu else 1, on_gpu)
    inputs = [x, packed.words, packed.row_scale]
    if s.format.table and on_gpu:
        inputs.append(registers.table_pairs(s.format))
    return _kernel(s)(*inputs)[:T]


def _kernel(s: Shape) -> Any:
    stages, w, consumers = s.stages, s.work, s.consumers
    scratch: dict[str, Any] = {
        "words": plgpu.SMEM((stages, w.units, w.depth, *s.format.tile), jnp.int32),
        "tokens": plgpu.SMEM(
            (stages, s.box, w.depth * COLUMNS),
            s.dtype,
            transforms=(Tile((min(8, s.box), 64)), Swizzle(128)),
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    }
    if s.in_turn or not s.on_gpu:
        blocks = s.rows // BLOCK
        # The same bytes as what is written transposed, and as what is copied.
        scratch["staging"] = plgpu.RefUnion(
            plgpu.SMEM((blocks, s.columns, BLOCK), s.dtype, transforms=BITS16),
            [plgpu.SMEM((s.columns, BLOCK), s.dtype, transforms=(Swizzle(128),))] * blocks,
        )
    else:
        scratch["partial"] = plgpu.SMEM((s.result_bytes // 4,), jnp.float32)
        scratch["met"] = plgpu.Barrier(num_arrivals=consumers, num_barriers=2)
    if s.format.table and s.on_gpu:
        scratch["table"] = plgpu.SMEM((registers.PAIRS, 32), jnp.int32)
        scratch["table_full"] = plgpu.Barrier(num_arrivals=1)

    def body(*refs: Any, **scoped: Any) -> None:
        names = ["x", "packed", "row_scale"]
        names += ["pairs"] if s.format.table and s.on_gpu else []
        r = Refs(dict(zip([*names, "out"], refs, strict=True)) | scoped)
        share_work(consumers, partial(_produce, s, r), partial(_consume, s, r))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((s.T, s.N), s.dtype),
        scratch_types=scratch,
        grid=(s.tiles.blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="quant_matmul",
    )


def _produce(s: Shape, r: Refs) -> None:
    depth = s.config.depth
    of_chain = s.steps // s.chains  # stages, when chains come one after the other

    def item(row: Any, token: Any, done: Any) -> None:
        unit = lax.div(row, jnp.int32(UNIT))

        def copy(step: Any, slot: Any, full: Any) -> None:
            if s.in_turn and s.chains > 1:
                chain = lax.div(step, jnp.int32(of_chain))
                step = (step - chain * of_chain) * s.chains + chain
            units, chunks = pl.ds(unit, s.config.units), pl.ds(step * depth, depth)
            plgpu.copy_gmem_to_smem(r.packed.at[units, chunks], r.words.at[slot], full)
            columns = pl.ds(step * depth * COLUMNS, depth * COLUMNS)
            plgpu.copy_gmem_to_smem(r.x.at[pl.ds(token, s.box), columns], r.tokens.at[slot], full)

        fill(s, r, done, s.steps, copy)

    drain(s, r, persistent(s.tiles, s.steps, item))


def _consume(s: Shape, r: Refs, worker: Any) -> None:
    if s.format.table and s.on_gpu:

        @pl.when(worker == 0)
        def _prepare() -> None:
            registers.store_table(r.pairs, r.table)
            plgpu.barrier_arrive(r.table_full)

        plgpu.barrier_wait(r.table_full)

    def item(row: Any, token: Any, done: Any) -> None:
        if not s.on_gpu:
            _finish(s, r, worker, row, token, _plainly(s, r, done))
        elif s.in_turn:
            _finish(s, r, worker, row, token, _chains_in_turn(s, r, worker, done))
        else:
            by_warp = s.config.way == "warp"
            _finish_partial(s, r, row, token, (_by_warps if by_warp else _by_groups)(s, r, done))

    persistent(s.tiles, s.steps, item)
    if s.in_turn or not s.on_gpu:
        plgpu.wait_smem_to_gmem(0)


def _zeros(s: Shape) -> Any:
    return plgpu.layout_cast(jnp.zeros((BLOCK, s.columns), jnp.float32), WGMMA)


def _by_warps(s: Shape, r: Refs, done: Any) -> list[Any]:
    """Sums of a warpgroup's warps, each of its own rows: for each unit float32 [64, columns]."""

    def add(step: Any, accs: Any) -> Any:
        slot = slot_of(s, done + step)
        plgpu.barrier_wait(r.full.at[slot])
        accs = registers.add_products(s.work, accs, r.words.at[slot], r.tokens.at[slot], r.table)
        plgpu.barrier_arrive(r.free.at[slot])
        return accs

    return lax.fori_loop(0, s.steps, add, [_zeros(s)] * s.config.blocks)


def _by_groups(s: Shape, r: Refs, done: Any) -> list[Any]:
    """A warpgroup's sums of one chain, float32 [64, columns]."""
    w = s.work
    chain = lax.div(lax.axis_index("warpgroup"), jnp.int32(w.places))

    def multiply(acc: Any) -> list[Any]:
        def operands(slot: Any) -> Any:
            for turn, part in np.ndindex(w.turns, PARTS):
                at = turn * w.chains * COLUMNS + part * 64
                if w.chains > 1:
                    at = pl.multiple_of(at + chain * COLUMNS, 64)
                load = partial(registers.weights, w, r.words.at[slot], turn, part, r.table)
                yield acc, load, r.tokens.at[slot].at[:, pl.ds(at, 64)]

        run_wgmma(s, r, done, s.steps, operands)
        return [acc[...]]

    return pl.run_scoped(multiply, ACC((BLOCK, s.columns), jnp.float32))


def _chains_in_turn(s: Shape, r: Refs, worker: Any, done: Any) -> list[Any]:
    """Of a warpgroup's blocks, float32 [64, columns] each."""
    blocks = s.config.blocks
    steps = s.steps // s.chains

    w = Work(s.format, 4, 1, 1, False, False)  # what each block of 64 rows is by itself

    def chain(first: Any) -> list[Any]:
        def multiply(*accs: Any) -> list[Any]:
            def operands(slot: Any) -> Any:
                for part in range(PARTS):
                    for block, acc in enumerate(accs):
                        units = r.words.at[slot, pl.ds((worker * blocks + block) * 4, 4)]
                        load = partial(registers.weights, w, units, 0, part, r.table)
                        yield acc, load, r.tokens.at[slot].at[:, pl.ds(part * 64, 64)]

            run_wgmma(s, r, first, steps, operands)
            return [acc[...] for acc in accs]

        return pl.run_scoped(multiply, *[ACC((BLOCK, s.columns), jnp.float32)] * blocks)

    if s.chains == 1:
        return chain(done)

    def add(i: Any, totals: Any) -> Any:
        return [a + b for a, b in zip(totals, chain(done + i * steps), strict=True)]

    return lax.fori_loop(0, s.chains, add, [_zeros(s)] * blocks)


def _plainly(s: Shape, r: Refs, done: Any) -> list[Any]:
    """What the others do, for the interpreter: blocks of 64 rows, float32 [64, columns] each."""
    blocks = s.rows // BLOCK

    def add(step: Any, totals: Any) -> Any:
        slot = slot_of(s, done + step)
        plgpu.barrier_wait(r.full.at[slot])
        w = unpack_chunks(r.words[slot], s.format)
        sums = jnp.dot(w, r.tokens[slot].T, preferred_element_type=jnp.float32)
        plgpu.barrier_arrive(r.free.at[slot])
        return [t + sums[i * BLOCK : (i + 1) * BLOCK] for i, t in enumerate(totals)]

    return lax.fori_loop(0, s.steps, add, [jnp.zeros((BLOCK, s.columns), jnp.float32)] * blocks)


def _finish(s: Shape, r: Refs, worker: Any, row: Any, token: Any, sums: list[Any]) -> None:
    """Scales rows and copies them out, transposed."""
    matrices, boxes = r.staging
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for block, acc in enumerate(sums):
        index = worker * len(sums) + block
        scale = plgpu.load(
            r.row_scale.at[pl.ds(row + index * BLOCK, BLOCK)], layout=ROW, optimized=False
        )
        scale = lax.broadcast_in_dim(scale, acc.shape, (0,))
        if s.on_gpu:
            scale = plgpu.layout_cast(scale, WGMMA)
        made = (acc * scale).astype(s.dtype)
        store_transposed(s, made, matrices.at[index], boxes[block])
    plgpu.commit_smem()
    for index in range(s.rows // BLOCK):
        owner = index // len(sums)
        pl.when(worker == owner)(partial(_copy_out, s, r, row, token, index))


def _copy_out(s: Shape, r: Refs, row: Any, token: Any, index: int) -> None:
    rows = pl.ds(row + index * BLOCK, BLOCK)
    plgpu.copy_smem_to_gmem(r.staging[1][index], r.out.at[pl.ds(token, s.box), rows])


def _finish_partial(s: Shape, r: Refs, row: Any, token: Any, sums: list[Any]) -> None:
    """Puts together what the workers summed, each a part of the rows or of K."""

    def meet(i: int) -> None:
        plgpu.barrier_arrive(r.met.at[i])
        plgpu.barrier_wait(r.met.at[i])

    for which, acc in enumerate(sums):
        registers.store_partial(s.work, acc, r.partial, which)
    meet(0)
    rows = pl.ds(row, s.rows)
    out = r.out.at[pl.ds(token, s.box), rows]
    registers.store_sums(s.work, r.partial, r.row_scale.at[rows], out, s.columns)
    meet(1)
