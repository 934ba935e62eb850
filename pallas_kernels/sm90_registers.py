"""What the Hopper kernel does with its registers that Pallas cannot say, for 16-bit pages.

Each function has a plain counterpart for the interpreter (`Shape.on_gpu`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.attention_common import ROWS
from pallas_kernels.sm90_ir import (
    add,
    bits_and,
    const,
    div,
    element,
    inline_mgpu,
    like,
    mul,
    shared_address,
    vector_of,
)
from pallas_kernels.sm90_shapes import ROW, WGMMA, Shape, across

EIGHT = plgpu.ShapeDtypeStruct((ROWS, 8), jnp.float32, WGMMA)


def add_octets(s: Shape, sums: Any, fade: Any, p: Any) -> Any:
    """sums [ROWS, 8] · fade [ROWS] + the sum of p [ROWS, tile] over every eight columns.

    Nothing passes from lane to lane: what a row's four lanes hold is added up when a split ends.
    """
    if not s.on_gpu:
        octets = [p[:, i : i + 8] for i in range(0, s.tile, 8)]
        return sums * fade[:, None] + functools.reduce(jnp.add, octets)

    @inline_mgpu(arg_types=(WGMMA, ROW, WGMMA), return_type=EIGHT)
    def add_up(ctx: Any, sums: Any, fade: Any, p: Any) -> Any:
        octets = p.registers.reshape(p.registers.shape[1], 2)  # [columns / 8, row / 8]
        before, factors = sums.registers.reshape(2), fade.registers.reshape(2)
        made = np.empty((2,), object)
        for row in (0, 1):
            factor = vector_of([element(factors[row], 0)] * 2)
            total = octets[0, row]
            for octet in octets[1:, row]:
                total = arith.addf(total, octet)
            made[row] = arith.addf(arith.mulf(before[row], factor), total)
        return like(sums, made.reshape(sums.registers.shape))

    return add_up(sums, fade, p)


def masked(s: Shape, x: Any, last: Any) -> Any:
    """Scores x [ROWS, tile], -inf where a row does not look; it sees slots up to `last` [ROWS]."""
    if not s.on_gpu:
        slots = lax.broadcasted_iota(jnp.int32, (ROWS, s.tile), 1)
        seen = slots <= last[:, None]
        seen = seen if s.window is None else seen & (slots > last[:, None] - s.window)
        return jnp.where(seen, x, -jnp.inf)

    @inline_mgpu(
        arg_types=(WGMMA, ROW),
        return_type=plgpu.ShapeDtypeStruct((ROWS, s.tile), jnp.float32, WGMMA),
    )
    def mask(ctx: Any, x: Any, last: Any) -> Any:
        # Slots are counted from this lane's first: they are known then, and take no registers.
        own = mul(bits_and(utils.thread_idx(), 3), 2)
        edges = [arith.subi(element(row, 0), own) for row in last.registers.flat]
        nothing = arith.constant(ir.F32Type.get(), -math.inf)
        octets = x.registers.reshape(-1, 2)
        made = np.empty_like(octets)
        for octet, row in np.ndindex(octets.shape):
            numbers = []
            for column in (0, 1):
                slot, edge = const(8 * octet + column), edges[row]
                seen = arith.cmpi(arith.CmpIPredicate.sge, edge, slot)
                if s.window is not None:
                    last_unseen = arith.subi(edge, const(s.window))
                    inside = arith.cmpi(arith.CmpIPredicate.slt, last_unseen, slot)
                    seen = arith.andi(seen, inside)
                numbers.append(arith.select(seen, element(octets[octet, row], column), nothing))
            made[octet, row] = vector_of(numbers)
        return like(x, made.reshape(x.registers.shape))

    return mask(x, last)


def faded(s: Shape, acc: Any, fade: Any) -> Any:
    """acc [ROWS, D] · fade [ROWS]. Most often every factor of a warp is 1: then nothing is done."""
    if not s.on_gpu:
        return acc * across(fade, s.D)

    shape = plgpu.ShapeDtypeStruct((ROWS, s.D), jnp.float32, WGMMA)

    @inline_mgpu(arg_types=(WGMMA, ROW), return_type=shape)
    def multiply(ctx: Any, acc: Any, fade: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        rows = [element(x, 0) for x in fade.registers.flat]
        some = utils.inline_ptx(
            "{ .reg .pred p; setp.neu.f32 p, $1, 0f3F800000; setp.neu.or.f32 p, $2, 0f3F800000, p;"
            " vote.sync.any.pred p, p, 0xffffffff; selp.u32 $0, 1, 0, p; }",
            *rows, result_types=i32, has_side_effects=True, convergent=True,
        )  # fmt: skip
        registers = acc.registers.reshape(-1, 2)
        changed = arith.cmpi(arith.CmpIPredicate.ne, some, const(0))
        branch: Any = scf.IfOp(changed, [x.type for x in registers.flat], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            factors = [vector_of([x] * 2) for x in rows]
            scf.yield_([arith.mulf(x, factors[i % 2]) for i, x in enumerate(registers.flat)])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(registers.flat))
        made = np.array(list(branch.results), object)
        return like(acc, made.reshape(acc.registers.shape))

    return multiply(acc, fade)


def pin_sums(s: Shape, pins: Any, sums: Any) -> None:
    """Writes sums [ROWS, 8], which must be there before what follows, over `pins` [16]."""
    if not s.on_gpu:
        return

    @inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))
    def store(ctx: Any, pins: Any, sums: Any) -> None:
        warp = div(bits_and(utils.thread_idx(), 127), 32)
        address = add(shared_address(pins), mul(warp, 16))
        numbers = [element(x, i) for x in sums.registers.flat for i in (0, 1)]
        ptx = "st.volatile.shared.v4.f32 [$0], {$1, $2, $3, $4};"
        utils.inline_ptx(ptx, address, *numbers, has_side_effects=True)

    store(pins, sums)
