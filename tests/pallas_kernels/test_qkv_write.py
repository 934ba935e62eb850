"""Both backends of `qkv_write` against NumPy, the rounding of both quantised types, and what the
kernel compiles to on the GPUs that it is for."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import qkv_write as op
from pallas_kernels.kv_quantise import calibrate, quantise
from pallas_kernels.qkv_heads import Heads, prepare
from pallas_kernels.qkv_write import BACKENDS, qkv_write
from tests.pallas_kernels.aot import compile_in_subprocess, run_with_plugin

E4M3 = jnp.float8_e4m3fn
LARGEST = {jnp.int8: 127.0, E4M3: 448.0}
PAGES, PAGE_SIZE = 4, 8
SLOTS = [9, 0, 17, 0, 31, 14]  # two inert tokens share slot 0 of the trash page
linux = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA plugin is for Linux")


def case(K, D, dtype, scaling=None, new_dtype=jnp.bfloat16, seed=0, group=2):
    """(pools, qkv, kv_index): pools, which hold random numbers before, and `group` query heads a
    head of keys and values."""
    rng = np.random.default_rng(seed)
    pages = [jnp.asarray(rng.normal(size=(PAGES, K, PAGE_SIZE, D)), dtype) for _ in "kv"]
    qkv = jnp.asarray(rng.normal(size=(len(SLOTS), K * (group + 2), D)), new_dtype)
    qkv = qkv.at[2, group * K].set(0)  # an all-zero head of keys
    scales: list = [None, None]
    if scaling == "dynamic":
        scales = [jnp.asarray(rng.random((PAGES, K, PAGE_SIZE)), jnp.float32) for _ in "kv"]
    elif scaling == "static":  # some of it saturates
        scales = [jnp.asarray((1 + rng.random(K)) / LARGEST[dtype], jnp.float32) for _ in "kv"]
    return (*pages, *scales), qkv.reshape(len(SLOTS), -1), jnp.asarray(SLOTS, jnp.int32)


def every_kind(qkv, D, K, seed=1):
    """All that can be done to heads."""
    rng = np.random.default_rng(seed)
    angles = rng.normal(size=(len(qkv), D // 2)) * 3
    bias, q_norm, k_norm = (
        jnp.asarray(rng.normal(size=n) * 0.5, qkv.dtype) for n in (qkv.shape[1], D, D)
    )
    rope = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    return Heads(bias, q_norm, k_norm, 1e-5, rope)


def write(args, backend, heads=Heads()):  # noqa: B008
    run, args = jax.jit(partial(qkv_write, backend=backend)), (*args, heads)
    if backend == "reference" or jax.default_backend() == "gpu":
        return run(*args)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return jax.block_until_ready(run(*args))


def real(x):
    return np.asarray(x).astype(np.float64)


def check(args, found):
    """Written slots hold what they should, up to rounding; every other slot keeps its bits."""
    pools, qkv, _ = args
    q_found, got = found
    K, D = pools[0].shape[1], pools[0].shape[3]
    q, *news = prepare(qkv, qkv.shape[1] // D - 2 * K, K, Heads())
    np.testing.assert_array_equal(real(q_found), real(q))
    untouched = np.ones((PAGES, PAGE_SIZE), bool)
    untouched.flat[SLOTS] = False
    for pages, scales, new, wrote, chose in zip(
        pools[:2], pools[2:], news, got[:2], got[2:], strict=True
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
    with pytest.raises(ValueError, match="backend='mosaic': the pages have D=24, expected"):
        qkv_write(*args, backend="mosaic")


@pytest.mark.parametrize(
    ("capability", "D", "kernel"),
    [(None, 64, False), (9.0, 64, True), (8.0, 256, True), (9.0, 24, False), (7.5, 64, False)],
)
def test_auto_takes_the_kernel_where_it_runs(capability, D, kernel, monkeypatch):
    monkeypatch.setattr(op, "capability", lambda: capability)
    args = case(2, D, jnp.int8, "dynamic")
    jaxpr = str(jax.make_jaxpr(lambda *args: qkv_write(*args))(*args))
    assert ("Ref<gmem>" in jaxpr) == kernel  # pools as references, written in place


def test_a_row_does_not_depend_on_its_neighbours():
    args = case(2, 64, E4M3, "dynamic")
    heads = every_kind(args[1], 64, 2)
    q_together, together = write(args, "mosaic", heads)
    for token, slot in enumerate(SLOTS):
        if slot:
            only = slice(token, token + 1)
            own = replace(heads, rope=tuple(x[only] for x in heads.rope))
            q, alone = write((args[0], args[1][only], args[2][only]), "mosaic", own)
            assert np.array_equal(q[0], q_together[token])
            page, at = divmod(slot, PAGE_SIZE)
            for a, b in zip(alone, together, strict=True):
                assert np.array_equal(a[page, :, at], b[page, :, at])


# -- what is done to heads ----------------------------------------------------------------------


def exact(qkv, H, K, heads):
    """`prepare` in float64."""
    x = real(qkv) + (0 if heads.bias is None else real(heads.bias))
    x = x.reshape(len(x), H + 2 * K, -1)
    half = x.shape[-1] // 2

    def made(x, weight):
        if weight is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + heads.eps) * real(weight)
        if heads.rope is not None:
            cos, sin = (real(t)[:, None] for t in heads.rope)
            turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)
            x = np.concatenate([turned.real, turned.imag], -1)
        return x

    return made(x[:, :H], heads.q_norm), made(x[:, H : H + K], heads.k_norm), x[:, H + K :]


@pytest.mark.parametrize("backend", ["reference", "mosaic"])
@pytest.mark.parametrize(
    ("K", "D", "group", "without"),
    [
        (2, 64, 3, ()), (8, 128, 4, ("bias", "q_norm", "k_norm")), (1, 32, 7, ("bias",)),
        (3, 32, 1, ("rope",)), (2, 256, 4, ("q_norm", "k_norm")), (2, 64, 1, ("bias", "rope")),
        (10, 128, 8, ()),
    ],
)  # fmt: skip
def test_what_is_done_to_heads(K, D, group, without, backend):
    args = case(K, D, jnp.float32, None, jnp.float32, group=group)
    heads = replace(every_kind(args[1], D, K), **dict.fromkeys(without))
    q, pools = write(args, backend, heads)
    page, at = np.divmod(SLOTS, PAGE_SIZE)
    wrote = [np.asarray(pool)[page, :, at] for pool in pools[:2]]
    for got, want in zip((q, *wrote), exact(args[1], group * K, K, heads), strict=True):
        some = np.asarray(SLOTS) != 0
        np.testing.assert_allclose(real(got)[some], want[some], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "mosaic"])
def test_norms_that_scale_by_one_more_than_their_weights(backend):
    args = case(2, 64, jnp.float32, None, jnp.float32)
    less = every_kind(args[1], 64, 2)
    more = replace(less, q_norm=less.q_norm + 1, k_norm=less.k_norm + 1)
    found, want = write(args, backend, replace(less, plus_one=True)), write(args, backend, more)
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(real(got), real(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "mosaic"])
def test_16_bits_are_as_exact_as_they_can_be(backend):
    args = case(2, 64, jnp.bfloat16)
    heads = every_kind(args[1], 64, 2)
    q, pools = write(args, backend, heads)
    page, at = np.divmod(SLOTS, PAGE_SIZE)
    for got, want in zip((q, pools[0][page, :, at]), exact(args[1], 4, 2, heads)[:2], strict=True):
        some = np.asarray(SLOTS) != 0
        error = np.linalg.norm(real(got)[some] - want[some], axis=-1)
        assert (error < 2**-7 * np.linalg.norm(want[some], axis=-1)).all()


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
        ({"qkv": S((6, 8, 64), jnp.bfloat16)}, "qkv [T, (H + 2K) * D]; got"),
        ({"qkv": S((6, 256), jnp.bfloat16)}, "qkv is (6, 256): expected [T, (H + 4) * 64]"),
        ({"qkv": S((6, 520), jnp.bfloat16)}, "qkv is (6, 520): expected [T, (H + 4) * 64]"),
        ({"qkv": S((6, 512), jnp.int8)}, "qkv is int8"),
        ({"heads": Heads(q_norm=S((64,), jnp.bfloat16))}, "q_norm and k_norm, or neither"),
        (
            {"heads": Heads(bias=S((64,), jnp.bfloat16))},
            "bias is bfloat16 (64,): expected",
        ),
        ({"heads": Heads(rope=(S((6, 64), jnp.float32),) * 2)}, "cos is float32 (6, 64): expected"),
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
    names = ("k_pages", "v_pages", "k_scales", "v_scales")
    pools, qkv, kv_index = case(2, 64, jnp.int8, "dynamic")
    given = {"qkv": qkv, "kv_index": kv_index, **dict(zip(names, pools, strict=True))} | change
    pools = tuple(given.pop(name) for name in names)
    with pytest.raises(ValueError, match=r".") as raised:
        qkv_write(pools, **given)
    assert message in str(raised.value)


# -- what it compiles to ------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("arch", [pytest.param("sm80", marks=pytest.mark.slow), "sm90"])
def test_it_compiles_without_spills(arch):
    rows = compile_in_subprocess(arch, "tests.pallas_kernels.qkv_write_cases:cases")
    assert rows
    assert not [row for row in rows if row["problem"]]


@linux
def test_the_pools_are_written_in_place():
    said = run_with_plugin("tests.pallas_kernels.qkv_write_cases", timeout_s=300)
    rows = [json.loads(line) for line in said.splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["donated_bytes"] >= row["pool_bytes"]
        assert row["other_bytes"] < 0.1 * row["pool_bytes"]
