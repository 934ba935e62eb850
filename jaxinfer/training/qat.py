"""Quantisation-aware training: a model learns with its matrices rounded.

In the forward, matrices are what their codes stand for; gradients pass the rounding as if it were
not there (Bengio et al. 2013). Scales are learnt too (Esser et al. 2020), as logarithms. What is
learnt becomes an ordinary quantised model: `finish`.

Letters: B sequences, T tokens a sequence, N rows, G groups of columns.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import Params, apply
from jaxinfer.models.weights import MATRICES
from jaxinfer.quant.make import Recipe, encode, find_scales
from jaxinfer.training.lm import half, log_probs, nll


class Learnt(NamedTuple):
    """What is trained: `weights`, the dense model in float32; `scales`, for each layer and matrix
    the logarithms of its scales, float32 [N, G]."""

    weights: Params
    scales: list[dict[str, jax.Array]]


def begin(params: Params, recipe: Recipe) -> Learnt:
    """From a trained model, with the scales that rounding to nearest would take.

    Raises:
        ValueError: a recipe other than int, or with zero points; or groups that do not divide.
    """
    if recipe.kind != "int" or not recipe.symmetric:
        raise ValueError(f"{recipe}: int without zero points can be trained")

    def scales(w: jax.Array) -> jax.Array:
        groups = w.astype(jnp.float32).reshape(len(w), recipe.groups(w.shape[1]), -1)
        return jnp.log(find_scales(groups, recipe)[0])

    weights = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
    return Learnt(weights, [{m: scales(layer[m]) for m in MATRICES} for layer in weights["layers"]])


def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the gradient of `x`."""
    return x + jax.lax.stop_gradient(rounded - x)


def fake(w: jax.Array, log_scales: jax.Array, recipe: Recipe) -> jax.Array:
    """w [N, K] as its codes would have it, float32."""
    s = jnp.exp(log_scales)[..., None]
    s = straight_through(s, s.astype(jnp.bfloat16).astype(jnp.float32))  # as they are stored
    most = 2 ** (recipe.bits - 1)
    # Clipped first: of what lies on the bound after rounding, `clip` passes half a gradient.
    groups = jnp.clip(w.reshape(*log_scales.shape, -1) / s, -most, most - 1)
    return (straight_through(groups, jnp.round(groups)) * s).reshape(w.shape)


def faked(learnt: Learnt, recipe: Recipe) -> Params:
    """The model that the forward sees."""
    layers = [
        {**layer, **{m: fake(layer[m], scales[m], recipe) for m in MATRICES}}
        for layer, scales in zip(learnt.weights["layers"], learnt.scales, strict=True)
    ]
    return {**learnt.weights, "layers": layers}


def finish(learnt: Learnt, recipe: Recipe) -> Params:
    """The quantised model: matrices are `QuantisedMatrix`, all else bfloat16."""

    def matrix(w: jax.Array, log_scales: jax.Array) -> Any:
        return encode(w, jnp.exp(log_scales).astype(jnp.bfloat16), None, recipe)

    layers = [
        {**half(layer), **{m: matrix(layer[m], scales[m]) for m in MATRICES}}
        for layer, scales in zip(learnt.weights["layers"], learnt.scales, strict=True)
    ]
    others = {k: v for k, v in learnt.weights.items() if k != "layers"}
    return {**half(others), "layers": layers}


def create_state(
    params: Params, recipe: Recipe, optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh optimiser over `begin`. Raises ValueError as it does."""
    return TrainState.create(apply_fn=apply, params=begin(params, recipe), tx=optimizer)


@functools.partial(jax.jit, static_argnames=("config", "recipe"), donate_argnames="state")
def train_step(
    state: TrainState, tokens: jax.Array, *, config: ModelConfig, recipe: Recipe
) -> tuple[TrainState, jax.Array]:
    """One update on tokens int32 [B, T+1]; the mean nats a token before it.

    Args:
        state: of `create_state`; donated.
        tokens: each but the first is predicted from those before.
        config: the model.
        recipe: that of `create_state`.
    """

    def loss(learnt: Learnt) -> jax.Array:
        logp = log_probs(half(faked(learnt, recipe)), config, tokens[:, :-1])
        return nll(logp, tokens[:, 1:]).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value
