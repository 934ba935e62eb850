"""The kernel behind `exchange`: partial results of several devices summed, in one launch.

Apart from `exchange`, because importing Mosaic changes the environment of the process.

Each device writes its part straight into a slot of its own in every device's memory, by addresses
that it is given, and reads the others' from its own memory. Words of data go with a word that says
which exchange they are of, in one store (NCCL's protocol LL does so): who waits for them polls the
data itself, and there is neither a barrier nor a fence. Slots are used in turns, two of a device:
who begins exchange i + 2 has the others' parts of i + 1, which they sent when done with i.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from pallas_kernels.exchange_layout import COUNTERS, SLOT_WORDS, VECTOR, message_slots
from pallas_kernels.sm90_ir import add, bits_and, const, inline_mgpu, mul

THREADS = 128
BLOCKS = COUNTERS  # whatever the size: each counts exchanges, and all must have counted as many
SLOT_BYTES = 4 * SLOT_WORDS  # of a vector, with what says which exchange it is of
PATIENCE = 1 << 27  # polls, a minute or so: then the kernel fails, for a device is gone
ADD = {jnp.dtype(jnp.bfloat16): "add.rn.bf16x2", jnp.dtype(jnp.float16): "add.rn.f16x2"}


def exchange(x: jax.Array, link: jax.Array, *, devices: int) -> jax.Array:
    """As `exchange.exchange`, whose checks have passed."""
    body = partial(_block, devices=devices, count=x.size, op=ADD[x.dtype])
    found = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.size,), x.dtype),
        grid=(BLOCKS,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="exchange",
    )(x.reshape(-1), link)
    return found.reshape(x.shape)


def _block(x_ref: Any, link_ref: Any, y_ref: Any, *, devices: int, count: int, op: str) -> None:
    vectors, capacity = count // VECTOR, message_slots()
    rounds = -(-vectors // (BLOCKS * THREADS))

    @inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def run(ctx: Any, x: Any, link: Any, y: Any) -> None:
        del ctx
        x, link, y = (_address(ref) for ref in (x, link, y))
        slots = [_pair(link, r) for r in range(devices)]
        own, me = _pair(link, devices), _word(link, 2 * (devices + 1))
        thread = bits_and(utils.thread_idx(), THREADS - 1)
        block = arith.index_cast(_i32(), gpu.block_id(gpu.Dimension.x))

        counter = _plus(own, mul(block, 4), 2 * devices * capacity * SLOT_BYTES)
        number = add(_load(counter, 1), 1)
        utils.warpgroup_barrier()
        is_first = arith.cmpi(arith.CmpIPredicate.eq, thread, const(0))
        utils.inline_ptx("st.global.u32 [$0], $1;", counter, number, predicate=is_first)

        turn = mul(bits_and(number, 1), devices)
        places, valid = [], []
        for i in range(rounds):
            place = add(mul(add(block, i * BLOCKS), THREADS), thread)
            inside = arith.cmpi(arith.CmpIPredicate.ult, place, const(vectors))
            valid.append(inside)
            places.append(arith.select(inside, place, const(vectors - 1)))

        mine = [_load(_plus(x, mul(place, 2 * VECTOR)), 4) for place in places]
        at = mul(add(turn, me), capacity)
        for words, place, inside in zip(mine, places, valid, strict=True):
            for slot in slots:
                there = _plus(slot, mul(add(at, place), SLOT_BYTES))
                _send(there, words[:2], number, inside)
                _send(_plus(there, None, SLOT_BYTES // 2), words[2:], number, inside)

        for place, inside in zip(places, valid, strict=True):
            total: list[Any] = []
            for r in range(devices):  # in the order of the devices, whoever sums
                where = mul(add(turn, r), capacity)
                here = _plus(own, mul(add(where, place), SLOT_BYTES))
                part = [*_receive(here, number)]
                part += _receive(_plus(here, None, SLOT_BYTES // 2), number)
                total = (
                    part
                    if not total
                    else [_sum(op, a, b) for a, b in zip(total, part, strict=True)]
                )
            utils.inline_ptx(
                "st.global.v4.u32 [$0], {$1, $2, $3, $4};",
                _plus(y, mul(place, 2 * VECTOR)), *total, predicate=inside,
            )  # fmt: skip

    run(x_ref, link_ref, y_ref)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _i64() -> Any:
    return ir.IntegerType.get_signless(64)


def _address(ref: Any) -> Any:
    return llvm.ptrtoint(_i64(), utils.memref_ptr(ref))


def _plus(address: Any, more: Any, static: int = 0) -> Any:
    """int64 address + uint32 bytes + static bytes."""
    if more is not None:
        address = arith.addi(address, arith.extui(_i64(), more))
    return arith.addi(address, utils.c(static, _i64())) if static else address


def _load(address: Any, count: int) -> Any:
    """Words of 32 bits."""
    if count == 1:
        return utils.inline_ptx(
            "ld.volatile.global.u32 $0, [$1];", address, result_types=_i32(), has_side_effects=True
        )
    names = ", ".join(f"${i}" for i in range(count))
    ptx = f"ld.global.v{count}.u32 {{{names}}}, [${count}];"
    return utils.inline_ptx(ptx, address, result_types=[_i32()] * count, has_side_effects=True)


def _word(link: Any, index: int) -> Any:
    return _load(_plus(link, None, 4 * index), 1)


def _pair(link: Any, index: int) -> Any:
    """An address, of two words."""
    low, high = (_word(link, 2 * index + i) for i in range(2))
    return utils.inline_ptx("mov.b64 $0, {$1, $2};", low, high, result_types=_i64())


def _send(address: Any, words: Any, number: Any, inside: Any) -> None:
    first, second = words
    utils.inline_ptx(
        "st.volatile.global.v4.u32 [$0], {$1, $3, $2, $3};", address, first, second, number,
        predicate=inside,
    )  # fmt: skip


def _receive(address: Any, number: Any) -> tuple[Any, Any]:
    """The two words of data there, once they are of this exchange."""
    i32, eq = _i32(), arith.CmpIPredicate
    loop = scf.WhileOp([i32] * 3, [const(0)])
    before = loop.before.blocks.append(i32)
    with ir.InsertionPoint.at_block_begin(before):
        (polls,) = before.arguments
        a, f, b, g = utils.inline_ptx(
            "ld.volatile.global.v4.u32 {$0, $1, $2, $3}, [$4];", address,
            result_types=[i32] * 4, has_side_effects=True,
        )  # fmt: skip
        stale = arith.ori(arith.cmpi(eq.ne, f, number), arith.cmpi(eq.ne, g, number))
        utils.inline_ptx("trap;", predicate=arith.cmpi(eq.uge, polls, const(PATIENCE)))
        scf.condition(stale, [add(polls, 1), a, b])
    after = loop.after.blocks.append(i32, i32, i32)
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_([after.arguments[0]])
    return loop.results[1], loop.results[2]


def _sum(op: str, x: Any, y: Any) -> Any:
    return utils.inline_ptx(f"{op} $0, $1, $2;", x, y, result_types=_i32())
