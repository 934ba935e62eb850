"""Arguments of `rms_norm` and what it must return of them; and that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.rms_norm import rms_norm

EPS = 1e-5
COUNTS = (8, 64, 384, 2048)  # rows


def problem(shape: tuple[int, ...], dtype: Any, *, delta: bool = False) -> tuple[Any, ...]:
    """(x, weight, eps, delta), of normal numbers."""
    rng = np.random.default_rng(0)
    x, other, weight = (jnp.asarray(rng.normal(size=s), dtype) for s in (shape, shape, shape[-1]))
    return x, weight, EPS, other if delta else None


def compare(run: Callable[..., Any], args: tuple[Any, ...], *, plus_one: bool = False) -> str:
    """Raises AssertionError where `run` returns other than float64 does, up to two roundings."""
    x, weight, eps, delta = args
    total, normed = run(*args)
    x, wide = np.asarray(x if delta is None else x + delta), np.float64
    np.testing.assert_array_equal(np.asarray(total), x)
    mean = (x.astype(wide) ** 2).mean(-1, keepdims=True)
    want = x.astype(wide) / np.sqrt(mean + eps) * (np.asarray(weight).astype(wide) + plus_one)
    error = np.abs(np.asarray(normed).astype(wide) - want) / np.abs(want).clip(1e-6)
    assert normed.dtype == x.dtype
    assert error.max() <= 1.1 * float(jnp.finfo(x.dtype).eps) + 2e-6, error.max()
    return f"error {error.max():.1e}"


def invariance(E: int, dtype: Any) -> str:
    """Raises AssertionError where a row's bits depend on how many rows there are."""
    args = problem((max(COUNTS), E), dtype, delta=True)
    x, weight, eps, delta = args
    assert delta is not None
    compare(jax.jit(rms_norm, static_argnums=2), args)
    found = []
    for n in COUNTS:
        run = jax.jit(rms_norm, static_argnums=2)
        parts = [run(x[i : i + n], weight, eps, delta[i : i + n]) for i in range(0, len(x), n)]
        found.append(b"".join(np.asarray(normed).tobytes() for _, normed in parts))
    assert len(set(found)) == 1, [bits == found[0] for bits in found]
    return f"{len(COUNTS)} numbers of rows"
