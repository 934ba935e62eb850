"""Words of the compiler's own language that the Hopper kernels use where Pallas has none."""

from __future__ import annotations

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

Fragments = mgpu.FragmentedArray
inline_mgpu: Any = plgpu.inline_mgpu  # pyright takes what it decorates for the undecorated


def const(x: int) -> Any:
    return utils.c(x - 2**32 if x >= 2**31 else x, ir.IntegerType.get_signless(32))


def add(x: Any, y: Any) -> Any:
    return arith.addi(x, y if isinstance(y, ir.Value) else const(y))


def mul(x: Any, y: int) -> Any:
    return arith.muli(x, const(y))


def div(x: Any, y: int) -> Any:
    return arith.divui(x, const(y))


def bits_and(x: Any, y: int) -> Any:
    return arith.andi(x, const(y))


def xor(x: Any, y: Any) -> Any:
    return arith.xori(x, y if isinstance(y, ir.Value) else const(y))


def lane_and_warp() -> tuple[Any, Any]:
    thread = bits_and(utils.thread_idx(), 127)
    return bits_and(thread, 31), div(thread, 32)


def shared_address(ref: Any) -> Any:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def element(x: Any, i: int) -> Any:
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def vector_of(elements: list[Any]) -> Any:
    kind = ir.VectorType.get((len(elements),), elements[0].type)
    return vector.from_elements(kind, elements)


def tree(op: Any, x: list[Any]) -> Any:
    while len(x) > 1:
        x = [op(*x[i : i + 2]) if i + 1 < len(x) else x[i] for i in range(0, len(x), 2)]
    return x[0]


def like(x: Any, registers: Any) -> Any:
    """An array of x's shape and layout."""
    return Fragments(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)
