"""What the host tells the device of a step, as one array: a transfer instead of some thirty.

`flatten` lays the leaves of a pytree of 32-bit numbers and flags one after the other; `unpack`,
inside the compiled step, takes them apart again. How they lie is part of the packed value's type,
so that a program compiled for one layout takes no other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxinfer.parallel import put

FLAG = np.dtype(bool)
WORDS = {np.dtype(t) for t in (np.int32, np.uint32, np.float32)}


@dataclass(frozen=True)
class Layout:
    """Of a pytree. `leaves`: shape and dtype of each."""

    tree: Any
    leaves: tuple[tuple[tuple[int, ...], np.dtype], ...]


@dataclass(frozen=True)
class Packed:
    """`words`: uint32 [n], all leaves; int32 and float32 by their bits, a flag in a word each."""

    words: Any
    layout: Layout


jax.tree_util.register_dataclass(Packed, data_fields=["words"], meta_fields=["layout"])


def pack(tree: Any, place: jax.sharding.Sharding | None = None) -> Packed:
    """`flatten`, on its way to the device, or to `place`."""
    return send(flatten(tree), place)


def send(packed: Packed, place: jax.sharding.Sharding | None = None) -> Packed:
    """What is on the host, on its way to the device, or to `place`."""
    # What NumPy arrays a compiled program is given, it waits for: the transfer is asked for here.
    return Packed(put(packed.words, place), packed.layout)


def flatten(tree: Any) -> Packed:
    """A pytree of NumPy arrays and scalars, on the host.

    Raises:
        ValueError: a leaf that is not bool, int32, uint32 or float32.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    layout = Layout(structure, tuple((x.shape, x.dtype) for x in arrays))
    return Packed(np.concatenate([_words(x) for x in arrays]), layout)


def unpack(packed: Packed) -> Any:
    """The pytree of which `flatten` made this, of device arrays."""
    leaves, at = [], 0
    for shape, dtype in packed.layout.leaves:
        size = math.prod(shape)
        words = packed.words[at : at + size].reshape(shape)
        leaves.append(words != 0 if dtype == FLAG else lax.bitcast_convert_type(words, dtype))
        at += size
    return jax.tree.unflatten(packed.layout.tree, leaves)


def _words(x: np.ndarray) -> np.ndarray:
    if x.dtype == FLAG:
        return x.ravel().astype(np.uint32)
    if x.dtype not in WORDS:
        raise ValueError(f"{x.dtype} {x.shape}: expected bool, int32, uint32 or float32")
    return x.ravel().view(np.uint32)
