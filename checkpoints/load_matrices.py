"""Quantised matrices from the tensors of a checkpoint: found, checked, decoded, fused, placed.

One module at a time is on the host. Decoding keeps what is published: codes are rearranged, never
dequantised and rounded anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints.formats import Field, Format, Quantisation
from checkpoints.safetensors_reader import Checkpoint, Tensor, read_rows, read_scalar
from jaxinfer.errors import CheckpointError
from jaxinfer.models.weights import Piece, Weight
from jaxinfer.offload import place_of
from jaxinfer.quant import (
    Parts,
    QuantisedMatrix,
    join_rows,
    join_shards,
    partition,
    take_rows,
)  # fmt: skip

EMBEDDING = "model.embed_tokens"
Formats = Mapping[str, Format]  # of the modules that are not dense


def module(piece: Piece) -> str:
    """`model.layers.0.mlp.up_proj` of its `.weight`."""
    return piece.name.removesuffix(".weight")


def find_formats(
    checkpoint: Checkpoint, weights: Iterable[Weight], quantisation: Quantisation | None
) -> dict[str, Format]:
    """How each module of `weights` is stored that is not dense."""
    if quantisation is None:
        return {}
    found = {}
    for weight in weights:
        for piece in weight.pieces:
            name = module(piece)
            if len(piece.shape) != 2 or name == EMBEDDING or name in found:
                continue
            kind = quantisation(name, checkpoint.tensors)
            if kind is not None:
                found[name] = kind
    return found


def fields_of(piece: Piece, kind: Format) -> dict[str, Field]:
    """By full name, the tensors that a quantised piece is stored as.

    Raises:
        CheckpointError: its format cannot store a matrix of this shape.
    """
    N, K = piece.shape
    if K % 2:
        raise CheckpointError(f"{piece.name}: {kind.name} of an odd number of columns, {K}")
    return {f"{module(piece)}.{suffix}": f for suffix, f in kind.fields(N, K).items()}


def fault(tensor: Tensor, wanted: Field) -> str:
    """What is wrong with a tensor; "" where nothing is."""
    if tensor.shape not in wanted.shapes:
        shapes = " or ".join(str([*s]) for s in wanted.shapes[:3])
        return f"{tensor.name} {[*tensor.shape]}, not {shapes}"
    if tensor.dtype.name not in wanted.dtypes:
        return f"{tensor.name} {tensor.dtype}, not {' or '.join(wanted.dtypes)}"
    return ""


def read_tensor(tensor: Tensor) -> np.ndarray:
    """All of a tensor. Raises `CheckpointError` as `read_rows` does."""
    if not tensor.shape:
        return read_scalar(tensor)
    out = np.empty(tensor.shape, tensor.dtype)
    read_rows(tensor, 0, out)
    return out


def bytes_of(checkpoint: Checkpoint, weight: Weight) -> int:
    """Bytes on disk of a weight of which some piece is quantised: about what it takes when read."""
    total = 0
    for name in {module(piece) for piece in weight.pieces}:
        mine = (t for t in checkpoint.tensors.values() if t.name.startswith(name + "."))
        total += sum(t.stop - t.start for t in mine)
    return total


def load_matrix(
    checkpoint: Checkpoint,
    weight: Weight,
    formats: Formats,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> Any:
    """One weight of which some piece is quantised, on its devices.

    Raises:
        CheckpointError: contents that are no such matrix, or a split that its groups do not allow.
    """
    rows = [_read(checkpoint, piece, formats, dtype) for piece in weight.pieces]
    return put(joined(rows, sharding), weight, sharding)


def joined(pieces: Sequence[Any], sharding: jax.sharding.Sharding) -> Any:
    """The matrix of a weight's pieces, which are declared for as many shards as it is split in."""
    # What is not fused is one piece, however it is split.
    return join_rows(pieces) if len(pieces) == 1 else join_shards(pieces, shards_of(sharding))


def shards_of(sharding: jax.sharding.Sharding) -> int:
    """Into how many different parts a weight is split."""
    if not isinstance(sharding, NamedSharding):
        return 1
    return math.prod(sharding.mesh.shape[axis] for axis in sharding.spec if isinstance(axis, str))


def put(matrix: Any, weight: Weight, sharding: jax.sharding.Sharding) -> Any:
    """An array or matrix on its devices, split as the dense `weight` would be by `sharding`.

    Raises:
        CheckpointError: its groups do not allow it.
    """
    places = shardings_of(matrix, weight, sharding)
    return jax.block_until_ready(jax.device_put(matrix, places))


def shardings_of(matrix: Any, weight: Weight, sharding: jax.sharding.Sharding) -> Any:
    """Where each array of a matrix lies; see `quant.partition`. Of an array: `sharding`.

    Raises:
        CheckpointError: its groups do not allow the split.
    """
    if not isinstance(matrix, QuantisedMatrix | Parts):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(partial(place_of, sharding), matrix)
    mesh = sharding.mesh
    try:
        specs = partition(matrix, PartitionSpec(*sharding.spec), shards_of(sharding))
    except ValueError as error:
        raise CheckpointError(f"{weight.pieces[0].name}: {error}") from None
    kind = sharding.memory_kind
    return jax.tree.map(
        lambda x, spec: place_of(NamedSharding(mesh, spec, memory_kind=kind), x), matrix, specs
    )


def _read(checkpoint: Checkpoint, piece: Piece, formats: Formats, dtype: np.dtype) -> Any:
    """A piece on the host: a quantised matrix of NumPy arrays, or a dense one of `dtype`."""
    name = module(piece)
    rows = slice(piece.start, piece.stop)
    if name not in formats:
        out = np.empty((piece.stop - piece.start, *piece.shape[1:]), dtype)
        read_rows(checkpoint.tensors[piece.name], piece.start, out)
        return out
    kind = formats[name]
    suffixes = kind.fields(*piece.shape)
    arrays = {
        suffix: read_tensor(checkpoint.tensors[f"{name}.{suffix}"])
        for suffix in suffixes
        if f"{name}.{suffix}" in checkpoint.tensors
    }
    try:
        matrix = kind.decode(arrays, *piece.shape)
    except ValueError as error:
        raise CheckpointError(f"{name}: {kind.name}: {error}") from None
    whole = (piece.start, piece.stop) == (0, piece.shape[0])
    return matrix if whole else take_rows(matrix, rows)
