"""A forward over several new tokens of each sequence: what `speculate` asks of a model.

Letters: S sequences, W tokens of each at most, T of the flat batch, P pages a sequence, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.batch import MIN_ROWS, Batch, Ragged
from jaxinfer.cache import TRASH_PAGE, PagedCache, init_cache
from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import DEFAULT_ATTENTION, AttentionOptions, Params, forward, logits
from jaxinfer.pages import pages_for
from jaxinfer.sampling import SamplingRows
from jaxinfer.speculate import Forward, State


class Pages(NamedTuple):
    """What a model keeps of its sequences.

    Attributes:
        cache: keys and values.
        page_table: int32 [G, S, P]; 0 is the trash page.
    """

    cache: PagedCache
    page_table: Array


def model_forward(
    name: str, config: ModelConfig, attention: AttentionOptions = DEFAULT_ATTENTION
) -> Forward:
    """`speculate.Forward` of the model whose weights are `params[name]`; it keeps `Pages`.

    Tokens beyond a sequence's last page are computed, and not kept.
    """

    def run(
        params: Mapping[str, Params], kept: Pages, tokens: Array, count: Array, position: Array
    ) -> tuple[Array, Pages]:
        S, W = tokens.shape
        batch = flatten(kept, tokens, count, position)
        out, cache = forward(params[name], config, batch, kept.cache, attention=attention)
        found = logits(params[name], config, out.hidden)[: S * W]
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
        limits=jnp.asarray(limits, jnp.int32), active=jnp.ones(S, bool), rows=rows,
        penalties=None, draft=kept.get("draft", jnp.asarray(text)), target=kept["target"],
    )  # fmt: skip


def flatten(kept: Pages, tokens: Array, count: Array, position: Array) -> Batch:
    """The batch of `count` [S] of tokens [S, W], the first at `position` [S]; without gaps, and
    padded. Its `logit_rows` are those of [S, W], and padding."""
    S, W = tokens.shape
    T = pages_for(S * W, MIN_ROWS) * MIN_ROWS
    page_size, P = kept.cache.k[0].shape[2], kept.page_table.shape[2]
    ends = jnp.cumsum(count)
    meant = jnp.arange(W) < count[:, None]
    place = jnp.where(meant, (ends - count)[:, None] + jnp.arange(W), T)  # past the end: dropped
    at = position[:, None] + jnp.arange(W)
    column = at // page_size
    page = jnp.take_along_axis(kept.page_table[0], jnp.minimum(column, P - 1), axis=1)
    page = jnp.where(column < P, page, TRASH_PAGE)

    def flat(x: Array) -> Array:
        return jnp.zeros(T, jnp.int32).at[place].set(x, mode="drop")

    rows = jnp.minimum(place, T - 1).reshape(-1)
    return Batch(
        tokens=flat(tokens),
        positions=flat(at),
        kv_index=flat(page * page_size + at % page_size),
        decode=None,
        chunks=Ragged(
            kept.page_table,
            jnp.pad(ends, (1, 0)).astype(jnp.int32),
            jnp.where(count > 0, position + count, 0).astype(jnp.int32),
        ),
        logit_rows=jnp.pad(rows, (0, T - S * W)).astype(jnp.int32),
    )
