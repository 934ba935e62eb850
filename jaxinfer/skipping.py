"""Which layers a model can best do without, when it guesses for itself.

Greedily: of the layers that are left, each in turn is left out, and the one goes without which most
of the likeliest tokens stay as they are. Zhang et al. 2023, Draft & verify, search the same sets by
Bayesian optimisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import Params, apply


def choose_layers(
    params: Params,
    config: ModelConfig,
    tokens: np.ndarray,
    count: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, ...]:
    """The layers to leave out, ascending.

    Args:
        params: the model's, dense or quantised, not packed.
        tokens: int32 [B, T]; text such as the model will write.
        count: how many layers.
        progress: called with (layers chosen, `count`).

    Raises:
        ValueError: `count` is not from 1 to one less than there are layers; or too little text.
    """
    L = config.num_layers
    if not 1 <= count < L:
        raise ValueError(f"count={count}: this model has {L} layers, leave out 1 to {L - 1}")
    if tokens.ndim != 2 or tokens.size < 2:
        raise ValueError(f"tokens {tokens.shape}: expected [B, T], two tokens at least")
    run = jax.jit(_likeliest, static_argnums=1)
    ids = jnp.asarray(tokens, jnp.int32)
    likeliest = run(params, config, ids)
    left = list(range(L))
    for done in range(count):
        agreement = partial(_agreement, run, params, config, ids, likeliest)
        gone = max(left, key=lambda i: agreement([j for j in left if j != i]))
        left.remove(gone)
        if progress is not None:
            progress(done + 1, count)
    return tuple(i for i in range(L) if i not in left)


def _agreement(
    run: Callable[..., jax.Array], params: Params, config: ModelConfig, ids: jax.Array,
    likeliest: jax.Array, layers: list[int],
) -> int:  # fmt: skip
    """How many of the likeliest tokens stay so with these layers alone."""
    some = params | {"layers": [params["layers"][i] for i in layers]}
    chosen = replace(config, layers=tuple(config.layers[i] for i in layers))
    return int((run(some, chosen, ids) == likeliest).sum())


def _likeliest(params: Params, config: ModelConfig, ids: jax.Array) -> jax.Array:
    return apply(params, config, ids).logits.argmax(axis=-1)
