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

from jaxinfer.cache import TRASH_PAGE, PagedCache, note_tokens
from jaxinfer.sampling import PenaltyState, SamplingRows
from jaxinfer.types import MAX_STOP_IDS

Host = Any  # NumPy when the host makes a plan; traced arrays inside a step

# Matmuls round differently with fewer rows, and have been seen to with other than multiples of it.
MIN_ROWS = 8


class Ragged(NamedTuple):
    """Sequences of one attention call; see `pallas_kernels.paged_attention`.

    Attributes:
        page_table: int32 [G, S, P].
        query_starts: int32 [S + 1]; sequence s owns tokens query_starts[s]:query_starts[s + 1].
        kv_lengths: int32 [S]; tokens of each sequence, those of this batch included.
    """

    page_table: Array
    query_starts: Array
    kv_lengths: Array


class Batch(NamedTuple):
    """One forward's input. Static shapes; inert tokens write to the trash page.

    Attributes:
        tokens, positions: int32 [T].
        kv_index: int32 [T]; flat slot (page * page_size + slot) where each token's K/V goes.
        decode: sequences with one token each, the first of the batch; None: there are none.
        chunks: the others, any number of tokens each. Where there are both, the first of these
            stands for what `decode` owns, and has no keys.
        logit_rows: int32 [R]; tokens whose hidden states are wanted.
    """

    tokens: Array
    positions: Array
    kv_index: Array
    decode: Ragged | None
    chunks: Ragged | None
    logit_rows: Array


class Drafting(NamedTuple):
    """What a draft model keeps of the running sequences.

    Attributes:
        cache: its keys and values, in pages of the target's numbers.
        read: int32 [M]; tokens of each row that it has read.
    """

    cache: PagedCache
    read: Array


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
        draft: only where another model guesses.
    """

    tokens: Array
    lengths: Array
    limits: Array
    active: Array
    page_table: Array
    rows: SamplingRows
    penalties: PenaltyState | None
    draft: Drafting | None = None


class Chunks(NamedTuple):
    """Parts of Q prompts, in the flat order of the step's T tokens, after those of decode rows.

    Attributes:
        tokens, positions: int32 [T].
        owner: int32 [T]; which of the Q parts a token belongs to, -1: to none.
        ends: int32 [Q]; where each part ends among the T tokens.
        row: int32 [Q]; M for those that stand for nothing.
        length: int32 [Q]; tokens of the sequence, the part's own included.
        prompt: int32 [Q]; tokens from here on were sampled, before a preemption.
        first, last: bool [Q]; `first` sets up the row, `last` has the next token sampled.
        pages: int32 [Q, P_max]; limit: int32 [Q]; how: [Q]; of a row that is set up.
        targets: int32 [T]; the tokens whose log-probabilities are wanted after each token; None:
            nothing is scored.
    """

    tokens: Host
    positions: Host
    owner: Host
    ends: Host
    row: Host
    length: Host
    prompt: Host
    first: Host
    last: Host
    pages: Host
    limit: Host
    how: SamplingRows
    targets: Host


class Plan(NamedTuple):
    """One dispatch, as the host asks for it.

    Attributes:
        released: bool [M]; rows to stop before anything else.
        columns: int32 [M], pages: int32 [M, W]; pages granted to each row, 0 for none, and the
            column of its page table from which on they go.
        rows: int32 [R]; the rows that decode, then M for those that stand for nothing.
        count: int32; how many decode.
        steps: int32; decode steps to run.
        chunks: what is read of prompts; None in dispatches of several steps.
        hooked: int32 [2, R + Q]; of each sequence, which of the step's hooks changes its
            activations, and which its logits, -1: none does; None in a step without hooks.
        guessing: bool [R]; rows for which tokens are guessed; None in a step that guesses nothing.
    """

    released: Host
    columns: Host
    pages: Host
    rows: Host
    count: Host
    steps: Host
    chunks: Chunks | None
    hooked: Host = None
    guessing: Host = None


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


@jax.named_scope("batch")
def prepare(seq: SeqState, plan: Plan) -> SeqState:
    """Stops the released rows, notes pages that were granted, and sets up new rows."""
    M, W = plan.pages.shape
    columns = plan.columns[:, None] + jnp.arange(W)
    columns = jnp.where(plan.pages > 0, columns, seq.page_table.shape[2])  # none: dropped
    table = seq.page_table.at[:, jnp.arange(M)[:, None], columns].set(plan.pages, mode="drop")
    seq = seq._replace(active=seq.active & ~plan.released, page_table=table)
    return seq if plan.chunks is None else _admit(seq, plan.chunks)


def _admit(seq: SeqState, chunks: Chunks) -> SeqState:
    new = jnp.where(chunks.first, chunks.row, seq.active.shape[0])  # past the end: dropped

    def put(array: Array, value: Host) -> Array:
        return array.at[new].set(value, mode="drop")

    return seq._replace(
        limits=put(seq.limits, chunks.limit),
        page_table=seq.page_table.at[:, new].set(chunks.pages, mode="drop"),
        rows=jax.tree.map(put, seq.rows, chunks.how),
        penalties=None if seq.penalties is None else _noted(seq.penalties, chunks, new),
        draft=None if seq.draft is None else seq.draft._replace(read=put(seq.draft.read, 0)),
    )


def _noted(penalties: PenaltyState, chunks: Chunks, new: Array) -> PenaltyState:
    """The parts' tokens: of the prompt, or sampled before a preemption."""
    M = penalties.prompt.shape[0]
    row = jnp.where(chunks.owner >= 0, jnp.asarray(chunks.row)[chunks.owner], M)
    sampled = chunks.positions >= jnp.asarray(chunks.prompt)[chunks.owner]
    prompt = penalties.prompt.at[new].set(False, mode="drop")
    counts = penalties.counts.at[new].set(0, mode="drop")
    prompt = prompt.at[jnp.where(sampled, M, row), chunks.tokens].set(True, mode="drop")
    counts = counts.at[jnp.where(sampled, row, M), chunks.tokens].add(1, mode="drop")
    return PenaltyState(prompt, counts)


def decoding(seq: SeqState, plan: Plan) -> tuple[Array, Array]:
    """Of `plan.rows` [R]: each as one of the state, any for those that stand for nothing; and
    which of them run."""
    M = seq.active.shape[0]
    rows = jnp.minimum(plan.rows, M - 1)
    return rows, seq.active[rows] & (plan.rows < M)


def note_steps(tokens: Array, seq: SeqState, plan: Plan, sampled: Array) -> Array | None:
    """`PagedCache.tokens` after several decode steps, in one write: one in each step takes longer
    than all else that a small model's step does for speculation.

    Args:
        tokens: int32 [pages, page_size]; before the steps.
        seq: before the steps.
        sampled: int32 [K, R]; by each step, -1 for rows that did not run.
    """
    size = tokens.shape[1]
    rows, _ = decoding(seq, plan)
    read = jnp.concatenate([seq.tokens[rows][None], sampled[:-1]])
    at = seq.lengths[rows] + jnp.arange(len(sampled))[:, None]
    page = jnp.where(sampled >= 0, seq.page_table[0, rows, at // size], TRASH_PAGE)
    return note_tokens(tokens, page * size + at % size, read)


@jax.named_scope("batch")
def assemble(seq: SeqState, plan: Plan, *, tokens: int, pages: int, page_size: int) -> Batch:
    """The batch of one step: a token of each row that decodes, then those of chunks, then padding.

    Rows that have stopped write to the trash page and attend to nothing.

    Args:
        tokens: T, at least `MIN_ROWS` and the number of `plan.rows` (static).
        pages: columns of the page table to look at (static); must cover every sequence's end.
        page_size: tokens a page.
    """
    M, R = seq.active.shape[0], plan.rows.shape[0]
    rows, active = decoding(seq, plan)
    lengths = jnp.where(active, seq.lengths[rows], 0)
    table = seq.page_table[:, rows, :pages]
    decode = Ragged(
        table,
        jnp.minimum(jnp.arange(R + 1, dtype=jnp.int32), plan.count),
        jnp.where(active, lengths + 1, 0),
    )

    def pad(x: Array) -> Array:
        return jnp.pad(x, (0, tokens - R))

    ids, positions = pad(jnp.where(active, seq.tokens[rows], 0)), pad(lengths)
    page = jnp.where(active, table[0, jnp.arange(R), lengths // page_size], TRASH_PAGE)
    slots = pad(page * page_size + lengths % page_size)
    wanted = jnp.arange(R, dtype=jnp.int32)
    chunks = plan.chunks
    if chunks is None:
        wanted = jnp.arange(max(R, MIN_ROWS), dtype=jnp.int32)
        return Batch(ids, positions, slots, decode, None, wanted)
    read = chunks.owner >= 0
    row = jnp.minimum(chunks.row, M - 1)
    page = seq.page_table[0, row[chunks.owner], chunks.positions // page_size]
    page = jnp.where(read, page, TRASH_PAGE)
    zero = jnp.zeros((1,), jnp.int32)
    wanted = jnp.concatenate([wanted, jnp.maximum(chunks.ends - 1, 0)])
    ragged = Ragged(
        jnp.pad(seq.page_table[:, row, :pages], ((0, 0), (1, 0), (0, 0))),
        jnp.concatenate([zero, plan.count[None], chunks.ends]).astype(jnp.int32),
        jnp.concatenate([zero, chunks.length]).astype(jnp.int32),
    )
    return Batch(
        tokens=jnp.where(read, chunks.tokens, ids),
        positions=jnp.where(read, chunks.positions, positions),
        kv_index=jnp.where(read, page * page_size + chunks.positions % page_size, slots),
        decode=decode,
        chunks=ragged,
        logit_rows=jnp.pad(wanted, (0, -wanted.shape[0] % MIN_ROWS)),
    )
