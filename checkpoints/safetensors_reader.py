"""Opens a Hugging Face directory of safetensors files and reads rows of its tensors.

Format: https://github.com/huggingface/safetensors#format. A file is eight bytes with the header's
length, the header (JSON: dtype, shape and byte range of every tensor), then the data. Everything
that the header claims is checked when the directory is opened, before any tensor is read. Rows
are read, not mapped: a file that shrinks meanwhile is an error rather than a bus error, and
nothing but the caller's buffer counts as the process's memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8  # the header's length, unsigned little-endian, is what a file begins with
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: bytes `start` to `stop` of `file`, row-major, little-endian."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """A directory's tensors by name. Every byte range lies inside its file."""

    directory: Path
    tensors: dict[str, Tensor]


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Reads and checks the headers of `model.safetensors`, or of the shards that its index names.

    Raises:
        CheckpointError: there is no such directory or no safetensors in it; a file is missing,
            truncated or not what its header says; two files hold the same tensor; the index
            names a tensor that its file does not hold.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    single, index = directory / SINGLE, directory / INDEX
    if not index.exists():
        if not single.exists():
            raise CheckpointError(_no_weights(directory))
        return Checkpoint(directory, _union([single]))
    where = _read_index(index)
    if single.exists() and set(where.values()) != {SINGLE}:
        raise CheckpointError(
            f"{directory} holds both {SINGLE} and {INDEX}, which names other files: "
            "remove the one that is out of date"
        )
    tensors = _union([directory / file for file in sorted(set(where.values()))])
    for name, file in where.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{index} puts {name!r} into {file}, which does not hold it")
    return Checkpoint(directory, tensors)


def read_rows(tensor: Tensor, start: int, out: np.ndarray) -> None:
    """Fills `out` with rows `start` to `start + len(out)` (axis 0) of `tensor`.

    Args:
        tensor: a tensor of at least one dimension.
        start: the first row.
        out: C-contiguous, of the tensor's shape but for axis 0. Another dtype than the tensor's
            is cast to, which takes a temporary of the rows as they are on disk.

    Raises:
        CheckpointError: the file has become unreadable or shorter since it was opened.
    """
    assert out.flags.c_contiguous, "rows are read straight into `out`"
    assert out.shape[1:] == tensor.shape[1:], (out.shape, tensor.shape)
    assert 0 <= start <= start + len(out) <= tensor.shape[0], (start, out.shape, tensor.shape)
    raw = out if out.dtype == tensor.dtype else np.empty(out.shape, tensor.dtype)
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    # The buffer protocol does not know ml_dtypes: the bytes are handed over instead.
    _read_bytes(tensor.file, tensor.start + start * row_bytes, raw.reshape(-1).view(np.uint8))
    if raw is not out:
        out[...] = raw


def read_scalar(tensor: Tensor) -> np.ndarray:
    """A tensor of no dimensions. Raises `CheckpointError` as `read_rows` does."""
    out = np.empty(1, tensor.dtype)
    _read_bytes(tensor.file, tensor.start, out.view(np.uint8))
    return out.reshape(())


def _read_bytes(path: Path, offset: int, out: np.ndarray) -> None:
    """Fills the uint8 vector `out` with the bytes of `path` from `offset` on."""
    done = 0
    try:
        with path.open("rb", buffering=0) as f:
            while done < out.size:
                count = os.preadv(f.fileno(), [out[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{path}: ends at byte {offset + done}, while being read")
                done += count
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
    if not pickles:
        return f"{directory}: neither {SINGLE} nor {INDEX} there"
    return (
        f"{directory}: only {pickles[0]}. A .bin file is a pickle, which can run any program when "
        "it is loaded, so only safetensors are read. Convert it with transformers: "
        "save_pretrained writes safetensors"
    )


def _read_index(path: Path) -> dict[str, str]:
    """The index's `weight_map`: the file name that holds each tensor."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{path}: has no `weight_map` of tensor names to file names")
    for name, file in where.items():
        # A path that leaves the directory would read whatever file the index's author likes.
        if not isinstance(file, str) or "\0" in file or Path(file).name != file:
            raise CheckpointError(f"{path}: {name!r}: {file!r} is not a file name")
        if not (path.parent / file).exists():
            raise CheckpointError(f"{path}: names {file}, which does not exist")
    return where


def _union(files: Iterable[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        for tensor in _read_header(file):
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(f"{file}: {tensor.name!r} is in {other.file.name} too")
    return tensors


def _read_header(path: Path) -> list[Tensor]:
    """The tensors that the header of `path` declares, checked against each other and the file."""
    try:
        size = path.stat().st_size
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    if size < LENGTH_BYTES:
        raise CheckpointError(f"{path}: truncated: {size} bytes, too short for a header")
    prefix = np.empty(LENGTH_BYTES, np.uint8)
    _read_bytes(path, 0, prefix)
    length = int.from_bytes(prefix.tobytes(), "little")
    if length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: not safetensors, or truncated: a header of {length} bytes is announced, "
            f"the file has {size} bytes, and {MAX_HEADER_BYTES} is the most a header may have"
        )
    text = np.empty(length, np.uint8)
    _read_bytes(path, LENGTH_BYTES, text)
    header = _parse_json(text.tobytes(), path)
    header.pop("__metadata__", None)
    data = LENGTH_BYTES + length
    tensors = [_parse_entry(path, name, entry, data) for name, entry in header.items()]
    _check_extents(path, tensors, data, size)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` where there is none."""
    try:
        text = path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    return _parse_json(text, path)


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys; `path` is where `text` is from."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: {repeated!r} is there twice")
        return table

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def _parse_entry(path: Path, name: str, entry: Any, data: int) -> Tensor:
    """One tensor of a header; `data` is where the file's data section starts, in bytes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{path}: {name!r}: dtype, shape and data_offsets are expected, not {entry!r}"
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{path}: {name!r}: dtype {code!r} is not supported; these are: {', '.join(DTYPES)}"
        )
    if not _are_sizes(shape):
        raise CheckpointError(f"{path}: {name!r}: {shape!r} is not a shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name!r}: {offsets!r} is not a pair of byte offsets")
    start, stop = offsets
    expected = math.prod(shape) * DTYPES[code].itemsize
    if stop - start != expected:
        raise CheckpointError(
            f"{path}: {name!r}: {code} {shape} takes {expected} bytes, and data_offsets "
            f"{offsets} hold {stop - start}"
        )
    return Tensor(name, path, DTYPES[code], tuple(shape), data + start, data + stop)


def _are_sizes(values: Any) -> bool:
    # `type`, for True is an int. The bounds are NumPy's, and keep the products small.
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def _check_extents(path: Path, tensors: list[Tensor], data: int, size: int) -> None:
    """Requires that the tensors fill the data section, without holes or overlaps."""
    end = data
    for tensor in sorted(tensors, key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            kind = "overlaps the tensor before it" if tensor.start < end else "leaves a hole"
            raise CheckpointError(f"{path}: {tensor.name!r} {kind} at byte {end}")
        end = tensor.stop
    if end > size:
        raise CheckpointError(f"{path}: truncated: {size} bytes, the header says {end}")
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes more than the header says")
