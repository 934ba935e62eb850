"""Both backends of `kv_write` against NumPy, the rounding of both quantised types, and what the
kernel compiles to on the GPUs that it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import kv_write as op
from pallas_kernels.kv_quantise import calibrate, quantise
from pallas_kernels.kv_write import BACKENDS, kv_write
from tests.pallas_kernels.aot import ROOT, compile_in_subprocess, plugin_path

E4M3 = jnp.float8_e4m3fn
LARGEST = {jnp.int8: 127.0, E4M3: 448.0}
PAGES, PAGE_SIZE = 4, 8
SLOTS = [9, 0, 17, 0, 31, 14]  # two inert tokens share slot 0 of the trash page
linux = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA plugin is for Linux")


def case(K, D, dtype, scaling=None, new_dtype=jnp.bfloat16, seed=0):
    """Arguments of `kv_write`; the pools hold random numbers before."""
    rng = np.random.default_rng(seed)
    pages = [jnp.asarray(rng.normal(size=(PAGES, K, PAGE_SIZE, D)), dtype) for _ in "kv"]
    new = [jnp.asarray(rng.normal(size=(len(SLOTS), K, D)), new_dtype) for _ in "kv"]
    new[0] = new[0].at[2, 0].set(0)  # an all-zero head
    scales: list = [None, None]
    if scaling == "dynamic":
        scales = [jnp.asarray(rng.random((PAGES, K, PAGE_SIZE)), jnp.float32) for _ in "kv"]
    elif scaling == "static":  # some of it saturates
        scales = [jnp.asarray((1 + rng.random(K)) / LARGEST[dtype], jnp.float32) for _ in "kv"]
    return (*pages, *scales, *new, jnp.asarray(SLOTS, jnp.int32))


def write(args, backend):
    run = jax.jit(partial(kv_write, backend=backend))
    if backend == "reference" or jax.default_backend() == "gpu":
        return run(*args)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return jax.block_until_ready(run(*args))


def real(x):
    return np.asarray(x).astype(np.float64)


def check(args, got):
    """Written slots hold what they should, up to rounding; every other slot keeps its bits."""
    untouched = np.ones((PAGES, PAGE_SIZE), bool)
    untouched.flat[SLOTS] = False
    for pages, scales, new, wrote, chose in zip(
        args[:2], args[2:4], args[4:6], got[:2], got[2:4], strict=True
    ):
        assert (wrote.dtype, wrote.shape) == (pages.dtype, pages.shape)
        before, after = (np.moveaxis(np.asarray(p), 2, 1)[untouched] for p in (pages, wrote))
        assert before.tobytes() == after.tobytes()
        if scales is not None and scales.ndim == 3:
            before, after = (np.moveaxis(np.asarray(p), 2, 1)[untouched] for p in (scales, chose))
            np.testing.assert_array_equal(before, after)
        elif scales is not None:
            np.testing.assert_array_equal(scales, chose)
        for token, slot in enumerate(SLOTS):
            if slot == 0:
                continue
            page, at = divmod(slot, PAGE_SIZE)
            x, stored = real(new[token]), real(wrote[page, :, at])
            if scales is None:
                np.testing.assert_array_equal(stored, real(new[token].astype(pages.dtype)))
                continue
            largest = LARGEST[pages.dtype.type]
            by = real(chose) if chose.ndim == 1 else real(chose[page, :, at])
            if chose.ndim == 3:
                peak = np.abs(x).max(-1)
                np.testing.assert_allclose(by, np.where(peak == 0, 1, peak / largest), rtol=1e-6)
            wanted = np.clip(x / by[:, None], -largest, largest)
            step = 0.5 if pages.dtype == jnp.int8 else np.maximum(np.abs(wanted) / 16, 2.0**-10)
            assert (np.abs(stored - wanted) <= step * (1 + 1e-4)).all()


FORMATS = [
    (jnp.bfloat16, None), (jnp.float32, None), (jnp.int8, "dynamic"), (jnp.int8, "static"),
    (E4M3, "dynamic"), (E4M3, "static"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "mosaic"])
@pytest.mark.parametrize(("dtype", "scaling"), FORMATS)
def test_every_page_type(dtype, scaling, backend):
    args = case(8, 64, dtype, scaling)
    check(args, write(args, backend))


@pytest.mark.parametrize(("K", "D"), [(1, 32), (2, 64), (5, 128), (6, 32), (1, 256)])
@pytest.mark.parametrize(("dtype", "scaling"), [(E4M3, "dynamic"), (jnp.int8, "static")])
def test_shapes_of_the_kernel(K, D, dtype, scaling):
    args = case(K, D, dtype, scaling, new_dtype=jnp.float16)
    check(args, write(args, "mosaic"))


def test_a_token_with_many_heads_takes_several_blocks():
    args = case(32, 128, jnp.int8, "dynamic", new_dtype=jnp.float32)
    check(args, write(args, "mosaic"))


def test_head_dims_that_no_warp_divides():
    args = case(2, 24, jnp.int8, "dynamic")
    check(args, write(args, "reference"))
    with pytest.raises(ValueError, match="backend='mosaic': k_new has D=24, expected"):
        kv_write(*args, backend="mosaic")


@pytest.mark.parametrize(
    ("capability", "D", "kernel"),
    [(None, 64, False), (9.0, 64, True), (8.0, 256, True), (9.0, 24, False), (7.5, 64, False)],
)
def test_auto_takes_the_kernel_where_it_runs(capability, D, kernel, monkeypatch):
    monkeypatch.setattr(op, "capability", lambda: capability)
    args = case(2, D, jnp.int8, "dynamic")
    jaxpr = str(jax.make_jaxpr(lambda *args: kv_write(*args))(*args))
    assert ("Ref<gmem>" in jaxpr) == kernel  # pools as references, written in place


def test_a_row_does_not_depend_on_its_neighbours():
    args = case(2, 64, E4M3, "dynamic")
    together = write(args, "mosaic")
    for token, slot in enumerate(SLOTS):
        if slot:
            rows = [x[token : token + 1] for x in args[4:]]
            alone = write((*args[:4], *rows), "mosaic")
            page, at = divmod(slot, PAGE_SIZE)
            for a, b in zip(alone, together, strict=True):
                assert np.array_equal(a[page, :, at], b[page, :, at])


# -- quantise -----------------------------------------------------------------------------------


def test_e4m3_rounds_to_nearest_even():
    """Every e4m3 value, every midpoint between two, and the float32 values beside those."""
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middle])
    x = np.concatenate([x, np.nextafter(x, np.float32(9e9)), np.nextafter(x, np.float32(-9e9))])
    x = np.clip(x, -448, 448)
    got, _ = quantise(jnp.asarray(x)[:, None], E4M3, jnp.ones(len(x)))
    want = x.astype(ml_dtypes.float8_e4m3fn)
    assert np.asarray(got[:, 0]).tobytes() == want.tobytes()


def test_int8_rounds_to_nearest_even():
    x = jnp.asarray([-300, -127.5, -1.5, -0.5, -0.49, 0, 0.5, 1.5, 2.5, 126.5, 127.4, 1e9])
    got, _ = quantise(x[:, None], jnp.int8, jnp.ones(len(x)))
    assert got[:, 0].tolist() == [-127, -127, -2, 0, 0, 0, 0, 2, 2, 126, 127, 127]


@pytest.mark.parametrize("dtype", [jnp.int8, E4M3])
def test_extremes(dtype):
    top, tiny = np.finfo(np.float32).max, np.float32(1e-42)
    x = jnp.asarray([[0, 0], [top, -top], [np.inf, 1], [tiny, -tiny], [np.nan, 1]], jnp.float32)
    values, scale = quantise(x, dtype)
    largest = LARGEST[dtype]
    np.testing.assert_allclose(scale[:4], [1, top / largest, top / largest, 1], rtol=1e-6)
    assert np.isnan(scale[4])  # a NaN is not hidden
    assert real(values[:4]).tolist() == [[0, 0], [largest, -largest], [largest, 0], [0, 0]]


@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=8
    ),
    st.sampled_from([jnp.int8, E4M3]),
)
def test_what_comes_back(row, dtype):
    x = np.asarray(row, np.float32)
    values, scale = quantise(jnp.asarray(x), dtype)
    back = real(values) * float(scale)
    step = float(scale) / 2 if dtype == jnp.int8 else np.abs(x) / 16 + float(scale) * 2.0**-10
    assert (np.abs(back - x) <= step * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", [jnp.int8, E4M3])
def test_calibrated_scales_let_nothing_saturate(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50, 4, 16)), jnp.bfloat16)
    scale = calibrate(x, dtype)
    assert (scale.shape, scale.dtype) == ((4,), jnp.float32)
    values, _ = quantise(x, dtype, scale)
    assert real(jnp.abs(values.astype(jnp.float32)).max((0, 1, 3))).tolist() == [LARGEST[dtype]] * 4


@pytest.mark.parametrize("call", [quantise, calibrate])
def test_other_types_are_refused(call):
    with pytest.raises(ValueError, match="dtype=int4: expected int8 or float8_e4m3fn"):
        call(jnp.ones((2, 2)), jnp.int4)


# -- checks -------------------------------------------------------------------------------------

S = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, f"backend='triton': expected one of {BACKENDS}"),
        ({"k_pages": S((4, 8, 64), jnp.int8)}, "k_pages [N, K, page_size, D]"),
        ({"v_pages": S((4, 2, 8, 64), jnp.bfloat16)}, "k_pages and v_pages must have one shape"),
        ({"v_new": S((6, 2, 32), jnp.bfloat16)}, "k_new and v_new must have one shape"),
        ({"k_new": S((6, 3, 64), jnp.bfloat16), "v_new": S((6, 3, 64), jnp.bfloat16)}, "[T, 2, 64"),
        ({"k_new": S((6, 2, 64), jnp.int8), "v_new": S((6, 2, 64), jnp.int8)}, "k_new is int8"),
        ({"kv_index": S((6,), jnp.int16)}, "kv_index is int16 (6,): expected int32 [6]"),
        ({"kv_index": S((5,), jnp.int32)}, "kv_index is int32 (5,): expected int32 [6]"),
        ({"k_scales": None}, "pages of int8 need k_scales and v_scales"),
        ({"k_scales": S((2,), jnp.bfloat16)}, "k_scales is bfloat16 (2,): expected float32 [4, 2,"),
        ({"v_scales": S((3,), jnp.float32)}, "v_scales is float32 (3,): expected float32 [4, 2, 8"),
        ({"v_scales": S((2,), jnp.float32)}, "k_scales (4, 2, 8) and v_scales (2,) differ"),
        ({f"{x}_pages": S((4, 2, 8, 64), jnp.int32) for x in "kv"}, "k_pages is int32: expected"),
        ({f"{x}_pages": S((4, 2, 8, 64), jnp.float16) for x in "kv"}, "must be None for pages of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    names = ("k_pages", "v_pages", "k_scales", "v_scales", "k_new", "v_new", "kv_index")
    args = dict(zip(names, case(2, 64, jnp.int8, "dynamic"), strict=True))
    with pytest.raises(ValueError, match=r".") as raised:
        kv_write(**(args | change))
    assert message in str(raised.value)


# -- what it compiles to ------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_it_compiles_without_spills(arch):
    rows = compile_in_subprocess(arch, "tests.pallas_kernels.kv_write_cases:cases")
    assert rows
    assert not [row for row in rows if row["problem"]]


@linux
def test_the_pools_are_written_in_place():
    path = os.pathsep.join(filter(None, (str(ROOT), plugin_path())))
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.pallas_kernels.kv_write_cases"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["donated_bytes"] >= row["pool_bytes"]
        assert row["other_bytes"] < 0.1 * row["pool_bytes"]
