"""`round_rows`: the kernel's bits are the definition's, what `auto` chooses, and what is refused.

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

from pallas_kernels import row_backend
from pallas_kernels.round_rows import round_rows
from pallas_kernels.row_backend import BACKENDS
from tests.pallas_kernels.gpu_check import checks
from tests.pallas_kernels.quant_problems import compare_rounding, rows_to_round

CODES = (jnp.int8, jnp.float8_e4m3fn)


def interpreted(x, dtype):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        fn = jax.jit(partial(round_rows, backend="mosaic"), static_argnums=1)
        return jax.block_until_ready(fn(x, dtype))


@pytest.mark.parametrize("dtype", CODES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(
    ("shape", "of"),
    [
        ((5, 320), jnp.float32),  # a row in a warp; the last block is not full
        ((2, 3, 64), jnp.bfloat16),
        ((3, 1152), jnp.float16),  # a row in four warps
    ],
)
def test_the_kernel_gives_the_definition_s_bits(shape, of, dtype):
    compare_rounding(interpreted, rows_to_round(shape, of), dtype)


@pytest.mark.parametrize("dtype", CODES, ids=lambda d: jnp.dtype(d).name)
def test_codes_stand_for_what_was_rounded(dtype):
    x = rows_to_round((6, 64), jnp.float32)
    codes, scales = round_rows(x, dtype)
    largest = np.abs(np.asarray(x)).max(-1, keepdims=True)
    error = np.abs(np.asarray(codes, np.float32) * np.asarray(scales)[:, None] - x)
    step = largest / 127 / 2 if dtype == jnp.int8 else np.abs(x) / 16 + largest / 448 / 512
    assert (error <= step * 1.001).all()


@pytest.mark.gpu
@pytest.mark.parametrize("check", list(checks("round_rows")), ids=lambda check: check.name)
def test_on_a_gpu(check):
    print(check.run())


@pytest.mark.parametrize(
    ("capability", "E", "kernel"),
    [(None, 64, False), (9.0, 64, True), (8.0, 4096, True), (9.0, 24, False), (7.5, 64, False)],
)
def test_auto_takes_the_kernel_where_it_runs(capability, E, kernel, monkeypatch):
    monkeypatch.setattr(row_backend, "capability", lambda: capability)
    jaxpr = str(jax.make_jaxpr(lambda x: round_rows(x, jnp.int8))(jnp.zeros((8, E))))
    assert ("core_map" in jaxpr or "mpmd_map" in jaxpr) == kernel


X = jnp.zeros((2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, f"backend='triton': expected one of {BACKENDS}"),
        ({"backend": "mosaic"}, "backend='mosaic': E=8, expected a multiple of 32 up to 16384"),
        ({"x": jnp.zeros((2, 8), jnp.int32)}, "x is int32 (2, 8): expected floats [..., E]"),
        ({"x": jnp.zeros((0, 8))}, "x is float32 (0, 8): expected floats [..., E], not empty"),
        ({"dtype": jnp.int32}, "dtype=int32: expected int8 or float8_e4m3fn"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        round_rows(**({"x": X, "dtype": jnp.int8} | change))
