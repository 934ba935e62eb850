"""Logits to tokens, on the device. Pure functions.

A row's token is a function of that row alone, to the bit: nothing here sums floats across a row
in an order that a compiler chooses (maxima and sums of integers are exact), and the noise is a
function of (seed, sample, position). Letters: S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.random import threefry_2x32

from jaxinfer.types import MAX_STOP_IDS, Axis, SamplingParams
from pallas_kernels.threshold import split_threshold, threshold

Field = Any  # on the device an Array; on the host NumPy, one row at a time, without the axis S

LIKELIEST_UNIFORM = 1 - 2**-24  # the largest float32 below 1
SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
SUMMED_AT_ONCE = 128
LARGEST_LOGIT = float(np.finfo(np.float32).max)


class SamplingRows(NamedTuple):
    """How each row is sampled. [S] unless said.

    Attributes:
        temperature: float32; 0 is greedy.
        top_k: int32; 0 keeps all.
        top_p, min_p: float32.
        repetition, presence, frequency: float32 penalties.
        seed: uint32 [S, 2]; the request's 64-bit seed: high half, low half.
        sample: int32; the sample's index within its request.
        stop_ids: int32 [S, MAX_STOP_IDS]; -1 pads.
        min_length: int32; no stop token is sampled for a position below this.
    """

    temperature: Field
    top_k: Field
    top_p: Field
    min_p: Field
    repetition: Field
    presence: Field
    frequency: Field
    seed: Field
    sample: Field
    stop_ids: Field
    min_length: Field


class PenaltyState(NamedTuple):
    """What penalties need to know. `prompt` bool [S, V]: in the prompt. `counts` int32 [S, V]:
    occurrences in the output."""

    prompt: Array
    counts: Array


class Logprobs(NamedTuple):
    """Log-probabilities of chosen tokens and of the likeliest ones, natural log.

    Attributes:
        logprob: float32 [S].
        rank: int32 [S]; 1 is the likeliest.
        top_ids: int32 [S, top], likeliest first.
        top_logprobs: float32 [S, top].
    """

    logprob: Array
    rank: Array
    top_ids: Array
    top_logprobs: Array


def pack_row(
    params: SamplingParams, *, seed: int, sample: int, stop_ids: Sequence[int], min_length: int
) -> SamplingRows:
    """One row on the host: NumPy scalars, `seed` [2] and `stop_ids` [MAX_STOP_IDS].

    Args:
        params: validated.
        seed: below 2**64.
        sample: index within the request.
        stop_ids: at most MAX_STOP_IDS, the model's own included.
        min_length: see `SamplingRows`.
    """
    padded = np.full(MAX_STOP_IDS, -1, np.int32)
    padded[: len(stop_ids)] = stop_ids
    return SamplingRows(
        temperature=np.float32(params.temperature),
        top_k=np.int32(min(max(params.top_k, 0), np.iinfo(np.int32).max)),
        top_p=np.float32(params.top_p),
        min_p=np.float32(params.min_p),
        repetition=np.float32(params.repetition_penalty),
        presence=np.float32(params.presence_penalty),
        frequency=np.float32(params.frequency_penalty),
        seed=np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        sample=np.int32(sample),
        stop_ids=padded,
        min_length=np.int32(min_length),
    )


def stack_rows(rows: Sequence[SamplingRows]) -> SamplingRows:
    """Rows of `pack_row` as one: NumPy arrays with the axis S."""
    return jax.tree.map(lambda *values: np.stack(values), *rows)


@jax.named_scope("sampling")
def sample(
    logits: Array,
    rows: SamplingRows,
    positions: Array,
    penalties: PenaltyState | None,
    *,
    truncated: bool,
    random: bool,
    axis: Axis = None,
) -> Array:
    """Draws one token a row.

    The minimum length and penalties; a greedy row takes the likeliest token (the lowest id of
    equals); the others divide by the temperature, truncate by min-p, top-k and top-p in that order
    (ties at a threshold are kept) and draw by the Gumbel-max trick. NaN counts as minus infinity.

    Args:
        logits: [S, V].
        rows: how each is sampled.
        positions: int32 [S]; where in its sequence each token will stand.
        penalties: None where no row is penalised.
        truncated: static; whether any row truncates. Rows that do not are the same either way.
        random: static; whether any row has a temperature. Greedy rows are the same either way.
        axis: mesh axes over which the columns are split: `logits` are this shard's, the penalties
            whole, and every shard gets the tokens of whole rows.

    Returns:
        int32 [S].
    """
    x = _allowed(logits, rows, positions, penalties, axis)
    greedy, highest = _likeliest(x, axis)
    if not random:
        return greedy
    x = _tempered(x, highest, rows, truncated, axis)
    noise = gumbel(rows, positions, x.shape[1], first=_first_column(x, axis))
    drawn, _ = _likeliest(x + noise, axis)
    return jnp.where(rows.temperature == 0, greedy, drawn)


def probabilities(
    logits: Array,
    rows: SamplingRows,
    positions: Array,
    penalties: PenaltyState | None,
    *,
    truncated: bool,
    random: bool,
) -> Array:
    """What `sample` draws from, float32 [S, V]; same arguments. A greedy row has one token."""
    x = _allowed(logits, rows, positions, penalties, None)
    likeliest, highest = _likeliest(x, None)
    greedy = jax.nn.one_hot(likeliest, x.shape[-1], dtype=jnp.float32)
    if not random:
        return greedy
    drawn = jax.nn.softmax(_tempered(x, highest, rows, truncated, None))
    return jnp.where(rows.temperature[:, None] == 0, greedy, drawn)


def _allowed(
    logits: Array,
    rows: SamplingRows,
    positions: Array,
    penalties: PenaltyState | None,
    axis: Axis,
) -> Array:
    """Float32 logits with stops held back and penalties, without NaN."""
    first = _first_column(logits, axis)
    # Before the conversion, which then takes place where a value is read: a scatter reads none.
    x = _hold_back_stops(logits, rows, positions, first).astype(jnp.float32)
    if penalties is not None and first is not None:
        mine = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=x.shape[1], axis=1)
        penalties = PenaltyState(mine(penalties.prompt), mine(penalties.counts))
    if penalties is not None:
        x = _penalise(x, rows, penalties)
    return jnp.nan_to_num(x, nan=-jnp.inf, posinf=LARGEST_LOGIT, neginf=-jnp.inf)


def _first_column(x: Array, axis: Axis) -> Array | None:
    """Of the vocabulary, the first that this shard's x [S, V / n] has; None: x has them all."""
    return None if axis is None else lax.axis_index(axis) * x.shape[1]


def _likeliest(x: Array, axis: Axis) -> tuple[Array, Array]:
    """The column of each row's largest value, int32 [S], of equals the lowest; and the value.
    See `sample`."""
    best = jnp.argmax(x, axis=-1).astype(jnp.int32)
    first = _first_column(x, axis)
    if first is None:
        return best, jnp.max(x, axis=-1)
    value = jnp.take_along_axis(x, best[:, None], axis=-1)[:, 0]
    # One message; shards in the order of their columns, so that the first of equals is the lowest.
    mine = jnp.stack([lax.bitcast_convert_type(value, jnp.int32), best + first])
    found = lax.all_gather(mine, axis)
    values = lax.bitcast_convert_type(found[:, 0], jnp.float32)
    shard = jnp.argmax(values, axis=0)[None]
    best = jnp.take_along_axis(found[:, 1], shard, axis=0)[0]
    return best, jnp.take_along_axis(values, shard, axis=0)[0]


def _tempered(x: Array, highest: Array, rows: SamplingRows, truncated: bool, axis: Axis) -> Array:
    # The likeliest is at exactly 0 whatever the temperature, and nothing overflows upwards.
    x = x - jnp.maximum(highest, -LARGEST_LOGIT)[:, None]
    x = x / jnp.maximum(rows.temperature, SMALLEST_TEMPERATURE)[:, None]
    if not truncated:
        return x
    limits = rows.top_k, rows.top_p, rows.min_p
    lowest = threshold(x, *limits) if axis is None else split_threshold(x, *limits, axis)
    return jnp.where(x >= lowest[:, None], x, -jnp.inf)


def _penalise(x: Array, rows: SamplingRows, penalties: PenaltyState) -> Array:
    """Repetition as in Keskar et al. 2019 (CTRL); presence and frequency as in OpenAI's API."""
    repetition, presence, frequency = (
        f[:, None] for f in (rows.repetition, rows.presence, rows.frequency)
    )
    written = penalties.counts > 0
    discouraged = jnp.where(x > 0, x / repetition, x * repetition)
    x = jnp.where(penalties.prompt | written, discouraged, x)
    x = x - frequency * penalties.counts
    return x - jnp.where(written, presence, 0.0)


def _hold_back_stops(x: Array, rows: SamplingRows, positions: Array, first: Array | None) -> Array:
    """`first`: see `_first_column`."""
    S, V = x.shape
    stops = rows.stop_ids
    if first is not None:
        stops = jnp.where((stops >= first) & (stops < first + V), stops - first, -1)
    early = (positions < rows.min_length)[:, None] & (stops >= 0)
    ids = jnp.where(early, stops, V + jnp.arange(MAX_STOP_IDS))  # out of bounds: dropped
    # An id may be there twice; but it is the same value that is written, and XLA need not sort.
    return x.at[jnp.arange(S)[:, None], ids].set(-jnp.inf, mode="drop", unique_indices=True)


def ends(token: Array, length: Array, limit: Array, stop_ids: Array) -> Array:
    """Whether `token` [...], about to stand at position `length`, is its sequence's last.

    `stop_ids` is [..., n].
    """
    return (length + 1 >= limit) | jnp.any(token[..., None] == stop_ids, axis=-1)


def count_tokens(penalties: PenaltyState | None, rows: Array, tokens: Array) -> PenaltyState | None:
    """Counts tokens of the output, each of a row; what is out of bounds is left out."""
    if penalties is None:
        return None
    return penalties._replace(counts=penalties.counts.at[rows, tokens].add(1, mode="drop"))


def gumbel(
    rows: SamplingRows,
    positions: Array,
    vocab_size: int,
    purpose: int = 0,
    first: Array | None = None,
) -> Array:
    """Standard Gumbel noise, float32 [S, V]: -log(-log(u)), a function of the row alone.

    All 32 random bits go where resolution decides draws, into 1 - u near 0: tokens of probability
    down to about 2**-32 are drawn as often as they should be. Another `purpose` gives other noise;
    0 is what `sample` draws with. `first`: int32; the noise of `vocab_size` tokens from this id on,
    as it is in that of any larger vocabulary; None: from 0 on.
    """

    def row(seed: Array, sample: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, sample), position)
        if purpose:
            key = jax.random.fold_in(key, purpose)
        bits = _bits(key, vocab_size, first)
        complement = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
        return -jnp.log(-jnp.log1p(-jnp.minimum(complement, LIKELIEST_UNIFORM)))

    return jax.vmap(row)(rows.seed, rows.sample, positions)


def _bits(key: Array, count: int, first: Array | None) -> Array:
    """`jax.random.bits`, uint32 [count]; from the `first` on, without those before it."""
    if first is None:
        return jax.random.bits(key, (count,), jnp.uint32)
    high, low = jax.random.key_data(key)
    at = first.astype(jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    words = threefry_2x32((high, low), jnp.concatenate([jnp.zeros_like(at), at]))
    return words[:count] ^ words[count:]  # of a counter of 64 bits, whose high half is 0


@jax.named_scope("sampling")
def token_logprobs(logits: Array, tokens: Array, *, top: int) -> Logprobs:
    """Log-probabilities under the model itself: before temperature, penalties and truncation.

    Args:
        logits: [S, V].
        tokens: int32 [S]; the chosen ones.
        top: static; how many of the likeliest to return, V at most. Of equals the lowest id comes
            first, in `rank` too.
    """
    x = logits.astype(jnp.float32)
    x = x - jnp.max(x, axis=-1, keepdims=True)
    logprobs = x - jnp.log(_total(jnp.exp(x)))[:, None]
    V = logprobs.shape[-1]
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    earlier = jnp.arange(V) < tokens[:, None]
    before = (logprobs > chosen) | ((logprobs == chosen) & earlier)
    rank = 1 + jnp.sum(before, axis=-1, dtype=jnp.int32)
    top_logprobs, top_ids = lax.top_k(logprobs, min(top, V))
    return Logprobs(chosen[:, 0], rank, top_ids.astype(jnp.int32), top_logprobs)


def _total(x: Array) -> Array:
    """Sums of the rows of x [S, V], in an order that depends on V alone: pairs of tokens that lie
    far apart, then pairs of those. A reduction's order depends on how many rows there are."""
    S, V = x.shape
    size = 1 << (V - 1).bit_length()
    x = jnp.pad(x, ((0, 0), (0, size - V)))
    while size > 1:
        # Seven halvings fit one kernel that adds 128 numbers for each sum.
        part = min(size, SUMMED_AT_ONCE)
        x = x.reshape(S, part, size // part)
        while part > 1:
            part //= 2
            x = x[:, :part] + x[:, part:]
        size = x.shape[-1]
        x = lax.optimization_barrier(x.reshape(S, size))
    return x[:, 0]
