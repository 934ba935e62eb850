"""Random ragged attention problems over poisoned page pools, for the checks on a GPU.

Every slot that a kernel must not read holds NaN (of int8 pages: the largest value, with NaN for its
scale): unused pages, the tail of last pages, what lies before every row's window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import paged_attention

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


@dataclass(frozen=True)
class Options:
    """What one kernel is specialised to; the fields that are not `paged_attention`'s:

    Attributes:
        G, K, D, page_size: query heads a KV head, KV heads, head dim, slots a page.
        dtype: of the queries and of unquantised pages.
        kv: "" for pages of `dtype`, or "int8" or "float8_e4m3fn".
        per_head: quantised pages have one given scale a head, not one a token and head.
        sinks: whether there are sink logits.
    """

    G: int = 4
    K: int = 2
    D: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"
    kv: str = ""
    per_head: bool = False
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False

    @property
    def tolerance(self) -> float:
        """Of ||out - float32|| / ||float32||, as the issue asks."""
        return 2e-2 if self.kv else 3e-3

    def __str__(self) -> str:
        scales = ("-head" if self.per_head else "-token") if self.kv else ""
        words = [f"G{self.G} D{self.D} page{self.page_size} {self.kv or self.dtype}{scales}"]
        words += [f"{k}={v}" for k in ("window", "softcap", "scale") if (v := getattr(self, k))]
        return " ".join(words + (["sinks"] if self.sinks else []))


@dataclass(frozen=True)
class Data:
    """One sequence's data: q [L, H, D], k and v [L, K, D] as stored, scales [L, K] or [K]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None

    def dequantised(self, which: str) -> np.ndarray:
        """Keys or values in float32, [L, K, D]."""
        x = np.asarray(getattr(self, which)).astype(np.float32)
        scale = getattr(self, f"{which}_scale")
        return x if scale is None else x * scale[..., None]


@dataclass(frozen=True)
class Item:
    """A sequence's part in one call: the last `new` of its first `length` tokens are queries."""

    sequence: int
    length: int
    new: int


@dataclass(frozen=True)
class World:
    """Sequences, and sink logits [H] (float32)."""

    options: Options
    sequences: tuple[Data, ...]
    sinks: np.ndarray | None


def make_world(options: Options, lengths: Sequence[int], seed: int = 0) -> World:
    """Random sequences of these lengths; keys have a few outlier channels."""
    o, rng = options, np.random.default_rng(seed)
    head_scales = None
    if o.per_head:
        head_scales = rng.uniform(3, 5, (2, o.K)).astype(np.float32) / LARGEST[o.kv]

    def sequence(length: int) -> Data:
        q = (1.5 * rng.standard_normal((length, o.K * o.G, o.D), np.float32)).astype(o.dtype)
        k, v = (rng.standard_normal((length, o.K, o.D), np.float32) for _ in "kv")
        k[:, :, :: max(1, o.D // 3)] *= 2
        if not o.kv:
            return Data(q, k.astype(o.dtype), v.astype(o.dtype))
        return Data(
            q,
            *(_quantise(x, o, None if head_scales is None else head_scales[i])[0]
              for i, x in enumerate((k, v))),
            *(_quantise(x, o, None if head_scales is None else head_scales[i])[1]
              for i, x in enumerate((k, v))),
        )  # fmt: skip

    made = tuple(sequence(length) for length in lengths)
    sinks = rng.standard_normal(o.K * o.G).astype(np.float32) if o.sinks else None
    return World(o, made, sinks)


def _quantise(x: np.ndarray, o: Options, scale: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    largest = LARGEST[o.kv]
    if scale is None:
        scale = np.abs(x).max(-1) / np.float32(largest)
    scaled = np.clip(x / scale[..., None], -largest, largest)
    return (np.rint(scaled) if o.kv == "int8" else scaled).astype(o.kv), scale


@dataclass(frozen=True)
class Call:
    """Arguments of one `paged_attention` call, on the host."""

    options: Options
    max_query: int
    arrays: dict[str, Any]
    used_rows: int


def make_call(
    world: World,
    items: Sequence[Item],
    *,
    seed: int = 1,
    columns: int = 0,
    spare_rows: int = 0,
    max_query: int | None = None,
    clean: bool = False,
) -> Call:
    """Lays the items out over permuted pages.

    Args:
        world: the data.
        items: what each sequence of the batch is. The same sequence may occur several times: each
            item gets pages of its own.
        seed: of the pages' order.
        columns: of the page table, beyond what the longest item needs.
        spare_rows: rows of q, full of NaN, that belong to nobody.
        max_query: at least the most new tokens of an item.
        clean: zeros where poison would be: for the reference.
    """
    o, rng = world.options, np.random.default_rng(seed)
    pages_of = [-(-item.length // o.page_size) for item in items]
    N, P = sum(pages_of) + 4, max(pages_of) + 1 + columns
    free = rng.permutation(N).astype(np.int32)
    poison_page, free = free[0], free[1:]
    table = np.full((len(items), P), poison_page, np.int32)
    kv_type = np.dtype(o.kv or o.dtype)
    bad = 0 if clean else 127 if o.kv == "int8" else np.nan
    pools = [np.full((N, o.K, o.page_size, o.D), bad).astype(kv_type) for _ in "kv"]
    scales = [np.full((N, o.K, o.page_size), 0 if clean else np.nan, np.float32) for _ in "kv"]
    for s, item in enumerate(items):
        table[s, : pages_of[s]], free = free[: pages_of[s]], free[pages_of[s] :]
        low = 0 if o.window is None else max(0, item.length - item.new - o.window + 1)
        at = np.arange(low, item.length)
        page, slot = table[s, at // o.page_size], at % o.page_size
        data = world.sequences[item.sequence]
        for pool, x in zip(pools, (data.k, data.v), strict=True):
            pool[page, :, slot] = x[low : item.length]
        if o.kv and not o.per_head:
            for pool, x in zip(scales, (data.k_scale, data.v_scale), strict=True):
                assert x is not None
                pool[page, :, slot] = x[low : item.length]
    queries = [world.sequences[i.sequence].q[i.length - i.new : i.length] for i in items]
    used = sum(item.new for item in items)
    nobody = np.full((spare_rows, o.K * o.G, o.D), np.nan).astype(o.dtype)
    arrays: dict[str, Any] = {
        "q": np.concatenate([*queries, nobody]),
        "k_pages": pools[0],
        "v_pages": pools[1],
        "page_table": table,
        "query_starts": np.cumsum([0, *(item.new for item in items)]).astype(np.int32),
        "kv_lengths": np.array([item.length for item in items], np.int32),
    }
    if world.sinks is not None:
        arrays["sinks"] = world.sinks
    if o.kv:
        first = world.sequences[0]
        given = [first.k_scale, first.v_scale] if o.per_head else scales
        arrays["k_scales"], arrays["v_scales"] = given
    return Call(o, max_query or max(item.new for item in items), arrays, used)


@cache
def program(max_query: int, backend: str, **options: Any) -> Any:
    """The jitted op; one for each set of static options, so that equal shapes compile once."""
    return jax.jit(partial(paged_attention, max_query=max_query, backend=backend, **options))


def run(call: Call, backend: str) -> np.ndarray:
    """The op's output on the host, [T, H, D]."""
    o = call.options
    fn = program(call.max_query, backend, window=o.window, softcap=o.softcap, scale=o.scale)
    return np.asarray(fn(**{name: jnp.asarray(x) for name, x in call.arrays.items()}))


def truth(world: World, items: Sequence[Item]) -> np.ndarray:
    """`reference` in float32 on the dequantised, unpoisoned keys and values: [rows, H, D]."""
    o = world.options
    plain = tuple(
        Data(s.q.astype(np.float32), s.dequantised("k"), s.dequantised("v"))
        for s in world.sequences
    )
    # One page size: the reference's own programs then differ in head counts and options alone.
    o = replace(o, dtype="float32", kv="", per_head=False, page_size=128)
    return run(make_call(World(o, plain, world.sinks), items, clean=True), "reference")


def relative_errors(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """Of the whole, and of the worst row [D]: ||got - want|| / ||want||."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    difference = np.linalg.norm(got - want, axis=-1)
    size = np.linalg.norm(want, axis=-1)
    whole = float(np.linalg.norm(difference) / np.linalg.norm(size))
    return whole, float(np.max(difference / np.maximum(size, 1e-30)))
