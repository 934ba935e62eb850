"""Quantised matrices as pytrees: one form for every published format.

A matrix [N, K] (out, in) is codes with a scale for each row and group of columns:

    int    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]   or   code * scale - min[n, g]
    table  w[n, k] = table[code[n, k]] * scale[n, g]
    float  w[n, k] = code[n, k] * scale[n, g]                  (FP8)

in float32, rounded to the dtype that is asked for. Scales of blocks of rows, or of a whole tensor,
are repeated for each row: whatever is concatenated along N keeps its own.

Letters: N rows (out), K columns (in), G groups of columns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_packing import PackedMatrix, unpack

Array = Any  # of NumPy while a checkpoint is read, of JAX afterwards


@dataclass(frozen=True)
class Scheme:
    """What is static of a quantised matrix.

    Attributes:
        kind: what a code is: an integer, an index into `table`, or a floating-point number.
        bits: of a code: 4 (two a byte) or 8.
        table: `kind="table"` only: 16 values.
        activations: how the other factor is rounded to the codes' type before it is multiplied:
            None, not at all; `token`, a scale for each token; `tensor`, the scale that the
            checkpoint gives; `group`, a scale for each token and group of columns.
    """

    kind: Literal["int", "table", "float"] = "int"
    bits: Literal[4, 8] = 4
    table: tuple[float, ...] = ()
    activations: Literal["token", "tensor", "group"] | None = None

    def __post_init__(self) -> None:
        if (self.kind == "table") != (len(self.table) == 16) or (
            self.kind != "int" and self.bits != (4 if self.kind == "table" else 8)
        ):
            raise ValueError(
                f"{self}: a table has 16 values for codes of 4 bits, and a float code has 8 bits"
            )
        if self.activations is not None and self.bits != 8:
            raise ValueError(f"{self}: activations are rounded to 8 bits only")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zeros", "mins", "order", "input_scale"],
    meta_fields=["scheme"],
)
@dataclass(frozen=True)
class QuantisedMatrix:
    """One matrix [N, K]; see this module for what its codes mean.

    Attributes:
        scheme: its static part.
        codes: 4 bits: uint8 [N, K/2], the even column's in the low half. 8 bits: int8 or
            float8_e4m3fn [N, K].
        scales: float [N, G]; G divides K.
        zeros: uint8 (of 4 bits) or int8 [N, G]. None, and no `mins`: 8 of 4 bits, 0 of 8.
        mins: float [N, G], subtracted after the scale instead (GGUF); zero is then 0.
        order: int32 [K]: column j of the codes multiplies x[order[j]] (GPTQ's act-order).
        input_scale: float32 []: `activations="tensor"` only.
    """

    scheme: Scheme
    codes: Array
    scales: Array
    zeros: Array = None
    mins: Array = None
    order: Array = None
    input_scale: Array = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns * (8 // self.scheme.bits)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclass(frozen=True)
class Parts:
    """A matrix whose rows are those of several of different schemes, one after the other.

    Fused matrices are: Q4_K_M has Q4_K queries and keys, Q6_K values; others leave some dense.
    """

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["matrix", "order"], meta_fields=[]
)
@dataclass(frozen=True)
class Ordered:
    """A packed matrix whose columns are in another order: column j multiplies x[order[j]]."""

    matrix: PackedMatrix
    order: Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape


Matrix = jax.Array | QuantisedMatrix | Parts | PackedMatrix | Ordered


def pack4(codes: Array) -> Array:
    """Codes of 4 bits, uint8 [N, K] → two a byte, uint8 [N, K/2]; K is even."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack4(packed: Array) -> Array:
    """uint8 [N, K/2] → uint8 [N, K]: the inverse of `pack4`."""
    xp = np if isinstance(packed, np.ndarray) else jnp
    pairs = xp.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def dequantise(matrix: Matrix, dtype: Any = jnp.float32) -> jax.Array:
    """The dense matrix [N, K] that a quantised one stands for, its columns in x's order.

    Values are computed in float32 and rounded once, to `dtype`; those of a packed matrix are what
    its kernel multiplies by.
    """
    if isinstance(matrix, Parts):
        return jnp.concatenate([dequantise(part, dtype) for part in matrix.parts])
    if isinstance(matrix, Ordered):
        return dequantise(matrix.matrix, dtype)[:, jnp.argsort(matrix.order)]
    if isinstance(matrix, PackedMatrix):
        return (unpack(matrix).astype(jnp.float32) * matrix.row_scale[:, None]).astype(dtype)
    if not isinstance(matrix, QuantisedMatrix):
        return jnp.asarray(matrix, dtype)
    dense = in_code_order(matrix, dtype)
    if matrix.order is not None:
        dense = dense[:, jnp.argsort(matrix.order)]
    return dense


def in_code_order(matrix: QuantisedMatrix, dtype: Any) -> jax.Array:
    """As `dequantise`, but with columns as the codes have them: [N, K]."""
    scheme = matrix.scheme
    codes = jnp.asarray(matrix.codes)
    if scheme.bits == 4:
        codes = unpack4(codes)
    if scheme.kind == "table":
        values = jnp.asarray(scheme.table, jnp.float32)[codes]
    else:
        values = codes.astype(jnp.float32)
    N, K = values.shape
    values = values.reshape(N, matrix.scales.shape[1], matrix.group)
    if matrix.zeros is not None:
        values = values - jnp.asarray(matrix.zeros).astype(jnp.float32)[..., None]
    elif scheme.kind == "int" and scheme.bits == 4 and matrix.mins is None:
        values = values - 8
    values = values * jnp.asarray(matrix.scales).astype(jnp.float32)[..., None]
    if matrix.mins is not None:
        values = values - jnp.asarray(matrix.mins).astype(jnp.float32)[..., None]
    return values.reshape(N, K).astype(dtype)


def take_rows(matrix: Any, rows: Any) -> Any:
    """The rows that the slice or index array `rows` picks."""
    if not isinstance(matrix, QuantisedMatrix):
        return matrix[rows]

    def pick(x: Array) -> Array:
        return None if x is None else x[rows]

    return replace(
        matrix,
        codes=pick(matrix.codes),
        scales=pick(matrix.scales),
        zeros=pick(matrix.zeros),
        mins=pick(matrix.mins),
    )


def join_rows(matrices: Sequence[Any]) -> Any:
    """Matrices of NumPy arrays, one above the other: neighbours that are alike become one.

    Raises:
        ValueError: they have not the same number of columns.
    """
    if len({m.shape[1] for m in matrices}) != 1:
        raise ValueError(f"{[m.shape for m in matrices]} have not the same number of columns")
    parts: list[Any] = []
    for matrix in matrices:
        if parts and _alike(parts[-1], matrix):
            parts[-1] = _joined(parts[-1], matrix)
        else:
            parts.append(matrix)
    return parts[0] if len(parts) == 1 else Parts(tuple(parts))


def join_shards(matrices: Sequence[Any], shards: int) -> Any:
    """As `join_rows`, of matrices that come one shard's after the other's, all shards' alike.

    Of `Parts`, each has rows of every shard: split into as many pieces, they give each shard its
    own rows of all parts, in their order.
    """
    count = len(matrices) // shards
    each = [join_rows(matrices[i * count : (i + 1) * count]) for i in range(shards)]
    if not isinstance(each[0], Parts):
        return join_rows(each)
    return Parts(tuple(map(join_rows, zip(*(one.parts for one in each), strict=True))))


def stack_stages(matrices: Sequence[Any]) -> Any:
    """The matrix of each stage of a pipeline as one, every array behind that of the stage before;
    what is one number becomes one of each. Only their parts are matrices.

    Raises:
        ValueError: they are not of one kind.
    """
    kinds = [_kind(matrix) for matrix in matrices]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            "this matrix is not stored alike in the layers of all stages, which run one program"
        )
    return jax.tree.map(lambda *xs: np.concatenate([np.atleast_1d(x) for x in xs]), *matrices)


def _kind(matrix: Any) -> Any:
    leaves, tree = jax.tree.flatten(matrix)
    return tree, [(np.shape(x), x.dtype) for x in leaves]


def _alike(a: Any, b: Any) -> bool:
    """Whether two are one matrix when joined: all but the rows is the same."""
    if not isinstance(a, QuantisedMatrix) or not isinstance(b, QuantisedMatrix):
        return not isinstance(a, QuantisedMatrix) and not isinstance(b, QuantisedMatrix)

    def same(x: Array, y: Array) -> bool:
        return (x is None and y is None) or (
            x is not None and y is not None and np.array_equal(x, y)
        )

    return (
        a.scheme == b.scheme
        and a.scales.shape[1] == b.scales.shape[1]
        and a.scales.dtype == b.scales.dtype
        and (a.zeros is None) == (b.zeros is None)
        and (a.mins is None) == (b.mins is None)
        and same(a.order, b.order)
        and same(a.input_scale, b.input_scale)
    )


def _joined(a: Any, b: Any) -> Any:
    if not isinstance(a, QuantisedMatrix):
        return np.concatenate([a, b])

    def both(x: Array, y: Array) -> Array:
        return None if x is None else np.concatenate([x, y])

    return replace(
        a,
        codes=both(a.codes, b.codes),
        scales=both(a.scales, b.scales),
        zeros=both(a.zeros, b.zeros),
        mins=both(a.mins, b.mins),
    )
