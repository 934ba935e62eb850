"""The engine as a value: a state of running rows, and pure functions from one state to the next.

No scheduler and no loop: a state is a pytree of arrays, to be run, kept, forked, saved, and mapped
over. `LLM.functional` makes one with prompts in it. Pages are handed out in order, on the device,
and never taken back: a state is a value, and whoever wants pages back goes on from an earlier one.

Letters: M rows, N pages, P_max pages a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer import sampling
from jaxinfer.batch import MIN_ROWS, Chunks, Plan, SeqState, init_state
from jaxinfer.cache import PagedCache, init_cache
from jaxinfer.config import ModelConfig
from jaxinfer.errors import CapacityError
from jaxinfer.hooks import Bound, Inside
from jaxinfer.models.decoder import Params
from jaxinfer.pages import pages_for
from jaxinfer.plans import SequenceSpec
from jaxinfer.runner import StepCompiler, StepKey, run_step

CHUNK = 2048  # tokens of a prompt that are read at once


class State(NamedTuple):
    """Rows in the middle of their sequences.

    Attributes:
        cache: keys and values; page 0 is the trash page.
        seq: the rows; see `batch.SeqState`. `seq.active` [M]: those that run.
        next_page: int32; the first page that nobody has.
        starved: bool [M]; rows that stopped because there was no page left for them.
    """

    cache: PagedCache
    seq: SeqState
    next_page: Array
    starved: Array


class Out(NamedTuple):
    """What a step brought.

    Attributes:
        tokens: int32 [M]; -1 where a row does not run.
        logprobs: of these tokens, [M] each, under the model itself; see `sampling.Logprobs`.
        activations: by site, of the tokens that went in: [M, width].
    """

    tokens: Array
    logprobs: sampling.Logprobs
    activations: dict[str, Array]


Step = Callable[[Params, State], tuple[State, Out]]


class Functional(NamedTuple):
    """`step(params, state) -> (state, out)`, and a state to begin with."""

    step: Step
    state: State


def empty(
    config: ModelConfig, *, rows: int, num_pages: int, page_size: int, longest: int, kv_dtype: Any
) -> State:
    """A state in which nothing runs, with pages for `num_pages - 1` times `page_size` tokens.

    Args:
        longest: tokens that a row may come to have.
        kv_dtype: of the cache.
    """
    return State(
        init_cache(config, num_pages, page_size, kv_dtype),
        init_state(rows, pages_for(longest, page_size)),
        jnp.int32(1),
        jnp.zeros(rows, bool),
    )


def read(
    params: Params,
    state: State,
    row: int | Array,
    tokens: Array,
    how: sampling.SamplingRows,
    limit: int | Array,
    *,
    config: ModelConfig,
    invariant: bool = True,
) -> State:
    """Puts a prompt into a row, and its keys and values into new pages. The next step samples.

    All of it but the last token is read: that goes through the model in the next step, so that
    forks of the row draw their first tokens each for itself.

    Args:
        row: which does not run.
        tokens: int32 [n], at least one; its length is static.
        how: how the row is sampled, as `sampling.pack_row` makes it.
        limit: tokens at which the row ends, prompt included.
    """
    count, page_size = len(tokens) - 1, _page_size(state)
    pages = pages_for(count, page_size)
    own = jnp.where(jnp.arange(_columns(state)) < pages, state.next_page, 0)
    own = own + jnp.where(own > 0, jnp.arange(_columns(state)), 0)
    fits = state.next_page + pages <= state.cache.k[0].shape[0]
    seq = state.seq
    seq = seq._replace(
        limits=seq.limits.at[row].set(limit),
        page_table=seq.page_table.at[:, row].set(jnp.where(fits, own, 0)),
        rows=jax.tree.map(lambda x, y: x.at[row].set(y), seq.rows, how),
        active=seq.active.at[row].set(False),
    )
    cache = state.cache
    for start in range(0, count, CHUNK):
        part = tokens[start : min(start + CHUNK, count)]
        T = pages_for(len(part), MIN_ROWS) * MIN_ROWS
        plan = _reading(part, start, row, how, limit, T=T, M=_rows(state), columns=_columns(state))
        key = StepKey(1, T, 1, _columns(state), page_size, invariant=invariant)
        cache, seq, _ = run_step(params, cache, seq, plan, config=config, key=key)
    seq = seq._replace(
        tokens=seq.tokens.at[row].set(tokens[-1]),
        lengths=seq.lengths.at[row].set(count),
        active=seq.active.at[row].set(fits & (count + 1 < limit)),
    )
    starved = state.starved.at[row].set(~fits)
    return State(cache, seq, state.next_page + jnp.where(fits, pages, 0), starved)


def fork(state: State, row: int | Array, into: Array) -> State:
    """Rows `into` go on from where `row` stands, as further samples of it.

    They share its full pages. What lies in its last page, partly filled, is copied to a new page
    for each. Their sample numbers are `row`'s and 1, 2, … more: draws are those that an engine
    makes for the samples of one request.

    Args:
        row: of the state.
        into: int32 [n]; rows that do not run, `row` not among them.
    """
    seq, page_size, count = state.seq, _page_size(state), len(into)
    length = seq.lengths[row]
    column, partly = length // page_size, length % page_size > 0
    new = jnp.where(partly, state.next_page + jnp.arange(count), 0)
    fits = state.next_page + jnp.where(partly, count, 0) <= state.cache.k[0].shape[0]
    new = jnp.where(fits, new, 0)

    def copied(pages: Array) -> Array:
        last = pages[seq.page_table[0, row, jnp.minimum(column, _columns(state) - 1)]]
        return pages.at[new].set(jnp.broadcast_to(last, (count, *last.shape)))

    def spread(x: Array) -> Array:
        return x.at[into].set(x[row])

    table = jnp.broadcast_to(seq.page_table[:, row, None], (1, count, _columns(state)))
    table = table.at[:, :, column].set(new, mode="drop")
    scales = state.cache.k_scales, state.cache.v_scales
    # Scales a head are the same for every page.
    scales = [x if x is None or x[0].ndim == 1 else tuple(map(copied, x)) for x in scales]
    cache = state.cache._replace(
        k=tuple(map(copied, state.cache.k)), v=tuple(map(copied, state.cache.v)),
        k_scales=scales[0], v_scales=scales[1],
    )  # fmt: skip
    rows = jax.tree.map(spread, seq.rows)
    rows = rows._replace(sample=rows.sample.at[into].add(1 + jnp.arange(count)))
    seq = seq._replace(
        tokens=spread(seq.tokens), lengths=spread(seq.lengths), limits=spread(seq.limits),
        active=seq.active.at[into].set(seq.active[row] & fits),
        page_table=seq.page_table.at[:, into].set(table), rows=rows,
    )  # fmt: skip
    used = jnp.where(partly & fits, count, 0)
    return State(cache, seq, state.next_page + used, state.starved.at[into].set(~fits))


def step(
    params: Params,
    state: State,
    *,
    config: ModelConfig,
    capture: tuple[str, ...] = (),
    logits_fn: Bound | None = None,
    invariant: bool = True,
) -> tuple[State, Out]:
    """A token of every row that runs.

    Args:
        capture: sites, each by its name.
        logits_fn: of `hooks.bind`; here it may mix rows, which all are the caller's.
        invariant: as of an engine.
    """
    seq, page_size, M = state.seq, _page_size(state), _rows(state)
    column = jnp.minimum(seq.lengths // page_size, _columns(state) - 1)
    needs = seq.active & (seq.lengths % page_size == 0)
    page = state.next_page + jnp.cumsum(needs) - 1
    there = page < state.cache.k[0].shape[0]
    granted, starved = needs & there, needs & ~there
    plan = Plan(
        released=starved,
        columns=column,
        pages=jnp.where(granted, page, 0)[:, None],
        rows=jnp.arange(M, dtype=jnp.int32),
        count=jnp.int32(M),
        steps=jnp.int32(1),
        chunks=None,
        hooked=None if logits_fn is None else jnp.stack([jnp.full(M, -1), jnp.zeros(M, int)]),
    )
    key = StepKey(
        M, 0, 0, _columns(state), page_size, invariant=invariant, random=True, truncated=True,
        top=0, capture=capture, hooks=() if logits_fn is None else (logits_fn.hook,),
    )  # fmt: skip
    tables = () if logits_fn is None else (_same_for_all(logits_fn, M),)
    cache, seq, found = run_step(params, state.cache, seq, plan, tables, config=config, key=key)
    activations = {site: x[0, :M] for site, x in found.captured.items()}
    logprobs = jax.tree.map(lambda x: x[0], found.logprobs)
    state = State(cache, seq, state.next_page + granted.sum(), state.starved | starved)
    return state, Out(found.tokens[0], logprobs, activations)


def start(
    params: Params,
    config: ModelConfig,
    compiler: StepCompiler,
    specs: Sequence[SequenceSpec],
    *,
    rows: int,
    num_pages: int | None,
    longest: int,
    page_size: int,
    kv_dtype: Any,
    invariant: bool,
    inside: Inside,
    donate: bool,
) -> Functional:
    """What `LLM.functional` returns, of sequences that were checked.

    Raises:
        CapacityError: the prompts do not fit into so many rows or pages.
    """
    prompts = [pages_for(len(spec.prompt) - 1, page_size) for spec in specs]
    if num_pages is None:
        num_pages = 1 + rows * pages_for(longest, page_size)
    if rows < max(1, len(specs)) or num_pages <= max(1, sum(prompts)):
        raise CapacityError(
            f"rows={rows}, num_pages={num_pages}: {len(specs)} prompts need a row each, and "
            f"{sum(prompts)} pages beside page 0"
        )
    state = empty(
        config, rows=rows, num_pages=num_pages, page_size=page_size, longest=longest,
        kv_dtype=kv_dtype,
    )  # fmt: skip
    options = compiler.options or None
    put = jax.jit(
        partial(read, config=config, invariant=invariant), donate_argnums=1,
        compiler_options=options,
    )  # fmt: skip
    for row, spec in enumerate(specs):
        how = sampling.pack_row(
            spec.params, seed=spec.seed, sample=spec.sample, stop_ids=spec.stop_ids,
            min_length=len(spec.prompt) + spec.params.min_tokens,
        )  # fmt: skip
        state = put(params, state, row, jnp.asarray(spec.prompt), how, spec.limit)
    run = partial(
        step, config=config, capture=inside.capture, logits_fn=inside.logits, invariant=invariant
    )
    if jax.tree.leaves(params)[0].devices().pop().platform == "gpu":
        # Kernels cannot be mapped over: states are taken one after the other.
        run = jax.custom_batching.sequential_vmap(run)
    donated = (1,) if donate else ()
    return Functional(jax.jit(run, donate_argnums=donated, compiler_options=options), state)


def _reading(
    part: Array, start: int, row: int | Array, how: Any, limit: int | Array,
    *, T: int, M: int, columns: int,
) -> Plan:  # fmt: skip
    """Reads tokens from position `start` on, padded to T, into a row that is set up already."""
    count = len(part)
    place = np.arange(T)
    one = partial(jnp.full, (1,))
    return Plan(
        released=jnp.zeros(M, bool),
        columns=jnp.zeros(M, jnp.int32),
        pages=jnp.zeros((M, 1), jnp.int32),
        rows=one(M, jnp.int32),
        count=jnp.int32(0),
        steps=jnp.int32(1),
        chunks=Chunks(
            tokens=jnp.pad(part, (0, T - count)),
            positions=jnp.asarray(np.where(place < count, start + place, 0), jnp.int32),
            owner=jnp.asarray(np.where(place < count, 0, -1), jnp.int32),
            ends=one(count, jnp.int32),
            row=one(row, jnp.int32),
            length=one(start + count, jnp.int32),
            prompt=one(start + count, jnp.int32),
            first=jnp.zeros(1, bool),
            last=jnp.zeros(1, bool),
            pages=jnp.zeros((1, columns), jnp.int32),
            limit=one(limit, jnp.int32),
            how=jax.tree.map(lambda x: jnp.asarray(x)[None], how),
            targets=None,
        ),
    )


def _same_for_all(bound: Bound, rows: int) -> tuple[Array, ...]:
    return tuple(jnp.broadcast_to(x, (rows, *x.shape)) for x in map(jnp.asarray, bound.arrays))


def _rows(state: State) -> int:
    return state.seq.active.shape[0]


def _columns(state: State) -> int:
    return state.seq.page_table.shape[2]


def _page_size(state: State) -> int:
    return state.cache.k[0].shape[2]
