"""Quantised matrices from the tensors of a checkpoint: found, checked, decoded, fused, placed.

One module at a time is on the host. Decoding keeps what is published: codes are rearranged, never
dequantised and rounded anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    stack_stages,
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


def unlike_stages(weights: Iterable[Weight], kind: Callable[[Piece], str]) -> list[str]:
    """What is of one kind in a stage of a pipeline and of another in the next, which a program that
    all stages run does not allow.

    Args:
        kind: how a piece is stored.
    """
    found = []
    for weight in weights:
        count = len(weight.pieces) // weight.stages
        for piece, other in zip(weight.pieces, weight.pieces[count:], strict=False):
            if kind(piece) != kind(other):
                found.append(f"{piece.name} {kind(piece)}, {other.name} {kind(other)}")
    return found


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
    return put(rows, weight, sharding)


def put(pieces: Sequence[Any], weight: Weight, sharding: jax.sharding.Sharding) -> Any:
    """The matrix of a weight's pieces on its devices, split as the dense `weight` would be by
    `sharding`, for as many shards as which it is declared.

    Raises:
        CheckpointError: its groups do not allow it, or it is stored otherwise in another stage.
    """
    shards, count = shards_of(sharding) // weight.stages, len(pieces) // weight.stages
    stages = [pieces[i : i + count] for i in range(0, len(pieces), count)]
    # What is not fused is one piece, however it is split.
    each = [join_rows(one) if count == 1 else join_shards(one, shards) for one in stages]
    places = shardings_of(each[0], weight, sharding)
    try:
        matrix = each[0] if weight.stages == 1 else stack_stages(each)
    except ValueError as error:
        names = ", ".join(piece.name for piece in weight.pieces[::count])
        raise CheckpointError(f"{names}: {error}") from None
    return jax.block_until_ready(jax.device_put(matrix, places))


def shards_of(sharding: jax.sharding.Sharding) -> int:
    """Into how many different parts a weight is split."""
    if not isinstance(sharding, NamedSharding):
        return 1
    axes = (axis if isinstance(axis, tuple) else (axis,) for axis in sharding.spec)
    return math.prod(sharding.mesh.shape[name] for axis in axes for name in axis if name)


def shardings_of(matrix: Any, weight: Weight, sharding: jax.sharding.Sharding) -> Any:
    """Where each array of a matrix, that of one stage, lies; see `quant.partition`. Of an array:
    `sharding`.

    Raises:
        CheckpointError: its groups do not allow the split.
    """
    if not isinstance(matrix, QuantisedMatrix | Parts):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(partial(place_of, sharding), matrix)
    rows, columns = (*sharding.spec, None, None)[:2]
    stage = None
    if weight.stages > 1:
        stage, *inner = rows if isinstance(rows, tuple) else (rows,)
        rows = tuple(inner) or None
    shards = shards_of(sharding) // weight.stages
    try:
        specs = partition(matrix, PartitionSpec(rows, columns), shards, stage)
    except ValueError as error:
        raise CheckpointError(f"{weight.pieces[0].name}: {error}") from None
    mesh, kind = sharding.mesh, sharding.memory_kind
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
