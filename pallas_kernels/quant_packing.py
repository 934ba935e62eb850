"""The layout in which the kernels of `quant_matmul` read weights: made once, when they are loaded.

A matrix [N, K] is cut into chunks of 16 rows and 128 columns, each one piece of memory: its codes,
in the order in which a matrix instruction's first operand lies in a warp's registers, then its
scales. A lane loads 16 bytes and has what it multiplies: nothing passes from lane to lane.

What a kernel multiplies by is a bfloat16 number, rounded once where that is possible:

    w[n, k] = bf16(code * scale[n, g] + offset[n, g])    or    bf16((code - zero) * scale[n, g])

times `row_scale[n]`, a power of two, or the scale itself of a row that has only one: then what is
multiplied is exact. Scales and offsets are rounded to bfloat16 too.

Letters: N rows of the matrix (out), K its columns (in), G groups of columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

DTYPE = jnp.bfloat16  # of activations: what dequantised weights are rounded to
UNIT, COLUMNS = 16, 128  # rows and columns of a chunk
LINE = 8  # words: what one load of a group's scales brings
BLOCK = 64  # rows of a warpgroup's matrix instruction: N is a multiple
LONGEST = 256  # words of a row of what one copy brings
STEP = 16  # columns of one matrix instruction: a group is a multiple of them

Kind = Literal["int", "table", "float"]
Offset = Literal["none", "mins", "zeros"]


@dataclass(frozen=True)
class Format:
    """What is static of a packed matrix.

    Attributes:
        kind: of a code: an integer, an index into `table`, float8_e4m3fn.
        bits: of a code.
        groups: of a chunk's 128 columns: 1, 2, 4 or 8.
        offset: what an integer has besides its scale; `none`: 4 bits stand for -8 to 7.
        table: 16 values.
    """

    kind: Kind
    bits: Literal[4, 8]
    groups: int
    offset: Offset = "none"
    table: tuple[float, ...] = ()

    @property
    def code_words(self) -> int:
        """Of a chunk."""
        return UNIT * COLUMNS * self.bits // 32

    @property
    def group_words(self) -> int:
        """Of a group's scales, and offsets if there are any."""
        return LINE * (1 if self.offset == "none" else 2)

    @property
    def words(self) -> int:
        """Of a chunk."""
        return self.code_words + self.groups * self.group_words

    @property
    def tile(self) -> tuple[int, int]:
        """The words of a chunk as a matrix with rows as long as can be copied."""
        longest = max(n for n in range(4, LONGEST + 1, 4) if self.words % n == 0)
        return self.words // longest, longest

    @property
    def exponent(self) -> int:
        """`row_scale` holds two to this power more than the weights have."""
        if self.kind != "int":
            return 0
        return 6 if self.offset == "zeros" else 7


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "row_scale"],
    meta_fields=["format"],
)
@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [N, K] for the kernels.

    Attributes:
        words: int32 [N / 16, K / 128, *format.tile].
        row_scale: float32 [N].
        format: its static part.
    """

    words: Any
    row_scale: Any
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0] * UNIT, self.words.shape[1] * COLUMNS


def groups_of_chunk(N: int, K: int, G: int) -> int | None:
    """Groups of 128 columns when [N, K] can be packed with G scales a row; None when it cannot."""
    if N % BLOCK or K % COLUMNS or K % G or (K // G) % STEP:
        return None
    group = K // G
    if group % COLUMNS and COLUMNS % group:
        return None
    return max(1, COLUMNS // group)


def pack(
    codes: jax.Array,
    scales: jax.Array,
    *,
    kind: Kind,
    bits: Literal[4, 8],
    zeros: jax.Array | None = None,
    mins: jax.Array | None = None,
    table: tuple[float, ...] = (),
) -> PackedMatrix:
    """Packs codes with their scales.

    Args:
        codes: 4 bits: uint8 [N, K/2], two a byte, the even column's low; else int8 or
            float8_e4m3fn [N, K].
        scales: [N, G].
        zeros: [N, G], subtracted from an integer. Without them and `mins`, 8 is from one of 4 bits.
        mins: [N, G], subtracted after the scale.
        table: of `kind="table"`.

    Raises:
        ValueError: sizes that chunks do not fit, named.
    """
    N, K = codes.shape[0], codes.shape[1] * (8 // bits)
    groups = groups_of_chunk(N, K, scales.shape[1])
    if groups is None:
        raise ValueError(
            f"[{N}, {K}] with {scales.shape[1]} groups: expected rows a multiple of {BLOCK},"
            f" columns of {COLUMNS}, and groups of 16, 32, 64 or a multiple of 128 columns"
        )
    offset: Offset = "zeros" if zeros is not None else "none" if mins is None else "mins"
    form = Format(kind, bits, groups, offset, table)
    scales, row_scale = _normalised(scales.astype(jnp.float32), offset)
    pieces = [_code_words(_raw(codes, form), form)]
    pieces.append(_scale_words(form, scales, row_scale, zeros, mins, K))
    words = jnp.concatenate(pieces, axis=2)
    words = words.reshape(*words.shape[:2], *form.tile)
    return PackedMatrix(words, row_scale * 2.0**form.exponent, form)


def _normalised(scales: jax.Array, offset: Offset) -> tuple[jax.Array, jax.Array]:
    """(scales over their row's, the row's): a power of two, or the only scale that there is."""
    top = jnp.abs(scales).max(axis=1)
    row = jnp.ldexp(jnp.ones_like(top), jnp.frexp(top)[1] - 1)
    if scales.shape[1] == 1 and offset != "mins":
        row = scales[:, 0]
    row = jnp.where(top > 0, row, 1.0)
    return scales / row[:, None], row


def _raw(codes: jax.Array, form: Format) -> jax.Array:
    """Unsigned bits of the codes, uint32 [N, K]."""
    if form.bits == 4:
        pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
        return pairs.reshape(codes.shape[0], -1).astype(jnp.uint32)
    raw = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint32)
    # Signed ones are moved up by 128; with mins there are none below zero.
    return raw ^ 0x80 if form.kind == "int" and form.offset != "mins" else raw


def _split(x: jax.Array) -> jax.Array:
    """[N, K] as [unit, row 8s, row, chunk, step, column 8s, lane, column 2s]."""
    N, K = x.shape
    return x.reshape(N // UNIT, 2, 8, K // COLUMNS, COLUMNS // STEP, 2, 4, 2)


def _places(form: Format) -> jax.Array:
    """Bit at which a code lies in its word: [row 8s, column 8s, column 2s]."""
    row, half, odd = jnp.meshgrid(*[jnp.arange(2, dtype=jnp.uint32)] * 3, indexing="ij")
    if form.bits == 8:  # a word for each eight columns
        return 8 * row + 16 * odd + 0 * half
    if form.kind == "table":  # neighbours in a byte
        return 8 * (2 * half + row) + 4 * odd
    return 4 * (2 * half + row) + 16 * odd


def _code_words(raw: jax.Array, form: Format) -> jax.Array:
    placed = _split(raw) << _places(form)[:, None, None, None, :, None, :]
    summed = (1, 7) if form.bits == 8 else (1, 5, 7)
    words = placed.sum(axis=summed, dtype=jnp.uint32)
    units, _, chunks = words.shape[:3]
    if form.bits == 8:  # [unit, row, chunk, step, half, lane]; 16 bytes: two steps
        words = words.reshape(units, 8, chunks, 4, 2, 2, 4).transpose(0, 2, 3, 1, 6, 4, 5)
    else:  # [unit, row, chunk, step, lane]; 16 bytes: four steps
        words = words.reshape(units, 8, chunks, 2, 4, 4).transpose(0, 2, 3, 1, 5, 4)
    words = words.reshape(units, chunks, form.code_words)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def scale_factors(form: Format) -> tuple[float, float]:
    """What scales are multiplied by for rows 0 to 7 of sixteen, and for the other eight.

    The bits of an integer are taken for those of a tiny bfloat16 number, which this makes up for.
    """
    if form.kind == "float":
        return 2.0**120, 2.0**120
    if form.kind == "table" or form.offset == "zeros":
        return 1.0, 1.0
    return 2.0**126, 2.0**126 if form.bits == 8 else 2.0**122


def _scale_words(
    form: Format, scales: jax.Array, row_scale: jax.Array, zeros: Any, mins: Any, K: int
) -> jax.Array:
    """[unit, chunk, words]: each group's scales, then its offsets if there are any."""
    values = [_line(scales, K, form, _by_row(*scale_factors(form)))]
    if zeros is not None:
        bias = 128 if form.bits == 8 else 0
        values.append(_line(-(zeros.astype(jnp.float32) + bias) * 2.0**-6, K, form))
    elif mins is not None:
        offsets = -mins.astype(jnp.float32) / row_scale[:, None] * 2.0**-form.exponent
        values.append(_line(offsets, K, form))
    words = jnp.stack(values, axis=3)
    return words.reshape(*words.shape[:2], form.groups * form.group_words)


def _line(x: jax.Array, K: int, form: Format, factors: Any = 1.0) -> jax.Array:
    """float32 [N, G] → words [unit, chunk, groups, 8]: two rows, eight apart, in each."""
    N, chunks = x.shape[0], K // COLUMNS
    x = jnp.repeat(x, chunks * form.groups // x.shape[1], axis=1)
    x = x.reshape(N // UNIT, 2, 8, chunks, form.groups).transpose(0, 3, 4, 2, 1) * factors
    pairs = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    words = pairs[..., 0] | (pairs[..., 1] << 16)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


# -- and back ------------------------------------------------------------------------------------


def unpack(packed: PackedMatrix) -> jax.Array:
    """What the kernels multiply by, bfloat16 [N, K], without `row_scale`: their definition."""
    return unpack_chunks(packed.words, packed.format)


def unpack_chunks(words: jax.Array, form: Format) -> jax.Array:
    """int32 [units, chunks, *form.tile] → bfloat16 [16 units, 128 chunks]."""
    units, chunks = words.shape[:2]
    words = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(units, chunks, -1)
    codes, rest = words[..., : form.code_words], words[..., form.code_words :]
    values = _code_values(_codes(codes, form), form)
    rest = rest.reshape(units, chunks, form.groups, -1, 8, 1)
    pairs = jnp.concatenate([rest & 0xFFFF, rest >> 16], axis=-1).astype(jnp.uint16)
    pairs = jax.lax.bitcast_convert_type(pairs, jnp.bfloat16).astype(jnp.float32)
    # [unit, chunk, group, scale or offset, row, row 8s] to the order of `_split`
    pairs = jnp.repeat(pairs, COLUMNS // STEP // form.groups, axis=2).transpose(3, 0, 5, 4, 1, 2)
    scales = pairs[0][..., None, None, None]
    scales = scales / _by_row(*scale_factors(form))[:, None, None, None, None, None, None]
    small = 2.0**-form.exponent
    if form.offset == "zeros":
        zeros = pairs[1][..., None, None, None]
        values = (values * small + zeros) * scales
    elif form.offset == "mins":
        values = values * small * scales + pairs[1][..., None, None, None]
    else:
        bias = 0 if form.kind != "int" else 8 if form.bits == 4 else 128
        values = (values - bias) * small * scales
    return values.astype(jnp.bfloat16).reshape(units * UNIT, chunks * COLUMNS)


def _codes(words: jax.Array, form: Format) -> jax.Array:
    """Bits of the codes, in the order of `_split`."""
    units, chunks = words.shape[:2]
    if form.bits == 8:
        words = words.reshape(units, chunks, 4, 8, 4, 2, 2).transpose(0, 3, 1, 2, 5, 6, 4)
        words = words.reshape(units, 1, 8, chunks, 8, 2, 4, 1)
    else:
        words = words.reshape(units, chunks, 2, 8, 4, 4).transpose(0, 3, 1, 2, 5, 4)
        words = words.reshape(units, 1, 8, chunks, 8, 1, 4, 1)
    places = _places(form)[:, None, None, None, :, None, :]
    return (words >> places) & (2**form.bits - 1)


def _by_row(lower: float, upper: float) -> jax.Array:
    """float32 [2]. Computed, not a constant: kernels, and so their interpreter, can have none."""
    return jnp.where(jax.lax.iota(jnp.int32, 2) == 0, lower, upper)


def _code_values(codes: jax.Array, form: Format) -> jax.Array:
    if form.kind == "table":
        values = jnp.zeros(codes.shape, jnp.float32)
        for code, value in enumerate(np.asarray(form.table, jnp.bfloat16)):
            values = jnp.where(codes == code, float(value), values)
        return values
    if form.kind == "float":
        raw = jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), jnp.float8_e4m3fn)
        return raw.astype(jnp.float32)
    return codes.astype(jnp.float32)
