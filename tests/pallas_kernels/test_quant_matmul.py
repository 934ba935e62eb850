"""`quant_matmul`: packing, both backends against float64, what `auto` chooses, what is refused.

What the kernels compile to is in `test_aot.py`.
"""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant_matmul as op
from pallas_kernels import quant_matmul_sm80, quant_matmul_sm90
from pallas_kernels.quant_matmul import BACKENDS, quant_matmul
from pallas_kernels.quant_packing import pack, unpack
from tests.pallas_kernels.gpu_check import checks
from tests.pallas_kernels.quant_problems import (
    KINDS,
    arguments,
    dense,
    packed,
    relative_error,
    tokens,
)


def interpret(run, *args):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return jax.block_until_ready(run(*args))


RUN = {
    "reference": jax.jit(partial(quant_matmul, backend="reference")),
    "sm90": partial(interpret, partial(quant_matmul, backend="mosaic")),
    "sm80": partial(interpret, partial(quant_matmul_sm80.matmul, arch="sm90", on_gpu=False)),
}


@pytest.mark.parametrize("name", KINDS)
def test_packed_weights_are_what_codes_stand_for(name):
    N, K = 128, 512
    matrix = packed(name, N, K)
    made = np.asarray(unpack(matrix).astype(jnp.float32)) * np.asarray(matrix.row_scale)[:, None]
    want = dense(name, N, K)
    if name in ("int4-row", "int8-row"):
        assert relative_error(made, want) < 1e-7, "a row's only scale is left for the result"
    elif name == "nf4":
        assert relative_error(made, want) < 2**-7.5, "table and product are rounded"
    else:
        rounded = np.asarray(
            jnp.asarray(want, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32)
        )
        np.testing.assert_array_equal(made, rounded)


def test_scales_of_any_size_are_kept():
    a = arguments("int4", 64, 256)
    for size in (2.0**-100, 2.0**60):
        scales = jnp.asarray(a["scales"].astype(np.float32) * size)
        matrix = pack(jnp.asarray(a["codes"]), scales, kind="int", bits=4)
        made = (
            np.asarray(unpack(matrix).astype(jnp.float32)) * np.asarray(matrix.row_scale)[:, None]
        )
        assert relative_error(made / size, dense("int4", 64, 256)) < 2**-8


def test_a_row_of_zeros():
    a = arguments("int4", 64, 256)
    scales = jnp.asarray(a["scales"]).at[3].set(0)
    matrix = pack(jnp.asarray(a["codes"]), scales, kind="int", bits=4)
    out = np.asarray(RUN["reference"](tokens(2, 256), matrix).astype(jnp.float32))
    assert np.isfinite(out).all()
    assert not out[:, 3].any()


@pytest.mark.parametrize("backend", RUN)
@pytest.mark.parametrize(
    ("name", "N", "K", "T"),
    [
        ("int4", 128, 512, 3),  # two tiles of rows; K in four chains
        ("int4-zeros", 64, 128, 20),
        ("int8-mins", 64, 256, 8),
        ("nf4", 64, 128, 140),  # two tiles of tokens
        ("fp8", 64, 384, 1),  # one chain
    ],
)
def test_numerics(backend, name, N, K, T):
    x = tokens(T, K)
    got = RUN[backend](x, packed(name, N, K)).astype(jnp.float32)
    assert relative_error(got, np.asarray(x, np.float64) @ dense(name, N, K).T) < 1.5e-2


def test_leading_axes():
    matrix, x = packed("int4", 64, 128), tokens(6, 128)
    np.testing.assert_array_equal(
        RUN["reference"](x.reshape(2, 3, 128), matrix),
        RUN["reference"](x, matrix).reshape(2, 3, 64),
    )


def test_gradient_and_vmap_of_the_kernel_are_those_of_the_definition():
    matrix, x = packed("int4", 64, 128), tokens(4, 128)

    def total(backend, x):
        return (quant_matmul(x, matrix, backend=backend).astype(jnp.float32) ** 2).sum()

    kernel = partial(interpret, jax.grad(partial(total, "mosaic")))
    want = np.asarray(jax.grad(partial(total, "reference"))(x), np.float64)
    assert relative_error(kernel(x), want) < 1e-2
    rows = x.reshape(2, 2, 128)
    many = interpret(jax.vmap(lambda x: quant_matmul(x, matrix, backend="mosaic")), rows)
    np.testing.assert_array_equal(many.reshape(4, 64), RUN["sm90"](x, matrix))
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), matrix)
    with pytest.raises(ValueError, match="vmap over x only"):
        interpret(jax.vmap(lambda x, m: quant_matmul(x, m, backend="mosaic")), rows, stacked)


@pytest.mark.gpu
@pytest.mark.parametrize("check", list(checks("quant_matmul")), ids=lambda check: check.name)
def test_on_a_gpu(check):
    print(check.run())


@pytest.mark.parametrize("capability", [None, 7.5, 8.0, 9.0, 10.0])
def test_auto_takes_the_kernel_where_it_runs(capability, monkeypatch):
    monkeypatch.setattr(op, "capability", lambda: capability)
    monkeypatch.setattr(op, "sm_count", lambda: 132)
    matrix = packed("int4", 64, 512)
    jaxpr = str(jax.make_jaxpr(lambda x: quant_matmul(x, matrix))(tokens(2, 512)))
    assert ("mpmd_map" in jaxpr or "core_map" in jaxpr) == (capability in (8.0, 9.0))


@pytest.mark.parametrize("T", [1, 7, 16, 40, 64, 100, 300, 5000])
@pytest.mark.parametrize(("N", "K"), [(64, 128), (192, 896), (1024, 4096), (28672, 4096)])
@pytest.mark.parametrize("name", ["int4", "int8-group", "nf4"])
def test_every_size_has_a_config_that_fits(name, N, K, T):
    form = packed(name, 64, 128).format
    config = quant_matmul_sm90.default_config(T, N, K, form, 132)
    padded = -(-T // 8) * 8 if T > 8 else T
    shape = quant_matmul_sm90.Shape(padded, N, K, form, jnp.dtype(jnp.bfloat16), config, 132, True)
    assert shape.stages >= 2
    assert shape.consumers <= 4
    assert K % (128 * config.depth) == 0
    assert config.units * 16 <= N
    assert config.units * config.depth * form.words * 4 % 128 == 0, "copies begin at 128 bytes"
    assert shape.tiles.of_rows * config.units * 16 >= N


X, MATRIX = tokens(2, 128), packed("int4", 64, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, f"backend='triton': expected one of {BACKENDS}"),
        ({"x": X.astype(jnp.float32)}, "x is float32 (2, 128): expected bfloat16 [..., K]"),
        ({"x": X[:0]}, "x is bfloat16 (0, 128): expected bfloat16 [..., K], not empty"),
        ({"x": X[:, :64]}, "x is (2, 64), the matrix (64, 128): expected x [..., K] for [N, K]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quant_matmul(**{"x": X, "packed": MATRIX, **change})


@pytest.mark.parametrize(("N", "K", "G"), [(32, 128, 1), (64, 192, 1), (64, 128, 3), (64, 128, 16)])
def test_what_cannot_be_packed_is_refused(N, K, G):
    codes, scales = jnp.zeros((N, K // 2), jnp.uint8), jnp.ones((N, G))
    with pytest.raises(
        ValueError, match=re.escape(f"[{N}, {K}] with {G} groups: expected rows a multiple of 64")
    ):
        pack(codes, scales, kind="int", bits=4)
