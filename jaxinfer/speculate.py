"""Speculative decoding: some tokens guessed, all of them checked by one forward of the target.

`step` is a pure state machine: draft, verify, accept and roll back are one function of arrays, to
be compiled as one program. It knows neither models nor caches: a proposer guesses, a target gives
logits, both are arguments. To roll back is to set a length: both write what they are given at
the positions that they are given, over whatever a refused guess left there.

Two rules say which guesses are taken:

- `shared` (the default): draft and target draw with the same noise, which is a function of (seed,
  sample, position), and a guess is taken where it is the target's own draw. What comes out is what
  the target alone would have drawn, token for token.
- `rejection` (Leviathan et al. 2023, Fast inference from transformers via speculative decoding): a
  guess x is taken with probability min(1, p(x) / q(x)), else one is drawn from what p has more than
  q. More is taken; what comes out has the target's distribution, not its tokens.

Letters: S sequences, k guesses, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jaxinfer import sampling
from jaxinfer.config import Rule
from jaxinfer.sampling import Logprobs, PenaltyState, SamplingRows
from jaxinfer.types import Axis

COIN, RESIDUAL = 1, 2  # purposes of noise: whether a guess is taken; what is drawn instead


class Drawing(NamedTuple):
    """Static: what `sampling.sample` is specialised to.

    `axis`: logits are this shard's part of the vocabulary; not where probabilities are asked for:
    those are of whole rows.
    """

    truncated: bool
    random: bool
    axis: Axis = None


class Proposal(NamedTuple):
    """Guesses of the tokens that follow.

    Attributes:
        tokens: int32 [S, k].
        drafted: int32 [S]; how many of them are meant.
        probabilities: float32 [S, k, V]; what each was drawn from; None: it was certain (or the
            rule is `shared`, which does not ask).
    """

    tokens: Array
    drafted: Array
    probabilities: Array | None = None


class Accepted(NamedTuple):
    """What a step adds to each sequence.

    Attributes:
        tokens: int32 [S, k + 1]; the first `added` are new.
        added: int32 [S]; from 1 to k + 1; 0 of a sequence that does not run.
        attempted: int32 [S]; guesses up to and including the first that was refused.
        logprobs: of `tokens`, [S, k + 1, …], under the target itself; None: not asked for.
    """

    tokens: Array
    added: Array
    attempted: Array
    logprobs: Logprobs | None = None


class State(NamedTuple):
    """The sequences between two steps.

    Attributes:
        fresh: int32 [S, k + 1]; the newest tokens of each, `fresh_count` of them: those that the
            proposer has not seen. The target has seen all but the last.
        fresh_count: int32 [S]; at least 1.
        lengths: int32 [S]; tokens of each sequence, the fresh ones included.
        limits: int32 [S]; a sequence ends when it has so many.
        active: bool [S].
        guessed: bool [S]; those of them for which anything is to be guessed.
        rows: how each is sampled.
        penalties: None where no row is penalised.
        draft, target: what the proposer and the target keep.
    """

    fresh: Array
    fresh_count: Array
    lengths: Array
    limits: Array
    active: Array
    guessed: Array
    rows: SamplingRows
    penalties: PenaltyState | None
    draft: Any
    target: Any


def newest(state: State) -> Array:
    """The last token of each sequence, int32 [S, 1]."""
    return jnp.take_along_axis(state.fresh, state.fresh_count[:, None] - 1, axis=1)


class Proposer(Protocol):
    """(The state with what it keeps, guesses of the `k` tokens that follow): it reads
    `state.fresh`, of those that are `guessed`. Nothing but `draft` and `target` changes."""

    def __call__(
        self, params: Any, state: State, k: int, drawing: Drawing, /
    ) -> tuple[State, Proposal]: ...


class Forward(Protocol):
    """Logits [S, W, V] after each of tokens [S, W], of which `count` [S] are meant, the first at
    `position` [S]; and what it keeps."""

    def __call__(
        self, params: Any, kept: Any, tokens: Array, count: Array, position: Array, /
    ) -> tuple[Array, Any]: ...


def step(
    state: State,
    params: Any,
    *,
    draft: Proposer,
    target: Forward,
    drawing: Drawing,
    rule: Rule = "shared",
    top: int | None = None,
    forced: float | None = None,
) -> tuple[State, Accepted]:
    """Guesses, checks them, and adds to every active sequence from one token to k + 1.

    Args:
        state: whose `fresh` holds k + 1 tokens.
        params: passed to both functions: dict-like with whatever they need.
        draft, target: see `Proposer`, `Forward`; static, as is all that follows.
        top: how many of the likeliest tokens' log-probabilities to return; None: none at all.
        forced: for measurements: guesses hold with this probability, whatever they are.
    """
    k = state.fresh.shape[1] - 1
    state, proposal = draft(params, state, k, drawing)
    # A guess at the limit would never be used, nor has it a place where it could be kept.
    room = jnp.where(state.guessed, jnp.maximum(state.limits - state.lengths - 1, 0), 0)
    proposal = proposal._replace(drafted=jnp.minimum(proposal.drafted, room))
    tokens = jnp.concatenate([newest(state), proposal.tokens], axis=1)
    count = jnp.where(state.active, proposal.drafted + 1, 0)
    logits, seen = target(params, state.target, tokens, count, state.lengths - 1)
    accepted = verify(
        proposal, logits, state.rows, state.lengths, state.penalties, drawing=drawing, rule=rule,
        forced=forced,
    )  # fmt: skip
    accepted, going = _cut(accepted, state)
    if top is not None:
        V = logits.shape[-1]
        found = sampling.token_logprobs(logits.reshape(-1, V), accepted.tokens.reshape(-1), top=top)
        found = jax.tree.map(lambda x: x.reshape(*tokens.shape, *x.shape[1:]), found)
        accepted = accepted._replace(logprobs=found)
    lengths = state.lengths + accepted.added
    new = accepted.added[:, None] > 0
    return state._replace(
        fresh=jnp.where(new, accepted.tokens, state.fresh),
        fresh_count=jnp.where(new[:, 0], accepted.added, state.fresh_count),
        lengths=lengths,
        active=state.active & going,
        penalties=_counted(state.penalties, accepted),
        target=seen,
    ), accepted


def verify(
    proposal: Proposal,
    logits: Array,
    rows: SamplingRows,
    lengths: Array,
    penalties: PenaltyState | None,
    *,
    drawing: Drawing,
    rule: Rule = "shared",
    forced: float | None = None,
) -> Accepted:
    """Which guesses are taken, and the token after them.

    Args:
        proposal: k guesses for the positions from `lengths` [S] on.
        logits: [S, k + 1, V]; the target's, after the newest token and after each guess.
        rows, penalties: [S]; as before the first guess.
        forced: see `step`.
    """
    S, width, V = logits.shape
    k = width - 1
    # One row for each position, penalised as if the guesses before it had been taken.
    flat = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), rows)
    positions = (lengths[:, None] + jnp.arange(width)).reshape(-1)
    told = _as_if_taken(penalties, proposal.tokens)
    arguments = (logits.reshape(-1, V), flat, positions, told)
    kinds = {"truncated": drawing.truncated, "random": drawing.random}
    meant = jnp.arange(k) < proposal.drafted[:, None]
    # Of the noise of one token: uniform in (0, 1).
    u = jnp.exp(-jnp.exp(-sampling.gumbel(flat, positions, 1, COIN))).reshape(S, width)[:, :k]
    if rule == "shared" or forced is not None:
        tokens = sampling.sample(*arguments, **kinds, axis=drawing.axis).reshape(S, width)
        agrees = proposal.tokens == tokens[:, :k] if forced is None else u < forced
        taken = _run_length(meant & agrees)
    else:
        assert drawing.axis is None, "probabilities are of whole rows"
        p = sampling.probabilities(*arguments, **kinds).reshape(S, width, V)
        q = proposal.probabilities
        if q is None:
            q = jax.nn.one_hot(proposal.tokens, V, dtype=jnp.float32)
        at = proposal.tokens[..., None]
        p_guess, q_guess = (jnp.take_along_axis(x, at, axis=2)[..., 0] for x in (p[:, :k], q))
        taken = _run_length(meant & (u * q_guess < p_guess))
        instead = _residual(p, q, taken, taken < proposal.drafted, rows, lengths)
        tokens = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
        tokens = jnp.where(jnp.arange(width) == taken[:, None], instead[:, None], tokens)
    return Accepted(tokens, taken + 1, jnp.minimum(taken + 1, proposal.drafted))


def _residual(
    p: Array, q: Array, taken: Array, refused: Array, rows: SamplingRows, lengths: Array
) -> Array:
    """The token after those that were taken, int32 [S]: of what p [S, k + 1, V] has more than
    q [S, k, V] where a guess was refused, else of p."""
    q = jnp.where(refused[:, None], _at(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), taken), 0)
    p = _at(p, taken)
    left = jnp.maximum(p - q, 0)
    left = jnp.where(left.sum(-1, keepdims=True) > 0, left, p)  # nothing left but roundings
    noise = sampling.gumbel(rows, lengths + taken, p.shape[-1], RESIDUAL)
    return jnp.argmax(jnp.log(left) + noise, axis=-1).astype(jnp.int32)


def _run_length(agrees: Array) -> Array:
    """How many of bool [S, k] come before the first that is False."""
    return jnp.cumprod(agrees.astype(jnp.int32), axis=1).sum(axis=1)


def _at(x: Array, index: Array) -> Array:
    """x[s, index[s]] of [S, n, V]."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def _as_if_taken(penalties: PenaltyState | None, guesses: Array) -> PenaltyState | None:
    """Penalties at each of k + 1 positions, [S · (k + 1), V]: guesses before it are counted."""
    if penalties is None:
        return None
    V = penalties.counts.shape[-1]
    before = jnp.cumsum(jax.nn.one_hot(guesses, V, dtype=jnp.int32), axis=1)
    before = jnp.pad(before, ((0, 0), (1, 0), (0, 0)))
    prompt = jnp.broadcast_to(penalties.prompt[:, None], before.shape)
    return PenaltyState(prompt.reshape(-1, V), (penalties.counts[:, None] + before).reshape(-1, V))


def _cut(accepted: Accepted, state: State) -> tuple[Accepted, Array]:
    """Nothing after a stop token or beyond the limit; and which sequences go on."""
    width = accepted.tokens.shape[1]
    length = state.lengths[:, None] + jnp.arange(width)
    stop_ids = state.rows.stop_ids[:, None]
    last = sampling.ends(accepted.tokens, length, state.limits[:, None], stop_ids)
    count = jnp.minimum(accepted.added, _run_length(~last) + 1)
    going = ~jnp.take_along_axis(last, count[:, None] - 1, axis=1)[:, 0]
    count = jnp.where(state.active, count, 0)
    attempted = jnp.minimum(accepted.attempted, count)
    return accepted._replace(added=count, attempted=attempted), going


def _counted(penalties: PenaltyState | None, accepted: Accepted) -> PenaltyState | None:
    if penalties is None:
        return None
    S, width = accepted.tokens.shape
    V = penalties.counts.shape[-1]
    new = jnp.arange(width) < accepted.added[:, None]
    ids = jnp.where(new, accepted.tokens, V)  # out of bounds: dropped
    return sampling.count_tokens(penalties, jnp.arange(S)[:, None], ids)
