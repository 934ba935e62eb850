"""`scaled_matmul`: both backends against float64, what `auto` chooses, and what is refused.

What the kernel compiles to is in `test_aot.py`.
"""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import scaled_matmul as op
from pallas_kernels import scaled_matmul_sm90
from pallas_kernels.scaled_matmul import BACKENDS, scaled_matmul
from tests.pallas_kernels.gpu_check import checks
from tests.pallas_kernels.quant_problems import relative_error, scaled_arguments

CODES = (jnp.int8, jnp.float8_e4m3fn)


def run(backend, *args):
    multiply = jax.jit(partial(scaled_matmul, backend=backend), static_argnums=4)
    if backend == "reference":
        return multiply(*args, jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return jax.block_until_ready(multiply(*args, jnp.bfloat16))


@pytest.mark.parametrize("backend", ["reference", "mosaic"])
@pytest.mark.parametrize("dtype", CODES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(("T", "N", "K"), [(1, 64, 128), (20, 128, 256), (140, 64, 128)])
def test_numerics(backend, dtype, T, N, K):
    x, w, x_scale, w_scale = scaled_arguments(dtype, T, N, K)
    got = run(backend, x, w, x_scale, w_scale).astype(jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    want *= np.asarray(x_scale)[:, None] * np.asarray(w_scale)
    assert relative_error(got, want) < 5e-3


def test_leading_axes():
    x, w, x_scale, w_scale = scaled_arguments(jnp.int8, 6, 64, 128)
    np.testing.assert_array_equal(
        run("reference", x.reshape(2, 3, 128), w, x_scale.reshape(2, 3), w_scale),
        run("reference", x, w, x_scale, w_scale).reshape(2, 3, 64),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("check", list(checks("scaled_matmul")), ids=lambda check: check.name)
def test_on_a_gpu(check):
    print(check.run())


@pytest.mark.parametrize(
    ("capability", "N", "kernel"),
    [(None, 64, False), (9.0, 64, True), (8.0, 64, False), (9.0, 32, False)],
)
def test_auto_takes_the_kernel_where_it_runs(capability, N, kernel, monkeypatch):
    monkeypatch.setattr(op, "capability", lambda: capability)
    monkeypatch.setattr(op, "sm_count", lambda: 132)
    args = scaled_arguments(jnp.int8, 2, N, 128)
    jaxpr = str(jax.make_jaxpr(lambda *a: scaled_matmul(*a, jnp.bfloat16))(*args))
    assert ("mpmd_map" in jaxpr or "core_map" in jaxpr) == kernel


@pytest.mark.parametrize("T", [1, 7, 16, 64, 100, 300, 5000])
@pytest.mark.parametrize(("N", "K"), [(64, 128), (192, 896), (4096, 14336), (28672, 4096)])
def test_every_size_has_a_config_that_fits(N, K, T):
    config = scaled_matmul_sm90.default_config(T, N, K, 132)
    dtypes = (jnp.dtype(jnp.int8), jnp.dtype(jnp.bfloat16))
    shape = scaled_matmul_sm90.Shape(T, N, K, *dtypes, config, 132, True)
    assert shape.stages >= 2
    assert K % (128 * config.depth) == 0
    assert shape.rows <= N


X, W, X_SCALE, W_SCALE = scaled_arguments(jnp.int8, 2, 64, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, f"backend='triton': expected one of {BACKENDS}"),
        ({"x": X.astype(jnp.int32)}, "x is int32, w int8: expected both int8 or float8_e4m3fn"),
        ({"w": W[:, :64]}, "x is (2, 128), w (64, 64): expected [..., K], not empty, and [N, K]"),
        ({"x_scale": X_SCALE[:1]}, "scales are (1,) and (64,): expected (2,) and (64,)"),
        ({"w": W[:32], "w_scale": W_SCALE[:32], "backend": "mosaic"}, "w is (32, 128), out"),
        ({"out_dtype": jnp.float32, "backend": "mosaic"}, "and 16 bits"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    args = {"x": X, "w": W, "x_scale": X_SCALE, "w_scale": W_SCALE, "out_dtype": jnp.bfloat16}
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled_matmul(**{**args, **change})
