"""Packed weights times 16-bit activations for Ampere: cp.async copies and the warp's `mma`.

A block is one warpgroup: 64 rows of the matrix, 16 to a warp, times up to 32 tokens. Every row is
summed over all of K in order by one accumulator: a token's bits depend on that token alone.

Letters: T tokens, N rows of the matrix (out), K its columns (in).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir

from pallas_kernels import weight_registers as registers
from pallas_kernels.quant_packing import BLOCK, COLUMNS, UNIT, Format, PackedMatrix, unpack_chunks
from pallas_kernels.sm90_ir import add, const, inline_mgpu, lane_and_warp, mul, shared_address
from pallas_kernels.sm90_shapes import WGMMA, Refs, Swizzle, Tile
from pallas_kernels.weight_registers import PAD, Work

TOKENS = 32  # of a tile
STAGES = 3
UNITS = BLOCK // UNIT


@dataclass(frozen=True)
class Shape:
    """Everything static that the kernel is specialised to.

    Attributes:
        T: tokens, a multiple of those of a tile, of which cp.async wants four times eight.
        arch: "sm80" copies with cp.async; "sm90" with TMA, which Hopper insists on.
        on_gpu: False runs what the interpreter can.
    """

    T: int
    N: int
    K: int
    format: Format
    dtype: Any
    arch: Literal["sm80", "sm90"]
    on_gpu: bool

    @property
    def work(self) -> Work:
        return Work(self.format, UNITS, 1, 1, False, True)


@partial(jax.jit, static_argnames=("arch", "on_gpu"))
def matmul(
    x: jax.Array,
    packed: PackedMatrix,
    *,
    arch: Literal["sm80", "sm90"] = "sm80",
    on_gpu: bool = True,
) -> jax.Array:
    """x [T, K] · packed [N, K] → [T, N] in x's dtype."""
    T, K = x.shape
    x = jnp.pad(x, ((0, -T % TOKENS), (0, 0)))
    s = Shape(x.shape[0], packed.shape[0], K, packed.format, x.dtype, arch, on_gpu)
    inputs = [x, packed.words, packed.row_scale]
    if s.format.table and on_gpu:
        inputs.append(registers.table_pairs(s.format))
    return _kernel(s)(*inputs)[:T]


def _kernel(s: Shape) -> Any:
    scratch: dict[str, Any] = {
        "words": plgpu.SMEM((STAGES, UNITS, 1, *s.format.tile), jnp.int32),
        "tokens": plgpu.SMEM(
            (STAGES, TOKENS, COLUMNS), s.dtype, transforms=(Tile((8, 64)), Swizzle(128))
        ),
        "partial": plgpu.SMEM((TOKENS * (BLOCK + PAD),), jnp.float32),
    }
    if s.arch == "sm90":
        scratch["full"] = plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)
    names = ["x", "packed", "row_scale"]
    if s.format.table and s.on_gpu:
        names.append("pairs")
        scratch["table"] = plgpu.SMEM((registers.PAIRS, 32), jnp.int32)

    def body(*refs: Any, **scoped: Any) -> None:
        r = Refs(dict(zip([*names, "out"], refs, strict=True)) | scoped)
        _multiply(s, r)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((s.T, s.N), s.dtype),
        scratch_types=scratch,
        grid=(s.N // BLOCK, s.T // TOKENS),
        grid_names=("rows", "tokens"),
        kernel_name="quant_matmul",
    )


def _multiply(s: Shape, r: Refs) -> None:
    chunks = s.K // COLUMNS
    unit, token = lax.axis_index("rows") * UNITS, lax.axis_index("tokens") * TOKENS
    if s.format.table and s.on_gpu:
        registers.store_table(r.pairs, r.table)
        _meet(s)

    def copy(chunk: Any) -> None:
        """The last ones are copied again, into stages that nobody reads: there is always one."""
        slot = lax.rem(chunk, jnp.int32(STAGES))
        chunk = lax.min(chunk, jnp.int32(chunks - 1))
        words = r.packed.at[pl.ds(unit, UNITS), pl.ds(chunk, 1)]
        tokens = r.x.at[pl.ds(token, TOKENS), pl.ds(chunk * COLUMNS, COLUMNS)]
        if s.arch == "sm90":
            plgpu.copy_gmem_to_smem(words, r.words.at[slot], r.full.at[slot])
            plgpu.copy_gmem_to_smem(tokens, r.tokens.at[slot], r.full.at[slot])
            return
        in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        if s.on_gpu:
            _start_copy(s, words, r.words.at[slot])  # waited for with the next one
        else:
            plgpu.copy_gmem_to_smem(words, r.words.at[slot], oob_mode=in_bounds)
        plgpu.copy_gmem_to_smem(tokens, r.tokens.at[slot], oob_mode=in_bounds)

    def await_copy(chunk: Any) -> Any:
        slot = lax.rem(chunk, jnp.int32(STAGES))
        if s.arch == "sm80":
            plgpu.wait_gmem_to_smem(STAGES - 2)
        else:
            plgpu.barrier_wait(r.full.at[slot])
        return slot

    def add(chunk: Any, acc: Any) -> Any:
        slot = await_copy(chunk)
        _meet(s)  # all have read what is written over now
        copy(chunk + STAGES - 1)
        if s.on_gpu:
            words, tokens = r.words.at[slot], r.tokens.at[slot]
            return registers.add_products(s.work, [acc], words, tokens, r.table)[0]
        w = unpack_chunks(r.words[slot], s.format)
        return acc + jnp.dot(w, r.tokens[slot].T, preferred_element_type=jnp.float32)

    for chunk in range(STAGES - 1):
        copy(jnp.int32(chunk))
    acc = jnp.zeros((BLOCK, TOKENS), jnp.float32)
    if s.on_gpu:
        acc = plgpu.layout_cast(acc, WGMMA)
    acc = lax.fori_loop(0, chunks, add, acc)
    for i in range(STAGES - 1):
        await_copy(jnp.int32(chunks + i))

    rows = pl.ds(unit * UNIT, BLOCK)
    out = r.out.at[pl.ds(token, TOKENS), rows]
    if not s.on_gpu:
        scale = lax.broadcast_in_dim(r.row_scale[rows], acc.shape, (0,))
        out[...] = (acc * scale).astype(s.dtype).T
        return
    registers.store_partial(s.work, acc, r.partial)
    _meet(s)
    registers.store_sums(s.work, r.partial, r.row_scale.at[rows], out, TOKENS)


def _start_copy(s: Shape, source: Any, to: Any) -> None:
    """Each warp asks for its own unit's chunk, 16 bytes a lane: cp.async of Pallas wants more."""

    @inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def start(ctx: Any, source: Any, to: Any) -> None:
        lane, warp = lane_and_warp()
        strides, _ = ir.MemRefType(source.type).get_strides_and_offset()
        size = 4 * s.format.words
        first = mul(lane, 16)
        start = utils.memref_ptr(source)
        i8 = ir.IntegerType.get_signless(8)
        for offset in range(0, size, 32 * 16):
            at = add(first, offset)
            of_unit = add(mul(warp, 4 * strides[0]), at)
            utils.inline_ptx(
                "{ .reg .pred p; setp.lt.u32 p, $2, $3;"
                " @p cp.async.cg.shared.global [$0], [$1], 16; }",
                add(add(shared_address(to), mul(warp, size)), at),
                utils.getelementptr(start, [of_unit], i8),
                at,
                const(size),
                has_side_effects=True,
            )

    start(source, to)


def _meet(s: Shape) -> None:
    """The block's warps wait for each other."""
    if not s.on_gpu:
        return

    @inline_mgpu(arg_types=())
    def wait(ctx: Any) -> None:
        utils.warpgroup_barrier()

    wait()
