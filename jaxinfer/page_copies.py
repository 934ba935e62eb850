"""Pages on their way between the device and the host's memory, as `batcher.Move` asks for them.

Like `metrics.Metrics` it belongs to the engine, and its state changes as the engine's does. Copies
are queued on the device as steps are, so that a page is read before the next step writes to it and
written before the next step reads it. What is on its way to the host lies in arrays of its own on
the device meanwhile: nobody waits for it, unless very much leaves at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import batched
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.batcher import Move
from jaxinfer.cache import TRASH_PAGE, PagedCache
from jaxinfer.offload import HOST

GROUP = 16  # pages that one program copies; it is padded with the trash page
AHEAD = 4  # groups on their way to the host, at most
# Pages' worth of the device's memory that copies take, at most: groups on their way to the host;
# one that is being gathered, and one that is being put in its place, twice each.
STAGED = (AHEAD + 4) * GROUP


class Page(NamedTuple):
    """What a page holds in all L layers, keys and then values.

    Attributes:
        kv: [2 L, kv_heads, page_size, head_dim]; of a pipeline, one stage's behind the other's.
        scales: float32 [2 L, kv_heads, page_size]; where each token has its own, else None.
        tokens: int32 [page_size]; where the cache keeps them, else None.
    """

    kv: Array
    scales: Array | None
    tokens: Array | None


class PageCopies:
    """Pages in the host's memory, by slots, and the programs that copy them.

    Args:
        cache: one with the shapes and places of all that pages will be copied from and to.
    """

    def __init__(self, cache: PagedCache) -> None:
        self._cache = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), cache
        )
        self._slots: dict[int, Page] = {}
        self._leaving: deque[tuple[Page, ...]] = deque()

    def clear(self) -> None:
        """Forgets all pages."""
        self._slots.clear()
        self._leaving.clear()

    def move(self, move: Move, cache: PagedCache) -> PagedCache:
        """Queues the copies; returns the cache, which is donated."""
        for some in batched(move.stores.tolist(), GROUP):
            pages, slots = zip(*some, strict=True)
            if len(self._leaving) == AHEAD:
                jax.block_until_ready(self._leaving.popleft())
            gather, _ = self._programs
            near = gather(cache, self._numbers(pages))[: len(pages)]
            far = jax.device_put(near, (self._places(HOST),) * len(near))
            self._leaving.append(far)
            self._slots |= zip(slots, far, strict=True)
        for some in batched(move.loads.tolist(), GROUP):
            slots, pages = zip(*some, strict=True)
            _, scatter = self._programs
            far = tuple(self._slots[slot] for slot in slots)
            near = jax.device_put(far, (self._places(),) * len(far))
            near += near[:1] * (GROUP - len(near))
            cache = scatter(cache, self._numbers(pages), near)
        return cache

    def warm_up(self, cache: PagedCache) -> PagedCache:
        """Compiles the programs, and runs them on the trash page."""
        trash = np.full((1, 2), TRASH_PAGE, np.int32)
        return self.move(Move(trash, trash), cache)

    def _numbers(self, pages: Sequence[int]) -> Array:
        """Pages of a group, on all devices."""
        numbers = np.full(GROUP, TRASH_PAGE, np.int32)
        numbers[: len(pages)] = pages
        return jax.device_put(numbers, self._everywhere)

    @property
    def _everywhere(self) -> Any:
        place: Any = self._cache.k[0].sharding
        split = isinstance(place, NamedSharding)
        return NamedSharding(place.mesh, PartitionSpec()) if split else place

    def _places(self, kind: str | None = None) -> Page:
        """Where a page lies: split as in the cache, in this memory of the devices or their own."""
        cache = self._cache
        heads = cache.k[0].sharding  # a page's arrays have layers and heads in the same places
        if kind is not None:
            heads = heads.with_memory_kind(kind)
        text = None
        if cache.tokens is not None:
            text = self._everywhere if kind is None else self._everywhere.with_memory_kind(kind)
        return Page(heads, heads if _scaled(cache) else None, text)  # pyright: ignore

    @cached_property
    def _programs(self) -> tuple[Any, Any]:
        """`_gather` and `_scatter`, compiled."""
        cache, place = self._cache, self._cache.k[0].sharding
        gather, scatter, group = _gather, _scatter, (self._places(),) * GROUP
        if isinstance(place, NamedSharding):  # each device copies its part
            specs = jax.tree.map(lambda x: x.sharding.spec, cache)
            some = jax.tree.map(lambda place: place.spec, group)
            split = partial(jax.shard_map, mesh=place.mesh, check_vma=False)
            gather = split(gather, in_specs=(specs, PartitionSpec()), out_specs=some)
            scatter = split(scatter, in_specs=(specs, PartitionSpec(), some), out_specs=specs)
        pages = jax.ShapeDtypeStruct((GROUP,), jnp.int32, sharding=self._everywhere)
        lowered = jax.jit(gather).lower(cache, pages)
        near = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            lowered.out_info, group,
        )  # fmt: skip
        put = jax.jit(scatter, donate_argnums=0).lower(cache, pages, near)
        return lowered.compile(), put.compile()


def _scaled(cache: PagedCache) -> bool:
    """Whether scales are of pages, and not calibrated ones of all of them."""
    return cache.k_scales is not None and cache.k_scales[0].ndim > 1


def _scales(cache: PagedCache) -> tuple[Array, ...]:
    assert cache.k_scales is not None
    assert cache.v_scales is not None
    return (*cache.k_scales, *cache.v_scales)


def _gather(cache: PagedCache, pages: Array) -> tuple[Page, ...]:
    """These pages [n], each in arrays of its own."""

    def picked(pools: Sequence[Array]) -> Array:
        return jnp.stack([pool[pages] for pool in pools], axis=1)

    kv = picked((*cache.k, *cache.v))
    scales = picked(_scales(cache)) if _scaled(cache) else None
    text = None if cache.tokens is None else cache.tokens[pages]
    return tuple(
        jax.tree.map(lambda x: x[i], Page(kv, scales, text))  # noqa: B023
        for i in range(len(pages))
    )


def _scatter(cache: PagedCache, pages: Array, group: tuple[Page, ...]) -> PagedCache:
    """The cache with what `_gather` made in these pages [n]."""
    new = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *group)  # [2 L, n, ...]

    def put(pools: Sequence[Array], values: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        found = tuple(x.at[pages].set(y) for x, y in zip(pools, values, strict=True))
        return found[: len(cache.k)], found[len(cache.k) :]

    k, v = put((*cache.k, *cache.v), new.kv)
    cache = cache._replace(k=k, v=v)
    if new.scales is not None:
        k_scales, v_scales = put(_scales(cache), new.scales)
        cache = cache._replace(k_scales=k_scales, v_scales=v_scales)
    if cache.tokens is not None:
        cache = cache._replace(tokens=cache.tokens.at[pages].set(new.tokens.T))
    return cache
