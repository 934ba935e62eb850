"""Writes parameters as a Hugging Face directory: the inverse of `load.load_params`."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from checkpoints.safetensors_reader import DTYPES, INDEX, SINGLE
from jaxinfer.errors import CheckpointError

CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Tensor:
    """A tensor on its way to disk. `rows[start]` is the (stop, offset) of a range of its rows.

    The range is rows `offset` and on of `param`.
    """

    name: str
    shape: tuple[int, ...]
    param: jax.Array
    rows: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.param.dtype.itemsize


def write_hf(
    directory: str | Path,
    params: Any,
    weights: Any,
    config: dict[str, Any],
    *,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes `config.json` and safetensors, with an index where there is more than one file.

    The files appear one by one under their final names, each complete; `config.json`, and the
    index before it, come last. Other files of the directory, such as the tokenizer, are kept.

    Args:
        directory: made if it does not exist.
        params: pytree of arrays, every one addressable from this process; dtypes are kept.
        weights: pytree of `Weight` like `params`.
        config: what `config.json` shall hold.
        max_shard_bytes: of the tensors in one file; a larger tensor gets a file of its own.
        overwrite: remove the weights that are there first.

    Raises:
        CheckpointError: the directory holds weights already, and not `overwrite`.
        ValueError: a parameter has not the shape that `weights` declares, or a dtype that
            safetensors lack; or the pieces do not cover a tensor. Nothing has been written.
    """
    tensors = _unfuse(params, weights)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stale = sorted([*directory.glob("*.safetensors"), *directory.glob(INDEX)])
    if stale and not overwrite:
        raise CheckpointError(f"{directory} holds weights already ({stale[0].name})")
    for path in stale:
        path.unlink()
    files = _split(tensors, max_shard_bytes)
    names = [SINGLE]
    if len(files) > 1:
        names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        write_atomically(directory / name, lambda f, ts=tensors: _write_file(f, ts))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for ts in files for t in ts)},
            "weight_map": {t.name: n for n, ts in zip(names, files, strict=True) for t in ts},
        }
        write_json(directory / INDEX, index)
    write_json(directory / "config.json", config)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name beside `path`, syncs it to disk and renames it."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


def _unfuse(params: Any, weights: Any) -> list[_Tensor]:
    """The tensors that the pieces of `weights` name. Pieces that are repeated count once."""
    leaves, treedef = jax.tree.flatten(weights)
    tensors: dict[str, _Tensor] = {}
    for weight, param in zip(leaves, treedef.flatten_up_to(params), strict=True):
        if param.shape != weight.shape or np.dtype(param.dtype) not in CODES:
            raise ValueError(f"{param.dtype} {param.shape} cannot be written as {weight}")
        offset = 0
        for piece in weight.pieces:
            tensor = tensors.setdefault(piece.name, _Tensor(piece.name, piece.shape, param))
            tensor.rows[piece.start] = (piece.stop, offset)
            offset += piece.stop - piece.start
    for tensor in tensors.values():
        _check_cover(tensor)
    return list(tensors.values())


def _check_cover(tensor: _Tensor) -> None:
    end = 0
    for start, (stop, _) in sorted(tensor.rows.items()):
        if start != end:
            raise ValueError(f"the pieces of {tensor.name} do not meet at row {end}")
        end = stop
    if end != tensor.shape[0]:
        raise ValueError(f"the pieces of {tensor.name} end at row {end} of {tensor.shape[0]}")


def _split(tensors: Iterable[_Tensor], max_bytes: int) -> list[list[_Tensor]]:
    """Fills one file after the other, in order."""
    files: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.nbytes for t in files[-1]) + tensor.nbytes > max_bytes:
            files.append([])
        files[-1].append(tensor)
    return files


def _write_file(f: BinaryIO, tensors: list[_Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for t in tensors:
        header[t.name] = {
            "dtype": CODES[np.dtype(t.param.dtype)],
            "shape": t.shape,
            "data_offsets": (end, end + t.nbytes),
        }
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    f.write(struct.pack("<Q", len(text)) + text)
    for t in tensors:
        _write_rows(f, t)


def _write_rows(f: BinaryIO, tensor: _Tensor) -> None:
    values = np.asarray(tensor.param)
    for start, (stop, offset) in sorted(tensor.rows.items()):
        rows = np.ascontiguousarray(values[offset : offset + stop - start])
        f.write(rows.reshape(-1).view(np.uint8))
