"""Device-side state of the running sequences, and how a step's flat batch is made from it.

The host plans in rows and counts; it need not know the latest tokens. Letters: M rows of state
(`max_num_seqs`), G groups of layers with their own pages, P_max pages a row, T tokens and S
sequences of one step, C tokens of a prefill chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxinfer.cache import TRASH_PAGE
from jaxinfer.sampling import PenaltyState, SamplingRows
from jaxinfer.types import MAX_STOP_IDS

Host = Any  # NumPy when the host makes a plan; traced arrays inside a step

MIN_ROWS = 8  # matmuls of fewer rows round differently from larger ones: never run them


class Batch(NamedTuple):
    """One forward's input. Static shapes; inert tokens write to the trash page.

    Attributes:
        tokens, positions: int32 [T].
        kv_index: int32 [T]; flat slot (page * page_size + slot) where each token's K/V goes.
        page_table: int32 [G, S, P].
        query_starts: int32 [S + 1]; sequence s owns tokens query_starts[s]:query_starts[s + 1].
        kv_lengths: int32 [S]; tokens of each sequence, those of this batch included.
        logit_rows: int32 [R]; tokens whose hidden states are wanted.
    """

    tokens: Array
    positions: Array
    kv_index: Array
    page_table: Array
    query_starts: Array
    kv_lengths: Array
    logit_rows: Array


class SeqState(NamedTuple):
    """The running sequences; donated to every step, so it never leaves the device.

    Attributes:
        tokens: int32 [M]; the last token sampled: the next decode step's input.
        lengths: int32 [M]; tokens whose K/V is in the cache.
        limits: int32 [M]; a sequence ends when it has this many tokens, prompt included.
        active: bool [M]; decoding.
        page_table: int32 [G, M, P_max].
        rows: how each row is sampled.
        penalties: only once some request has asked for penalties.
    """

    tokens: Array
    lengths: Array
    limits: Array
    active: Array
    page_table: Array
    rows: SamplingRows
    penalties: PenaltyState | None


class Admission(NamedTuple):
    """What the host says of a row when its first chunk is run. Scalars, and pages [P_max]."""

    pages: Host
    limit: Host
    rows: SamplingRows  # of one row, without the leading axis


class Chunk(NamedTuple):
    """Prompt tokens `start` to `start + count` of the sequence in `row`, padded to C.

    `first` applies `admission`; `last` samples the token after them. Tokens from `prompt` on were
    sampled before the sequence was preempted. `targets` [C] are the tokens whose log-probabilities
    are wanted after each token (scoring only).
    `released` [M] are rows to stop before anything else.
    """

    tokens: Host
    row: Host
    start: Host
    count: Host
    prompt: Host
    first: Host
    last: Host
    admission: Admission
    released: Host
    targets: Host


class DecodePlan(NamedTuple):
    """Decode `steps` times; `released` [M] as in `Chunk`. `pages` int32 [M, W], 0 for none, go to
    each row of the page table from column `columns` [M] on."""

    steps: Host
    released: Host
    columns: Host
    pages: Host


def init_state(max_num_seqs: int, max_pages: int, groups: int = 1) -> SeqState:
    """A state with no running sequence."""
    M = max_num_seqs
    f32, i32 = jnp.float32, jnp.int32

    def fill(value: float, dtype: Any) -> Array:
        return jnp.full((M,), value, dtype)

    return SeqState(
        tokens=fill(0, i32), lengths=fill(0, i32), limits=fill(0, i32), active=fill(0, jnp.bool_),
        page_table=jnp.full((groups, M, max_pages), TRASH_PAGE, i32),
        rows=SamplingRows(
            temperature=fill(0, f32), top_k=fill(0, i32), top_p=fill(1, f32), min_p=fill(0, f32),
            repetition=fill(1, f32), presence=fill(0, f32), frequency=fill(0, f32),
            seed=jnp.zeros((M, 2), jnp.uint32), sample=fill(0, i32),
            stop_ids=jnp.full((M, MAX_STOP_IDS), -1, i32), min_length=fill(0, i32),
        ),
        penalties=None,
    )  # fmt: skip


def init_penalties(max_num_seqs: int, vocab_size: int) -> PenaltyState:
    """Penalty state with nothing counted."""
    shape = (max_num_seqs, vocab_size)
    return PenaltyState(jnp.zeros(shape, jnp.bool_), jnp.zeros(shape, jnp.int32))


def admit(seq: SeqState, chunk: Chunk) -> SeqState:
    """Stops the released rows, sets up a new one on its first chunk, notes the prompt's tokens."""
    seq = seq._replace(active=seq.active & ~chunk.released)
    row, new = chunk.row, chunk.admission

    def put(array: Array, value: Host) -> Array:
        return array.at[row].set(jnp.where(chunk.first, value, array[row]))

    penalties = seq.penalties
    if penalties is not None:
        offset = jnp.arange(chunk.tokens.shape[0])
        sampled = chunk.start + offset >= chunk.prompt
        vocab = penalties.prompt.shape[1]
        tokens = jnp.where(offset < chunk.count, chunk.tokens, vocab)  # past the end: dropped
        kept = jnp.where(chunk.first, False, penalties.prompt[row])
        kept = kept.at[jnp.where(sampled, vocab, tokens)].set(True, mode="drop")
        counts = jnp.where(chunk.first, 0, penalties.counts[row])
        counts = counts.at[jnp.where(sampled, tokens, vocab)].add(1, mode="drop")
        penalties = PenaltyState(
            penalties.prompt.at[row].set(kept), penalties.counts.at[row].set(counts)
        )
    table = jnp.where(chunk.first, new.pages, seq.page_table[:, row])
    return seq._replace(
        limits=put(seq.limits, new.limit),
        page_table=seq.page_table.at[:, row].set(table),
        rows=jax.tree.map(put, seq.rows, new.rows),
        penalties=penalties,
    )


def extend(seq: SeqState, plan: DecodePlan) -> SeqState:
    """Stops the released rows, and notes the pages that others were granted."""
    M, W = plan.pages.shape
    columns = plan.columns[:, None] + jnp.arange(W)
    columns = jnp.where(plan.pages > 0, columns, seq.page_table.shape[2])  # none: dropped
    table = seq.page_table.at[:, jnp.arange(M)[:, None], columns].set(plan.pages, mode="drop")
    return seq._replace(active=seq.active & ~plan.released, page_table=table)


def assemble_chunk(seq: SeqState, chunk: Chunk, *, pages: int, page_size: int) -> Batch:
    """The batch of one prefill chunk: one sequence, C tokens of which `count` are real.

    Args:
        pages: columns of the page table to look at (static); must cover the chunk's end.
        page_size: tokens a page.
    """
    offset = jnp.arange(chunk.tokens.shape[0], dtype=jnp.int32)
    valid = offset < chunk.count
    positions = jnp.where(valid, chunk.start + offset, 0)
    table = seq.page_table[:, chunk.row, :pages]
    last = jnp.maximum(chunk.count - 1, 0)
    return Batch(
        tokens=jnp.where(valid, chunk.tokens, 0),
        positions=positions,
        kv_index=_slots(table[0], positions, valid, page_size),
        page_table=table[:, None],
        query_starts=jnp.stack([jnp.zeros_like(chunk.count), chunk.count]).astype(jnp.int32),
        kv_lengths=(chunk.start + chunk.count)[None].astype(jnp.int32),
        logit_rows=jnp.full((MIN_ROWS,), last, jnp.int32),
    )


def assemble_decode(seq: SeqState, *, rows: int, pages: int, page_size: int) -> Batch:
    """The batch of one decode step over the first `rows` rows: one token each.

    The tokens are padded to `MIN_ROWS`; attention sees `rows` sequences only.
    """
    T = max(rows, MIN_ROWS)
    active = seq.active[:rows]
    lengths = jnp.where(active, seq.lengths[:rows], 0)
    table = seq.page_table[:, :rows, :pages]
    slots = jax.vmap(_slots, (0, 0, 0, None))(table[0], lengths, active, page_size)

    def pad(x: Array) -> Array:
        return jnp.pad(x, (0, T - rows))

    return Batch(
        tokens=pad(jnp.where(active, seq.tokens[:rows], 0)),
        positions=pad(lengths),
        kv_index=pad(slots),
        page_table=table,
        query_starts=jnp.arange(rows + 1, dtype=jnp.int32),
        kv_lengths=jnp.where(active, lengths + 1, 0),
        logit_rows=jnp.arange(T, dtype=jnp.int32),
    )


def _slots(table: Array, positions: Array, valid: Array, page_size: int) -> Array:
    """Flat slots of positions in one sequence's pages; the trash page where not valid."""
    page = jnp.where(valid, table[positions // page_size], TRASH_PAGE)
    return page * page_size + positions % page_size
