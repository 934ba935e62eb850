"""Streams Hugging Face safetensors into device arrays.

One block of rows is on the host at a time: read, cast, sent to every device that wants a part of
it, and freed once it has arrived. Memory on the host is therefore a few blocks, whatever the
model's size, and every row is read once, however the weights are sharded.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from checkpoints.formats import Field, read_quantisation
from checkpoints.load_matrices import (
    Formats,
    bytes_of,
    fault,
    fields_of,
    find_formats,
    load_matrix,
    module,
    read_tensor,
    unlike_stages,
)  # fmt: skip
from checkpoints.safetensors_reader import Checkpoint, open_checkpoint, read_rows
from jaxinfer.errors import CheckpointError
from jaxinfer.models.weights import Piece, Weight
from jaxinfer.offload import HOST

BLOCK_BYTES = 128 * 2**20  # of one block of rows, after the cast
LISTED = 20  # names that an error message spells out of each kind
FLOATS = ("bfloat16", "float16", "float32", "float64")


def load_params(
    directory: str | Path,
    weights: Any,
    *,
    dtype: DTypeLike,
    shardings: Any = None,
    allowed_extra: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The parameters that `weights` declares, read from `directory` onto the devices.

    Args:
        directory: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        weights: pytree of `Weight`, such as `declare(config, shards)`.
        dtype: of every parameter that is not quantised; what is on disk is cast to it.
        shardings: pytree of `jax.sharding.Sharding` like `weights`; None: the default device.
        allowed_extra: regular expressions that must match the whole name of a tensor which may
            be on disk without being used.
        progress: called with (bytes done, bytes in all) of the parameters after each weight.

    Returns:
        A pytree like `weights`, of arrays that are on their devices. Matrices that `config.json`
        says are quantised are `quant.QuantisedMatrix` or `quant.Parts`.

    Raises:
        CheckpointError: as for `open_checkpoint`; or tensors are missing, unused, of another
            shape or dtype: one error lists them all, before any is read. Or quantised ones do not
            make a matrix, or are split where they cannot be.
        UnsupportedModel: as `formats.read_quantisation`.
    """
    checkpoint = open_checkpoint(directory)
    leaves, treedef = jax.tree.flatten(weights)
    formats = find_formats(checkpoint, leaves, read_quantisation(directory))
    check(checkpoint, leaves, allowed_extra, formats)
    places = flat_shardings(treedef, shardings)
    dtype = jnp.dtype(dtype)
    sizes = [math.prod(weight.shape) * dtype.itemsize for weight in leaves]
    done, params = 0, []
    for weight, sharding, size in zip(leaves, places, sizes, strict=True):
        if quantised(weight, formats):
            params.append(load_matrix(checkpoint, weight, formats, dtype, sharding))
        else:
            params.append(_load_weight(checkpoint, weight, dtype, sharding))
        done += size
        if progress is not None:
            progress(done, sum(sizes))
    return jax.tree.unflatten(treedef, params)


def quantised(weight: Weight, formats: Formats) -> bool:
    """Whether some piece of `weight` is."""
    return any(module(piece) in formats for piece in weight.pieces)


def stored_sizes(directory: str | Path, weights: Any, dtype: DTypeLike) -> Any:
    """Bytes that `load_params` will take for each weight; about, where something is quantised.

    Where `config.json` says that nothing is, no other file is looked at.

    Raises:
        CheckpointError, UnsupportedModel: as `load_params`, of what can be known before reading.
    """
    width, quantisation = jnp.dtype(dtype).itemsize, read_quantisation(directory)
    if quantisation is None:
        return jax.tree.map(lambda weight: math.prod(weight.shape) * width, weights)
    checkpoint = open_checkpoint(directory)
    formats = find_formats(checkpoint, jax.tree.leaves(weights), quantisation)

    def size(weight: Weight) -> int:
        if quantised(weight, formats):
            return bytes_of(checkpoint, weight)
        return math.prod(weight.shape) * width

    return jax.tree.map(size, weights)


def check(
    checkpoint: Checkpoint,
    weights: Iterable[Weight],
    allowed_extra: Sequence[str],
    formats: Formats | None = None,
) -> None:
    """Raises one `CheckpointError` that lists whatever keeps `weights` from being read."""
    tensors, formats, weights = checkpoint.tensors, formats or {}, list(weights)

    def kind(piece: Piece) -> str:
        return formats[module(piece)].name if module(piece) in formats else "dense"

    wanted: dict[str, Field] = {}
    for weight in weights:
        for piece in weight.pieces:
            if module(piece) in formats and piece.name.endswith(".weight"):
                wanted |= fields_of(piece, formats[module(piece)])
            else:
                wanted[piece.name] = Field((piece.shape,), FLOATS)
    extra = tensors.keys() - wanted.keys()
    unused = [n for n in extra if not any(re.fullmatch(p, n) for p in allowed_extra)]
    unused = [n for n in unused if not _no_bias(checkpoint, n, formats)]
    found = [(tensors[name], field) for name, field in wanted.items() if name in tensors]
    missing = {n for n, field in wanted.items() if n not in tensors and not field.optional}
    problems = [
        listed("missing", missing),
        listed("not part of the model", unused),
        listed("of another shape or dtype", filter(None, (fault(t, f) for t, f in found))),
        listed("stored otherwise in the next stage of a pipeline", unlike_stages(weights, kind)),
    ]
    if any(problems):
        raise CheckpointError(
            f"{checkpoint.directory}: config.json and the weights do not agree.\n"
            + "\n".join(filter(None, problems))
        )


def _no_bias(checkpoint: Checkpoint, name: str, formats: Formats) -> bool:
    """Whether a tensor is a bias of zeros, which some tools write beside every matrix."""
    tensor = checkpoint.tensors[name]
    if name.removesuffix(".bias") not in formats or len(tensor.shape) != 1:
        return False
    return not read_tensor(tensor).any()


def flat_shardings(treedef: Any, shardings: Any) -> list[jax.sharding.Sharding]:
    """One sharding a leaf of `treedef`; where `shardings` is None, the default device's."""
    if shardings is None:
        return [jnp.zeros(()).sharding] * treedef.num_leaves
    return treedef.flatten_up_to(shardings)


def listed(what: str, items: Iterable[str]) -> str:
    """One line: how many items there are, and the first of them; "" where there is none."""
    items = sorted(items)
    if not items:
        return ""
    more = f"; and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return f"{len(items)} {what}: {'; '.join(items[:LISTED])}{more}"


def _load_weight(
    checkpoint: Checkpoint, weight: Weight, dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
    """Builds the addressable shards of one weight, block by block, and joins them."""
    if sharding.memory_kind == HOST:  # where nothing is computed, and so nothing joined
        whole = _read_weight_rows(checkpoint, weight, 0, weight.shape[0], dtype)
        return jax.block_until_ready(jax.device_put(whole, sharding))
    indices = sharding.addressable_devices_indices_map(weight.shape)
    row_bytes = math.prod(weight.shape[1:]) * dtype.itemsize
    block = max(1, BLOCK_BYTES // max(1, row_bytes))
    by_rows: dict[tuple[int, int], list[tuple[Any, tuple[slice, ...]]]] = {}
    for device, index in indices.items():
        assert index is not None, "a weight has at least one dimension"
        start, stop, _ = index[0].indices(weight.shape[0])
        by_rows.setdefault((start, stop), []).append((device, index[1:]))
    shards: dict[Any, jax.Array] = {}
    for (start, stop), wanted in by_rows.items():
        for first in range(start, stop, block):
            rows = _read_weight_rows(checkpoint, weight, first, min(first + block, stop), dtype)
            for device, columns in wanted:
                part = jax.device_put(np.ascontiguousarray(rows[:, *columns]), device)
                if len(part) < stop - start:
                    part = _placed(shards.get(device), part, first - start, stop - start)
                # Unbounded, the transfers in flight would hold the whole model on the host.
                shards[device] = part.block_until_ready()
    return jax.make_array_from_single_device_arrays(
        weight.shape, sharding, [shards[device] for device in indices]
    )


def _read_weight_rows(
    checkpoint: Checkpoint, weight: Weight, start: int, stop: int, dtype: np.dtype
) -> np.ndarray:
    """Rows `start` to `stop` of a weight, out of its pieces, in a buffer of their own."""
    out = _aligned_empty((stop - start, *weight.shape[1:]), dtype)
    first = 0  # the row of the weight at which the piece begins
    for piece in weight.pieces:
        low, high = max(start, first), min(stop, first + _length(piece))
        if low < high:
            rows = out[low - start : high - start]
            read_rows(checkpoint.tensors[piece.name], piece.start + low - first, rows)
        first += _length(piece)
    return out


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty` at a multiple of 64 bytes, which XLA on CPU takes over instead of copying."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size].view(dtype).reshape(shape)


def _length(piece: Piece) -> int:
    return piece.stop - piece.start


def _placed(shard: jax.Array | None, part: jax.Array, row: int, rows: int) -> jax.Array:
    """`shard`, or zeros of `rows` rows on the device of `part`, with `part` at row `row`."""
    if shard is None:
        shard = jnp.zeros((rows, *part.shape[1:]), part.dtype, device=part.sharding)
    return _place(shard, part, row)


@functools.partial(jax.jit, donate_argnums=0)
def _place(shard: jax.Array, part: jax.Array, row: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(shard, part, row, 0)
