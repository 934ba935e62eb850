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

from checkpoints.safetensors_reader import Checkpoint, open_checkpoint, read_rows
from jaxinfer.errors import CheckpointError
from jaxinfer.models.weights import Piece, Weight

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
        dtype: of every parameter; what is on disk is cast to it.
        shardings: pytree of `jax.sharding.Sharding` like `weights`; None: the default device.
        allowed_extra: regular expressions that must match the whole name of a tensor which may
            be on disk without being used.
        progress: called with (bytes done, bytes in all) of the parameters after each weight.

    Returns:
        A pytree like `weights`, of arrays that are on their devices.

    Raises:
        CheckpointError: as for `open_checkpoint`; or tensors are missing, unused, of another
            shape or not floating point: one error lists them all, before any is read.
    """
    checkpoint = open_checkpoint(directory)
    leaves, treedef = jax.tree.flatten(weights)
    check(checkpoint, leaves, allowed_extra)
    places = flat_shardings(treedef, shardings)
    dtype = jnp.dtype(dtype)
    sizes = [math.prod(weight.shape) * dtype.itemsize for weight in leaves]
    done, params = 0, []
    for weight, sharding, size in zip(leaves, places, sizes, strict=True):
        params.append(_load_weight(checkpoint, weight, dtype, sharding))
        done += size
        if progress is not None:
            progress(done, sum(sizes))
    return jax.tree.unflatten(treedef, params)


def check(checkpoint: Checkpoint, weights: Iterable[Weight], allowed_extra: Sequence[str]) -> None:
    """Raises one `CheckpointError` that lists whatever keeps `weights` from being read."""
    tensors = checkpoint.tensors
    wanted = {piece.name: piece for weight in weights for piece in weight.pieces}
    extra = tensors.keys() - wanted.keys()
    unused = [n for n in extra if not any(re.fullmatch(p, n) for p in allowed_extra)]
    found = [(tensors[name], piece) for name, piece in wanted.items() if name in tensors]
    problems = [
        listed("missing", wanted.keys() - tensors.keys()),
        listed("not part of the model", unused),
        listed(
            "of another shape",
            [f"{t.name} {[*t.shape]}, not {[*p.shape]}" for t, p in found if t.shape != p.shape],
        ),
        listed(
            "not floating point (quantised formats are not supported yet)",
            [f"{t.name} {t.dtype}" for t, _ in found if t.dtype.name not in FLOATS],
        ),
    ]
    if any(problems):
        raise CheckpointError(
            f"{checkpoint.directory}: config.json and the weights do not agree.\n"
            + "\n".join(filter(None, problems))
        )


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
