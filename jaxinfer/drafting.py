"""Speculation in the engine's steps: from rows and pages to `speculate.step`, and back.

The text of every page is beside its keys (`PagedCache.tokens`): repeats are looked for in it, and a
draft model reads from it what it has not seen. The draft has a pool of its own, addressed by the
target's page ids. It need not keep up: `Drafting.read` says how far it has come in each row, a
row's guesses wait until it has come as far as the newest tokens, and `catch_up` gets it there.

Letters: M rows of state, R rows of a step, k guesses, P pages a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import proposers, sampling
from jaxinfer.batch import Drafting, Plan, SeqState, decoding
from jaxinfer.cache import PagedCache
from jaxinfer.config import BatcherConfig, ModelConfig, Speculative
from jaxinfer.models.decoder import DEFAULT_ATTENTION, AttentionOptions, Params
from jaxinfer.parallel import new_cache, replicate, stage_config
from jaxinfer.pipeline import forward
from jaxinfer.speculate import Accepted, Drawing, Proposer, State, newest, step
from jaxinfer.types import Axis
from jaxinfer.windows import Pages, model_forward, text_at, unread


@dataclass(frozen=True)
class Drafter:
    """What guesses. Static.

    Attributes:
        how: as the user chose.
        model: the draft model; None: there is none.
    """

    how: Speculative
    model: ModelConfig | None = None

    @property
    def reads_text(self) -> bool:
        """Whether it needs `PagedCache.tokens`."""
        return self.how.method != "skip"


def of_stage(drafter: Drafter | None, config: ModelConfig, mesh: Mesh | None) -> Drafter | None:
    """What guesses, as each stage of a pipeline computes it: with its own layers."""
    if drafter is None:
        return None
    each = stage_config(config, mesh).num_layers
    how = replace(drafter.how, skip=tuple(i for i in drafter.how.skip if i < each))
    model = drafter.model
    return Drafter(how, None if model is None else stage_config(model, mesh))


def init_drafting(
    drafter: Drafter, limits: BatcherConfig, dtype: Any, mesh: Mesh | None = None
) -> Drafting | None:
    """What a draft model keeps, with nothing read; None where there is none."""
    if drafter.model is None:
        return None
    cache = new_cache(drafter.model, limits.num_pages, limits.page_size, dtype, mesh=mesh)
    return Drafting(cache, replicate(jnp.zeros(limits.max_num_seqs, jnp.int32), mesh))


def speculate_rows(
    params: Params,
    draft: Params | None,
    cache: PagedCache,
    seq: SeqState,
    plan: Plan,
    *,
    config: ModelConfig,
    drafter: Drafter,
    k: int,
    pages: int,
    attention: AttentionOptions,
    drawing: Drawing,
    top: int | None,
    axis: Axis = None,
) -> tuple[PagedCache, SeqState, Accepted]:
    """From one token to k + 1 for every row of `plan.rows` that runs; [R] of each in what is
    accepted. Rows of which the draft has too much to read get one.

    Args:
        params, draft: weights of the target, and of the draft model if there is one.
        config: of the target.
        pages: columns of the page table to look at; they must cover all that may be written.
        drawing, top: see `speculate.step`. Its `axis` is chosen here.
        axis: mesh axes when run under `shard_map`.
    """
    whole = top is not None or drafter.how.rule == "rejection"
    drawing = drawing._replace(axis=None if whole else axis)
    M = seq.active.shape[0]
    rows, active = decoding(seq, plan)
    table, lengths = seq.page_table[:, rows, :pages], seq.lengths[rows] + 1
    last = seq.tokens[rows][:, None]
    fresh, count, guessed = last, jnp.ones_like(lengths), plan.guessing
    kept: Any = None
    if seq.draft is not None:
        assert cache.tokens is not None, "a draft model reads the text"
        first = seq.draft.read[rows]
        guessed &= lengths - first <= k + 1
        count = jnp.where(guessed, lengths - first, 1)
        at = jnp.where(guessed, first, lengths - 1)[:, None] + jnp.arange(k + 1)
        fresh = text_at(cache.tokens, table[0], at)
        fresh = jnp.where(at == lengths[:, None] - 1, last, fresh)
        kept = Pages(seq.draft.cache, table)
    elif drafter.reads_text:
        assert cache.tokens is not None, "what is looked for repeats is the text"
        everywhere = jnp.arange(pages * cache.tokens.shape[1])
        kept = text_at(cache.tokens, table[0], jnp.tile(everywhere, (len(rows), 1)))
    how, penalties = jax.tree.map(lambda x: x[rows], (seq.rows, seq.penalties))
    state = State(
        fresh=jnp.pad(fresh, ((0, 0), (0, k + 1 - fresh.shape[1]))),
        fresh_count=count, lengths=lengths, limits=seq.limits[rows], active=active,
        guessed=guessed, rows=how, penalties=penalties, draft=kept, target=Pages(cache, table),
    )  # fmt: skip
    after, accepted = step(
        state,
        {"target": params, "draft": draft},
        draft=proposer(drafter, config, attention, axis=axis, whole=whole),
        target=model_forward("target", config, attention, axis=axis, whole=whole),
        drawing=drawing, rule=drafter.how.rule, top=top, forced=drafter.how.forced,
    )  # fmt: skip
    to = jnp.where(active, plan.rows, M)  # past the end: dropped
    new = jnp.arange(k + 1) < accepted.added[:, None]
    drafting = seq.draft
    if drafting is not None:
        read = jnp.where(guessed, to, M)
        drafting = Drafting(after.draft.cache, drafting.read.at[read].set(lengths, mode="drop"))
    seq = seq._replace(
        tokens=seq.tokens.at[to].set(newest(after)[:, 0], mode="drop"),
        lengths=seq.lengths.at[to].set(after.lengths - 1, mode="drop"),
        active=seq.active.at[to].set(after.active, mode="drop"),
        penalties=sampling.count_tokens(
            seq.penalties, jnp.where(new, to[:, None], M), accepted.tokens
        ),
        draft=drafting,
    )
    return after.target.cache, seq, accepted


def catch_up(
    draft: Params, cache: PagedCache, seq: SeqState, plan: Plan, *,
    drafter: Drafter, tokens: int, pages: int, attention: AttentionOptions,
    axis: Axis = None,
) -> SeqState:  # fmt: skip
    """The draft reads what it has not seen of `plan.rows`, the first of them first, `tokens` at
    most; but for the newest token of each."""
    assert drafter.model is not None
    assert seq.draft is not None
    assert cache.tokens is not None
    text, M = cache.tokens, seq.active.shape[0]
    rows, active = decoding(seq, plan)
    table, first = seq.page_table[:, rows, :pages], seq.draft.read[rows]
    left = jnp.where(active, jnp.maximum(seq.lengths[rows] - first, 0), 0)
    before = jnp.cumsum(left) - left
    count = jnp.clip(tokens - before, 0, left)
    kept = Pages(seq.draft.cache, table)
    batch = unread(
        kept, count, first, tokens,
        lambda owner, _, where: text_at(text, table[0, owner], where[:, None])[:, 0],
    )  # fmt: skip
    _, read = forward(draft, drafter.model, batch, seq.draft.cache, attention=attention, axis=axis)
    to = jnp.where(count > 0, plan.rows, M)
    return seq._replace(draft=Drafting(read, seq.draft.read.at[to].add(count, mode="drop")))


def proposer(
    drafter: Drafter,
    config: ModelConfig,
    attention: AttentionOptions = DEFAULT_ATTENTION,
    *,
    axis: Axis = None,
    whole: bool = True,
) -> Proposer:
    """What guesses, with weights by the names `target` and `draft`.

    Args:
        config: of the target.
        axis, whole: see `windows.model_forward`.
    """
    run = partial(model_forward, attention=attention, axis=axis, whole=whole)
    how, with_probabilities = drafter.how, drafter.how.rule == "rejection"
    if how.method == "lookup":
        return proposers.prompt_lookup(how.longest, how.shortest)
    if how.method == "skip":
        guess = run("target", config, skip=how.skip)
        return proposers.skipped_layers(guess, with_probabilities=with_probabilities)
    assert drafter.model is not None, "a draft without a model"
    guess = run("draft", drafter.model)
    return proposers.draft_model(guess, with_probabilities=with_probabilities)
