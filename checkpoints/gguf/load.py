"""Weights of a GGUF file onto the devices: quantised as they are stored, one tensor at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from checkpoints.gguf.blocks import PLAIN, decode
from checkpoints.gguf.model import gguf_name, norm_offset, permuted, rows_in_order
from checkpoints.gguf.reader import BlockType, Gguf, GgufTensor, open_gguf, read_rows
from checkpoints.load import flat_shardings, listed
from checkpoints.load_matrices import EMBEDDING, module, put, unlike_stages
from jaxinfer.errors import CheckpointError
from jaxinfer.models.weights import Piece, Weight
from jaxinfer.quant import dequantise, take_rows

ROWS = 8192  # of an embedding that are dequantised at once
IGNORED = {"rope_freqs.weight"}  # see `model.read_config`


def load_gguf(
    path: str | Path | Gguf,
    weights: Any,
    *,
    dtype: DTypeLike,
    head_dim: int,
    shardings: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The parameters that `weights` declares. As `checkpoints.load_params`, which see.

    Embeddings and vectors become dense, of `dtype`; matrices stay as they are stored, but for F32,
    F16 and BF16, which are cast.

    Raises:
        CheckpointError: as `open_gguf`; or tensors are missing, unused or of another shape: one
            error lists them all, before any is read.
    """
    gguf, dtype = open_gguf(path), jnp.dtype(dtype)
    leaves, treedef = jax.tree.flatten(weights)
    _check(gguf, leaves)
    sizes = [_bytes(gguf, weight, dtype) for weight in leaves]
    done, params = 0, []
    for weight, sharding, size in zip(
        leaves, flat_shardings(treedef, shardings), sizes, strict=True
    ):
        rows = [_read(gguf, piece, dtype, head_dim) for piece in weight.pieces]
        if len(weight.shape) == 1:
            params.append(jax.block_until_ready(jax.device_put(np.concatenate(rows), sharding)))
        else:
            params.append(put(rows, weight, sharding))
        done += size
        if progress is not None:
            progress(done, sum(sizes))
    return jax.tree.unflatten(treedef, params)


def stored_sizes(path: str | Path | Gguf, weights: Any, dtype: DTypeLike) -> Any:
    """Bytes that `load_gguf` will take for each weight.

    Raises:
        CheckpointError: as `load_gguf`, of what can be known before reading.
    """
    gguf = open_gguf(path)
    _check(gguf, jax.tree.leaves(weights))
    return jax.tree.map(lambda weight: _bytes(gguf, weight, jnp.dtype(dtype)), weights)


def _bytes(gguf: Gguf, weight: Weight, dtype: np.dtype) -> int:
    total = 0
    for piece in weight.pieces:
        tensor = gguf.tensors[_name(gguf, piece)]
        share = (piece.stop - piece.start) / piece.shape[0]
        if _stays(piece, tensor):
            total += round(math.prod(piece.shape) * share * _bytes_per_value(tensor.type))
        else:
            total += round(math.prod(piece.shape) * dtype.itemsize * share)
    return total


@functools.cache
def _bytes_per_value(kind: BlockType) -> float:
    """What a decoded block takes in memory."""
    block = decode(np.zeros((1, kind.size), np.uint8), kind)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(block)) / kind.values


def _stays(piece: Piece, tensor: GgufTensor) -> bool:
    """Whether a tensor stays quantised."""
    matrix = len(piece.shape) == 2 and module(piece) != EMBEDDING
    return matrix and tensor.type.name not in PLAIN


def _check(gguf: Gguf, weights: list[Weight]) -> None:
    wanted = {_name(gguf, piece): piece for weight in weights for piece in weight.pieces}
    found = [(gguf.tensors[name], p) for name, p in wanted.items() if name in gguf.tensors]
    problems = [
        listed("missing", wanted.keys() - gguf.tensors.keys()),
        listed("not part of the model", gguf.tensors.keys() - wanted.keys() - IGNORED),
        listed(
            "of another shape",
            [f"{t.name} {[*t.shape]}, not {[*p.shape]}" for t, p in found if t.shape != p.shape],
        ),
    ]
    if not any(problems):
        kinds = unlike_stages(weights, lambda piece: gguf.tensors[_name(gguf, piece)].type.name)
        problems.append(listed("stored otherwise in the next stage of a pipeline", kinds))
    if any(problems):
        raise CheckpointError(
            f"{gguf.path}: the metadata and the tensors do not agree.\n"
            + "\n".join(filter(None, problems))
        )


def _read(gguf: Gguf, piece: Piece, dtype: np.dtype, head_dim: int) -> Any:
    """A piece on the host: a quantised matrix of NumPy arrays, or a dense array of `dtype`."""
    tensor = gguf.tensors[_name(gguf, piece)]
    if len(piece.shape) == 1:
        whole = _plain(gguf, tensor, 0, 1, np.dtype(np.float32))[0]
        whole = (whole - norm_offset(gguf, tensor.name)).astype(dtype)
    elif _stays(piece, tensor):
        whole = decode(read_rows(gguf, tensor, 0, piece.shape[0]), tensor.type)
    elif tensor.type.name in PLAIN:
        whole = _plain(gguf, tensor, 0, piece.shape[0], dtype)
    else:
        whole = np.empty(piece.shape, dtype)
        for first in range(0, piece.shape[0], ROWS):
            last = min(first + ROWS, piece.shape[0])
            part = decode(read_rows(gguf, tensor, first, last), tensor.type)
            whole[first:last] = np.asarray(dequantise(part, dtype))
    rows = np.arange(piece.start, piece.stop)
    if permuted(gguf, tensor.name):
        rows = rows_in_order(piece.shape[0], head_dim)[rows]
    elif len(rows) == piece.shape[0]:
        return whole
    return take_rows(whole, rows)


def _name(gguf: Gguf, piece: Piece) -> str:
    return gguf_name(gguf.metadata["general.architecture"], piece.name)


def _plain(gguf: Gguf, tensor: GgufTensor, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
    if tensor.type.name not in PLAIN:
        raise CheckpointError(f"{gguf.path}: {tensor.name!r}: a vector of {tensor.type.name}")
    return read_rows(gguf, tensor, start, stop).view(PLAIN[tensor.type.name]).astype(dtype)
