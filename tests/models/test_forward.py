"""`forward` over ragged batches against `apply` on each sequence alone, with tiny random models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.batch import Batch, Chunks, Plan, Ragged, SeqState, assemble, init_state, prepare
from jaxinfer.cache import TRASH_PAGE, PagedCache, init_cache
from jaxinfer.config import LayerConfig, ModelConfig, RopeConfig
from jaxinfer.models.decoder import apply, forward, logits
from jaxinfer.models.weights import init_params
from jaxinfer.sampling import pack_row
from jaxinfer.types import SamplingParams

BASE = ModelConfig(
    family="llama", vocab_size=61, hidden_size=24, intermediate_size=40, num_heads=4,
    num_kv_heads=2, head_dim=8, layers=(LayerConfig(), LayerConfig()), max_position=256,
)  # fmt: skip
VARIANTS = {
    "gqa": BASE,
    "mqa, tied": replace(BASE, num_kv_heads=1, tie_embeddings=True),
    "mha, biases": replace(BASE, num_kv_heads=4, qkv_bias=True, o_bias=True, mlp_bias=True),
    "windows": replace(BASE, layers=(LayerConfig(window=5), LayerConfig(), LayerConfig(window=1))),
    "qk_norm, two ropes": replace(
        BASE, qk_norm=True, layers=(LayerConfig(), LayerConfig(rope=RopeConfig(theta=500.0)))
    ),
    "a layer without rope": replace(BASE, layers=(LayerConfig(rope=None), LayerConfig())),
}
PAGES = 24
RESID = ("layers.0.resid", "layers.1.resid")  # all variants have two layers or more
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

run = jax.jit(forward, static_argnames=("config", "attention", "capture"))
alone = jax.jit(apply, static_argnames=("config", "capture"))


def random_params(config, seed=0):
    """`init_params` with biases and norms that are not the neutral ones."""
    params = init_params(config, jax.random.key(seed), jnp.float32)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape) if leaf.ndim == 1 else leaf
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


@dataclass
class Part:
    """New tokens `start` to `stop` of a sequence that lies in `pages`."""

    tokens: np.ndarray
    start: int
    stop: int
    pages: list[int]


def build(parts: list[Part], page_size: int, *, size: int, columns: int) -> Batch:
    """The flat batch of the parts, one after the other, padded with inert tokens to `size`."""
    tokens, positions, slots = (np.zeros(size, np.int32) for _ in range(3))
    table = np.zeros((1, len(parts), columns), np.int32)
    starts = [0]
    for s, part in enumerate(parts):
        table[0, s, : len(part.pages)] = part.pages
        for position in range(part.start, part.stop):
            at = starts[-1] + position - part.start
            tokens[at], positions[at] = part.tokens[position], position
            slots[at] = part.pages[position // page_size] * page_size + position % page_size
        starts.append(starts[-1] + part.stop - part.start)
    return Batch(
        tokens=jnp.asarray(tokens),
        positions=jnp.asarray(positions),
        kv_index=jnp.asarray(slots),
        decode=None,
        chunks=Ragged(
            jnp.asarray(table),
            jnp.asarray(starts, jnp.int32),
            jnp.asarray([p.stop for p in parts], jnp.int32),
        ),
        logit_rows=jnp.arange(size, dtype=jnp.int32),
    )


def sequences(page_size, lengths, seed=0):
    """Random tokens, and for each sequence pages of its own in no particular order."""
    rng = np.random.default_rng(seed)
    free = rng.permutation(np.arange(1, PAGES)).tolist()
    found = []
    for length in lengths:
        count = -(-length // page_size)
        pages, free = free[:count], free[count:]
        found.append((rng.integers(0, BASE.vocab_size, length).astype(np.int32), pages))
    return found


def slots_of(cache: PagedCache, pages: list[int]) -> list[np.ndarray]:
    return [np.asarray(array)[pages] for array in (*cache.k, *cache.v)]


@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_mixed_batch_is_each_sequence_alone(name, page_size):
    """A whole prompt, a chunk behind a cached prefix, and two decode rows, in one batch."""
    config = VARIANTS[name]
    params = random_params(config)
    new = [(0, 11), (9, 22), (20, 21), (3, 4)]
    found = sequences(page_size, [stop for _, stop in new])
    columns = max(len(pages) for _, pages in found)

    def step(spans, cache):
        parts = [Part(t, *span, p) for (t, p), span in zip(found, spans, strict=True)]
        batch = build(parts, page_size, size=32, columns=columns)
        return run(params, config, batch, cache, capture=RESID)

    cache = init_cache(config, PAGES, page_size, jnp.float32)
    _, cache = step([(0, start) for start, _ in new], cache)
    out, _ = step(new, cache)
    got = logits(params, config, out.hidden)
    padded = np.stack([np.pad(t, (0, 22 - len(t))) for t, _ in found])
    want, resid = alone(params, config, padded, capture=RESID)
    at = 0
    for s, (start, stop) in enumerate(new):
        rows = slice(at, at + stop - start)
        np.testing.assert_allclose(got[rows], want[s, start:stop], **TOLERANCE)
        for site in RESID:
            theirs = resid[site][s, start:stop]
            np.testing.assert_allclose(out.activations[site][rows], theirs, **TOLERANCE)
        at = rows.stop


@pytest.mark.parametrize(
    ("kv_dtype", "static"),
    [(jnp.int8, False), (jnp.float8_e4m3fn, False), (jnp.int8, True)],
)
def test_a_quantised_cache(kv_dtype, static):
    """Close to the unquantised one; chunks and the whole prompt agree, because the new tokens, too,
    are attended to as written, whatever the step says about the whole prompt."""
    params = random_params(BASE)
    tokens, pages = sequences(8, [20])[0]
    scales = None
    if static:
        given = tuple(jnp.full((BASE.num_kv_heads,), 0.05) for _ in BASE.layers)
        scales = (given, given)

    def prefill(cuts, cache):
        hidden = []
        for start, stop in zip((0, *cuts), (*cuts, 20), strict=True):
            batch = build([Part(tokens, start, stop, pages)], 8, size=32, columns=3)
            out, cache = run(params, BASE, batch, cache)
            hidden.append(out.hidden[: stop - start])
        return np.concatenate(hidden), cache

    def empty():
        return init_cache(BASE, PAGES, 8, kv_dtype, scales=scales)

    exact, _ = prefill((), init_cache(BASE, PAGES, 8, jnp.float32))
    whole, cache = prefill((), empty())
    chunks, _ = prefill((7, 16), empty())
    np.testing.assert_allclose(chunks, whole, rtol=1e-3, atol=1e-3)
    error = np.linalg.norm(whole - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.1
    assert all(x.dtype == kv_dtype for x in (*cache.k, *cache.v))
    wanted = scales or empty()[2:]
    for before, after in zip(jax.tree.leaves(wanted), jax.tree.leaves(cache[2:]), strict=True):
        assert np.array_equal(before, after) == static


def test_no_activations_unless_asked_for():
    found = sequences(8, [3])
    batch = build([Part(found[0][0], 0, 3, found[0][1])], 8, size=8, columns=1)
    cache = init_cache(BASE, PAGES, 8, jnp.float32)
    out, _ = run(random_params(BASE), BASE, batch, cache)
    assert out.activations == {}


def test_logit_rows_choose_hidden_states():
    params = random_params(BASE)
    tokens, pages = sequences(8, [7])[0]
    batch = build([Part(tokens, 0, 7, pages)], 8, size=8, columns=1)
    cache = init_cache(BASE, PAGES, 8, jnp.float32)
    full, _ = run(params, BASE, batch, cache)
    some, _ = run(params, BASE, batch._replace(logit_rows=jnp.array([6, 2, 2])), cache)
    np.testing.assert_allclose(some.hidden, full.hidden[jnp.array([6, 2, 2])], rtol=1e-6, atol=1e-6)


def test_only_own_slots_and_the_trash_page_are_written():
    """Everything else in the cache keeps its bits, and garbage there changes no output."""
    params = random_params(BASE)
    (tokens, pages), (other, other_pages) = sequences(8, [11, 6])
    parts = [Part(tokens, 0, 11, pages), Part(other, 0, 6, other_pages)]
    batch = build(parts, 8, size=32, columns=3)  # 15 inert tokens, and an unused page column
    clean = init_cache(BASE, PAGES, 8, jnp.float32)
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), clean)
    want, _ = run(params, BASE, batch, clean)
    got, after = run(params, BASE, batch, poisoned)
    np.testing.assert_array_equal(got.hidden[:17], want.hidden[:17])
    own = np.zeros((PAGES, 8), bool)
    own.flat[np.asarray(batch.kv_index)] = True
    for array in (*after.k, *after.v):
        array = np.asarray(array).transpose(0, 2, 1, 3)  # [N, page_size, K, D]
        assert np.isnan(array[~own]).all()
        own_pages = own.copy()
        own_pages[TRASH_PAGE] = False
        assert np.isfinite(array[own_pages]).all()


def plan(parts=(), rows=(), *, state, size=16, columns=5, slots=3, released=(), granted=()) -> Plan:
    """A step that decodes `rows` and reads `parts`, {row: Part}, as the engine would ask for it.

    `granted`: {row: (column, pages)}.
    """
    M = len(state.active)
    tokens, positions = np.full(size, 5, np.int32), np.zeros(size, np.int32)
    owner, ends = np.full(size, -1, np.int32), np.zeros(slots, np.int32)
    pages = np.zeros((slots, columns), np.int32)
    parts, at = dict(parts), len(rows)
    for i, part in enumerate(parts.values()):
        ends[i:] = end = at + part.stop - part.start
        tokens[at:end] = part.tokens[part.start : part.stop]
        positions[at:end] = np.arange(part.start, part.stop)
        owner[at:end], at = i, end
        pages[i, : len(part.pages)] = part.pages
    rest = slots - len(parts)
    how = pack_row(SamplingParams(temperature=0.0), seed=1, sample=0, stop_ids=(), min_length=0)
    chunks = Chunks(
        tokens, positions, owner, ends,
        row=np.array([*parts, *[M] * rest], np.int32),
        length=np.array([*(p.stop for p in parts.values()), *[0] * rest], np.int32),
        prompt=np.full(slots, 64, np.int32),
        first=np.array([*(p.start == 0 for p in parts.values()), *[False] * rest]),
        last=np.zeros(slots, bool),
        pages=pages, limit=np.full(slots, 40, np.int32),
        how=jax.tree.map(lambda x: np.stack([x] * slots), how), targets=None,
    )  # fmt: skip
    columns_of, new = np.zeros(M, np.int32), np.zeros((M, 2), np.int32)
    for row, (column, found) in dict(granted).items():
        columns_of[row], new[row, : len(found)] = column, found
    stopped = np.isin(np.arange(M), list(released))
    decode = np.array([*rows, *[M] * (4 - len(rows))], np.int32)
    whole = Plan(stopped, columns_of, new, decode, np.int32(len(rows)), np.int32(1), chunks)
    return whole if parts else whole._replace(chunks=None)


def test_rows_are_granted_pages_and_stopped():
    seq = init_state(3, 5)
    seq = seq._replace(active=jnp.array([True, True, False]), page_table=seq.page_table + 9)
    got = prepare(seq, plan(state=seq, released=[1], granted={0: (2, [7, 8]), 2: (4, [6])}))
    assert got.active.tolist() == [True, False, False]
    assert got.page_table.tolist() == [[[9, 9, 7, 8, 9], [9] * 5, [9, 9, 9, 9, 6]]]


def test_rows_are_set_up_by_first_chunks_alone():
    (tokens, pages), (other, theirs) = sequences(8, [9, 21])
    seq = init_state(4, 5)
    seq = seq._replace(page_table=seq.page_table + 9, limits=seq.limits + 7)
    parts = {2: Part(tokens, 0, 9, pages), 0: Part(other, 16, 21, theirs)}
    got = prepare(seq, plan(parts, state=seq))
    assert got.limits.tolist() == [7, 7, 40, 7]
    table = got.page_table[0].tolist()
    assert table == [[9] * 5, [9] * 5, [*pages, *[0] * (5 - len(pages))], [9] * 5]


def test_assemble_is_the_batch_built_by_hand():
    """Decode rows first, then two parts of prompts, then padding."""
    lengths = [9, 4, 16, 0]
    found = sequences(8, [*(n + 1 for n in lengths[:3]), 21])
    seq = decoding(lengths, found, [t[-1] for t, _ in found])
    other = Part(found[3][0], 8, 12, found[3][1])
    asked = plan({3: other}, [2, 0], state=seq)
    got = assemble(prepare(seq, asked), asked, tokens=16, pages=3, page_size=8)
    decode = [Part(t, n, n + 1, p) for n, (t, p) in ((lengths[i], found[i]) for i in (2, 0))]
    want = build([*decode, other], 8, size=16, columns=3)
    for name in ("tokens", "positions", "kv_index"):
        np.testing.assert_array_equal(got[Batch._fields.index(name)], getattr(want, name), name)
    assert got.decode.query_starts.tolist() == [0, 1, 2, 2, 2]
    assert got.decode.kv_lengths.tolist() == [17, 10, 0, 0]
    np.testing.assert_array_equal(got.decode.page_table[0, :2], want.chunks.page_table[0, :2])
    # The first stands for the rows that decode.
    assert got.chunks.query_starts.tolist() == [0, 2, 6, 6, 6]
    assert got.chunks.kv_lengths.tolist() == [0, 12, 0, 0]
    np.testing.assert_array_equal(got.chunks.page_table[0, 1], want.chunks.page_table[0, 2])
    assert got.logit_rows.tolist() == [0, 1, 2, 3, 5, 5, 5, 0]  # a multiple of 8


@pytest.mark.parametrize(
    "name",
    [n if n in ("gqa", "windows") else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS],
)
def test_decode_rows_beside_chunks_are_each_sequence_alone(name):
    config = VARIANTS[name]
    params = random_params(config)
    found = sequences(8, [10, 12, 17, 21])
    cache = init_cache(config, PAGES, 8, jnp.float32)
    for length, (tokens, pages) in zip([9, 11, 0, 8], found, strict=True):
        if length:
            prefix = build([Part(tokens, 0, length, pages)], 8, size=16, columns=3)
            _, cache = run(params, config, prefix, cache)
    seq = decoding([9, 11, 0, 0], found, [t[-1] for t, _ in found])
    parts = {3: Part(found[3][0], 8, 21, found[3][1]), 2: Part(found[2][0], 0, 17, found[2][1])}
    asked = plan(parts, [1, 0], state=seq, size=32)
    asked.chunks.first[0] = True  # as if it had been set up
    batch = assemble(prepare(seq, asked), asked, tokens=32, pages=3, page_size=8)
    out, _ = run(params, config, batch, cache)
    got = logits(params, config, out.hidden)
    for at, which in [(0, 1), (1, 0), (4, 3), (5, 2)]:
        want = alone(params, config, found[which][0][None]).logits[0, -1]
        np.testing.assert_allclose(got[at], want, **TOLERANCE)


def decoding(lengths, found, last) -> SeqState:
    """A state in which the rows with a length decode; `last[i]` is row i's newest token."""
    seq = init_state(len(lengths), 5)
    table = np.zeros(seq.page_table.shape, np.int32)
    for row, (_, pages) in enumerate(found):
        table[0, row, : len(pages)] = pages
    return seq._replace(
        tokens=jnp.asarray(last, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        active=jnp.asarray(lengths) > 0,
        page_table=jnp.asarray(table),
    )


def test_a_stopped_row_is_inert():
    """It decodes to nothing: its pages, and the other rows' results, are what they were."""
    params = random_params(BASE)
    found = sequences(8, [10, 12, 17])
    cache = init_cache(BASE, PAGES, 8, jnp.float32)
    for tokens, pages in found:
        prefix = build([Part(tokens, 0, len(tokens) - 1, pages)], 8, size=16, columns=3)
        _, cache = run(params, BASE, prefix, cache)
    seq = decoding([9, 11, 16], found, [t[-1] for t, _ in found])
    seq = seq._replace(active=jnp.array([True, False, True]))
    batch = assemble(seq, plan(rows=[0, 1, 2], state=seq), tokens=8, pages=3, page_size=8)
    out, after = run(params, BASE, batch, cache)
    got = logits(params, BASE, out.hidden)
    for row in (0, 2):
        want = alone(params, BASE, found[row][0][None]).logits[0, -1]
        np.testing.assert_allclose(got[row], want, **TOLERANCE)
    written = {int(i) // 8 for i in np.asarray(batch.kv_index)} | {TRASH_PAGE}
    rest = sorted(set(range(PAGES)) - written)
    assert set(found[1][1]) <= set(rest)
    for before, now in zip(slots_of(cache, rest), slots_of(after, rest), strict=True):
        np.testing.assert_array_equal(before, now)
