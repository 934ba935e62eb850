"""`rms_norm`: both backends against float64, what `auto` chooses, and what is refused.

What the kernel compiles to is in `test_aot.py`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels import row_backend
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.row_backend import BACKENDS
from tests.pallas_kernels.gpu_check import checks
from tests.pallas_kernels.norm_problems import compare, problem


def run(backend, *args, plus_one=False):
    fn = jax.jit(partial(rms_norm, backend=backend, plus_one=plus_one), static_argnums=2)
    if backend == "reference":
        return fn(*args)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return jax.block_until_ready(fn(*args))


@pytest.mark.parametrize("backend", ["reference", "mosaic"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 320), jnp.float32),  # a row in a warp; the last block is not full
        ((2, 3, 64), jnp.bfloat16),
        ((3, 1152), jnp.float16),  # a row in four warps
    ],
)
@pytest.mark.parametrize("delta", [False, True])
def test_numerics(backend, shape, dtype, delta):
    compare(partial(run, backend), problem(shape, dtype, delta=delta))


@pytest.mark.parametrize("backend", ["reference", "mosaic"])
def test_one_more_than_the_weight(backend):
    args = problem((5, 1152), jnp.bfloat16, delta=True)
    compare(partial(run, backend, plus_one=True), args, plus_one=True)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_rows_of_any_size(scale):
    x, weight, eps, _ = problem((5, 32), jnp.float32)
    compare(partial(run, "reference"), (x * scale, weight, eps, None))


def test_squares_may_overflow_the_type():
    x, weight, eps, _ = problem((4, 32), jnp.float16)
    compare(partial(run, "reference"), (x * 1000, weight, eps, None))


@pytest.mark.gpu
@pytest.mark.parametrize("check", list(checks("rms_norm")), ids=lambda check: check.name)
def test_on_a_gpu(check):
    print(check.run())


@pytest.mark.parametrize(
    ("capability", "E", "kernel"),
    [(None, 64, False), (9.0, 64, True), (8.0, 4096, True), (9.0, 24, False), (7.5, 64, False)],
)
def test_auto_takes_the_kernel_where_it_runs(capability, E, kernel, monkeypatch):
    monkeypatch.setattr(row_backend, "capability", lambda: capability)
    x = jnp.zeros((8, E))
    jaxpr = str(jax.make_jaxpr(lambda x: rms_norm(x, x[0], 1e-5))(x))
    assert ("name=rms_norm" in jaxpr or "core_map" in jaxpr or "mpmd_map" in jaxpr) == kernel


X = jnp.zeros((2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, f"backend='triton': expected one of {BACKENDS}"),
        ({"backend": "mosaic"}, "backend='mosaic': E=8, expected a multiple of 32 up to 16384"),
        ({"x": jnp.zeros((2, 8), jnp.int32)}, "x is int32 (2, 8): expected floats [..., E]"),
        ({"x": jnp.zeros((0, 8))}, "x is float32 (0, 8): expected floats [..., E], not empty"),
        ({"weight": jnp.ones(7)}, "weight is float32 (7,): expected float32 [8]"),
        ({"weight": jnp.ones(8, jnp.float16)}, "weight is float16 (8,): expected float32 [8]"),
        ({"delta": X[:1]}, "delta is float32 (1, 8): expected float32 (2, 8)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = {"x": X, "weight": jnp.ones(8), "eps": 1e-5, "delta": None}
    with pytest.raises(ValueError, match=r".") as raised:
        rms_norm(**(args | change))
    assert message in str(raised.value)
