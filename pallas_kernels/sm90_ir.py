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


def load_matrices(address: Any, *, transposed: bool = False) -> tuple[Any, ...]:
    """Four 8 x 8 matrices of 16 bits each number; each lane brings the address of a row of one."""
    i32 = ir.IntegerType.get_signless(32)
    kind = ".trans" if transposed else ""
    ptx = f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
    return utils.inline_ptx(
        ptx, address, result_types=[i32] * 4, has_side_effects=True, convergent=True
    )  # type: ignore[return-value]


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
