"""What the kernels of `exchange` have in common: their launch, and in MLIR addresses of 64 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from pallas_kernels.sm90_ir import add, bits_and, const

THREADS = 128
PATIENCE = 1 << 27  # polls, a minute or so: then the kernel fails, for a device is gone
ADD = {jnp.dtype(jnp.bfloat16): "add.rn.bf16x2", jnp.dtype(jnp.float16): "add.rn.f16x2"}


def launch(
    body: Callable[..., None], x: jax.Array, link: jax.Array, *, blocks: int, name: str
) -> jax.Array:
    """Runs body(x flat, link, result flat) in so many blocks of one warpgroup; the result is as
    x."""
    found = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.size,), x.dtype),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name=name,
    )(x.reshape(-1), link)
    return found.reshape(x.shape)


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    return ir.IntegerType.get_signless(64)


def block_and_thread() -> tuple[Any, Any]:
    block = arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x))
    return block, bits_and(utils.thread_idx(), THREADS - 1)


def equal(x: Any, y: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, x, y)


def below(x: Any, y: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.ult, x, y)


def address_of(ref: Any) -> Any:
    return llvm.ptrtoint(i64(), utils.memref_ptr(ref))


def plus(address: Any, more: Any, static: int = 0) -> Any:
    """int64 address + uint32 bytes + static bytes."""
    if more is not None:
        address = arith.addi(address, arith.extui(i64(), more))
    return arith.addi(address, utils.c(static, i64())) if static else address


def load(address: Any, count: int, how: str = "") -> list[Any]:
    """Words of 32 bits; `how`: of PTX, such as `.volatile`."""
    if count == 1:
        ptx, kind = f"ld{how}.global.u32 $0, [$1];", i32()
        return [utils.inline_ptx(ptx, address, result_types=kind, has_side_effects=True)]
    names = ", ".join(f"${i}" for i in range(count))
    ptx, kinds = f"ld{how}.global.v{count}.u32 {{{names}}}, [${count}];", [i32()] * count
    return list(utils.inline_ptx(ptx, address, result_types=kinds, has_side_effects=True))


def store(address: Any, words: list[Any], valid: Any, how: str = "") -> None:
    """Words of 32 bits, where `valid`."""
    names = ", ".join(f"${i + 1}" for i in range(len(words)))
    kind = f"v{len(words)}.u32 [$0], {{{names}}}" if len(words) > 1 else "u32 [$0], $1"
    utils.inline_ptx(f"st{how}.global.{kind};", address, *words, predicate=valid)


def pair(link: Any, index: Any) -> Any:
    """The address that is row `index` of a link's table, of two words."""
    low, high = load(plus(link, arith.muli(index, const(8))), 2)
    return utils.inline_ptx("mov.b64 $0, {$1, $2};", low, high, result_types=i64())


def total(op: str, parts: list[list[Any]]) -> list[Any]:
    """Sums of words, each of two numbers, in the order given."""
    first, *others = parts
    for part in others:
        first = [
            utils.inline_ptx(f"{op} $0, $1, $2;", s, p, result_types=i32())
            for s, p in zip(first, part, strict=True)
        ]
    return first


def count_up(address: Any, thread: Any) -> Any:
    """This block's counter, one higher than before."""
    number = add(load(address, 1, ".volatile")[0], 1)
    utils.warpgroup_barrier()
    store(address, [number], equal(thread, const(0)))
    return number


def until(condition: Any, results: int = 0) -> list[Any]:
    """Polls: `condition()` → whether to go on polling, and `results` words, which are returned as
    they were last."""
    loop = scf.WhileOp([i32()] * (1 + results), [const(0)])
    before = loop.before.blocks.append(i32())
    with ir.InsertionPoint.at_block_begin(before):
        (polls,) = before.arguments
        again, *found = condition()
        utils.inline_ptx(
            "trap;", predicate=arith.cmpi(arith.CmpIPredicate.uge, polls, const(PATIENCE))
        )
        scf.condition(again, [add(polls, 1), *found])
    after = loop.after.blocks.append(*[i32()] * (1 + results))
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_([after.arguments[0]])
    return list(loop.results[1:])
