"""What the formats share: the declaration of a matrix's tensors, and the unpacking of integers.

Letters: N rows (out), K columns (in), G groups of columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.errors import CheckpointError
from jaxinfer.quant import QuantisedMatrix, Scheme, pack4

FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Field:
    """One tensor of a matrix: the shapes and dtypes that it may have, and whether it must be."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    optional: bool = False


Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Format:
    """How one matrix is stored.

    Attributes:
        name: as people know it.
        fields: of (N, K): by suffix, the tensors `<module>.<suffix>` of a matrix.
        decode: of their contents, N and K: the matrix, of NumPy arrays. Raises ValueError, saying
            what is wrong, for contents that are no such matrix.
    """

    name: str
    fields: Callable[[int, int], dict[str, Field]]
    decode: Callable[[Arrays, int, int], QuantisedMatrix]


def field(*shapes: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS, optional: bool = False):
    """A `Field`, shorter."""
    return Field(shapes, dtypes, optional)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """32-bit words [..., W] → uint8 [..., W * 32/bits], lowest bits first."""
    per = 32 // bits
    words = np.ascontiguousarray(words).view(np.uint32)
    if bits == 8:
        return words.view(np.uint8).reshape(*words.shape[:-1], -1)
    shifts = np.arange(per, dtype=np.uint32) * bits
    codes = (words[..., None] >> shifts).astype(np.uint8) & ((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1)


def integers(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    bits: int,
    g_idx: np.ndarray | None = None,
) -> QuantisedMatrix:
    """A matrix of unsigned codes [N, K] and zero points [N, G] of 4 or 8 bits.

    Zero points that are all in the middle are left out. Columns are put beside those of their
    group, which `g_idx` [K] names.

    Raises:
        ValueError: the groups of `g_idx` are not of one size.
    """
    middle = 1 << (bits - 1)
    if zeros is not None and (zeros == middle).all():
        zeros = None
    order = None if g_idx is None else _by_groups(g_idx, scales.shape[1])
    if order is not None:
        codes = codes[:, order]
    if bits == 4:
        return QuantisedMatrix(Scheme("int", 4), pack4(codes), scales, zeros, order=order)
    # Stored signed: the middle of the range is 0.
    codes = (codes ^ 128).view(np.int8)
    zeros = None if zeros is None else (zeros ^ 128).view(np.int8)
    return QuantisedMatrix(Scheme("int", 8), codes, scales, zeros, order=order)


def _by_groups(g_idx: np.ndarray, G: int) -> np.ndarray | None:
    """The order of the columns that puts groups beside each other; None: they are so already."""
    size = math.ceil(len(g_idx) / G)
    if np.array_equal(g_idx, np.arange(len(g_idx)) // size):
        return None
    if g_idx.min() < 0 or not np.array_equal(np.bincount(g_idx, minlength=G), [size] * G):
        raise ValueError(f"g_idx does not name each of {G} groups {size} times")
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def groups(K: int, size: int, where: str) -> int:
    """How many groups of `size` columns (-1: all) K columns make.

    Raises:
        CheckpointError: they do not divide.
    """
    if size == -1:
        return 1
    if K % size:
        raise CheckpointError(f"{where}: groups of {size} do not divide {K} columns")
    return K // size


def per_row(scales: np.ndarray, N: int, K: int, block: tuple[int, int]) -> np.ndarray:
    """Scales of blocks [⌈N/rows⌉, ⌈K/columns⌉] → [N, G] of groups that divide K."""
    rows, columns = block
    each = np.repeat(scales, rows, axis=0)[:N]
    size = math.gcd(columns, K)
    return np.repeat(each, columns // size, axis=1)[:, : K // size]


def only(config: Mapping[str, Any], key: str, *accepted: Any, where: str) -> Any:
    """`config[key]`, which must be one of `accepted`; absent: None.

    Raises:
        CheckpointError: it is another.
    """
    value = config.get(key)
    if not any(value == one and type(value) is type(one) for one in accepted):
        raise CheckpointError(
            f"{where}: {key} = {value!r} is not read; accepted: "
            f"{', '.join(repr(one) for one in accepted)}"
        )
    return value
