"""Opens a GGUF file: its metadata, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
Files come from strangers: every count and length is held against what is left of the file before
anything is read or allocated, and every tensor against the file's end. (The `gguf` package maps
the file and believes its counts; see ADR 008.)
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxinfer.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 30
MAX_NAME, MAX_DIMS, MAX_ITEMS = 65535, 4, 1 << 24
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class BlockType:
    """How ggml stores a tensor: `size` bytes for every `values` numbers of a row."""

    name: str
    values: int
    size: int


TYPES = {
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18), 3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22), 7: BlockType("Q5_1", 32, 24), 8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84), 11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144), 13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210), 20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
}  # fmt: skip
# Known, and not read: named in the error.
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: row-major, its bytes from `start` of the file on. `shape`: slowest axis first."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    start: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.values * self.type.size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Gguf:
    """An opened file. Every tensor lies inside it."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads forward, never past the end."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self.path, self.size, self.at = file, path, size, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: byte {self.at}: {what}")

    def take(self, count: int, what: str) -> bytes:
        """`count` bytes. Raises where the file, or what a header may have, ends before."""
        if count > min(self.size, MAX_HEADER_BYTES) - self.at:
            raise self.fail(f"{what} of {count} bytes goes past the end")
        data = self._file.read(count)
        if len(data) != count:
            raise self.fail("the file ends while being read")
        self.at += count
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def count(self, least: int, what: str) -> int:
        """A number of things that take at least `least` bytes each."""
        count = self.number("<Q", what)
        if count > min((self.size - self.at) // least, MAX_ITEMS):
            raise self.fail(f"{what} = {count}: the file has no room for so many")
        return count

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        length = self.number("<Q", what)
        if length > most:
            raise self.fail(f"{what} of {length} bytes; at most {most}")
        return self.take(length, what).decode("utf-8", errors="replace")


def open_gguf(path: str | Path | Gguf) -> Gguf:
    """Reads and checks a file's header. What is open already is returned.

    Raises:
        CheckpointError: there is no such file, or it is no GGUF, of another version or big-endian,
            one of several parts, truncated, or contradicts itself; or holds a tensor of a type that
            is not read, which is named.
    """
    if isinstance(path, Gguf):
        return path
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(_Cursor(file, path, path.stat().st_size))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read(c: _Cursor) -> Gguf:
    if c.take(4, "magic") != MAGIC:
        raise CheckpointError(f"{c.path}: not a GGUF file: it does not begin with {MAGIC!r}")
    version = c.number("<I", "version")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{c.path}: GGUF version {version}, or big-endian; 2 and 3, little-endian, are read"
        )
    # A tensor takes a name's length, dimensions, a type and an offset; a key the like.
    num_tensors, num_keys = c.count(24, "number of tensors"), c.count(13, "number of keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = c.text("a key", MAX_NAME)
        if key in metadata:
            raise c.fail(f"key {key!r} comes twice")
        metadata[key] = _value(c, c.number("<I", "a type"), key)
    if metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            f"{c.path}: one of {metadata['split.count']} parts; merge them first: "
            "llama-gguf-split --merge"
        )
    infos = [_tensor(c) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= 1 << 20:
        raise CheckpointError(f"{c.path}: general.alignment = {alignment!r} is not a multiple of 8")
    data = -(-c.at // alignment) * alignment
    return Gguf(c.path, metadata, _placed(c, infos, data, alignment))


def _value(c: _Cursor, kind: int, key: str) -> Any:
    if kind == STRING:
        return c.text(key)
    if kind in NUMBERS:
        dtype = np.dtype(NUMBERS[kind])
        value = np.frombuffer(c.take(dtype.itemsize, key), dtype)[0].item()
        return bool(value) if kind == BOOL else value
    if kind != ARRAY:
        raise c.fail(f"{key}: {kind} is no type of a value")
    kind = c.number("<I", key)
    if kind == STRING:
        return [c.text(key) for _ in range(c.count(8, key))]
    if kind not in NUMBERS:
        raise c.fail(f"{key}: an array of type {kind} is not read")
    dtype = np.dtype(NUMBERS[kind])
    return np.frombuffer(c.take(c.count(dtype.itemsize, key) * dtype.itemsize, key), dtype).tolist()


def _tensor(c: _Cursor) -> GgufTensor:
    """A tensor's info; `start` is relative to the data section yet."""
    name = c.text("a tensor's name", MAX_NAME)
    dims = c.number("<I", name)
    if not 1 <= dims <= MAX_DIMS:
        raise c.fail(f"{name!r} has {dims} dimensions")
    shape = tuple(c.number("<Q", name) for _ in range(dims))[::-1]
    kind, start = c.number("<I", name), c.number("<Q", name)
    if kind not in TYPES:
        what = OTHERS.get(kind, str(kind))
        raise CheckpointError(
            f"{c.path}: {name!r} is of ggml type {what}, which is not read; these are: "
            f"{', '.join(t.name for t in TYPES.values())}"
        )
    if shape[-1] % TYPES[kind].values or 0 in shape:
        raise c.fail(
            f"{name!r}: {[*shape]}, in blocks of {TYPES[kind].values} ({TYPES[kind].name})"
        )
    return GgufTensor(name, shape, TYPES[kind], start)


def _placed(
    c: _Cursor, infos: list[GgufTensor], data: int, alignment: int
) -> dict[str, GgufTensor]:
    """The tensors with their places in the file, which must not overlap."""
    found: dict[str, GgufTensor] = {}
    end = 0
    for info in sorted(infos, key=lambda t: t.start):
        if info.name in found:
            raise CheckpointError(f"{c.path}: {info.name!r} comes twice")
        if info.start % alignment or info.start < end:
            raise CheckpointError(
                f"{c.path}: {info.name!r} at {info.start} of the data overlaps the tensor before "
                f"it, or is no multiple of {alignment}"
            )
        end = info.start + info.nbytes
        if data + end > c.size:
            raise CheckpointError(
                f"{c.path}: truncated: {c.size} bytes; {info.name!r} ends at {data + end}"
            )
        found[info.name] = GgufTensor(info.name, info.shape, info.type, data + info.start)
    return found


def read_rows(gguf: Gguf, tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor of two dimensions (of one: its only row), as bytes: uint8 [rows, bytes]."""
    count = (stop - start) * tensor.row_bytes
    try:
        with gguf.path.open("rb") as file:
            file.seek(tensor.start + start * tensor.row_bytes)
            data = file.read(count)
    except OSError as error:
        raise CheckpointError(f"{gguf.path}: cannot be read: {error.strerror}") from error
    if len(data) != count:
        raise CheckpointError(f"{gguf.path}: {tensor.name!r}: the file ends while being read")
    return np.frombuffer(data, np.uint8).reshape(stop - start, tensor.row_bytes)
