"""A model's quantised matrices in the layout of the GPU's kernels: made once, when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.offload import DEVICE, HOST, moved, on_host
from jaxinfer.quant.arrays import Matrix, Ordered, Parts, QuantisedMatrix
from pallas_kernels.device import capability, has_kernels
from pallas_kernels.quant_packing import DTYPE, UNIT, PackedMatrix, groups_of_chunk, pack

SLABS = 8  # of rows, packed one after the other: what it takes meanwhile is that much less


def can_pack(matrix: QuantisedMatrix) -> bool:
    """Whether a kernel multiplies by this matrix; activations that are rounded have another way."""
    groups = groups_of_chunk(*matrix.shape, matrix.scales.shape[1])
    return matrix.scheme.activations is None and groups is not None


def pack_params(params: Any, dtype: Any, *, consume: bool, mesh: Mesh | None = None) -> Any:
    """The model's weights with those matrices packed that the device has a kernel for.

    Args:
        params: dicts and lists of arrays and matrices, on the device or, some, on the host.
        dtype: of activations; only bfloat16 has kernels.
        consume: takes matrices out of `params` as they are packed, so that both forms of only one
            are in memory.
        mesh: devices over which they are split: each packs its part.
    """
    if dtype != DTYPE or not has_kernels(capability()):
        return params
    how = pack_matrix if mesh is None else partial(pack_shards, mesh=mesh)
    return _pack_all(params, consume, partial(_where_it_lies, how))


def _pack_all(tree: Any, consume: bool, how: Callable[[Matrix], Any]) -> Any:
    if isinstance(tree, list):
        return [_pack_all(x, consume, how) for x in tree]
    if isinstance(tree, dict):
        packed = {}
        for name, value in tree.items():
            packed[name] = _pack_all(value, consume, how)
            if consume and packed[name] is not value and not isinstance(value, dict | list):
                tree[name] = None
        return packed
    if isinstance(tree, QuantisedMatrix | Parts):
        return jax.block_until_ready(how(tree))
    return tree


def _where_it_lies(how: Callable[[Matrix], Any], matrix: Any) -> Any:
    """`how` of a matrix; one that lies on the host is packed on the device, and put back."""
    if not any(map(on_host, jax.tree.leaves(matrix))):
        return how(matrix)
    return moved(how(moved(matrix, DEVICE)), HOST)


def pack_shards(matrix: Any, mesh: Mesh) -> Any:
    """As `pack_matrix`, of a matrix split over all axes of a mesh: each device packs its own part.

    Of columns, each device has a row scale of its own for every row: the global `row_scale` holds
    them one after the other. Only as parts, under `shard_map`, are they matrices.
    """

    def part(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    packed = jax.eval_shape(pack_matrix, jax.tree.map(part, matrix))
    run = jax.shard_map(
        pack_matrix, mesh=mesh, in_specs=(_specs(matrix),),
        out_specs=_packed_specs(matrix, packed, mesh.axis_names), check_vma=False,
    )  # fmt: skip
    return jax.jit(run)(matrix)


def _specs(matrix: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding.spec, matrix)


def _packed_specs(matrix: Any, packed: Any, axes: tuple[str, ...]) -> Any:
    if isinstance(packed, Parts):
        pairs = zip(matrix.parts, packed.parts, strict=True)
        return Parts(tuple(_packed_specs(*pair, axes) for pair in pairs))
    if isinstance(packed, Ordered):
        return Ordered(_packed_specs(matrix, packed.matrix, axes), matrix.order.sharding.spec)
    if isinstance(packed, PackedMatrix):
        return PackedMatrix(matrix.codes.sharding.spec, PartitionSpec(axes), packed.format)
    return _specs(matrix)


def pack_matrix(matrix: Matrix) -> Any:
    """The matrix packed, where it can be; its parts, where it has some."""
    if isinstance(matrix, Parts):
        return Parts(tuple(pack_matrix(part) for part in matrix.parts))
    if not isinstance(matrix, QuantisedMatrix):
        return matrix
    if matrix.scheme.activations in ("token", "tensor"):  # the type that `scaled_matmul` reads
        return replace(matrix, scales=matrix.scales.astype(jnp.float32))
    if not can_pack(matrix):
        return matrix
    packed = _pack(matrix)
    return packed if matrix.order is None else Ordered(packed, matrix.order)


@jax.jit
def _pack(matrix: QuantisedMatrix) -> PackedMatrix:
    scheme = matrix.scheme
    N, _ = matrix.shape
    count = SLABS if N % (SLABS * 64) == 0 else 1
    fields = (matrix.codes, matrix.scales, matrix.zeros, matrix.mins)
    slabs = [None if x is None else x.reshape(count, N // count, -1) for x in fields]

    def one(slab: Any) -> PackedMatrix:
        codes, scales, zeros, mins = slab
        return pack(
            codes, scales, kind=scheme.kind, bits=scheme.bits, zeros=zeros, mins=mins,
            table=scheme.table,
        )  # fmt: skip

    done = jax.lax.map(one, slabs)
    words = done.words.reshape(N // UNIT, *done.words.shape[2:])
    return PackedMatrix(words, done.row_scale.reshape(N), done.format)
