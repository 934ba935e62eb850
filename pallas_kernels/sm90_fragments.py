"""Quantised tiles straight into the registers that wgmma reads, below what Pallas can say.

wgmma takes its first operand from registers, 16 rows to a warp, so that 8-bit keys and values need
no copy of themselves in shared memory: `ldmatrix` brings them, and two or three instructions widen
two of them. They come in another order than a plain copy would have, and it is left at that:

- Of 16 columns of keys a lane holds four neighbours, of which the first and third belong to the
  first eight columns of the operand. `permuted` puts the columns of q in the same order.
- Of 16 rows of transposed values (the head dim) a lane holds two neighbours as rows i and i + 8.
  `turned` says where they belong when results leave.

Each function has a plain counterpart for the interpreter (`Shape.on_gpu`), without reordering.

Letters: D head dim, N query rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.sm90_ir import (
    Fragments,
    add,
    bits_and,
    const,
    div,
    element,
    inline_mgpu,
    lane_and_warp,
    load_matrices,
    mul,
    shared_address,
    tree,
    vector_of,
    xor,
)
from pallas_kernels.sm90_shapes import (
    COLUMN,
    SUMS,
    TURNED,
    WGMMA,
    Shape,
    bytes_of,
    widened_by,
)
from pallas_kernels.sm90_tiles import store_columns


def permuted(q: jax.Array) -> jax.Array:
    """q [..., D] with columns in the order in which `keys` has them."""
    groups = q.reshape(*q.shape[:-1], -1, 4, 2, 2)
    return jnp.moveaxis(groups, -1, -3).reshape(q.shape)


def keys(s: Shape, tile: Any, part: int) -> Any:
    """64 columns of a tile of keys, [tile, 64], in the 16-bit type of the queries."""
    if not s.on_gpu:
        return _widened(s, tile[...])[:, part * 64 : (part + 1) * 64]

    @_inlined(s, (s.tile, 64))
    def load(ctx: Any, tile: Any) -> Any:
        registers = np.empty((s.tile // 64, 8, 2), object)  # [.., columns / 8, row / 8 of 16]
        lane, warp = lane_and_warp()
        # Matrices 0, 1 of a load are rows 0 and 8 on; 2, 3 are the same of 16 columns further.
        row = add(mul(warp, 16), mul(bits_and(div(lane, 8), 1), 8))
        start = _address(s, tile, row, lane, div(lane, 16))
        for block, step in np.ndindex(s.tile // 64, 2):
            at = _moved(s, start, rows=block * 64, chunk=part * 4 + step * 2)
            for i, word in enumerate(load_matrices(at, transposed=False)):
                chunk = step * 2 + i // 2
                low, high = _widen(s, word)
                registers[block, 2 * chunk, i % 2] = low
                registers[block, 2 * chunk + 1, i % 2] = high
        return _wgmma_operand(registers, (s.tile, 64))

    return load(tile)


def values(s: Shape, tile: Any, half: int) -> Any:
    """64 rows of a tile of values, transposed to [D, 64], in the 16-bit type of the queries."""
    if not s.on_gpu:
        return _widened(s, tile[...])[half * 64 : (half + 1) * 64].T

    @_inlined(s, (s.D, 64))
    def load(ctx: Any, tile: Any) -> Any:
        registers = np.empty((s.D // 64, 8, 2), object)  # [.., tokens / 8, column % 2]
        lane, warp = lane_and_warp()
        start = _address(s, tile, mul(div(lane, 8), 8), lane, warp)
        for block, step in np.ndindex(s.D // 64, 2):
            at = _moved(s, start, rows=half * 64 + step * 32, chunk=block * 4)
            for i, word in enumerate(load_matrices(at, transposed=True)):
                registers[block, step * 4 + i, :] = _widen(s, word)
        return _wgmma_operand(registers, (s.D, 64))

    return load(tile)


def column_max(s: Shape, x: Any, exchange: Any) -> Any:
    """Largest of each column of x [tile, N] of this warpgroup; `exchange` as `_reduce`."""
    if not s.on_gpu:
        return x.max(axis=0)
    return _reduce(s, x, exchange, WGMMA, arith.maximumf, reused=False)


def column_sum(s: Shape, x: Any, exchange: Any) -> Any:
    """Sums of the columns of what `add_rows` made."""
    if not s.on_gpu:
        return x.sum(axis=0)
    return _reduce(s, x, exchange, SUMS, arith.addf, reused=True)


def add_rows(s: Shape, sums: Any, fade: Any, x: Any) -> Any:
    """sums [32, N] · fade [N] + x [tile, N], the rows of x that a lane holds added up."""
    if not s.on_gpu:
        return sums * fade + x.reshape(-1, 32, s.rows).sum(axis=0)

    @inline_mgpu(
        arg_types=(SUMS, COLUMN, WGMMA),
        return_type=plgpu.ShapeDtypeStruct((32, s.rows), jnp.float32, SUMS),
    )
    def add_up(ctx: Any, sums: Any, fade: Any, x: Any) -> Any:
        before, factors = sums.registers.reshape(-1), fade.registers.reshape(-1)
        added = []
        for rows, old, factor in zip(_rows_of_columns(x), before, factors, strict=True):
            added.append(arith.addf(arith.mulf(old, factor), tree(arith.addf, rows)))
        made = np.array(added, object).reshape(sums.registers.shape)
        return Fragments(_registers=made, _layout=sums.layout, _is_signed=None)

    return add_up(sums, fade, x)


def turned(s: Shape, x: Any) -> Any:
    """float32 [D, N], rows as wgmma has them after `values`, as [N, D]."""
    if not s.on_gpu:
        return x.T

    @inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((s.rows, s.D), jnp.float32, TURNED),
    )
    def turn(ctx: Any, x: Any) -> Any:
        before = x.registers.reshape(s.D // 64, s.rows // 8, 2)
        after = np.empty((s.rows // 8, s.D // 64, 2), object)
        for block, octet, row in np.ndindex(s.D // 64, s.rows // 8, 2):
            pair = [element(before[block, octet, odd], row) for odd in (0, 1)]
            after[octet, block, row] = vector_of(pair)
        layout = TURNED.to_mgpu()
        after = after.reshape(layout.registers_shape((s.rows, s.D)))
        return Fragments(_registers=after, _layout=layout, _is_signed=None)

    return turn(x)


def store_weights(s: Shape, weights: Any, into: Any) -> None:
    """weights [tile, N] transposed to [N, tile] in shared memory, for wgmma to read."""
    if not s.on_gpu:
        into[...] = weights.T
        return

    store_columns(weights, into)


# -- what they are made of -----------------------------------------------------------------------


def _widened(s: Shape, x: Any) -> Any:
    """As `_widen`, of arrays."""
    if s.kv_dtype == jnp.int8:
        return x.astype(s.dtype) * jnp.asarray(widened_by(s), s.dtype)
    return jnp.nan_to_num(x.astype(jnp.float16), nan=480.0).astype(s.dtype)


def _inlined(s: Shape, shape: tuple[int, int]) -> Any:
    """A function of a tile of bytes that gives an operand of wgmma."""
    return inline_mgpu(
        arg_types=(plgpu.RefType(bytes_of(s.D)),),
        return_type=plgpu.ShapeDtypeStruct(shape, s.dtype, WGMMA),
    )


def _wgmma_operand(registers: Any, shape: tuple[int, int]) -> Any:
    """[rows / 64, columns / 8, 2] registers of two 16-bit values each."""
    layout = WGMMA.to_mgpu()
    registers = registers.reshape(layout.registers_shape(shape))
    return Fragments(_registers=registers, _layout=layout, _is_signed=None)


def _address(s: Shape, tile: Any, row: Any, lane: Any, chunk: Any) -> Any:
    """Of 16 bytes, number `chunk`, of row `row + lane % 8` of a swizzled tile."""
    width = min(s.D, 128)
    line = bits_and(lane, 7)
    swizzle = line if width == 128 else div(line, 2)
    inside = add(mul(line, width), mul(xor(chunk, swizzle), 16))
    return add(add(shared_address(tile), mul(row, s.D)), inside)


def _moved(s: Shape, address: Any, rows: int, chunk: int) -> Any:
    """The address so many rows (of 8) and chunks further; the bits of `chunk` are not in use."""
    width = min(s.D, 128)
    across, inside = divmod(chunk * 16, width)
    return add(xor(address, inside), rows * s.D + across * 8 * width)


def _widen(s: Shape, word: Any) -> tuple[Any, Any]:
    """Bytes 0, 2 and bytes 1, 3 of a word as 16-bit numbers, times `widened_by`.

    The bits of a byte, put in the right place of a 16-bit number, are the value times a power of
    two: a small one, subnormal or nearly so, that one multiplication undoes. NaN becomes 480.
    """
    bf16 = s.dtype == jnp.bfloat16
    name = "bf16x2" if bf16 else "f16x2"
    i32 = ir.IntegerType.get_signless(32)
    if s.kv_dtype == jnp.int8:  # as unsigned: 128 more, an integer number of the smallest step
        word = xor(word, 0x80808080)
        high = utils.inline_ptx("prmt.b32 $0, $1, 0, 0x4341;", word, result_types=i32)
        pairs = (bits_and(word, 0x00FF00FF), high)
        numbers = (0x7F007F00, 0xC000C000) if bf16 else (0x78007800, 0xB400B400)
        ptx = f"fma.rn.{name} $0, $1, $2, $3;"
    else:
        shift, mask = (4, 0x07F007F0) if bf16 else (1, 0x3F803F80)
        pairs = tuple(
            arith.ori(bits_and(x, 0x80008000), bits_and(arith.shrui(x, const(shift)), mask))
            for x in (arith.shli(word, const(8)), word)
        )
        numbers = (0x7B807B80,) if bf16 else (0x5C005C00,)
        ptx = f"mul.rn.{name} $0, $1, $2;"
    kind = ir.VectorType.get((2,), utils.dtype_to_ir_type(s.dtype))
    low, high = (
        utils.bitcast(utils.inline_ptx(ptx, x, *map(const, numbers), result_types=i32), kind)
        for x in pairs
    )
    return low, high


def _rows_of_columns(x: Any) -> list[list[Any]]:
    """For each eight columns the registers of a lane, in the order of their rows."""
    blocks, octets = x.registers.shape[:2]
    return [
        list(c)
        for c in np.moveaxis(x.registers.reshape(blocks, octets, -1), 1, 0).reshape(octets, -1)
    ]


def _reduce(s: Shape, x: Any, exchange: Any, layout: Any, op: Any, *, reused: bool) -> Any:
    """Reduces columns within the lane, the warp, then through `exchange` [N, 4].

    Who comes next may write there at once where it is `reused`; else a barrier must lie between.
    """
    result = plgpu.ShapeDtypeStruct((s.rows,), jnp.float32, COLUMN)

    @inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=result)
    def reduce(ctx: Any, x: Any, exchange: Any) -> Any:
        f32, shared = ir.F32Type.get(), llvm.PointerType.get(address_space=3)
        lane, warp = lane_and_warp()
        of_lane = add(shared_address(exchange), mul(bits_and(lane, 3), 32))
        of_warp = add(of_lane, mul(warp, 4))

        def pointer(base: Any, octet: int, column: int) -> Any:
            return llvm.inttoptr(shared, add(base, octet * 128 + column * 16))

        columns = _rows_of_columns(x)
        for octet, rows in enumerate(columns):
            both = tree(op, rows)
            for column in (0, 1):
                value = element(both, column)
                for distance in (4, 8, 16):
                    value = op(value, utils.shfl_bfly(value, distance))
                llvm.store(value, pointer(of_warp, octet, column))
        utils.warpgroup_barrier()
        registers = []
        for octet in range(len(columns)):
            pair = []
            for column in (0, 1):
                quad = llvm.load(ir.VectorType.get((4,), f32), pointer(of_lane, octet, column))
                pair.append(tree(op, [element(quad, i) for i in range(4)]))
            registers.append(vector_of(pair))
        if reused:
            utils.warpgroup_barrier()
        made = COLUMN.to_mgpu()
        registers = np.array(registers, object).reshape(made.registers_shape((s.rows,)))
        return Fragments(_registers=registers, _layout=made, _is_signed=None)

    return reduce(x, exchange)
