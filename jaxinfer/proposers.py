"""Proposers for `speculate.step`: a draft model, the target without some of its layers, and what
the text itself has said before.

Letters: S sequences, k guesses, L tokens of history, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxinfer import sampling
from jaxinfer.speculate import Drawing, Forward, Proposal, Proposer, State, newest


def draft_model(forward: Forward, *, with_probabilities: bool = False) -> Proposer:
    """Guesses by another model, a token at a time, drawn as the target draws: with its noise.

    It first reads the fresh tokens, however many there are, then each of its own guesses but the
    last. `state.draft` is what `forward` keeps.

    Args:
        forward: of the draft; the same vocabulary as the target's.
        with_probabilities: what the rule `rejection` needs.
    """

    def propose(params: Any, state: State, k: int, drawing: Drawing) -> tuple[State, Proposal]:
        kept, proposal = _drawn(
            partial(forward, params), state.draft, state.fresh, state.fresh_count, state, k,
            drawing, with_probabilities,
        )  # fmt: skip
        return state._replace(draft=kept), proposal

    return propose


def skipped_layers(forward: Forward, *, with_probabilities: bool = False) -> Proposer:
    """Guesses by the target itself without some of its layers; Zhang et al. 2023, Draft & verify.

    It shares what the target keeps: of the layers that it has, keys and values of a guess are put
    there, and replaced when the target reads the guess.

    Args:
        forward: of the target without those layers; it keeps all that the target keeps.
        with_probabilities: as of `draft_model`.
    """

    def propose(params: Any, state: State, k: int, drawing: Drawing) -> tuple[State, Proposal]:
        # The target has seen the other fresh ones, and knows them better.
        kept, proposal = _drawn(
            partial(forward, params), state.target, newest(state), jnp.ones_like(state.fresh_count),
            state, k, drawing, with_probabilities,
        )  # fmt: skip
        return state._replace(target=kept), proposal

    return propose


def _drawn(
    forward: Any, kept: Any, fresh: Array, fresh_count: Array, state: State, k: int,
    drawing: Drawing, with_probabilities: bool,
) -> tuple[Any, Proposal]:  # fmt: skip
    """k guesses, each of the text with the one before it: what `forward` keeps, and they.

    Args:
        forward: with its params.
        fresh, fresh_count: int32 [S, W] and [S]; the newest tokens, that it reads first.
    """
    one = (state.active & state.guessed).astype(jnp.int32)
    rows = jnp.arange(len(one))
    first = state.lengths - fresh_count
    logits, kept = forward(kept, fresh, one * fresh_count, first)
    logits = jnp.take_along_axis(logits, fresh_count[:, None, None] - 1, axis=1)[:, 0]

    def draw(logits: Array, position: Array, penalties: Any) -> Any:
        arguments = (logits, state.rows, position, penalties)
        kinds = {"truncated": drawing.truncated, "random": drawing.random}
        token = sampling.sample(*arguments, **kinds, axis=drawing.axis)
        q = sampling.probabilities(*arguments, **kinds) if with_probabilities else 0
        return token, q, sampling.count_tokens(penalties, rows, token)

    def another(carry: Any, _: None) -> Any:
        token, position, penalties, kept = carry
        logits, kept = forward(kept, token[:, None], one, position)
        token, q, penalties = draw(logits[:, 0], position + 1, penalties)
        return (token, position + 1, penalties, kept), (token, q)

    token, q, penalties = draw(logits, state.lengths, state.penalties)
    carry = (token, state.lengths, penalties, kept)
    (*_, kept), (tokens, qs) = lax.scan(another, carry, length=k - 1)
    tokens = jnp.concatenate([token[None], tokens]).T
    all_q = jnp.concatenate([q[None], qs]).swapaxes(0, 1) if with_probabilities else None
    return kept, Proposal(tokens, jnp.full_like(one, k), all_q)


def prompt_lookup(longest: int = 3, shortest: int = 1) -> Proposer:
    """Guesses what followed the latest earlier occurrence of the sequence's last tokens: of
    `longest` if they occurred, else of fewer, down to `shortest`; nothing where there is none.

    `state.draft` is int32 [S, L]: the tokens of each sequence, but for the fresh ones; L is the
    longest limit. Saxena 2023, Prompt lookup decoding.

    Raises:
        ValueError: not 1 <= shortest <= longest.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(
            f"shortest={shortest}, longest={longest}: expected 1 <= shortest <= longest"
        )

    def propose(params: Any, state: State, k: int, drawing: Drawing) -> tuple[State, Proposal]:
        tokens = _noted(state)
        S, L = tokens.shape
        length, at = state.lengths, jnp.arange(L)
        # Of each place, how many tokens up to it are the last ones of the sequence.
        run, same = jnp.zeros((S, L), jnp.int32), jnp.ones((S, L), bool)
        for i in range(longest):
            back = jnp.pad(tokens, ((0, 0), (i, 0)), constant_values=-1)[:, :L]
            ends = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - i, 0)[:, None], axis=1)
            same &= (back == ends) & (at >= i) & (length[:, None] > i)
            run += same
        earlier = (at < length[:, None] - 1) & (run >= shortest)
        found = jnp.where(earlier, run * L + at, -1)  # the longest, and of equals the latest
        place = jnp.argmax(found, axis=1)
        hit = jnp.take_along_axis(found, place[:, None], axis=1)[:, 0] >= 0
        # What repeats itself is taken to go on so beyond what is there.
        period = jnp.maximum(length - 1 - place, 1)[:, None]
        ids = place[:, None] + 1 + jnp.arange(k) % period
        guesses = jnp.take_along_axis(tokens, jnp.minimum(ids, L - 1), axis=1)
        count = jnp.where(hit & state.active, k, 0)
        return state._replace(draft=tokens), Proposal(guesses, count.astype(jnp.int32))

    return propose


def _noted(state: State) -> Array:
    """The history with the fresh tokens in it."""
    tokens = state.draft
    S, width = state.fresh.shape
    new = jnp.arange(width) < state.fresh_count[:, None]
    first = state.lengths - state.fresh_count
    # Past the end: dropped.
    ids = jnp.where(new, first[:, None] + jnp.arange(width), tokens.shape[1])
    return tokens.at[jnp.arange(S)[:, None], ids].set(state.fresh, mode="drop")
