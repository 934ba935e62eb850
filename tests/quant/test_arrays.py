"""Quantised arrays: what codes mean, joining rows, matmul, splitting, saving."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints import restore, save
from jaxinfer.quant import (
    Parts,
    QuantisedMatrix,
    Scheme,
    dequantise,
    join_rows,
    matmul,
    pack4,
    partition,
    take_rows,
    unpack4,
)

P = PartitionSpec
NF4 = tuple(float(v) for v in np.linspace(-1, 1, 16))
KINDS = ["int4", "int4-zeros", "int4-mins", "int8", "int8-zeros", "nf4", "fp8", "order"]


def matrix(kind: str, N: int = 8, K: int = 32, G: int = 4, seed: int = 0) -> Any:
    """A random matrix of NumPy arrays."""
    draw = np.random.default_rng(seed)
    codes = pack4(draw.integers(0, 16, (N, K), np.uint8))
    scales = draw.uniform(0.5, 2, (N, G)).astype(np.float16)
    order = draw.permutation(K).astype(np.int32) if kind == "order" else None
    if kind == "fp8":
        return QuantisedMatrix(
            Scheme("float", 8), draw.normal(0, 50, (N, K)).astype(ml_dtypes.float8_e4m3fn), scales
        )
    if kind == "nf4":
        return QuantisedMatrix(Scheme("table", 4, NF4), codes, scales)
    if kind.startswith("int8"):
        zeros = draw.integers(-9, 9, (N, G), np.int8) if kind == "int8-zeros" else None
        return QuantisedMatrix(
            Scheme("int", 8), draw.integers(-128, 128, (N, K), np.int8), scales, zeros
        )
    zeros = draw.integers(0, 16, (N, G), np.uint8) if kind == "int4-zeros" else None
    mins = draw.uniform(0, 2, (N, G)).astype(np.float32) if kind == "int4-mins" else None
    return QuantisedMatrix(Scheme("int", 4), codes, scales, zeros, mins, order)


def by_hand(m: Any) -> np.ndarray:
    """The definition, one weight at a time, in float64."""
    N, K = m.shape
    w = np.zeros((N, K))
    for n in range(N):
        for j in range(K):
            if m.scheme.bits == 4:
                code = int(m.codes[n, j // 2]) >> (4 * (j % 2)) & 15
            else:
                code = float(m.codes[n, j])
            value = m.scheme.table[cast(int, code)] if m.scheme.kind == "table" else code
            g = j // m.group
            if m.zeros is not None:
                value -= int(m.zeros[n, g])
            elif m.scheme.kind == "int" and m.scheme.bits == 4 and m.mins is None:
                value -= 8
            value *= float(m.scales[n, g])
            value -= 0 if m.mins is None else float(m.mins[n, g])
            w[n, j if m.order is None else m.order[j]] = value
    return w


@pytest.mark.parametrize("kind", KINDS)
def test_dequantise_is_the_definition(kind: str) -> None:
    m = matrix(kind)
    np.testing.assert_allclose(dequantise(m), by_hand(m), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_matmul(kind: str) -> None:
    m = matrix(kind)
    x = np.random.default_rng(1).normal(size=(3, 5, 32)).astype(np.float32)
    y = jax.jit(matmul)(x, jax.device_put(m))
    np.testing.assert_allclose(y, x @ by_hand(m).T, rtol=1e-5, atol=1e-3)


@given(st.integers(1, 5), st.integers(1, 9))
def test_packing_is_undone(N: int, half: int) -> None:
    codes = np.random.default_rng(N * half).integers(0, 16, (N, 2 * half), np.uint8)
    assert pack4(codes).shape == (N, half)
    np.testing.assert_array_equal(unpack4(pack4(codes)), codes)
    np.testing.assert_array_equal(unpack4(jnp.asarray(pack4(codes))), codes)


@pytest.mark.parametrize("activations", ["token", "tensor", "group"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounded_activations(kind: str, activations: Any) -> None:
    """Against the same in NumPy, from the definition, with float64 sums."""
    m = matrix(kind, G=4 if activations == "group" else 1)
    m = replace(m, scheme=replace(m.scheme, activations=activations))
    x = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    top = 127 if kind == "int8" else 448
    if activations == "tensor":
        scale = np.full((5, 32), 0.01, np.float32)  # some are clipped
        m = replace(m, input_scale=np.float32(0.01))
    else:
        size = 8 if activations == "group" else 32
        most = np.abs(x).reshape(5, -1, size).max(-1) / np.float32(top)
        scale = np.repeat(most, size, axis=1).astype(np.float32)
    if kind == "int8":
        rounded = np.clip(np.round(x / scale), -128, 127)
    else:
        rounded = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    want = (rounded.astype(np.float64) * scale) @ by_hand(m).T
    got = matmul(jnp.asarray(x), jax.device_put(m))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone(kind: str) -> None:
    m = jax.device_put(matrix(kind))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 32)), jnp.bfloat16)
    step = jax.jit(matmul)
    np.testing.assert_array_equal(step(x, m)[:8], step(x[:8], m))


def test_rows_are_joined_where_they_are_alike() -> None:
    a, b = matrix("int4"), matrix("int4", N=4, seed=1)
    joined = join_rows([a, b])
    assert isinstance(joined, QuantisedMatrix)
    np.testing.assert_array_equal(
        dequantise(joined), np.concatenate([dequantise(a), dequantise(b)])
    )
    np.testing.assert_array_equal(dequantise(take_rows(joined, slice(8, 12))), dequantise(b))


@pytest.mark.parametrize(
    "other",
    [
        matrix("int4-zeros", seed=1),
        matrix("int4-mins", seed=1),
        matrix("order", seed=1),
        matrix("int4", G=2, seed=1),
        matrix("int8", seed=1),
        matrix("nf4", seed=1),
        np.ones((8, 32), np.float32),
    ],
)
def test_what_is_not_alike_stays_in_parts(other: Any) -> None:
    a = matrix("int4")
    joined = join_rows([a, a, other])
    assert isinstance(joined, Parts)
    assert [p.shape for p in joined.parts] == [(16, 32), (8, 32)]
    x = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    dense = np.concatenate([dequantise(a), dequantise(a), dequantise(other)])
    np.testing.assert_allclose(dequantise(joined), dense)
    np.testing.assert_allclose(matmul(x, jax.device_put(joined)), x @ dense.T, rtol=1e-5, atol=1e-3)


def test_dense_rows_are_joined_too() -> None:
    ones = np.ones((2, 32), np.float32)
    np.testing.assert_array_equal(join_rows([ones, 2 * ones]), np.concatenate([ones, 2 * ones]))
    with pytest.raises(ValueError, match="same number of columns"):
        join_rows([ones, ones[:, :16]])


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Scheme("table", 4),
        lambda: Scheme("int", 4, NF4),
        lambda: Scheme("float", 4),
        lambda: Scheme("int", 4, activations="token"),
    ],
)
def test_schemes_that_are_none(bad: Any) -> None:
    with pytest.raises(ValueError, match="8 bits"):
        bad()


# -- splitting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [P("t", None), P(None, "t")])
def test_shards_compute_their_share(kind: str, spec: P) -> None:
    if kind == "order" and spec[1]:
        return  # refused; see below
    m = jax.device_put(matrix(kind))
    mesh = Mesh(np.array(jax.devices()[:1]), ("t",))
    specs = partition(m, spec, 1)
    placed = jax.device_put(m, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    x = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)

    def local(x: jax.Array, w: Any) -> jax.Array:
        return jax.lax.psum(matmul(x, w), "t") if spec[1] else matmul(x, w)

    out = jax.shard_map(
        local, mesh=mesh, in_specs=(P(None, spec[1]), specs), out_specs=P(None, spec[0])
    )(x, placed)
    np.testing.assert_allclose(out, matmul(x, m), rtol=1e-6)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_columns_is_a_matrix(kind: str, degree: int) -> None:
    """What `partition` says of columns: each shard's arrays are those columns' own matrix."""
    if kind == "order":
        return
    m = matrix(kind)
    partition(m, P(None, "t"), degree)
    dense, size = dequantise(m), 32 // degree

    def cut(x: Any, i: int) -> Any:
        if x is None:
            return None
        n = x.shape[1] // degree
        return x[:, i * n : (i + 1) * n]

    for i in range(degree):
        names = ("codes", "scales", "zeros", "mins")
        part = replace(m, **{n: cut(getattr(m, n), i) for n in names})
        np.testing.assert_array_equal(dequantise(part), dense[:, i * size : (i + 1) * size])


@pytest.mark.parametrize(
    ("m", "spec", "degree", "message"),
    [
        (matrix("int4"), P(None, "t"), 8, r"cut the groups of 8 columns .* degrees 1, 2, 4 work"),
        (matrix("order"), P(None, "t"), 2, "act-order.* degree 1 works"),
        (matrix("int8", N=6), P("t", None), 4, "6 rows .* degrees 1, 2 work"),
        (join_rows([matrix("int4"), matrix("order")]), P(None, "t"), 2, "act-order"),
    ],
)
def test_splits_that_do_not_work(m: Any, spec: P, degree: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(m, spec, degree)


def test_a_single_scale_a_row_is_the_whole_rows() -> None:
    specs = partition(matrix("int8", G=1), P(None, "t"), 8)
    assert specs.scales == P(None, None)
    assert specs.codes == P(None, "t")


# -- saving ---------------------------------------------------------------------------------------


def test_they_survive_saving(tmp_path: Any) -> None:
    tree = {kind: jax.device_put(matrix(kind)) for kind in KINDS} | {
        "parts": jax.device_put(join_rows([matrix("int4"), matrix("int8")]))
    }
    save(tmp_path / "saved", tree, {})
    abstract = jax.eval_shape(lambda: tree)
    back = restore(tmp_path / "saved", abstract)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
