"""A forward over several new tokens of each sequence: what `speculate` asks of a model.

Letters: S sequences, W tokens of each at most, T of the flat batch, P pages a sequence, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.batch import MIN_ROWS, Batch, Ragged
from jaxinfer.cache import TRASH_PAGE, PagedCache, init_cache, join_layers, split_layers
from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import DEFAULT_ATTENTION, AttentionOptions, Params, logits
from jaxinfer.pages import pages_for
from jaxinfer.pipeline import forward
from jaxinfer.sampling import SamplingRows
from jaxinfer.speculate import Forward, State
from jaxinfer.types import Axis


class Pages(NamedTuple):
    """What a model keeps of its sequences.

    Attributes:
        cache: keys and values.
        page_table: int32 [G, S, P]; 0 is the trash page.
    """

    cache: PagedCache
    page_table: Array


def model_forward(
    name: str,
    config: ModelConfig,
    attention: AttentionOptions = DEFAULT_ATTENTION,
    *,
    skip: Sequence[int] = (),
    axis: Axis = None,
    whole: bool = True,
) -> Forward:
    """`speculate.Forward` of the model whose weights are `params[name]`; it keeps `Pages`.

    Tokens beyond a sequence's last page are computed, and not kept.

    Args:
        skip: layers that it does without; what it keeps of them stays as it is.
        axis: mesh axes when run under `shard_map`.
        whole: False: every shard has the logits of its part of the vocabulary.
    """
    layers = [i for i in range(config.num_layers) if i not in set(skip)]
    chosen = replace(config, layers=tuple(config.layers[i] for i in layers))

    def run(
        params: Mapping[str, Params], kept: Pages, tokens: Array, count: Array, position: Array
    ) -> tuple[Array, Pages]:
        S, W = tokens.shape
        weights, pools = params[name], split_layers(kept.cache)
        weights = weights | {"layers": [weights["layers"][i] for i in layers]}
        options = replace(attention, max_query=W)
        batch = flatten(kept, tokens, count, position)
        some = join_layers([pools[i] for i in layers], kept.cache.tokens)
        out, some = forward(weights, chosen, batch, some, attention=options, axis=axis)
        for i, pool in zip(layers, split_layers(some), strict=True):
            pools[i] = pool
        found = logits(weights, chosen, out.hidden, axis=axis if whole else None)[: S * W]
        cache = join_layers(pools, some.tokens)
        return found.reshape(S, W, -1), kept._replace(cache=cache)

    return run


def begin(
    params: Mapping[str, Params],
    configs: Mapping[str, ModelConfig],
    prompts: Sequence[Sequence[int]],
    rows: SamplingRows,
    limits: Sequence[int],
    *,
    k: int,
    page_size: int,
    dtype: Any,
) -> State:
    """A state for `speculate.step` in which `target` and, if there is one, `draft` have read the
    prompts, but for their last tokens. Without a draft, `state.draft` is int32 [S, longest limit],
    the prompts, for `proposers.prompt_lookup`.

    Args:
        params, configs: of the models, by those names.
        prompts: of one token at least.
        limits: see `speculate.State`; every sequence gets pages for so many.
        k: guesses of a step.
        dtype: of the cache.
    """
    S, lengths = len(prompts), np.array([len(p) for p in prompts], np.int32)
    P = pages_for(max(limits), page_size)
    text = np.zeros((S, max(limits)), np.int32)
    for i, prompt in enumerate(prompts):
        text[i, : len(prompt)] = prompt
    own = 1 + np.arange(S * P, dtype=np.int32).reshape(S, P)
    kept = {}
    for name, config in configs.items():
        pages = Pages(init_cache(config, 1 + S * P, page_size, dtype), jnp.asarray(own[None]))
        read = jax.jit(model_forward(name, config), donate_argnums=1)
        some = jnp.asarray(text[:, : max(lengths)])
        _, kept[name] = read(params, pages, some, jnp.asarray(lengths - 1), jnp.zeros(S, jnp.int32))
    fresh = np.zeros((S, k + 1), np.int32)
    fresh[:, 0] = text[np.arange(S), lengths - 1]
    return State(
        fresh=jnp.asarray(fresh), fresh_count=jnp.ones(S, jnp.int32), lengths=jnp.asarray(lengths),
        limits=jnp.asarray(limits, jnp.int32), active=jnp.ones(S, bool),
        guessed=jnp.ones(S, bool),
        rows=rows, penalties=None, draft=kept.get("draft", jnp.asarray(text)),
        target=kept["target"],
    )  # fmt: skip


def flatten(kept: Pages, tokens: Array, count: Array, position: Array) -> Batch:
    """The batch of `count` [S] of tokens [S, W], the first at `position` [S]; without gaps, and
    padded. Its `logit_rows` are those of [S, W], and padding."""
    S, W = tokens.shape
    T = pages_for(S * W, MIN_ROWS) * MIN_ROWS
    batch = unread(kept, count, position, T, lambda owner, offset, _: tokens[owner, offset])
    rows = (jnp.cumsum(count) - count)[:, None] + jnp.arange(W)
    rows = jnp.pad(jnp.minimum(rows, T - 1).reshape(-1), (0, T - S * W))
    return batch._replace(logit_rows=rows.astype(jnp.int32))


def unread(
    kept: Pages, count: Array, position: Array, T: int, tokens: Callable[..., Array]
) -> Batch:
    """The batch of the `count` [S] tokens of each sequence from `position` [S] on: T at most.

    No logits are wanted of it.

    Args:
        tokens: what they are, of int32 [T] each: the sequence, the number among its new tokens, the
            position. It is asked for padding too.
    """
    page_size, P = kept.cache.k[0].shape[2], kept.page_table.shape[2]
    ends, at = jnp.cumsum(count), jnp.arange(T)
    # By comparing all: a search is a loop, whose every turn is launched.
    owner = jnp.minimum((at[:, None] >= ends).sum(axis=1), len(count) - 1)
    offset = jnp.where(at < ends[-1], at - (ends - count)[owner], 0)
    where = jnp.where(at < ends[-1], position[owner] + offset, 0)
    column = where // page_size
    real = (at < ends[-1]) & (column < P)
    page = jnp.where(real, kept.page_table[0, owner, jnp.minimum(column, P - 1)], TRASH_PAGE)
    return Batch(
        tokens=tokens(owner, offset, where),
        positions=where.astype(jnp.int32),
        kv_index=(page * page_size + where % page_size).astype(jnp.int32),
        decode=None,
        chunks=Ragged(
            kept.page_table,
            jnp.pad(ends, (1, 0)).astype(jnp.int32),
            jnp.where(count > 0, position + count, 0).astype(jnp.int32),
        ),
        logit_rows=jnp.zeros(MIN_ROWS, jnp.int32),
    )


def text_at(tokens: Array, table: Array, position: Array) -> Array:
    """The tokens at `position` [S, n] of sequences with pages `table` [S, P], of
    `PagedCache.tokens`. Beyond the table: whatever."""
    page_size, P = tokens.shape[1], table.shape[1]
    page = jnp.take_along_axis(table, jnp.minimum(position // page_size, P - 1), axis=1)
    return tokens[page, position % page_size]
