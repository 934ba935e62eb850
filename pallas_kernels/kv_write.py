"""Writes new keys and values into the pages of a KV cache, quantising them on the way.

`kv_write` is the op: it checks its arguments and picks a backend. `reference` is the definition,
in plain jnp; `kv_write_mosaic` is one kernel that writes keys, values and their scales in place.

Shapes: T new tokens, K key/value heads, D head dim, N pages of page_size slots.
A page type is what the pages hold: a float type, which values are cast to, or int8 or
float8_e4m3fn, which stand for `page.astype(float32) * scale`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.device import capability, has_kernels
from pallas_kernels.kv_quantise import LARGEST, Pools, quantise

Backend = Literal["auto", "reference", "mosaic"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "mosaic")

MOSAIC_DIMS = (32, 64, 128, 256)  # a warp holds a row: whole registers in each of its 32 lanes


def kv_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k_scales: jax.Array | None,
    v_scales: jax.Array | None,
    k_new: jax.Array,
    v_new: jax.Array,
    kv_index: jax.Array,
    *,
    backend: Backend = "auto",
) -> Pools:
    """Writes T tokens' keys and values; in place where the caller gives the pools away.

    Args:
        k_pages, v_pages: [N, K, page_size, D], of one page type.
        k_scales, v_scales: for quantised pages, float32. [N, K, page_size]: every token and head
            has its own scale, chosen here (`quantise`). [K]: given scales, which stay as they are;
            what is beyond them saturates. None for float pages.
        k_new, v_new: [T, K, D], a float type.
        kv_index: int32 [T], the slot page * page_size + slot of each token. Only slots of page 0,
            the trash page, may occur more than once. Not checked: they lie in the pools.
        backend: `mosaic`: one kernel launch, on a GPU from sm_80 on (or in Pallas's GPU
            interpreter), for head dims in `MOSAIC_DIMS`. `auto` is that where it can run, and
            `reference` elsewhere; both write the same values.

    Returns:
        (k_pages, v_pages, k_scales, v_scales), written.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit, named with what would.
    """
    _check(k_pages, v_pages, k_scales, v_scales, k_new, v_new, kv_index, backend)
    if _choose(backend, k_new.shape[2]) == "reference":
        return reference(k_pages, v_pages, k_scales, v_scales, k_new, v_new, kv_index)
    from pallas_kernels import kv_write_mosaic  # importing Mosaic changes the environment

    return kv_write_mosaic.write(k_pages, v_pages, k_scales, v_scales, k_new, v_new, kv_index)


def _choose(backend: Backend, D: int) -> Backend:
    fits = D in MOSAIC_DIMS
    if backend == "mosaic" and not fits:
        raise ValueError(f"backend='mosaic': k_new has D={D}, expected {MOSAIC_DIMS}")
    if backend != "auto":
        return backend
    return "mosaic" if fits and has_kernels(capability()) else "reference"


def reference(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k_scales: jax.Array | None,
    v_scales: jax.Array | None,
    k_new: jax.Array,
    v_new: jax.Array,
    kv_index: jax.Array,
) -> Pools:
    """The definition of `kv_write`; same arguments."""
    page, slot = jnp.divmod(kv_index, k_pages.shape[2])

    def store(pool: jax.Array, new: jax.Array) -> jax.Array:
        # Duplicates exist in the trash page alone, where any winner will do, so the indices may be
        # called unique: XLA then stores directly instead of serialising the updates.
        return pool.at[page, :, slot].set(new, unique_indices=True, mode="promise_in_bounds")

    def write(
        pages: jax.Array, scales: jax.Array | None, new: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        if scales is None:
            return store(pages, new.astype(pages.dtype)), None
        if scales.ndim == 1:
            return store(pages, quantise(new, pages.dtype, scales)[0]), scales
        values, scale = quantise(new, pages.dtype)
        return store(pages, values), store(scales, scale)

    k_pages, k_scales = write(k_pages, k_scales, k_new)
    v_pages, v_scales = write(v_pages, v_scales, v_new)
    return k_pages, v_pages, k_scales, v_scales


# -- checks -------------------------------------------------------------------------------------


def _check(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k_scales: jax.Array | None,
    v_scales: jax.Array | None,
    k_new: jax.Array,
    v_new: jax.Array,
    kv_index: jax.Array,
    backend: str,
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    if k_pages.ndim != 4 or k_new.ndim != 3:
        raise ValueError(
            "expected k_pages [N, K, page_size, D] and k_new [T, K, D]; got "
            f"{k_pages.shape} and {k_new.shape}"
        )
    _, K, _, D = k_pages.shape
    for name, of, other in (("pages", k_pages, v_pages), ("new", k_new, v_new)):
        if (of.shape, of.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"k_{name} and v_{name} must have one shape and dtype; got {of.shape} {of.dtype} "
                f"and {other.shape} {other.dtype}"
            )
    if k_new.shape[1:] != (K, D):
        raise ValueError(f"k_new is {k_new.shape}: expected [T, {K}, {D}], as in the pages")
    if not jnp.issubdtype(k_new.dtype, jnp.floating) or k_new.dtype.itemsize < 2:
        raise ValueError(f"k_new is {k_new.dtype}: expected bfloat16, float16 or float32")
    if kv_index.shape != k_new.shape[:1] or kv_index.dtype != jnp.int32:
        raise ValueError(
            f"kv_index is {kv_index.dtype} {kv_index.shape}: expected int32 [{k_new.shape[0]}]"
        )
    check_scales(k_pages, k_scales, v_scales)


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
