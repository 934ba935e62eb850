"""`speculate.step` on small models that are tables: tokens and distributions are the target's.

A model keeps the tokens that it was given, at their positions, and looks at the last two: what a
refused guess left behind would change what comes next.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer import sampling
from jaxinfer.proposers import draft_model, prompt_lookup, skipped_layers
from jaxinfer.sampling import PenaltyState, SamplingRows
from jaxinfer.speculate import Accepted, Drawing, Proposal, Rule, State, step, verify
from tests.test_sampling import row, stack

V, L, S = 7, 40, 4
PROPOSERS = ("draft", "lookup", "skip", "nothing")


class Params(NamedTuple):
    """Logits by the last two tokens, [V, V, V], of each model."""

    target: jax.Array
    draft: jax.Array


def forward(which: str, params: Params, kept: Any, tokens: Any, count: Any, position: Any) -> Any:
    """See `speculate.Forward`. `kept`: int32 [S, L]."""
    rows, width = jnp.arange(len(tokens))[:, None], tokens.shape[1]
    places = position[:, None] + jnp.arange(width)
    meant = jnp.arange(width) < count[:, None]
    kept = kept.at[rows, jnp.where(meant, places, L)].set(tokens, mode="drop")
    before = kept[rows, jnp.clip(places - 1, 0, L - 1)]
    return getattr(params, which)[before, kept[rows, jnp.clip(places, 0, L - 1)]], kept


def models(seed: int, *, unlike: float, scale: float = 1.5) -> Params:
    """Two that are more or less alike."""
    rng = np.random.default_rng(seed)
    target, other = rng.normal(size=(2, V, V, V)) * scale
    return Params(*(jnp.asarray(x, jnp.float32) for x in (target, target + unlike * other)))


def nothing(params: Any, state: State, k: int, drawing: Drawing) -> tuple[State, Proposal]:
    zeros = jnp.zeros((len(state.lengths), k), jnp.int32)
    return state, Proposal(zeros, zeros[:, 0])


def make_proposer(name: str, rule: Rule) -> Any:
    if name == "draft":
        return draft_model(partial(forward, "draft"), with_probabilities=rule == "rejection")
    if name == "skip":  # it writes into what the target keeps
        guess = partial(forward, "draft")
        return skipped_layers(guess, with_probabilities=rule == "rejection")
    return prompt_lookup() if name == "lookup" else nothing


@cache
def compiled(name: str, rule: Rule, drawing: Drawing) -> Any:
    run = partial(
        step, draft=make_proposer(name, rule), target=partial(forward, "target"),
        drawing=drawing, rule=rule,
    )  # fmt: skip
    return jax.jit(run)


def begin(
    prompts: list[list[int]], rows: SamplingRows, limits: Any, k: int, *, penalised: bool = False
) -> State:
    """Prompts of two tokens and more, read but for their last tokens."""
    n, lengths = len(prompts), np.array([len(p) for p in prompts], np.int32)
    text = np.zeros((n, L), np.int32)
    for i, prompt in enumerate(prompts):
        text[i, : len(prompt)] = prompt
    penalties = None
    if penalised:
        there = np.zeros((n, V), bool)
        for i, prompt in enumerate(prompts):
            there[i, prompt] = True
        penalties = PenaltyState(jnp.asarray(there), jnp.zeros((n, V), jnp.int32))
    fresh = np.zeros((n, k + 1), np.int32)
    fresh[:, 0] = text[np.arange(n), lengths - 1]
    # What lies beyond is not part of the sequence, and must not matter.
    seen = np.where(np.arange(L) < lengths[:, None] - 1, text, 3)
    return State(
        fresh=jnp.asarray(fresh), fresh_count=jnp.ones(n, jnp.int32), lengths=jnp.asarray(lengths),
        limits=jnp.asarray(limits, jnp.int32), active=jnp.ones(n, bool),
        guessed=jnp.ones(n, bool), rows=rows,
        penalties=penalties, draft=jnp.asarray(seen), target=jnp.asarray(seen),
    )  # fmt: skip


def speculated(name: str, rule: Rule, state: State, params: Params, drawing: Drawing) -> Any:
    """Tokens of each sequence until all have ended, and what each step accepted."""
    run, made, steps = compiled(name, rule, drawing), [[] for _ in state.lengths], []
    while np.any(np.asarray(state.active)):
        state, accepted = run(state, params)
        check(state, accepted)
        steps.append(accepted)
        for out, tokens, added in zip(made, *map(np.asarray, accepted[:2]), strict=True):
            out += tokens[:added].tolist()
    return made, steps, state


def check(state: State, accepted: Accepted) -> None:
    """What holds after every step."""
    added, attempted = np.asarray(accepted.added), np.asarray(accepted.attempted)
    assert np.all(added <= accepted.tokens.shape[1])
    assert np.all(added[np.asarray(state.active)] >= 1)
    assert np.all((attempted <= added) & (attempted >= added - 1))
    lengths, fresh = np.asarray(state.lengths), np.asarray(state.fresh)
    assert np.all(lengths <= np.asarray(state.limits))
    for i, count in enumerate(np.asarray(state.fresh_count)):
        if added[i]:
            assert count == added[i]
            np.testing.assert_array_equal(fresh[i, :count], np.asarray(accepted.tokens)[i, :count])
        seen = np.asarray(state.target)[i, lengths[i] - count : lengths[i] - 1]
        np.testing.assert_array_equal(seen, fresh[i, : count - 1])


def plain(state: State, params: Params, drawing: Drawing) -> list[list[int]]:
    """The same without speculation: a token a step."""
    made, steps, _ = speculated("nothing", "shared", state, params, drawing)
    assert all(np.all(np.asarray(s.added) <= 1) for s in steps)
    return made


draw = jax.jit(partial(sampling.sample, truncated=True, random=True))
chances = jax.jit(partial(sampling.probabilities, truncated=True, random=True))


def by_hand(prompt: list[int], how: SamplingRows, limit: int, params: Params) -> list[int]:
    """One sequence by `sampling.sample` alone."""
    rows, text = stack([how]), list(prompt)
    stops = {int(i) for i in how.stop_ids if i >= 0}
    while len(text) < limit:
        counts = np.bincount(text[len(prompt) :], minlength=V)[None].astype(np.int32)
        told = jnp.asarray(np.isin(np.arange(V), prompt)[None])
        penalties = PenaltyState(told, jnp.asarray(counts))
        logits = params.target[text[-2], text[-1]][None]
        text.append(int(draw(logits, rows, np.array([len(text)], np.int32), penalties)[0]))
        if text[-1] in stops:
            break
    return text[len(prompt) :]


hows = st.builds(
    row,
    seed=st.integers(0, 2**40),
    sample=st.integers(0, 3),
    stop_ids=st.sampled_from([(), (2,), (0, 5)]),
    min_length=st.integers(0, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
)
tokens = st.integers(0, V - 1)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(tokens, min_size=2, max_size=9), min_size=S, max_size=S),
    how=st.lists(hows, min_size=S, max_size=S),
    more=st.lists(st.integers(1, 14), min_size=S, max_size=S),
    unlike=st.sampled_from([0.0, 0.4, 3.0]),
    # Each is a program: one guess at a time with one of them alone.
    proposed=st.sampled_from([("draft", 1), *((name, 3) for name in PROPOSERS)]),
)
def test_tokens_are_those_without_speculation(
    prompts: Any, how: Any, more: Any, unlike: float, proposed: tuple[str, int]
) -> None:
    name, k = proposed
    params = models(1, unlike=unlike)
    limits = [len(p) + n for p, n in zip(prompts, more, strict=True)]
    state = begin(prompts, stack(how), limits, k, penalised=True)
    made, _, _ = speculated(name, "shared", state, params, Drawing(True, True))
    for i in range(S):
        assert made[i] == by_hand(prompts[i], how[i], limits[i], params)


@pytest.mark.parametrize("rule", ["shared", "rejection"])
@pytest.mark.parametrize("name", PROPOSERS)
def test_greedy_tokens_are_those_without_speculation(name: str, rule: Rule) -> None:
    params, rng = models(2, unlike=2.0), np.random.default_rng(0)
    prompts = rng.integers(0, V, (S, 5)).tolist()
    state = begin(prompts, stack([row(temperature=0)] * S), [30] * S, 3)
    made, _, _ = speculated(name, rule, state, params, Drawing(False, False))
    assert made == plain(state, params, Drawing(False, False))


@pytest.mark.parametrize("rule", ["shared", "rejection"])
def test_a_draft_that_is_the_target_is_always_right(rule: Rule) -> None:
    params = models(3, unlike=0.0)
    how = stack([row(seed=i, temperature=1) for i in range(S)])
    state = begin([[1, 2]] * S, how, [2 + 12] * S, 3)
    made, steps, _ = speculated("draft", rule, state, params, Drawing(False, True))
    assert [np.asarray(s.added).tolist() for s in steps] == [[4] * S] * 3
    assert [np.asarray(s.attempted).tolist() for s in steps[:2]] == [[3] * S] * 2
    assert all(len(out) == 12 for out in made)


def test_text_that_repeats_is_guessed() -> None:
    target = np.full((V, V, V), -9.0, np.float32)
    for a, b, c in ((1, 2, 3), (2, 3, 4), (3, 4, 1), (4, 1, 2)):
        target[a, b, c] = 9
    params = Params(*[jnp.asarray(target)] * 2)
    state = begin([[1, 2, 3, 4, 1, 2]] * S, stack([row(temperature=0)] * S), [26] * S, 4)
    made, steps, _ = speculated("lookup", "shared", state, params, Drawing(False, False))
    assert made[0] == [3, 4, 1, 2] * 5
    assert len(steps) == 4


def test_a_row_that_does_not_run_stays_as_it_is() -> None:
    params = models(4, unlike=0.4)
    state = begin([[1, 2, 3]] * S, stack([row(temperature=0)] * S), [20] * S, 2)
    state = state._replace(active=jnp.asarray([True, False, True, False]))
    after, accepted = compiled("draft", "shared", Drawing(False, False))(state, params)
    for before, now in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        np.testing.assert_array_equal(before[1::2], now[1::2])
    np.testing.assert_array_equal(accepted.added[1::2], 0)
    np.testing.assert_array_equal(accepted.attempted[1::2], 0)


HOWS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "top-k": {"temperature": 1.4, "top_k": 4},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 0.8, "min_p": 0.15},
    "truncated": {
        "temperature": 1.2,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "frequency_penalty": 0.3,
    },
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": 0.6},
}


@pytest.mark.parametrize("rule", ["shared", "rejection"])
@pytest.mark.parametrize("name", ["draft", "lookup", pytest.param("skip", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("how", "n"),
    [
        # Truncation takes a hundred times as long as all else on a CPU.
        pytest.param(HOWS[how], n, id=f"{how}, {n}", marks=pytest.mark.slow if slow else ())
        for how, n, slow in (
            ("temperature", 200_000, False),
            ("truncated", 200_000, True),
            ("penalties", 200_000, True),
            ("top-k", 200_000, True),
            ("top-p", 200_000, True),
            ("min-p", 200_000, True),
        )
    ],
)
def test_the_distribution_is_the_targets(
    how: dict[str, Any], n: int, name: str, rule: Rule
) -> None:
    """Of `n` sequences of two tokens; cells of [V, V]."""
    params, penalised = models(5, unlike=0.7), "frequency_penalty" in how
    truncated = bool({"top_k", "top_p", "min_p"} & set(how))
    one = row(**how)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (n, *np.shape(x))), one)
    seeds = np.zeros((n, 2), np.uint32)
    seeds[:, 1] = np.arange(n)
    rows = rows._replace(seed=jnp.asarray(seeds))
    prompt = [4, 1, 2, 4, 1]
    state = begin([prompt] * n, rows, [len(prompt) + 2] * n, 2, penalised=penalised)
    run = compiled(name, rule, Drawing(truncated, True))
    found = np.full((n, 2), -1)
    for _ in range(2):
        at = np.asarray(state.lengths) - len(prompt)
        state, accepted = run(state, params)
        new, added = np.asarray(accepted.tokens), np.asarray(accepted.added)
        for i in range(2):
            here = (added > i) & (at + i < 2)
            found[here, at[here] + i] = new[here, i]
    assert (found >= 0).all()
    expected = n * _exact(prompt, one, params, penalised)
    counts = np.bincount(found[:, 0] * V + found[:, 1], minlength=V * V)
    cells = expected > 0
    assert counts[~cells].sum() == 0
    chi_square = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    free = cells.sum() - 1
    assert chi_square < free + 4.5 * np.sqrt(2 * free), (chi_square, free)


def _exact(prompt: list[int], one: SamplingRows, params: Params, penalised: bool) -> np.ndarray:
    """Of two tokens, [V · V]."""

    def of_next(text: list[int]) -> np.ndarray:
        penalties = None
        if penalised:
            counts = np.bincount(text[len(prompt) :], minlength=V)[None]
            told = np.isin(np.arange(V), prompt)[None]
            penalties = PenaltyState(jnp.asarray(told), jnp.asarray(counts, jnp.int32))
        logits = params.target[text[-2], text[-1]][None]
        p = chances(logits, stack([one]), jnp.asarray([len(text)]), penalties)
        return np.asarray(p[0], np.float64)

    first = of_next(prompt)
    return np.concatenate([p * of_next([*prompt, a]) for a, p in enumerate(first)])


def test_more_is_taken_by_rejection() -> None:
    """At the same models: what the option is for. Shared noise takes less, never other tokens."""
    n, params = 2000, models(6, unlike=0.6)
    how = stack([row(seed=i, temperature=1) for i in range(n)])
    shares = {}
    rules: tuple[Rule, ...] = ("shared", "rejection")
    for rule in rules:
        state = begin([[1, 2, 3]] * n, how, [30] * n, 3)
        _, accepted = compiled("draft", rule, Drawing(False, True))(state, params)
        shares[rule] = float((accepted.added - 1).sum() / accepted.attempted.sum())
    assert 0.3 < shares["shared"] < shares["rejection"] < 1


def test_verify_may_be_called_without_a_state_machine() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(S, 3, V)), jnp.float32)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    guesses = likeliest[:, :2].at[1, 1].add(1).at[2, 0].add(1) % V
    rows = stack([row(temperature=0)] * S)
    accepted = verify(
        Proposal(guesses, jnp.asarray([2, 2, 2, 1])), logits, rows, jnp.zeros(S, jnp.int32), None,
        drawing=Drawing(False, False),
    )  # fmt: skip
    np.testing.assert_array_equal(accepted.added, [3, 2, 1, 2])
    np.testing.assert_array_equal(accepted.attempted, [2, 2, 1, 1])
    np.testing.assert_array_equal(accepted.tokens, likeliest)


@pytest.mark.parametrize(("longest", "shortest"), [(0, 0), (2, 3), (3, 0)])
def test_lookups_of_no_tokens_are_refused(longest: int, shortest: int) -> None:
    with pytest.raises(ValueError, match=f"shortest={shortest}, longest={longest}: expected"):
        prompt_lookup(longest, shortest)
