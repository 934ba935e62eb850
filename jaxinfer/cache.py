"""The paged KV cache: a pytree of page pools, one pair of arrays a layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from pallas_kernels.kv_quantise import LARGEST, Pools

TRASH_PAGE = 0  # what inert tokens write to; never granted to a sequence

Scales = tuple[jax.Array, ...]

# Of `EngineOptions.kv_cache_dtype`; `auto` is the model's own dtype.
KV_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "fp8_e4m3": jnp.float8_e4m3fn}


class PagedCache(NamedTuple):
    """Keys and values, one array a layer, [num_pages, kv_heads, page_size, head_dim].

    One array a layer, not one for all: a kernel updates it in place, and slicing a stacked array
    would copy it.

    `k_scales`, `v_scales`: of quantised pages (int8, float8_e4m3fn), one float32 array a layer:
    [num_pages, kv_heads, page_size], or [kv_heads] where the scales were calibrated beforehand
    (`pallas_kernels.qkv_write`). None for float pages.

    `tokens`: int32 [num_pages, page_size], the tokens themselves; None where nobody asks for them:
    speculation does, which looks for repeats or has another model read them.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    k_scales: Scales | None = None
    v_scales: Scales | None = None
    tokens: jax.Array | None = None


def resolve_kv_dtype(kv_cache_dtype: str, dtype: Any) -> Any:
    """What the pages hold under an engine's `kv_cache_dtype`, for a model of `dtype`."""
    return jnp.dtype(KV_DTYPES.get(kv_cache_dtype, dtype))


def init_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    kv_dtype: Any,
    *,
    scales: tuple[Scales, Scales] | None = None,
    with_tokens: bool = False,
) -> PagedCache:
    """A zeroed cache of `num_pages` pages, the trash page included.

    Args:
        kv_dtype: what the pages hold: a float type, int8 or float8_e4m3fn.
        scales: calibrated scales of keys and of values, float32 [kv_heads] a layer, for quantised
            pages. None: every token and head gets its own.
        with_tokens: whether it keeps the tokens too.
    """
    shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)

    def pools(shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    if jnp.dtype(kv_dtype) in LARGEST and scales is None:
        scales = (pools(shape[:3], jnp.float32), pools(shape[:3], jnp.float32))
    tokens = jnp.zeros((num_pages, page_size), jnp.int32) if with_tokens else None
    return PagedCache(
        pools(shape, kv_dtype), pools(shape, kv_dtype), *(scales or (None, None)), tokens=tokens
    )


def split_layers(cache: PagedCache) -> list[Pools]:
    """(k, v, k_scales, v_scales) of each layer, as `qkv_write` takes and returns them."""
    none = [None] * len(cache.k)
    scales = (cache.k_scales or none, cache.v_scales or none)
    return list(zip(cache.k, cache.v, *scales, strict=True))


def join_layers(layers: list[Pools], tokens: jax.Array | None = None) -> PagedCache:
    """The cache that `split_layers` takes apart, but for its tokens."""
    k, v, k_scales, v_scales = zip(*layers, strict=True)
    quantised = k_scales[0] is not None
    scales = (k_scales, v_scales) if quantised else (None, None)
    return PagedCache(k, v, *scales, tokens=tokens)


def note_tokens(tokens: jax.Array | None, kv_index: jax.Array, new: jax.Array) -> jax.Array | None:
    """`PagedCache.tokens` with tokens `new` in the slots `kv_index`, of the same shape."""
    if tokens is None:
        return None
    return tokens.reshape(-1).at[kv_index].set(new).reshape(tokens.shape)


def page_bytes(config: ModelConfig, page_size: int, kv_dtype: Any) -> int:
    """Bytes that one page takes over all layers, keys and values and their scales."""
    kv_dtype = jnp.dtype(kv_dtype)
    row = config.head_dim * kv_dtype.itemsize + 4 * (kv_dtype in LARGEST)
    return 2 * config.num_layers * config.num_kv_heads * page_size * row
