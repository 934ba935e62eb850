"""Rows that are hard to cut off, and whether they are cut as `threshold.reference` does: by the
kernel, and where several devices have some columns each."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.threshold import reference, split_threshold, threshold


def rows_of(V: int, seed: int = 0) -> np.ndarray:
    """float32 [7, V]: spread out, crowded, few values, one likely token, forbidden tokens, equals,
    nothing at all."""
    rng = np.random.default_rng(seed)
    wide, narrow = rng.normal(0, 3, V), rng.normal(0, 1e-3, V)
    levels, lonely = rng.integers(-12, 1, V) / 3, rng.normal(0, 1, V) - 15
    lonely[V // 2] = 0
    masked = rng.normal(0, 2, V)
    masked[rng.permutation(V)[: V - max(1, V // 10)]] = -np.inf
    x = np.stack([wide, narrow, levels, lonely, masked, np.zeros(V)]).astype(np.float32)
    x = np.concatenate([x - x.max(-1, keepdims=True), np.full((1, V), -np.inf, np.float32)])
    return x.astype(np.float32)


def settings(V: int) -> list[tuple[int, float, float]]:
    """(top_k, top_p, min_p): each alone, all together, none."""
    some = max(1, min(V // 3, 1000))
    return [
        (0, 1.0, 0.0), (1, 1.0, 0.0), (some, 1.0, 0.0), (V - 1, 1.0, 0.0), (V, 1.0, 0.0),
        (0, 1e-30, 0.0), (0, 0.0, 0.0), (0, 0.5, 0.0), (0, 0.9, 0.0), (0, 1 - 2**-24, 0.0),
        (0, 1.0, 1e-4), (0, 1.0, 1.0), (some, 0.95, 1e-4), (some, 0.3, 0.0), (0, 0.7, 0.2),
    ]  # fmt: skip


def problem(V: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """Every row with every setting: x [105, V], top_k, top_p, min_p."""
    x, how = rows_of(V, seed), settings(V)
    k, p, m = (np.tile(np.array(column), len(x)) for column in zip(*how, strict=True))
    return (
        jnp.asarray(np.repeat(x, len(how), 0)),
        jnp.asarray(k, jnp.int32),
        jnp.asarray(p, jnp.float32),
        jnp.asarray(m, jnp.float32),
    )


def compare(args: tuple[jax.Array, ...], config: Any = None) -> str:
    """Raises AssertionError where the kernel finds another threshold than the definition."""
    return _same(args, jax.jit(partial(threshold, backend="mosaic", config=config))(*args))


def compare_split(args: tuple[jax.Array, ...], devices: int) -> str:
    """`compare` for `split_threshold`; devices are those of an axis that is mapped over."""
    x, *how = args
    parts = jnp.stack(jnp.split(x, devices, axis=1))
    find = partial(split_threshold, axis="devices")
    find = jax.vmap(find, in_axes=(0, None, None, None), axis_name="devices")
    found = np.asarray(jax.jit(find)(parts, *how))
    assert (found == found[0]).all(), "devices differ"
    return _same(args, found[0])


def _same(args: tuple[jax.Array, ...], found: Any) -> str:
    want, got = np.asarray(jax.jit(reference)(*args)), np.asarray(found)
    wrong = np.flatnonzero(want != got)  # -0.0 and 0.0 are the same
    told = [
        f"row {i} (top_k {k}, top_p {p}, min_p {m}): {got[i]} for {want[i]}"
        for i in wrong[:5]
        for k, p, m in [[a[i] for a in args[1:]]]
    ]
    assert not told, f"{len(wrong)} of {len(want)} rows differ: " + "; ".join(told)
    return f"{len(want)} rows of {args[0].shape[1]}"
