"""Packed weights straight into the registers that wgmma and mma read, below what Pallas can say.

A thread's codes come in loads of 16 bytes, already in its own order (`quant_packing`). Their bits,
masked out of a word, are those of two tiny bfloat16 numbers, one in each half: of 4 bits in the
lower or the upper half of a byte, so that rows 0 to 7 of sixteen differ from the others by a power
of two. One multiply-add of two numbers at once turns them into weights.

A table of 16 values is looked up two codes at a time, in shared memory: each lane has a copy of all
256 pairs in a bank of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial as partial_of
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.quant_packing import BLOCK, COLUMNS, LINE, STEP, UNIT, Format
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
    load_matrices,
    mul,
    shared_address,
    vector_of,
    xor,
)
from pallas_kernels.sm90_shapes import WGMMA, Swizzle, Tile

PAIRS = 256  # of two codes of 4 bits
STEPS = 4  # matrix instructions of 64 columns
PARTS = COLUMNS // 64  # of a chunk: as many columns as a swizzled line has
PAD = 4  # numbers between one token's partial sums and the next: no two lanes share a bank


@dataclass(frozen=True)
class Work:
    """How a stage of a block's weights is shared out.

    A worker is a warp, with 16 rows, or a warpgroup, with 64. It takes the chunks of one chain:
    every `chains`-th.

    Attributes:
        form: of the weights.
        units: of 16 rows.
        depth: chunks of each.
        chains: into which K is split, and that are added up at last.
        spread: workers have a chain each; else every worker has all of them, one after the other.
        by_warp: a worker is a warp.
        each: units of a warp that is a worker.
    """

    form: Format
    units: int
    depth: int
    chains: int
    spread: bool
    by_warp: bool
    each: int = 1

    @property
    def rows(self) -> int:
        return self.units * UNIT

    @property
    def places(self) -> int:
        """Workers beside each other, with the same chain."""
        return self.units // self.each if self.by_warp else self.units * UNIT // BLOCK

    @property
    def workers(self) -> int:
        return self.places * (self.chains if self.spread else 1)

    @property
    def consumers(self) -> int:
        """Warpgroups."""
        return -(-self.workers // 4) if self.by_warp else self.workers

    @property
    def turns(self) -> int:
        """Chunks of a stage that a worker takes."""
        return self.depth // (self.chains if self.spread else 1)


def weights(w: Work, words: Any, turn: int, part: int, table: Any = None) -> Any:
    """64 columns of this warpgroup's chunk, bfloat16 [64, 64], as an operand of wgmma.

    `words`: int32 [units, depth, ...] in shared memory; `table`: what `store_table` wrote.
    """
    refs = [words] if table is None else [words, table]

    @inline_mgpu(
        arg_types=(plgpu.RefType(),) * len(refs),
        return_type=plgpu.ShapeDtypeStruct((BLOCK, 64), jnp.bfloat16, WGMMA),
    )
    def load(ctx: Any, words: Any, *table: Any) -> Any:
        unit, chain = _place(w)
        registers = _operand(w.form, _chunk(w, words, unit, chain, turn), part, *table)
        layout = WGMMA.to_mgpu()
        registers = registers.reshape(layout.registers_shape((BLOCK, 64)))
        return Fragments(_registers=registers, _layout=layout, _is_signed=None)

    return load(*refs)


def add_products(w: Work, accs: list[Any], words: Any, tokens: Any, table: Any = None) -> Any:
    """Each of accs [64, columns] + a unit of each warp's part of a stage times tokens [columns, K].

    A warp multiplies by itself (`mma`), where wgmma would wait for its own latency; bits are the
    same. `tokens` may have fewer than eight rows: then the last one stands for those that lack.
    """
    refs = [words, tokens] if table is None else [words, tokens, table]
    count, K = tokens.shape
    rows = min(8, count)
    kind = plgpu.RefType((Tile((rows, 64)), Swizzle(128)))
    types = (plgpu.RefType(), kind, plgpu.RefType())[: len(refs)]
    made_type = plgpu.ShapeDtypeStruct(accs[0].shape, jnp.float32, WGMMA)

    @inline_mgpu(arg_types=([WGMMA] * len(accs), *types), return_type=[made_type] * len(accs))
    def multiply(ctx: Any, accs: Any, words: Any, tokens: Any, *table: Any) -> Any:
        unit, chain = _place(w)
        lane, _ = lane_and_warp()
        start, half = shared_address(tokens), div(lane, 8)

        def all_turns() -> list[Any]:
            sums = [list(acc.registers.flat) for acc in accs]
            for turn, part in np.ndindex(w.turns, PARTS):
                operands = [
                    _operand(w.form, _chunk(w, words, add(unit, e), chain, turn), part, *table)
                    for e in range(w.each)
                ]
                line = bits_and(lane, 7)
                line = line if rows == 8 else arith.minui(line, const(rows - 1))
                first = mul(_number(w, chain, turn), PARTS * rows)
                line = add(line, add(first, part * rows))
                base = add(start, mul(line, 128))
                swizzle = bits_and(line, 7)
                at = [add(base, mul(xor(add(half, 4 * i), swizzle), 16)) for i in range(2)]
                for octet, pair in np.ndindex(len(sums[0]) // 2, 2):
                    b = load_matrices(add(at[pair], octet * (K // 64) * 1024))
                    mine = slice(2 * octet, 2 * octet + 2)
                    for own, operand in zip(sums, operands, strict=True):
                        own[mine] = _two_steps(own[mine], operand[0, 4 * pair : 4 * pair + 4], b)
            return [x for own in sums for x in own]

        made = _if(_works(w), all_turns, [x for acc in accs for x in acc.registers.flat])
        made = np.array(made, object).reshape(len(accs), *accs[0].registers.shape)
        return [like(acc, registers) for acc, registers in zip(accs, made, strict=True)]

    return multiply(accs, *refs)


def _two_steps(sums: list[Any], weights: Any, b: Any) -> list[Any]:
    """The sums of eight tokens after 32 columns more."""
    four = [element(x, i) for x in sums for i in (0, 1)]
    for step in (0, 1):
        a = weights[2 * step : 2 * step + 2].reshape(-1)
        four = _mma(four, a, b[2 * step : 2 * step + 2])
    return [vector_of(four[:2]), vector_of(four[2:])]


def store_partial(w: Work, acc: Any, into: Any, which: int = 0) -> None:
    """Puts a worker's sums, acc [64, columns], into float32 [chains · columns · (rows + PAD)].

    `which`: of a warp's units.
    """
    columns = acc.shape[1]

    @inline_mgpu(arg_types=(WGMMA, plgpu.RefType()))
    def store(ctx: Any, acc: Any, into: Any) -> None:
        unit, chain = _place(w)
        lane, _ = lane_and_warp()
        row = add(mul(add(unit, which), UNIT), div(lane, 4))
        column = add(mul(chain, columns), mul(bits_and(lane, 3), 2))
        at = add(shared_address(into), mul(add(mul(column, w.rows + PAD), row), 4))

        def all_sums() -> list[Any]:
            for (octet, half), x in np.ndenumerate(acc.registers.reshape(-1, 2)):
                for odd in (0, 1):
                    moved = (8 * octet + odd) * (w.rows + PAD) + 8 * half
                    llvm.store(element(x, odd), _pointer(add(at, 4 * moved)))
            return []

        _if(_works(w), all_sums, [])

    store(acc, into)


def store_sums(w: Work, partial: Any, row_scale: Any, out: Any, columns: int) -> None:
    """Adds up the chains that `store_partial` left, in order, and writes out [tokens, rows]."""
    count = out.shape[0]
    threads = 128 * w.consumers
    pairs = w.rows // 2

    @inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def store(ctx: Any, partial: Any, row_scale: Any, out: Any) -> None:
        f32 = ir.F32Type.get()
        two, two16 = (ir.VectorType.get((2,), t) for t in (f32, ir.BF16Type.get()))
        strides, _ = ir.MemRefType(out.type).get_strides_and_offset()
        start, scale_at, out_at = shared_address(partial), *map(utils.memref_ptr, (row_scale, out))

        def one(index: Any) -> list[Any]:
            token, pair = arith.divui(index, const(pairs)), arith.remui(index, const(pairs))
            row = mul(pair, 2)
            at = add(start, mul(add(mul(token, w.rows + PAD), row), 4))
            step = 4 * columns * (w.rows + PAD)
            parts = [llvm.load(two, _pointer(add(at, i * step))) for i in range(w.chains)]
            total = parts[0]
            if w.chains > 1:  # zeros first, as where one accumulator follows another
                total = arith.addf(vector_of([arith.constant(f32, 0.0)] * 2), total)
                for part in parts[1:]:
                    total = arith.addf(total, part)
            scale = llvm.load(two, utils.getelementptr(scale_at, [row], f32), alignment=8)
            made = arith.truncf(two16, arith.mulf(total, scale))
            place = add(mul(token, strides[0]), row)
            llvm.store(made, utils.getelementptr(out_at, [place], ir.BF16Type.get()), alignment=4)
            return []

        for first in range(0, count * pairs, threads):
            index = add(utils.thread_idx(), first)
            if first + threads <= count * pairs:
                one(index)
            else:
                inside = arith.cmpi(arith.CmpIPredicate.ult, index, const(count * pairs))
                _if(inside, partial_of(one, index), [])

    store(partial, row_scale, out)


def table_pairs(form: Format) -> jax.Array:
    """int32 [256]: the two values that a byte stands for, the lower code's in the lower half."""
    values = np.asarray(form.table, jnp.bfloat16).view(np.uint16).astype(np.uint32)
    return jnp.asarray((values[None, :] | (values[:, None] << 16)).reshape(-1).view(np.int32))


def store_table(pairs: Any, into: Any) -> None:
    """Copies pairs, int32 [256] in memory, to shared memory [256, 32], each lane its own."""

    @inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def store(ctx: Any, pairs: Any, into: Any) -> None:
        thread = bits_and(utils.thread_idx(), 127)
        lane, warp = bits_and(thread, 31), div(thread, 32)
        source = utils.memref_ptr(pairs)
        i32 = ir.IntegerType.get_signless(32)
        to = add(add(shared_address(into), mul(lane, 4)), mul(warp, 128))
        for i in range(0, PAIRS, 4):
            at = utils.getelementptr(source, [add(warp, i)], i32)
            llvm.store(llvm.load(i32, at), _pointer(add(to, i * 128)))

    store(pairs, into)


# -- what they are made of -----------------------------------------------------------------------


def _if(condition: Any, then: Callable[[], list[Any]], otherwise: list[Any]) -> list[Any]:
    """What `then` gives, run only where the condition holds; None of it means always."""
    if condition is None:
        return then()
    branch: Any = scf.IfOp(condition, [x.type for x in otherwise], has_else=bool(otherwise))
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(then())
    if otherwise:
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(otherwise)
    return list(branch.results)


def _worker(w: Work) -> Any:
    return div(utils.thread_idx(), 32 if w.by_warp else 128)


def _works(w: Work) -> Any:
    """Whether a worker has anything to do; None where all have."""
    if w.workers == 4 * w.consumers or not w.by_warp:
        return None
    return arith.cmpi(arith.CmpIPredicate.ult, _worker(w), const(w.workers))


def _place(w: Work) -> tuple[Any, Any]:
    """(This warp's unit, or the first of them; its worker's chain)."""
    worker = _worker(w)
    place = arith.remui(worker, const(w.places))
    chain = arith.divui(worker, const(w.places)) if w.spread and w.chains > 1 else const(0)
    if w.by_warp:
        return mul(place, w.each), chain
    return add(mul(place, BLOCK // UNIT), lane_and_warp()[1]), chain


def _number(w: Work, chain: Any, turn: int) -> Any:
    """Of a worker's chunk in its stage."""
    return add(chain, turn * w.chains) if w.spread else const(turn)


def _chunk(w: Work, words: Any, unit: Any, chain: Any, turn: int) -> Any:
    """Its address."""
    number = add(mul(unit, w.depth), _number(w, chain, turn))
    return add(shared_address(words), mul(number, 4 * w.form.words))


def _operand(form: Format, chunk: Any, part: int, *table: Any) -> Any:
    """64 columns of a chunk in registers of two weights each: [1, columns / 8, row / 8 of 16]."""
    lane, _ = lane_and_warp()
    codes = _load_codes(form, add(chunk, mul(lane, 16)), part)
    line = add(add(chunk, 4 * form.code_words), mul(div(lane, 4), 4))
    pairs_at = add(shared_address(table[0]), mul(lane, 4)) if table else None
    registers = np.empty((1, 2 * STEPS, 2), object)
    scales: list[list[Any]] = []
    for step in range(STEPS):
        if step % max(1, COLUMNS // form.groups // STEP) == 0:
            group = (part * STEPS + step) * STEP * form.groups // COLUMNS
            scales = _scales(form, add(line, 4 * group * form.group_words))
        for half in (0, 1):
            pairs = _pairs(form, codes[step], half, pairs_at)
            for row in (0, 1):
                registers[0, 2 * step + half, row] = _weight(form, pairs[row], scales[row], row)
    return registers


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
        return [[word] for word in _load(add(address, part * 512), 4)]
    found = [_load(add(address, (2 * part + i) * 512), 4) for i in range(2)]
    return [pair for four in found for pair in (four[:2], four[2:])]


def _ptx(ptx: str, *operands: Any, in_place: bool = False) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx(ptx, *operands, result_types=i32, has_side_effects=in_place)


def _multiply(x: Any, y: Any, in_place: bool = False) -> Any:
    """Of two numbers each. Ampere has sums of products only: minus zero changes no bit."""
    ptx = "fma.rn.bf16x2 $0, $1, $2, $3;"
    return _ptx(ptx, x, y, const(0x80008000), in_place=in_place)


def _both(word: Any, upper: bool) -> Any:
    """A half of a word, twice."""
    return _ptx(f"prmt.b32 $0, $1, 0, {'0x3232' if upper else '0x1010'};", word)


def _scales(form: Format, at: Any) -> list[list[Any]]:
    """For each of a lane's two rows: the scale and, where there is one, the offset; twice."""
    words = _load(at, 1)
    if form.offset != "none":
        words += _load(add(at, 4 * LINE), 1)
    rows = [[_both(word, bool(row)) for word in words] for row in (0, 1)]
    if form.kind == "int" and form.offset == "none":  # -8 or -128 times the scale, exactly
        for row, values in enumerate(rows):
            small = 0x0008 if form.bits == 4 and row == 0 else 0x0080
            values.append(_multiply(values[0], const(0x80008000 | small * 0x10001)))
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
            arith.ori(bits_and(x, 0x80008000), bits_and(arith.shrui(x, const(4)), 0x07F007F0))
            for x in moved
        ]
    return [bits_and(word, 0x00FF00FF), _ptx("prmt.b32 $0, $1, 0, 0x4341;", word)]


def _looked_up(word: Any, byte: int, pairs_at: Any) -> Any:
    """The pair of values that a byte stands for: its line is 128 bytes on for each."""
    shift = 8 * byte - 7
    moved = arith.shrui(word, const(shift)) if shift > 0 else arith.shli(word, const(-shift))
    return _load(add(bits_and(moved, 0x7F80), pairs_at), 1)[0]


def _weight(form: Format, pair: Any, scales: list[Any], row: int) -> Any:
    """Two weights. Made where it is written: wgmma's operands must be there before its fence."""
    kind = ir.VectorType.get((2,), ir.BF16Type.get())
    if form.offset == "zeros":
        # Two steps, the first exact: bits times 2^127 (2^123 in a byte's upper half), less zeros.
        one = const(0x7F007F00 if form.bits == 8 or row == 0 else 0x7D007D00)
        pair = _ptx("fma.rn.bf16x2 $0, $1, $2, $3;", pair, one, scales[1])
    if form.kind == "int" and form.offset != "zeros":
        made = _ptx("fma.rn.bf16x2 $0, $1, $2, $3;", pair, scales[0], scales[1], in_place=True)
    else:
        made = _multiply(pair, scales[0], in_place=True)
    return utils.bitcast(made, kind)
