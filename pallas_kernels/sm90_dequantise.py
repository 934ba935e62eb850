"""Packed weights straight into the registers that wgmma reads, below what Pallas can say.

A thread's codes come in loads of 16 bytes, already in its own order (`quant_packing`). Their bits,
masked out of a word, are those of two tiny bfloat16 numbers, one in each half: of 4 bits in the
lower or the upper half of a byte, so that rows 0 to 7 of sixteen differ from the others by a power
of two. One multiply-add of two numbers at once turns them into weights.

A table of 16 values is looked up two codes at a time, in shared memory: each lane has a copy of all
256 pairs in a bank of its own.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.quant_packing import COLUMNS, ROWS, STEP, WORDS, Format
from pallas_kernels.sm90_ir import (
    Fragments,
    add,
    bits_and,
    const,
    div,
    element,
    inline_mgpu,
    lane_and_warp,
    like,
    mul,
    shared_address,
    vector_of,
    xor,
)
from pallas_kernels.sm90_shapes import WGMMA, Swizzle, Tile

PAIRS = 256  # of two codes of 4 bits
STEPS = 4  # matrix instructions of 64 columns
LINE_BYTES = 4 * WORDS


def weights(form: Format, chunk: Any, part: int, table: Any = None) -> Any:
    """64 columns of a chunk, bfloat16 [64, 64], as an operand of wgmma.

    `chunk`: int32 [lines, 32] in shared memory; `table`: what `store_table` wrote.
    """
    refs = [chunk] if table is None else [chunk, table]

    @inline_mgpu(
        arg_types=(plgpu.RefType(),) * len(refs),
        return_type=plgpu.ShapeDtypeStruct((ROWS, 64), jnp.bfloat16, WGMMA),
    )
    def load(ctx: Any, chunk: Any, *table: Any) -> Any:
        registers = _operand(form, chunk, part, *table)
        layout = WGMMA.to_mgpu()
        registers = registers.reshape(layout.registers_shape((ROWS, 64)))
        return Fragments(_registers=registers, _layout=layout, _is_signed=None)

    return load(*refs)


def add_products(form: Format, acc: Any, chunk: Any, tokens: Any, part: int, table: Any) -> Any:
    """acc [64, columns] + 64 columns of a chunk times those of all of `tokens` [columns, K].

    A warp at a time (`mma`), where wgmma would wait for its own latency; the bits are the same.
    `tokens` may have fewer than eight rows: then the last one stands for those that lack.
    """
    refs = [chunk, tokens] if table is None else [chunk, tokens, table]
    count, K = tokens.shape
    rows = min(8, count)
    kind = plgpu.RefType((Tile((rows, 64)), Swizzle(128)))
    types = (plgpu.RefType(), kind, plgpu.RefType())[: len(refs)]

    @inline_mgpu(
        arg_types=(WGMMA, *types),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, WGMMA),
    )
    def multiply(ctx: Any, acc: Any, chunk: Any, tokens: Any, *table: Any) -> Any:
        weights = _operand(form, chunk, part % (COLUMNS // 64), *table)
        lane, _ = lane_and_warp()
        line = bits_and(lane, 7)
        if rows < 8:
            line = arith.minui(line, const(rows - 1))
        line = add(line, part * rows)
        base = add(shared_address(tokens), mul(line, 128))
        swizzle = bits_and(line, 7)
        at = [add(base, mul(xor(add(div(lane, 8), 4 * i), swizzle), 16)) for i in range(2)]
        sums = acc.registers.reshape(-1, 2)
        made = np.empty_like(sums)
        for octet in range(sums.shape[0]):
            four = [element(x, i) for x in sums[octet] for i in (0, 1)]
            for pair in range(2):
                b = _load_matrices(add(at[pair], octet * K // 64 * 1024))
                for step in (0, 1):
                    a = weights[0, 4 * pair + 2 * step : 4 * pair + 2 * step + 2].reshape(-1)
                    four = _mma(four, a, b[2 * step : 2 * step + 2])
            made[octet] = [vector_of(four[:2]), vector_of(four[2:])]
        return like(acc, made.reshape(acc.registers.shape))

    return multiply(acc, *refs)


def store_table(pairs: Any, into: Any) -> None:
    """Copies pairs, int32 [256] in memory, to shared memory [256, 32], each lane its own."""

    @inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def store(ctx: Any, pairs: Any, into: Any) -> None:
        thread = bits_and(utils.thread_idx(), 127)
        lane, warp = bits_and(thread, 31), div(thread, 32)
        source = utils.memref_ptr(pairs)
        i32 = ir.IntegerType.get_signless(32)
        to = add(add(shared_address(into), mul(lane, 4)), mul(warp, LINE_BYTES))
        for i in range(0, PAIRS, 4):
            at = utils.getelementptr(source, [add(warp, i)], i32)
            llvm.store(llvm.load(i32, at), _pointer(add(to, i * LINE_BYTES)))

    store(pairs, into)


# -- what they are made of -----------------------------------------------------------------------


def _operand(form: Format, chunk: Any, part: int, *table: Any) -> Any:
    """Registers of two weights each: [1, columns / 8, row / 8 of 16]."""
    thread = bits_and(utils.thread_idx(), 127)
    base = shared_address(chunk)
    codes = _load_codes(form, add(base, mul(thread, 16)), part)
    line = add(add(base, form.code_lines * LINE_BYTES), mul(div(thread, 4), 4))
    pairs_at = None
    if table:
        pairs_at = add(shared_address(table[0]), mul(bits_and(thread, 31), 4))
    registers = np.empty((1, 2 * STEPS, 2), object)
    scales: list[list[Any]] = []
    for step in range(STEPS):
        if step % max(1, COLUMNS // form.groups // STEP) == 0:
            group = (part * STEPS + step) * STEP * form.groups // COLUMNS
            scales = _scales(form, line, group)
        for half in (0, 1):
            pairs = _pairs(form, codes[step], half, pairs_at)
            for row in (0, 1):
                registers[0, 2 * step + half, row] = _weight(form, pairs[row], scales[row], row)
    return registers


def _load_matrices(address: Any) -> tuple[Any, ...]:
    """Four 8 x 8 matrices of 16-bit numbers; each lane brings the address of a row of one."""
    i32 = ir.IntegerType.get_signless(32)
    ptx = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    return utils.inline_ptx(
        ptx, address, result_types=[i32] * 4, has_side_effects=True, convergent=True
    )  # type: ignore[return-value]


def _mma(c: list[Any], a: Any, b: Any) -> list[Any]:
    """c + a · b, of 16 rows, 8 columns and 16 between."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    words = [utils.bitcast(x, i32) for x in a]
    ptx = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3},"
        " {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return list(utils.inline_ptx(ptx, *words, *b, *c, result_types=[f32] * 4, convergent=True))


def _pointer(address: Any) -> Any:
    return llvm.inttoptr(llvm.PointerType.get(address_space=3), address)


def _load(address: Any, words: int) -> list[Any]:
    i32 = ir.IntegerType.get_signless(32)
    if words == 1:
        return [llvm.load(i32, _pointer(address), alignment=4)]
    found = llvm.load(ir.VectorType.get((words,), i32), _pointer(address), alignment=4 * words)
    return [element(found, i) for i in range(words)]


def _load_codes(form: Format, address: Any, part: int) -> list[list[Any]]:
    """For each step of 16 columns a word, or with 8 bits one for each half of them."""
    if form.bits == 4:
        return [[word] for word in _load(add(address, part * 2048), 4)]
    found = [_load(add(address, (2 * part + i) * 2048), 4) for i in range(2)]
    return [pair for four in found for pair in (four[:2], four[2:])]


def _ptx(ptx: str, *operands: Any, in_place: bool = False) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx(ptx, *operands, result_types=i32, has_side_effects=in_place)


def _both(word: Any, upper: bool) -> Any:
    """A half of a word, twice."""
    return _ptx(f"prmt.b32 $0, $1, 0, {'0x3232' if upper else '0x1010'};", word)


def _scales(form: Format, line: Any, group: int) -> list[list[Any]]:
    """For each of a thread's two rows: the scale and, where there is one, the offset; twice."""
    at = add(line, group * (form.scale_lines // form.groups) * LINE_BYTES)
    words = _load(at, 1)
    if form.offset != "none":
        words += _load(add(at, LINE_BYTES), 1)
    rows = [[_both(word, bool(row)) for word in words] for row in (0, 1)]
    if form.kind == "int" and form.offset == "none":  # -8 or -128 times the scale, exactly
        upper = 0x0080
        for row, values in enumerate(rows):
            small = 0x0008 if form.bits == 4 and row == 0 else upper
            values.append(
                _ptx("mul.rn.bf16x2 $0, $1, $2;", values[0], const(0x80008000 | small * 0x10001))
            )
    return rows


def _pairs(form: Format, words: list[Any], half: int, pairs_at: Any) -> list[Any]:
    """Of a step's word or words the pairs of neighbours in `half`, of the two rows."""
    if form.kind == "table":
        return [_looked_up(words[0], 2 * half + row, pairs_at) for row in (0, 1)]
    if form.bits == 4:
        word = words[0] if half == 0 else arith.shrui(words[0], const(8))
        return [bits_and(word, 0x000F000F), bits_and(word, 0x00F000F0)]
    word = words[half]
    if form.kind == "float":
        moved = (arith.shli(word, const(8)), word)
        return [
            arith.ori(
                bits_and(x, 0x80008000), bits_and(arith.shrui(x, const(4)), 0x07F007F0)
            )
            for x in moved
        ]
    return [bits_and(word, 0x00FF00FF), _ptx("prmt.b32 $0, $1, 0, 0x4341;", word)]


def _looked_up(word: Any, byte: int, pairs_at: Any) -> Any:
    """The pair of values that a byte stands for: its line is 128 bytes on for each."""
    shift = 8 * byte - 7
    moved = arith.shrui(word, const(shift)) if shift > 0 else arith.shli(word, const(-shift))
    return _load(add(bits_and(moved, 0x7F80), pairs_at), 1)[0]


def _weight(form: Format, pair: Any, scales: list[Any], row: int) -> Any:
    """Two weights. Where it is written it stays: wgmma's operands must be there before its fence."""
    kind = ir.VectorType.get((2,), ir.BF16Type.get())
    if form.offset == "zeros":
        # Two steps, the first exact: bits times 2^127 (2^123 in a byte's upper half), less zeros.
        one = const(0x7F007F00 if form.bits == 8 or row == 0 else 0x7D007D00)
        pair = _ptx("fma.rn.bf16x2 $0, $1, $2, $3;", pair, one, scales[1])
    if form.kind == "int" and form.offset != "zeros":
        made = _ptx("fma.rn.bf16x2 $0, $1, $2, $3;", pair, scales[0], scales[1], in_place=True)
    else:
        made = _ptx("mul.rn.bf16x2 $0, $1, $2;", pair, scales[0], in_place=True)
    return utils.bitcast(made, kind)
