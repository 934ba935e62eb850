"""What lies between the product that makes queries, keys and values, and attention over the cache.

A bias is added, heads are normalised and rotated, and keys and values are written into the pages of
a KV cache, quantised on the way. `qkv_write` is the op: it checks its arguments and picks a
backend. `reference` is the definition, in plain jnp: `prepare`, then `store`. `qkv_write_mosaic` is
one kernel for all of it, which writes the pages in place.

Shapes: T new tokens, H query heads, K key/value heads, D head dim, N pages of page_size slots.
A page type is what the pages hold: a float type, which values are cast to, or int8 or
float8_e4m3fn, which stand for `page.astype(float32) * scale`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.device import capability, has_kernels
from pallas_kernels.kv_quantise import LARGEST, Pools, quantise
from pallas_kernels.qkv_heads import Heads, prepare

Backend = Literal["auto", "reference", "mosaic"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "mosaic")

MOSAIC_DIMS = (32, 64, 128, 256)  # a warp holds half a row


def qkv_write(
    pools: Pools,
    qkv: jax.Array,
    kv_index: jax.Array,
    heads: Heads = Heads(),  # noqa: B008
    *,
    backend: Backend = "auto",
) -> tuple[jax.Array, Pools]:
    """Writes T tokens' keys and values, in place where the caller gives the pools away.

    Args:
        pools: k_pages, v_pages, k_scales, v_scales. Pages [N, K, page_size, D], of one page type.
            Scales for quantised pages, float32. [N, K, page_size]: every token and head has its own
            scale, chosen here (`quantise`). [K]: given scales, which stay as they are; what is
            beyond them saturates. None for float pages.
        qkv: [T, (H + 2K) * D], a float type: query heads, key heads, value heads.
        kv_index: int32 [T], the slot page * page_size + slot of each token. Only slots of page 0,
            the trash page, may occur more than once. Not checked: they lie in the pools.
        heads: what is done to them before.
        backend: `mosaic`: one kernel launch, on a GPU from sm_80 on (or in Pallas's GPU
            interpreter), for head dims in `MOSAIC_DIMS`; a token's bits depend on that token alone.
            `auto` is that where it can run, and `reference` elsewhere. They differ by roundings.

    Returns:
        Queries [T, H, D], as qkv, and the pools, written.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit, named with what would.
    """
    _check(pools, qkv, kv_index, heads, backend)
    if _choose(backend, pools[0].shape[3]) == "reference":
        return reference(pools, qkv, kv_index, heads)
    from pallas_kernels import qkv_write_mosaic  # importing Mosaic changes the environment

    return qkv_write_mosaic.write(pools, qkv, kv_index, heads)


def _choose(backend: Backend, D: int) -> Backend:
    fits = D in MOSAIC_DIMS
    if backend == "mosaic" and not fits:
        raise ValueError(f"backend='mosaic': the pages have D={D}, expected {MOSAIC_DIMS}")
    if backend != "auto":
        return backend
    return "mosaic" if fits and has_kernels(capability()) else "reference"


def reference(
    pools: Pools, qkv: jax.Array, kv_index: jax.Array, heads: Heads
) -> tuple[jax.Array, Pools]:
    """The definition of `qkv_write`; same arguments."""
    K, D = pools[0].shape[1], pools[0].shape[3]
    q, k, v = prepare(qkv, qkv.shape[-1] // D - 2 * K, K, heads)
    return q, store(pools, k, v, kv_index)


def store(pools: Pools, k_new: jax.Array, v_new: jax.Array, kv_index: jax.Array) -> Pools:
    """Keys and values [T, K, D] into their slots."""
    k_pages, v_pages, k_scales, v_scales = pools
    page, slot = jnp.divmod(kv_index, k_pages.shape[2])

    def put(pool: jax.Array, new: jax.Array) -> jax.Array:
        # Duplicates exist in the trash page alone, where any winner will do, so the indices may be
        # called unique: XLA then stores directly instead of serialising the updates.
        return pool.at[page, :, slot].set(new, unique_indices=True, mode="promise_in_bounds")

    def write(
        pages: jax.Array, scales: jax.Array | None, new: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        if scales is None:
            return put(pages, new.astype(pages.dtype)), None
        if scales.ndim == 1:
            return put(pages, quantise(new, pages.dtype, scales)[0]), scales
        values, scale = quantise(new, pages.dtype)
        return put(pages, values), put(scales, scale)

    k_pages, k_scales = write(k_pages, k_scales, k_new)
    v_pages, v_scales = write(v_pages, v_scales, v_new)
    return k_pages, v_pages, k_scales, v_scales


# -- checks -------------------------------------------------------------------------------------


def _check(pools: Pools, qkv: jax.Array, kv_index: jax.Array, heads: Heads, backend: str) -> None:
    k_pages, v_pages, k_scales, v_scales = pools
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    if k_pages.ndim != 4 or qkv.ndim != 2:
        raise ValueError(
            "expected k_pages [N, K, page_size, D] and qkv [T, (H + 2K) * D]; got "
            f"{k_pages.shape} and {qkv.shape}"
        )
    _, K, _, D = k_pages.shape
    if (k_pages.shape, k_pages.dtype) != (v_pages.shape, v_pages.dtype):
        raise ValueError(
            f"k_pages and v_pages must have one shape and dtype; got {k_pages.shape} "
            f"{k_pages.dtype} and {v_pages.shape} {v_pages.dtype}"
        )
    if qkv.shape[1] % D or qkv.shape[1] // D <= 2 * K:
        raise ValueError(f"qkv is {qkv.shape}: expected [T, (H + {2 * K}) * {D}] with H > 0")
    if not jnp.issubdtype(qkv.dtype, jnp.floating) or qkv.dtype.itemsize < 2:
        raise ValueError(f"qkv is {qkv.dtype}: expected bfloat16, float16 or float32")
    if kv_index.shape != qkv.shape[:1] or kv_index.dtype != jnp.int32:
        raise ValueError(
            f"kv_index is {kv_index.dtype} {kv_index.shape}: expected int32 [{qkv.shape[0]}]"
        )
    check_scales(k_pages, k_scales, v_scales)
    _check_heads(heads, qkv, D)


def _check_heads(heads: Heads, qkv: jax.Array, D: int) -> None:
    if (heads.q_norm is None) != (heads.k_norm is None):
        raise ValueError("expected q_norm and k_norm, or neither")
    tables = heads.rope or (None, None)
    table = (qkv.shape[0], D // 2), jnp.dtype(jnp.float32)
    for name, x, shape, dtype in (
        ("bias", heads.bias, qkv.shape[1:], qkv.dtype),
        ("q_norm", heads.q_norm, (D,), qkv.dtype),
        ("k_norm", heads.k_norm, (D,), qkv.dtype),
        ("cos", tables[0], *table),
        ("sin", tables[1], *table),
    ):
        if x is not None and (x.shape, x.dtype) != (shape, dtype):
            raise ValueError(f"{name} is {x.dtype} {x.shape}: expected {dtype} {shape}")
    if heads.rope is not None and D % 2:
        raise ValueError(f"the pages have D={D}: expected an even one, for rope")


def check_scales(
    k_pages: jax.Array, k_scales: jax.Array | None, v_scales: jax.Array | None
) -> None:
    """That scales are given for quantised pages alone, and have one of the two shapes.

    Raises:
        ValueError: they do not fit, named with what would.
    """
    N, K, page_size, _ = k_pages.shape
    if k_pages.dtype not in LARGEST:
        if not jnp.issubdtype(k_pages.dtype, jnp.floating) or k_pages.dtype.itemsize < 2:
            raise ValueError(
                f"k_pages is {k_pages.dtype}: expected bfloat16, float16, float32, int8 or "
                "float8_e4m3fn"
            )
        if k_scales is not None or v_scales is not None:
            raise ValueError(f"k_scales and v_scales must be None for pages of {k_pages.dtype}")
        return
    if k_scales is None or v_scales is None:
        raise ValueError(f"pages of {k_pages.dtype} need k_scales and v_scales")
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if scales.dtype != jnp.float32 or scales.shape not in ((N, K, page_size), (K,)):
            raise ValueError(
                f"{name} is {scales.dtype} {scales.shape}: expected float32 "
                f"[{N}, {K}, {page_size}] or [{K}]"
            )
    if k_scales.shape != v_scales.shape:
        raise ValueError(f"k_scales {k_scales.shape} and v_scales {v_scales.shape} differ")
