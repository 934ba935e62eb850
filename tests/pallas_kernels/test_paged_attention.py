"""The op against a plain float64 definition over random lengths, pages and options."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention as op
from pallas_kernels.kv_quantise import quantise
from pallas_kernels.paged_attention import paged_attention

HEADS, KV_HEADS, DIM = 6, 2, 16
STATIC = ("max_query", "scale", "window", "softcap", "backend")
SINKS = np.array([0.5, -3, 2, 9, -np.inf, 0], np.float32)  # one a head
attend = jax.jit(paged_attention, static_argnames=STATIC)


def case(seed, lengths, new, page_size, *, spare=3, poison=np.nan, dtype=np.float32):
    """A ragged batch over permuted pages; every slot that must not be read holds `poison`."""
    rng = np.random.default_rng(seed)
    per_seq = [-(-n // page_size) for n in lengths]
    P, N = max([*per_seq, 1]) + 1, sum(per_seq) + 1 + spare
    free = rng.permutation(np.arange(1, N))
    k = np.full((N, KV_HEADS, page_size, DIM), poison, np.float32)
    v = k.copy()
    table = np.zeros((len(lengths), P), np.int32)
    keys = [rng.normal(size=(n, KV_HEADS, DIM)).astype(dtype) for n in lengths]
    values = [rng.normal(size=(n, KV_HEADS, DIM)).astype(dtype) for n in lengths]
    for s, n in enumerate(lengths):
        table[s, : per_seq[s]], free = free[: per_seq[s]], free[per_seq[s] :]
        for i in range(n):
            page, slot = table[s, i // page_size], i % page_size
            k[page, :, slot], v[page, :, slot] = keys[s][i], values[s][i]
    T = sum(new)
    q = rng.normal(size=(T, HEADS, DIM)).astype(dtype)
    starts = np.cumsum([0, *new]).astype(np.int32)
    arrays = [jnp.asarray(x) for x in (q, k.astype(dtype), v.astype(dtype), table, starts)]
    return (*arrays, jnp.asarray(lengths, jnp.int32)), keys, values


def define(q, starts, lengths, keys, values, *, scale=None, window=None, softcap=None, sinks=None):
    """Attention token by token, in float64."""
    q = np.asarray(q, np.float64)
    out = np.zeros_like(q)
    scale = DIM**-0.5 if scale is None else scale
    for s, n in enumerate(lengths):
        new = starts[s + 1] - starts[s]
        for i in range(new):
            at = n - new + i
            low = 0 if window is None else max(0, at - window + 1)
            for h in range(HEADS):
                group = h // (HEADS // KV_HEADS)
                k = keys[s][low : at + 1, group].astype(np.float64)
                v = values[s][low : at + 1, group].astype(np.float64)
                x = k @ q[starts[s] + i, h] * scale
                x = softcap * np.tanh(x / softcap) if softcap else x
                sink = -np.inf if sinks is None else float(sinks[h])
                top = max(x.max(), sink)
                p = np.exp(x - top)
                out[starts[s] + i, h] = p @ v / (p.sum() + np.exp(sink - top))
    return out


@pytest.mark.parametrize("page_size", [8, 64, 256])
@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ([1, 300, 64, 65], [1, 1, 1, 1]),
        ([7, 290, 33], [7, 5, 1]),
        ([140], [140]),
        ([600], [3]),
    ],
)
def test_reference_is_attention(lengths, new, page_size):
    args, keys, values = case(1, lengths, new, page_size)
    got = attend(*args, max_query=max(new), backend="reference")
    want = define(args[0], np.asarray(args[4]), lengths, keys, values)
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_rows_of_nobody_keep_what_they_hold():
    (q, *rest), _, _ = case(1, [7, 40], [1, 1], 16)
    q = jnp.pad(q, ((0, 3), (0, 0), (0, 0)))
    got = attend(q, *rest, max_query=1, backend="reference", into=jnp.full_like(q, 5))
    np.testing.assert_array_equal(got[:2], attend(q, *rest, max_query=1, backend="reference")[:2])
    np.testing.assert_array_equal(got[2:], 5)
    with pytest.raises(ValueError, match=r"into is float32 \(2, 6, 16\): expected float32 \(5, "):
        attend(q, *rest, max_query=1, into=q[:2])


@pytest.mark.parametrize(
    "options",
    [{"window": 5}, {"window": 300}, {"softcap": 2.0}, {"scale": 0.5}, {"sinks": SINKS},
     {"sinks": SINKS, "window": 5, "softcap": 2.0}],
)  # fmt: skip
def test_options(options):
    lengths, new = [1, 290, 33], [1, 5, 33]
    args, keys, values = case(2, lengths, new, 16)
    got = attend(*args, max_query=33, backend="reference", **options)
    want = define(args[0], np.asarray(args[4]), lengths, keys, values, **options)
    np.testing.assert_allclose(got, want, atol=3e-6)


@pytest.mark.parametrize("options", [{}, {"sinks": SINKS, "window": 40, "softcap": 3.0}])
@pytest.mark.parametrize("q_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_quantised_pages(dtype, static, q_dtype, options):
    """Against float64 on what the pages stand for; unread slots hold the worst of pages and scales,
    those that lie before every window included."""
    lengths, new, page_size = [1, 290, 33], [1, 5, 33], 16
    (q, k, v, table, starts, _), keys, values = case(2, lengths, new, page_size)
    q = q.astype(q_dtype)
    arrays, back = [], []
    for pages, rows in ((k, keys), (v, values)):
        filled = jnp.nan_to_num(pages)
        given = jnp.array([0.03, 0.02]) * (1 if dtype == jnp.int8 else 0.25) if static else None
        by = jnp.broadcast_to(given[:, None], filled.shape[:3]) if static else None
        got, chosen = quantise(filled, dtype, by)
        unread = np.isnan(pages[..., 0])
        worst = np.nan if dtype == jnp.float8_e4m3fn else 127
        got = jnp.where(unread[..., None], jnp.asarray(worst, dtype), got)
        arrays += [got, given if static else jnp.where(unread, jnp.nan, chosen)]
        real = np.asarray(got, np.float64) * np.asarray(chosen, np.float64)[..., None]
        seqs = np.asarray(table)
        flat = [np.moveaxis(real[seqs[s]], 2, 1).reshape(-1, KV_HEADS, DIM) for s in range(3)]
        back.append([f[:n] for f, n in zip(flat, lengths, strict=True)])
        assert np.abs(back[-1][1] - rows[1]).max() < (2 if static else 0.2)
    if "window" in options:  # sequence 1 sees nothing before position 290 - 5 - 40 + 1
        before = seqs[1][: (290 - 5 - 40) // page_size]
        for i in (0, 2):
            arrays[i] = arrays[i].at[before].set(jnp.asarray(worst, dtype))
            if not static:
                arrays[i + 1] = arrays[i + 1].at[before].set(jnp.nan)
    got = attend(
        q, arrays[0], arrays[2], table, starts, jnp.asarray(lengths, jnp.int32), max_query=33,
        k_scales=arrays[1], v_scales=arrays[3], backend="reference", **options,
    )  # fmt: skip
    assert got.dtype == q_dtype
    want = define(q, np.asarray(starts), lengths, *back, **options)
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert error < {jnp.float32: 2e-6, jnp.bfloat16: 5e-3, jnp.float16: 6e-4}[q_dtype]


def test_unread_slots_before_a_window():
    """They may hold anything, as slots past the end may."""
    (q, k, v, table, starts, lengths), keys, values = case(2, [290], [5], 16)
    before = np.asarray(table)[0, : (290 - 5 - 40) // 16]
    k, v = (x.at[before].set(jnp.nan) for x in (k, v))
    got = attend(q, k, v, table, starts, lengths, max_query=5, window=40, backend="reference")
    want = define(q, np.asarray(starts), [290], keys, values, window=40)
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_chunks_equal_the_whole():
    """A prompt's last tokens come out the same from a chunk as from the whole prompt."""
    args, _, _ = case(3, [200], [200], 16)
    whole = attend(*args, max_query=200, backend="reference")
    q, k, v, table, _, lengths = args
    chunk = attend(q[150:], k, v, table, jnp.array([0, 50], jnp.int32), lengths, max_query=50)
    np.testing.assert_allclose(chunk, whole[150:], atol=1e-6)


def alone_and_together():
    args, _, _ = case(4, [90, 700, 3], [1, 1, 1], 64)
    q, k, v, table, _, lengths = args
    starts = jnp.array([0, 1], jnp.int32)
    narrow = table[:1, :2]  # the page table is cut to what this sequence needs
    together = attend(*args, max_query=1, backend="reference")[:1]
    return attend(q[:1], k, v, narrow, starts, lengths[:1], max_query=1), together


def test_a_row_does_not_depend_on_its_neighbours():
    # Not bit for bit: XLA on a CPU picks its exp and its sums by the shape of the whole array.
    alone, together = alone_and_together()
    np.testing.assert_allclose(alone, together, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_a_row_has_the_same_bits_whatever_stands_beside_it():
    alone, together = alone_and_together()
    assert np.array_equal(alone, together)


def test_rows_of_nobody_are_zero():
    args, _, _ = case(5, [9, 20], [2, 3], 8)
    q = jnp.concatenate([args[0], jnp.full((3, HEADS, DIM), jnp.nan)])
    out = attend(q, *args[1:], max_query=3, backend="reference")
    assert np.isfinite(out).all()
    assert (np.asarray(out[5:]) == 0).all()


def test_half_precision():
    args, keys, values = case(6, [90, 300], [4, 1], 64, dtype=jnp.bfloat16)
    got = attend(*args, max_query=4, backend="reference")
    assert got.dtype == jnp.bfloat16
    want = define(args[0], np.asarray(args[4]), [90, 300], keys, values)
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert error < 5e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "backend='triton'"),
        ({"max_query": 0}, "max_query=0"),
        ({"max_query": 99}, "max_query=99"),
        ({"window": 0}, "window=0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": -0.5}, "scale=-0.5"),
        ({"q": jnp.zeros((5, 5, DIM))}, "5 heads"),
        ({"q": jnp.zeros((5, 6, 8))}, "of 8"),
        ({"q": jnp.zeros((5, 6, DIM), jnp.float16)}, "float16"),
        ({"v_pages": jnp.zeros((2, 2, 8, DIM))}, "differ"),
        ({"kv_lengths": jnp.zeros((2,), jnp.int16)}, "int32"),
        ({"kv_lengths": jnp.zeros((3,), jnp.int32)}, "kv_lengths [2]"),
        ({"page_table": jnp.zeros((2, 0), jnp.int32)}, "no columns"),
        ({"sinks": jnp.zeros((5,))}, "sinks is float32 (5,): expected float32 [6]"),
        ({"sinks": jnp.zeros((6,), jnp.bfloat16)}, "sinks is bfloat16 (6,): expected float32 [6]"),
        ({"k_scales": jnp.zeros((2,))}, "must be None for pages of float32"),
        ({f"{x}_pages": jnp.zeros((8, 2, 8, DIM), jnp.int8) for x in "kv"}, "need k_scales"),
        ({"v_pages": jnp.zeros((8, 2, 8, DIM), jnp.int8)}, "v_pages"),
    ],
)
def test_bad_arguments_are_named(change, message):
    names = ("q", "k_pages", "v_pages", "page_table", "query_starts", "kv_lengths")
    args, _, _ = case(7, [9, 20], [2, 3], 8)
    options = {"max_query": 3, "backend": "reference", **dict(zip(names, args, strict=True))}
    with pytest.raises(ValueError, match=r".") as raised:
        paged_attention(**(options | change))
    assert message in str(raised.value)


@pytest.mark.parametrize("backend", ["sm90", "sm80"])
def test_a_kernel_asked_for_by_name_needs_its_gpu(backend, monkeypatch):
    args, _, _ = case(7, [9, 20], [2, 3], 8)
    monkeypatch.setattr(op, "capability", lambda: None)
    with pytest.raises(ValueError, match=f"backend='{backend}' needs a GPU .* is none"):
        paged_attention(*args, max_query=3, backend=backend)
    monkeypatch.setattr(op, "capability", lambda: 7.5)
    with pytest.raises(ValueError, match=r"capability [89]; here it is 7\.5"):
        paged_attention(*args, max_query=3, backend=backend)


@pytest.mark.parametrize(
    ("q", "pages", "message"),
    [
        ((6, 128), (2, 64, 128), "q is float32: expected bfloat16 or float16"),
        ((6, 96), (2, 64, 96), "head_dim 96: expected one of (64, 128, 256)"),
        ((6, 128), (2, 16, 128), "page_size 16: expected one of (32, 64, 128)"),
        ((65, 128), (1, 64, 128), "65 query heads a KV head: expected at most 64"),
    ],
)
def test_what_the_kernels_take(q, pages, message, monkeypatch):
    """By name: an error that says so. By `auto`: `reference`, said once."""
    dtype = jnp.float32 if "float32" in message else jnp.bfloat16
    pool = jnp.zeros((2, *pages), dtype)
    zero, one = jnp.zeros((1,), jnp.int32), jnp.ones((1,), jnp.int32)
    args = (
        jnp.zeros((1, *q), dtype), pool, pool, zero[None], jnp.array([0, 1], jnp.int32), one,
    )  # fmt: skip
    monkeypatch.setattr(op, "capability", lambda: 9.0)
    with pytest.raises(ValueError, match=r".") as raised:
        paged_attention(*args, max_query=1, backend="sm90")
    assert message in str(raised.value)
    said = []
    monkeypatch.setattr(op, "_say_once", said.append)
    assert paged_attention(*args, max_query=1).shape == args[0].shape
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize("bad", [-1, 99])
def test_page_ids_are_checked_on_demand(bad, monkeypatch):
    args, _, _ = case(7, [20], [3], 8)
    q, k, v, table, starts, lengths = args
    wrong = table.at[0, 1].set(bad)
    spare = jnp.concatenate([table, jnp.full((1, 1), bad, jnp.int32)], axis=1)  # not read
    monkeypatch.setenv(op.CHECK_PAGES, "1")
    run = jax.jit(partial(paged_attention, max_query=3, backend="reference"))
    np.testing.assert_array_equal(
        run(q, k, v, spare, starts, lengths), run(q, k, v, table, starts, lengths)
    )
    with pytest.raises(Exception, match=rf"page_table\[0, 1\] = {bad}: expected 0 to"):
        jax.block_until_ready(run(q, k, v, wrong, starts, lengths))


def test_odd_page_sizes_are_refused():
    args, _, _ = case(8, [9], [1], 24)
    with pytest.raises(ValueError, match="page_size=24"):
        paged_attention(*args, max_query=1)
