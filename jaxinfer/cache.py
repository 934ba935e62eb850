"""The paged KV cache: a pytree of page pools, one pair of arrays a layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig

TRASH_PAGE = 0  # what inert tokens write to; never granted to a sequence


class PagedCache(NamedTuple):
    """Keys and values, one array a layer, [num_pages, kv_heads, page_size, head_dim].

    One array a layer, not one for all: a kernel updates it in place, and slicing a stacked array
    would copy it.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def init_cache(config: ModelConfig, num_pages: int, page_size: int, dtype: Any) -> PagedCache:
    """A zeroed cache of `num_pages` pages, the trash page included."""
    shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)

    def pools() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    return PagedCache(pools(), pools())


def page_bytes(config: ModelConfig, page_size: int, dtype: Any) -> int:
    """Bytes that one page takes over all layers, keys and values."""
    tokens = 2 * config.num_layers * config.num_kv_heads * config.head_dim * page_size
    return tokens * jnp.dtype(dtype).itemsize


def write(pages: jax.Array, new: jax.Array, kv_index: jax.Array) -> jax.Array:
    """Writes new [T, kv_heads, head_dim] at flat slots kv_index [T] = page * page_size + slot.

    Only slots of the trash page may occur more than once.
    """
    page_size = pages.shape[2]
    # Duplicates exist in the trash page alone, where any winner will do, so the indices may be
    # called unique: XLA then stores directly instead of serialising the updates.
    return pages.at[kv_index // page_size, :, kv_index % page_size].set(
        new.astype(pages.dtype), unique_indices=True, mode="promise_in_bounds"
    )
