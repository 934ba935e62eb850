"""Where the weights of an `LLM` come from: a checkpoint, the caller, who has them in memory, or
chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.config import EngineOptions, ModelConfig
from jaxinfer.hub import resolve_model
from jaxinfer.in_memory import check_dense, check_params, place, stored_bytes
from jaxinfer.loading import (
    load_weights,
    model_config,
    model_tokenizer,
    open_source,
    split_stored,
)
from jaxinfer.memory import split_within
from jaxinfer.models.decoder import Params
from jaxinfer.models.weights import declare, init_params
from jaxinfer.offload import Split
from jaxinfer.parallel import declared_on
from jaxinfer.sharding import shardings

if TYPE_CHECKING:
    from jaxinfer.tokenizer import Tokenizer


class Source(NamedTuple):
    """A model of which nothing but the config has been read.

    Attributes:
        config: of the model.
        tokenizer: reads it; None where there is none. Raises CheckpointError.
        split: says where the weights are to lie, on the devices of a mesh. Raises CheckpointError,
            UnsupportedModel and CapacityError.
        load: puts them there, given the dtype, the mesh and `Split.layers`. Raises CheckpointError.
        in_memory: the weights are there already, perhaps on the device, and are the caller's.
        draft: a model that guesses, likewise.
    """

    config: ModelConfig
    tokenizer: Callable[[], Tokenizer | None]
    split: Callable[[EngineOptions, Mesh | None], Split]
    load: Callable[[Any, Mesh | None, Sequence[int]], Params]
    in_memory: bool = False
    draft: tuple[Params, ModelConfig] | None = None


def stored(model: str | Path, revision: str | None) -> Source:
    """A model on disk, or on the Hub, from where it is fetched.

    Raises:
        CheckpointError, UnsupportedModel: there is no such model, or its config is not one that
            can be run.
    """
    path = open_source(resolve_model(str(model), revision))
    config = model_config(path)
    return Source(
        config,
        tokenizer=lambda: model_tokenizer(path),
        split=lambda options, mesh: split_stored(path, config, options, mesh),
        load=lambda dtype, mesh, layers: load_weights(path, config, dtype, mesh, layers),
    )


def given(
    params: Params,
    config: ModelConfig,
    options: EngineOptions,
    *,
    tokenizer: Tokenizer | None,
    draft: tuple[Params, ModelConfig] | None,
) -> Source:
    """A model in memory, whole as for one device.

    Raises:
        CheckpointError: `params` is not the tree of `config` and the dtype.
        ValueError: a draft without speculation.
    """
    check_params(params, config, jnp.dtype(options.dtype))
    if options.speculative is None and draft is not None:
        raise ValueError('a draft was given: expected speculative="draft" with it')

    def split(options: EngineOptions, mesh: Mesh | None) -> Split:
        if draft is not None:
            check_params(*draft, jnp.dtype(options.dtype))
        if mesh is not None:
            check_dense([params, draft and draft[0]], mesh)
        sizes, budget = stored_bytes(params, config), options.device_weight_bytes
        if budget is None:
            return Split((), sum(jax.tree.leaves(sizes)), 0, 0)
        return split_within(sizes, config, budget, mesh)

    return Source(
        config,
        tokenizer=lambda: tokenizer,
        split=split,
        load=lambda _, mesh, layers: place(params, config, mesh, layers),
        in_memory=True,
        draft=draft,
    )


def drawn(config: ModelConfig, seed: int) -> Source:
    """A model of random weights, dense; each device draws its own."""

    def split(options: EngineOptions, mesh: Mesh | None) -> Split:
        width = jnp.dtype(options.dtype).itemsize
        sizes = jax.tree.map(lambda w: width * math.prod(w.shape), declare(config))
        if options.device_weight_bytes is None:
            return Split((), sum(jax.tree.leaves(sizes)), 0, 0)
        return split_within(sizes, config, options.device_weight_bytes, mesh)

    def load(dtype: Any, mesh: Mesh | None, layers: Sequence[int]) -> Params:
        key = jax.random.key(seed)
        if mesh is None or layers:  # drawn whole, as one device would
            return place(init_params(config, key, dtype), config, mesh, layers)
        declared = declared_on(config, mesh)
        places = shardings(declared, mesh)
        return init_params(config, key, dtype, declared=declared, places=places)

    return Source(config, tokenizer=lambda: None, split=split, load=load)
