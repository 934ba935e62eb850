"""Pipeline parallelism: stages hold layers in turn, and parts of a step follow one another through
them (ADR 012).

All stages run one program. At tick t stage s works on item t - s, if there is one, and hands what
comes out to the next stage; items that do not exist write to the trash page and attend to nothing.
Of a forward the items are slices of its tokens (`forward`). Of decode steps they are parts of the
rows, step after step (`decode`): a part goes through the last stage, and its tokens are drawn, just
before it is the first stage's turn to take it again.

Letters: T tokens, E hidden size, R rows that decode, n stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.batch import MIN_ROWS, Batch, Plan, Ragged, SeqState, assemble
from jaxinfer.cache import TRASH_PAGE, PagedCache, note_tokens
from jaxinfer.config import ModelConfig
from jaxinfer.models import decoder
from jaxinfer.models.decoder import (
    DEFAULT_ATTENTION,
    NO_CHANGE,
    AttentionOptions,
    Params,
    StepOutput,
    embedded,
    final_norm,
    forward_stage,
)
from jaxinfer.models.sites import Change
from jaxinfer.pages import pages_for
from jaxinfer.types import Axis
from pallas_kernels.device import capability, has_kernels

# On a GPU fewer tokens take as long as these: the weights are read for them alike.
GPU_SLICE = 256
SLICES_A_STAGE = 4  # of a long step: stages then stand idle for a fifth of the time at most

# (state, rows that decode, their hidden states [R, E]) -> (state with their next tokens, results)
Sample = Callable[[SeqState, Plan, Array], tuple[SeqState, Any]]


def forward(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    cache: PagedCache,
    *,
    attention: AttentionOptions = DEFAULT_ATTENTION,
    axis: Axis = None,
    capture: Sequence[str] = (),
    change: Change = NO_CHANGE,
) -> tuple[StepOutput, PagedCache]:
    """`decoder.forward`, which see, also under the axes of a pipeline.

    There weights and cache are those of one stage, `config` has its layers, and nothing is captured
    or changed. The tokens are cut into slices of one size, in their order: a slice finds the keys
    that earlier ones have written.
    """
    if not isinstance(axis, tuple):
        return decoder.forward(
            params, config, batch, cache,
            attention=attention, axis=axis, capture=capture, change=change,
        )  # fmt: skip
    assert not capture, "a stage sees its own layers only"
    assert not change, "a stage sees its own layers only"
    stages, stage = lax.axis_size(axis[0]), lax.axis_index(axis[0])
    size = _slice_size(len(batch.tokens), stages)
    count = pages_for(len(batch.tokens), size)
    x = embedded(params, config, _padded(batch.tokens, size), axis).reshape(count, size, -1)

    def tick(carry: tuple[Array, PagedCache], t: Array) -> Any:
        handed, cache = carry
        entering = jnp.where(stage == 0, x[jnp.minimum(t, count - 1)], handed)
        out, cache = forward_stage(
            params, config, entering, _slice(batch, size, t - stage), cache,
            attention=attention, axis=_inner(axis),
        )  # fmt: skip
        return (_handed_on(out, axis), cache), out

    ticks = jnp.arange(count + stages - 1)
    (_, cache), outs = lax.scan(tick, (jnp.zeros_like(x[0]), cache), ticks)
    last = outs[stages - 1 :].reshape(count * size, -1)[batch.logit_rows]
    hidden = final_norm(params, config, _from_last(last, axis), attention)
    tokens = note_tokens(cache.tokens, batch.kv_index, batch.tokens)
    return StepOutput(hidden, {}), cache._replace(tokens=tokens)


def decode(
    params: Params,
    config: ModelConfig,
    cache: PagedCache,
    seq: SeqState,
    plan: Plan,
    sample: Sample,
    *,
    steps: int,
    pages: int,
    page_size: int,
    attention: AttentionOptions,
    axis: tuple[str, str],
) -> tuple[PagedCache, SeqState, Any]:
    """`plan.steps` decode steps of the rows of `plan`, in the ticks of `steps` (static) of them.

    Args:
        params, config, cache: of one stage.
        plan: without chunks.
        sample: see `Sample`.
        pages, page_size: see `batch.assemble`.

    Returns:
        The cache and the state afterwards, and what `sample` said: [steps, R, …].
    """
    stages, stage = lax.axis_size(axis[0]), lax.axis_index(axis[0])
    rows, counts = _dealt(plan, stages, none=len(seq.active))
    size = rows.shape[1]

    def part(seq: SeqState, item: Array) -> tuple[SeqState, Plan, Array]:
        """Of an item: the state, its rows, and whether there is such a one: else nothing runs."""
        due = (item >= 0) & (item < stages * plan.steps)
        mine = plan._replace(rows=rows[item % stages], count=counts[item % stages])
        return seq._replace(active=seq.active & due), mine, due

    def batch(seq: SeqState, item: Array) -> Batch:
        paused, mine, _ = part(seq, item)
        return assemble(paused, mine, tokens=size, pages=pages, page_size=page_size)

    def tick(carry: tuple[Array, PagedCache, SeqState], t: Array) -> Any:
        handed, cache, seq = carry
        entering = batch(seq, t)
        x = jnp.where(stage == 0, embedded(params, config, entering.tokens, axis), handed)
        out, cache = forward_stage(
            params, config, x, batch(seq, t - stage), cache, attention=attention, axis=_inner(axis)
        )
        tokens = note_tokens(cache.tokens, entering.kv_index, entering.tokens)
        paused, leaving, due = part(seq, t - stages + 1)
        hidden = final_norm(params, config, _from_last(out, axis), attention)
        after, said = sample(paused, leaving, hidden)
        seq = after._replace(active=jnp.where(due, after.active, seq.active))
        return (_handed_on(out, axis), cache._replace(tokens=tokens), seq), said

    start = jnp.zeros((size, config.hidden_size), params["final_norm"].dtype)
    ticks = jnp.arange(steps * stages + stages - 1)
    (_, cache, seq), said = lax.scan(tick, (start, cache, seq), ticks)

    def in_rows(x: Array) -> Array:
        x = x[stages - 1 :].reshape(steps, stages, size, *x.shape[2:])
        x = jnp.swapaxes(x, 1, 2)  # dealt out, and taken in
        return x.reshape(steps, size * stages, *x.shape[3:])[:, : len(plan.rows)]

    return cache, seq, jax.tree.map(in_rows, said)


# -- items ----------------------------------------------------------------------------------------


def _dealt(plan: Plan, stages: int, *, none: int) -> tuple[Array, Array]:
    """`plan.rows` in as many parts as there are stages, [n, R / n] and padded with `none`; and how
    many of each decode, [n].

    They are dealt out one by one: those that decode are the first, and each part has its share.
    """
    size = MIN_ROWS * pages_for(len(plan.rows), MIN_ROWS * stages)
    spare = stages * size - len(plan.rows)
    rows = jnp.pad(jnp.asarray(plan.rows), (0, spare), constant_values=none)
    return rows.reshape(size, stages).T, (plan.count + stages - 1 - jnp.arange(stages)) // stages


def _slice_size(tokens: int, stages: int) -> int:
    """Tokens of a slice: at least what a GPU computes at once, and a multiple of `MIN_ROWS`."""
    least = GPU_SLICE if has_kernels(capability()) else MIN_ROWS
    even = pages_for(tokens, SLICES_A_STAGE * stages)
    return MIN_ROWS * pages_for(max(least, even), MIN_ROWS)


def _padded(x: Array, size: int) -> Array:
    return jnp.pad(x, (0, -len(x) % size))


def _slice(batch: Batch, size: int, item: Array) -> Batch:
    """Tokens `item * size` to `(item + 1) * size` of a batch; inert ones if it has none there."""
    count = pages_for(len(batch.tokens), size)
    real = (item >= 0) & (item < count)
    first = jnp.clip(item, 0, count - 1) * size

    def cut(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(_padded(x, size), first, size)

    decode, chunks = batch.decode, batch.chunks
    return Batch(
        tokens=cut(batch.tokens),
        positions=cut(batch.positions),
        kv_index=jnp.where(real, cut(batch.kv_index), TRASH_PAGE),
        decode=None if decode is None else _slice_decode(decode, size, first, real),
        chunks=None if chunks is None else _slice_chunks(chunks, size, first, real),
        logit_rows=batch.logit_rows,
    )


def _slice_decode(ragged: Ragged, size: int, first: Array, real: Array) -> Ragged:
    """Sequences of one token each: those whose tokens lie in the slice."""
    R = len(ragged.kv_lengths)
    width = min(size, R)
    spare = -R % width
    real = real & (first < R)
    first = jnp.minimum(first, R + spare - width)
    table = jnp.pad(ragged.page_table, ((0, 0), (0, spare), (0, 0)))
    lengths = lax.dynamic_slice_in_dim(jnp.pad(ragged.kv_lengths, (0, spare)), first, width)
    here = jnp.where(real, jnp.clip(ragged.query_starts[-1] - first, 0, width), 0)
    return Ragged(
        lax.dynamic_slice_in_dim(table, first, width, axis=1),
        jnp.minimum(jnp.arange(width + 1, dtype=jnp.int32), here),
        jnp.where(real, lengths, 0),
    )


def _slice_chunks(ragged: Ragged, size: int, first: Array, real: Array) -> Ragged:
    """Every sequence, with what of it lies in the slice, and nothing of what comes later."""
    starts = jnp.where(real, jnp.clip(ragged.query_starts - first, 0, size), 0)
    later = jnp.maximum(ragged.query_starts[1:] - first - size, 0)
    lengths = jnp.maximum(ragged.kv_lengths - later, 0)
    return Ragged(ragged.page_table, starts, jnp.where(starts[1:] > starts[:-1], lengths, 0))


# -- between stages -------------------------------------------------------------------------------


def _inner(axis: tuple[str, str]) -> str | None:
    """The axis of the devices that share a layer, if there are several."""
    return axis[1] if lax.axis_size(axis[1]) > 1 else None


def _handed_on(x: Array, axis: tuple[str, str]) -> Array:
    """What the stage before has computed; the first stage gets zeros."""
    return lax.ppermute(x, axis[0], [(i, i + 1) for i in range(lax.axis_size(axis[0]) - 1)])


def _from_last(x: Array, axis: tuple[str, str]) -> Array:
    """The last stage's x, on all of them: the others add zeros, so that the sum is exact."""
    last = lax.axis_index(axis[0]) == lax.axis_size(axis[0]) - 1
    return lax.psum(jnp.where(last, x, jnp.zeros_like(x)), axis[0])
