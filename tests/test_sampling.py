from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import sampling
from jaxinfer.sampling import PenaltyState, SamplingRows, pack_row, token_logprobs
from jaxinfer.types import MAX_STOP_IDS, SamplingParams
from pallas_kernels.threshold import threshold as find_threshold

V = 37
NEVER = -np.inf

draw = jax.jit(sampling.sample, static_argnames=("truncated", "random"))
noise = jax.jit(sampling.gumbel, static_argnums=2)
weigh = jax.jit(sampling.probabilities, static_argnames=("truncated", "random"))


def row(
    *, seed: int = 0, sample: int = 0, stop_ids: tuple[int, ...] = (), min_length: int = 0,
    **params: Any,
) -> SamplingRows:  # fmt: skip
    packed = SamplingParams(**params)
    return pack_row(packed, seed=seed, sample=sample, stop_ids=stop_ids, min_length=min_length)


def stack(rows: list[SamplingRows]) -> SamplingRows:
    return jax.tree.map(jnp.asarray, sampling.stack_rows(rows))


def repeat(one: SamplingRows, count: int) -> SamplingRows:
    return stack([one] * count)


find = jax.jit(find_threshold)


def threshold(x: Any, rows: SamplingRows) -> jax.Array:
    return find(x, rows.top_k, rows.top_p, rows.min_p)


def some_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def kept_by_reference(x: np.ndarray, *, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Plain float64: min-p, then top-k, then top-p of what is left; ties at a threshold stay."""
    p = np.exp(x.astype(np.float64) - x.max())
    kept = p >= min_p * p.max()
    if 0 < top_k < kept.sum():
        kept &= x >= np.sort(x[kept])[-top_k]
    if top_p < 1:
        order = [i for i in np.argsort(-x, kind="stable") if kept[i]]
        before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]]) / p[order].sum()
        lowest = x[order][before < top_p].min()
        kept &= x >= lowest
    return kept


# -- truncation -----------------------------------------------------------------------------


@given(
    levels=st.lists(st.integers(-12, 12), min_size=V, max_size=V),
    top_k=st.sampled_from([0, 1, 2, 5, V - 1, V, V + 1, 10_000]),
    # Sums of these masses never come near these shares, so that rounding decides nothing.
    top_p=st.sampled_from([1e-30, 0.123457, 0.500123, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.0511, 0.5, 1.0]),
)
def test_truncation_keeps_the_reference_set(
    levels: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    x = np.array(levels, np.float32) / 3
    x -= x.max()
    rows = repeat(row(top_k=top_k, top_p=top_p, min_p=min_p), 1)
    kept = x >= np.asarray(threshold(x[None], rows))[0]
    np.testing.assert_array_equal(kept, kept_by_reference(x, top_k=top_k, top_p=top_p, min_p=min_p))


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 31, 1024, 1025]),
    temperature=st.sampled_from([1e-30, 0.1, 1.0, 30.0, 1e5]),
    top_k=st.integers(0, 1100),
    top_p=st.floats(2**-10, 1.0, width=32),
)
def test_truncation_of_continuous_logits(
    seed: int, size: int, temperature: float, top_k: int, top_p: float
) -> None:
    x = some_logits(size, seed=seed, scale=3.0)
    x = ((x - x.max()) / np.float32(temperature)).astype(np.float32)
    found = threshold(x[None], repeat(row(top_k=top_k, top_p=top_p), 1))
    kept = x >= np.asarray(found)[0]
    # Rounding decides only within this much of the share, in mass that is 1 for the likeliest.
    narrow, wide = (
        kept_by_reference(x, top_k=top_k, top_p=min(top_p * (1 + d), 1.0), min_p=0.0)
        for d in (-1e-5, 1e-5)
    )
    assert (narrow <= kept).all()
    assert (kept <= wide).all()


@pytest.mark.parametrize("top_k", [V, V + 1, 2**31 - 1])
def test_a_row_that_does_not_truncate_keeps_all(top_k: int) -> None:
    x = some_logits(2, V) - 20
    x[:, [0, 3]] = 0.0, NEVER
    for params in ({"top_k": top_k}, {}):
        np.testing.assert_array_equal(threshold(x, repeat(row(**params), 2)), [NEVER, NEVER])


def test_top_k_counts_the_whole_range_of_float32() -> None:
    x = np.array([[0.0, -1e-30, -1.0, -1.00000012, -3e38, NEVER]], np.float32)
    for k in range(1, 6):
        assert float(threshold(x, repeat(row(top_k=k), 1))[0]) == x[0, k - 1]


def test_a_row_without_any_likely_token_has_a_threshold() -> None:
    rows = stack([row(top_k=3), row(top_p=0.5), row()])
    found = np.asarray(threshold(np.full((3, V), NEVER, np.float32), rows))
    np.testing.assert_array_equal(found, [NEVER, 0.0, NEVER])


@pytest.mark.slow
def test_the_largest_vocabulary_of_equals_does_not_overflow() -> None:
    for size in (2**18, 2**18 + 1):
        x = np.zeros((1, size), np.float32)
        x[0, size // 2 :] = -1.0
        # All of the first half hold 0.73 of the mass: 0.5 is met by equals, all kept.
        assert float(threshold(x, repeat(row(top_p=0.5), 1))[0]) == 0.0
        assert float(threshold(x, repeat(row(top_p=0.8), 1))[0]) == -1.0
        assert float(threshold(0 * x, repeat(row(top_p=0.999), 1))[0]) == 0.0


def test_thresholds_of_a_real_vocabulary_are_the_same_alone_and_together() -> None:
    size = 128_256
    x = some_logits(5, size, scale=3.0)
    x -= x.max(-1, keepdims=True)
    kinds = ({"top_k": 50}, {"top_p": 0.9}, {"top_k": 1000, "top_p": 0.95}, {"min_p": 0.01}, {})
    rows = [row(**kind) for kind in kinds]
    together = np.asarray(threshold(x, stack(rows)))
    alone = [np.asarray(threshold(x[i : i + 1], stack(rows[i : i + 1])))[0] for i in range(5)]
    np.testing.assert_array_equal(together, alone)
    for i, kind in enumerate(kinds):
        limits = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | kind
        np.testing.assert_array_equal(x[i] >= together[i], kept_by_reference(x[i], **limits))


def test_ties_at_the_threshold_are_kept() -> None:
    x = jnp.array([[0.0, -1.0, -1.0, -2.0]])
    for params in ({"top_k": 2}, {"top_p": 0.6}):
        assert float(threshold(x, repeat(row(**params), 1))[0]) == -1.0


def test_a_tiny_top_p_keeps_the_likeliest_and_its_equals() -> None:
    logits = np.full((200, V), -1.0, np.float32)
    logits[:, [3, 8]] = 2.0
    rows = stack([row(seed=s, top_p=1e-40) for s in range(200)])
    tokens = draw(logits, rows, jnp.zeros(200, jnp.int32), None, truncated=True, random=True)
    assert set(np.asarray(tokens).tolist()) == {3, 8}


# -- greedy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [False, True])
def test_greedy_takes_the_likeliest_and_of_equals_the_lowest(random: bool) -> None:
    logits = some_logits(4, V)
    logits[1, [30, 7]] = 50.0
    rows = repeat(row(temperature=0.0), 4)
    tokens = draw(logits, rows, jnp.zeros(4, jnp.int32), None, truncated=False, random=random)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert tokens[1] == 7


@pytest.mark.parametrize(
    "params",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-30}, {"temperature": 1e-42}],
)
def test_limits_of_sampling_are_greedy(params: dict[str, Any]) -> None:
    logits = some_logits(64, V)
    rows = stack([row(seed=s, **params) for s in range(64)])
    tokens = draw(logits, rows, jnp.arange(64), None, truncated=True, random=True)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


# -- the distribution -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_p": 0.9},
        {"top_k": 4},
        {"min_p": 0.1, "top_k": 6, "top_p": 0.95},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    draws, size = 4096, 12
    x = some_logits(size, seed=3, scale=1.5)
    rows = repeat(row(seed=2**40 + 17, **params), draws)
    tokens = draw(
        np.tile(x, (draws, 1)), rows, jnp.arange(draws), None, truncated=True, random=True
    )
    found = np.bincount(np.asarray(tokens), minlength=size)
    scaled = x / params.get("temperature", 1.0)
    limits = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
    limits.pop("temperature", None)
    kept = kept_by_reference(scaled, **limits)
    expected = np.where(kept, np.exp(scaled - scaled.max()), 0)
    expected = expected / expected.sum()
    one = jax.tree.map(lambda leaf: leaf[:1], rows)
    exact = weigh(x[None], one, jnp.zeros(1, jnp.int32), None, truncated=True, random=True)
    np.testing.assert_allclose(exact[0], expected, rtol=1e-5, atol=1e-7)
    expected = draws * expected
    assert found[~kept].sum() == 0
    chi_square = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    # 0.999 quantiles of chi-square with 1 to 11 degrees of freedom
    bounds = [10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9, 29.6, 31.3]
    assert chi_square < bounds[kept.sum() - 2]


def test_rare_tokens_are_drawn_as_often_as_they_should_be() -> None:
    # 2**22 draws of noise: its largest value exceeds t with probability about draws * exp(-t).
    # Noise made from 23 bits could not pass 16.
    rows = repeat(row(seed=1), 128)
    drawn = np.asarray(noise(rows, jnp.arange(128), 2**15))
    beyond = drawn[drawn > 13]
    expected = drawn.size * np.exp(-13)
    assert abs(len(beyond) - expected) < 4 * np.sqrt(expected)
    assert len(np.unique(beyond)) == len(beyond)
    assert np.isfinite(drawn).all()


# -- seeds ----------------------------------------------------------------------------------


def test_seed_sample_and_position_each_change_the_noise() -> None:
    base = {"seed": 5, "sample": 1}
    rows = stack([
        row(**base), row(**base), row(seed=6, sample=1), row(seed=5 + 2**32, sample=1),
        row(seed=5, sample=2), row(**base),
    ])  # fmt: skip
    positions = jnp.array([9, 9, 9, 9, 9, 10])
    drawn = np.asarray(noise(rows, positions, V))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    for other in drawn[2:]:
        assert not np.array_equal(drawn[0], other)


def test_pack_row_splits_the_seed_and_pads_the_stops() -> None:
    packed = row(seed=(7 << 32) + 9, stop_ids=(4, 2), top_k=-1, min_length=3)
    assert packed.seed.tolist() == [7, 9]
    assert packed.seed.dtype == np.uint32
    assert packed.stop_ids.tolist() == [4, 2] + [-1] * (MAX_STOP_IDS - 2)
    assert packed.top_k == 0
    assert row(top_k=10**12).top_k == 2**31 - 1


# -- independence of rows -------------------------------------------------------------------

MIXED = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"top_p": 0.7, "min_p": 0.01},
    {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"top_p": 0.9, "top_k": 20, "presence_penalty": -0.7},
)


def mixed_batch(size: int) -> tuple[np.ndarray, SamplingRows, np.ndarray, PenaltyState]:
    vocab = 1031
    rng = np.random.default_rng(11)
    rows = stack([row(seed=s * 977, sample=s % 3, **MIXED[s % len(MIXED)]) for s in range(size)])
    penalties = PenaltyState(
        jnp.asarray(rng.random((size, vocab)) < 0.1),
        jnp.asarray(rng.integers(0, 3, (size, vocab)), jnp.int32),
    )
    return some_logits(size, vocab), rows, np.arange(size, dtype=np.int32) * 13, penalties


@pytest.mark.slow
def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    logits, rows, positions, penalties = mixed_batch(24)
    everything = partial(draw, truncated=True, random=True)
    together = np.asarray(everything(logits, rows, positions, penalties))
    backwards = jax.tree.map(lambda x: x[::-1], (logits, rows, positions, penalties))
    np.testing.assert_array_equal(together, np.asarray(everything(*backwards))[::-1])
    for size in (1, 3, 8):
        for start in range(0, 24, size):
            part = jax.tree.map(
                lambda x, at=slice(start, start + size): x[at], (logits, rows, positions, penalties)
            )
            np.testing.assert_array_equal(everything(*part), together[start : start + size])


def test_a_row_is_the_same_in_every_compiled_variant() -> None:
    logits, rows, positions, penalties = mixed_batch(24)
    whole = np.asarray(draw(logits, rows, positions, penalties, truncated=True, random=True))
    kind = np.arange(24) % len(MIXED)

    def check(wanted: np.ndarray, tokens: jax.Array) -> None:
        np.testing.assert_array_equal(np.asarray(tokens)[wanted], whole[wanted])

    check(
        np.isin(kind, [0, 1, 4]),
        draw(logits, rows, positions, penalties, truncated=False, random=True),
    )
    check(kind == 0, draw(logits, rows, positions, penalties, truncated=False, random=False))
    check(kind < 4, draw(logits, rows, positions, None, truncated=True, random=True))
    check(kind < 2, draw(logits, rows, positions, None, truncated=False, random=True))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_bad_logits_in_one_row_leave_the_others_alone(poison: float) -> None:
    logits, rows, positions, penalties = mixed_batch(12)
    clean = np.asarray(draw(logits, rows, positions, penalties, truncated=True, random=True))
    bad = np.array([0, 2, 5])
    logits[bad] = poison
    tokens = np.asarray(draw(logits, rows, positions, penalties, truncated=True, random=True))
    others = np.setdiff1d(np.arange(12), bad)
    np.testing.assert_array_equal(tokens[others], clean[others])
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()


def test_single_nan_logits_are_never_drawn() -> None:
    logits = np.full((1, V), np.nan, np.float32)
    logits[0, 5] = -3.0
    for temperature in (0.0, 1.0):
        rows = repeat(row(temperature=temperature), 1)
        assert draw(logits, rows, jnp.zeros(1, jnp.int32), None, truncated=True, random=True) == 5


# -- rows of which several devices have some columns each -----------------------------------------


@partial(jax.jit, static_argnames=("devices", "truncated"))
def draw_split(logits: jax.Array, *rest: Any, devices: int, truncated: bool) -> jax.Array:
    """[devices, S]: what each draws; devices are those of an axis that is mapped over."""
    one = partial(sampling.sample, truncated=truncated, random=True, axis="devices")
    one = jax.vmap(one, in_axes=(0, None, None, None), axis_name="devices")
    return one(jnp.stack(jnp.split(logits, devices, axis=1)), *rest)


@given(
    levels=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(
        st.fixed_dictionaries({
            "temperature": st.sampled_from([0.0, 1e-42, 0.5, 1.0, 30.0]),
            "top_k": st.sampled_from([0, 1, 2, 7, 47, 48, 10_000]),
            "top_p": st.sampled_from([1e-30, 0.3, 0.9, 1.0]),
            "min_p": st.sampled_from([0.0, 1e-4, 0.2, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "frequency_penalty": st.sampled_from([0.0, -0.4]),
        }),
        min_size=8, max_size=8,
    ),
    devices=st.sampled_from([2, 3, 8]),
    truncated=st.booleans(),
)  # fmt: skip
def test_split_rows_draw_what_whole_rows_draw(
    levels: int, seed: int, kinds: list[dict[str, Any]], devices: int, truncated: bool
) -> None:
    rng, size = np.random.default_rng(seed), 48
    logits = rng.integers(-levels, levels + 1, (8, size)).astype(np.float32) / 3  # many equals
    logits[rng.random(logits.shape) < 0.1] = rng.choice([np.nan, NEVER, np.inf])
    logits[rng.integers(8)] = rng.choice([0.0, np.nan, NEVER])
    ids = tuple(rng.choice(size, 5, replace=False).tolist())
    rows = stack([
        row(seed=seed + i, sample=i % 2, stop_ids=ids, min_length=i, **kind)
        for i, kind in enumerate(kinds)
    ])  # fmt: skip
    told = PenaltyState(
        jnp.asarray(rng.random((8, size)) < 0.3), jnp.asarray(rng.integers(0, 3, (8, size)))
    )
    arguments = (jnp.asarray(logits), rows, jnp.full(8, 4), told)
    want = draw(*arguments, truncated=truncated, random=True)
    for got in draw_split(*arguments, devices=devices, truncated=truncated):
        np.testing.assert_array_equal(got, want)


@given(st.integers(0, 2**32 - 1), st.integers(1, V), st.integers(0, 10**6))
def test_noise_of_some_tokens_is_that_of_the_whole_vocabulary(
    seed: int, first: int, position: int
) -> None:
    rows, at = repeat(row(seed=seed), 2), jnp.array([position, 7])
    whole = np.asarray(noise(rows, at, 2 * V))
    some = np.asarray(noise(rows, at, V, first=jnp.int32(first)))
    np.testing.assert_array_equal(some, whole[:, first : first + V])


# -- penalties and stops --------------------------------------------------------------------


def test_penalties_follow_their_formulas() -> None:
    logits = some_logits(1, V)
    counts, prompt = np.zeros((1, V), np.int32), np.zeros((1, V), bool)
    counts[0, [2, 3]], prompt[0, [3, 4]] = [2, 1], True
    rows = repeat(row(repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5), 1)
    expected = logits[0].copy()
    for token in (2, 3, 4):
        expected[token] *= 1.5 if expected[token] < 0 else 1 / 1.5
    expected[[2, 3]] -= np.array([0.25 + 2 * 0.5, 0.25 + 0.5])
    penalties = PenaltyState(jnp.asarray(prompt), jnp.asarray(counts))
    found = sampling._penalise(jnp.asarray(logits), rows, penalties)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_before_the_minimum_length(temperature: float) -> None:
    logits = np.zeros((2, V), np.float32)
    logits[:, [4, V - 1]] = 60.0
    logits[:, 9] = 30.0
    rows = repeat(row(temperature=temperature, stop_ids=(V - 1, 4), min_length=10), 2)
    tokens = draw(logits, rows, jnp.array([9, 10]), None, truncated=True, random=True)
    assert tokens[0] == 9
    assert tokens[1] in (4, V - 1)


# -- log-probabilities ----------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_logprobs_and_ranks(seed: int, top: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-4, 4, (3, V)).astype(np.float32)  # many ties
    tokens = rng.integers(0, V, 3).astype(np.int32)
    found = sampling.token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), top=top)
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x).sum(-1, keepdims=True))
    order = np.argsort(-logits, axis=-1, kind="stable")
    every = np.arange(3)
    np.testing.assert_allclose(found.logprob, expected[every, tokens], atol=2e-6)
    np.testing.assert_array_equal(
        found.rank, 1 + np.array([list(order[i]).index(tokens[i]) for i in every])
    )
    np.testing.assert_array_equal(found.top_ids, order[:, :top])
    assert found.top_ids.shape == found.top_logprobs.shape == (3, top)
    np.testing.assert_allclose(
        found.top_logprobs, np.take_along_axis(expected, order[:, :top], -1), atol=2e-6
    )


def test_top_is_limited_by_the_vocabulary() -> None:
    found = sampling.token_logprobs(jnp.zeros((2, 4)), jnp.zeros(2, jnp.int32), top=20)
    np.testing.assert_array_equal(found.top_ids, [[0, 1, 2, 3]] * 2)


@pytest.mark.parametrize("V", [1, 2, 100, 128, 129, 5000])
def test_log_probabilities_are_those_of_a_softmax(V):
    rng = np.random.default_rng(V)
    logits = rng.normal(size=(3, V)).astype(np.float32) * 5
    tokens = rng.integers(V, size=3).astype(np.int32)
    got = token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), top=min(V, 3))
    x = logits.astype(np.float64)
    want = (
        x
        - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
        - x.max(1, keepdims=True)
    )
    np.testing.assert_allclose(got.logprob, want[np.arange(3), tokens], rtol=1e-6, atol=2e-6)


def test_a_total_is_the_same_whatever_the_rows():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random((64, 3001)), jnp.float32)
    total = jax.jit(sampling._total)
    want = [float(total(x[i : i + 1])[0]) for i in range(64)]
    assert total(x).tolist() == want
    np.testing.assert_allclose(want, np.asarray(x, np.float64).sum(1), rtol=1e-6)
