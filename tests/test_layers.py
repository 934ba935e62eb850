"""The layers against NumPy in float64, and what rotations must keep."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import RopeConfig
from jaxinfer.layers import (
    down,
    embed,
    gated,
    linear,
    rope_tables,
    unembed,
)
from jaxinfer.rope import rope_frequencies
from pallas_kernels.qkv_heads import Heads, prepare, rotate

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(x):
    return np.asarray(x).astype(np.float64)


def test_linear():
    x, w, b = normal(0, 3, 5, 8), normal(1, 6, 8), normal(2, 6)
    got = jax.jit(linear)(x, w, b)
    np.testing.assert_allclose(got, wide(x) @ wide(w).T + wide(b), **CLOSE)
    np.testing.assert_allclose(linear(x, w), wide(x) @ wide(w).T, **CLOSE)


def tables(positions, head_dim, rope=RopeConfig()):  # noqa: B008
    return rope_tables(jnp.asarray(positions, jnp.int32), *rope_frequencies(rope, head_dim))


def test_rope_rotates_pairs():
    D, positions = 8, np.array([0, 1, 7, 100])
    x = normal(0, 4, 3, D)
    got = wide(jax.jit(rotate)(x, *tables(positions, D)))
    angle = positions[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    pairs = wide(x)[..., : D // 2] + 1j * wide(x)[..., D // 2 :]
    want = pairs * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(got[..., : D // 2], want.real, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(got[..., D // 2 :], want.imag, rtol=1e-4, atol=2e-5)


def test_rope_keeps_norms_and_leaves_position_0_alone():
    x = normal(0, 50, 2, 16)
    got = rotate(x, *tables(np.arange(50), 16))
    np.testing.assert_array_equal(got[0], x[0])
    norms = [np.linalg.norm(wide(a), axis=-1) for a in (got, x)]
    np.testing.assert_allclose(*norms, rtol=1e-6)


@pytest.mark.parametrize("shift", [1, 37, 1000])
def test_rope_scores_depend_on_distance_alone(shift):
    q, k = normal(0, 1, 1, 16), normal(1, 1, 1, 16)
    q, k = (jnp.broadcast_to(x, (20, 1, 16)) for x in (q, k))

    def scores(first):
        at = tables(np.arange(first, first + 20), 16)
        return np.einsum("ihd,jhd->ij", wide(rotate(q, *at)), wide(rotate(k, *at)))

    np.testing.assert_allclose(scores(shift), scores(0), atol=2e-3)
    assert np.ptp(scores(0)) > 1  # or there is nothing to compare


def test_rope_factor_scales_what_is_rotated():
    x, D = normal(0, 3, 2, 8), 8
    frequencies, _ = rope_frequencies(RopeConfig(), D)
    plain, scaled = (
        rotate(x, *rope_tables(jnp.arange(3), frequencies, factor)) for factor in (1.0, 1.5)
    )
    np.testing.assert_allclose(scaled, 1.5 * wide(plain), **CLOSE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_heads_are_split(heads, kv_heads):
    D, x = 4, normal(0, 7, (heads + 2 * kv_heads) * 4)
    q, k, v = prepare(x, heads, kv_heads, Heads())
    assert (q.shape, k.shape, v.shape) == ((7, heads, D), *[(7, kv_heads, D)] * 2)
    np.testing.assert_array_equal(np.concatenate([q, k, v], axis=1).reshape(7, -1), x)


def activate(x, name):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("biases", [False, True])
def test_gated_mlp(activation, biases):
    E, F, x = 6, 10, normal(0, 5, 6)
    layer = {"gate_up": normal(1, 2 * F, E), "down": normal(2, E, F)}
    if biases:
        layer |= {"gate_up_bias": normal(3, 2 * F), "down_bias": normal(4, E)}

    @jax.jit
    def mlp(x, layer):
        return down(gated(x, layer, activation), layer)

    got = mlp(x, layer)
    both = wide(x) @ wide(layer["gate_up"]).T + wide(layer.get("gate_up_bias", 0))
    gate, up = np.split(both, 2, axis=1)
    want = (activate(gate, activation) * up) @ wide(layer["down"]).T
    np.testing.assert_allclose(got, want + wide(layer.get("down_bias", 0)), **CLOSE)


def test_embed_and_unembed():
    table, tokens = normal(0, 11, 6), jnp.array([3, 0, 10])
    np.testing.assert_array_equal(embed(table, tokens), np.asarray(table)[[3, 0, 10]])
    hidden = normal(1, 4, 6)
    np.testing.assert_allclose(unembed(table, hidden), wide(hidden) @ wide(table).T, **CLOSE)
    low = unembed(table.astype(jnp.bfloat16), hidden.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
