"""Training with rounded matrices: what is learnt, what the forward sees, what comes out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer import models
from jaxinfer.models.weights import MATRICES
from jaxinfer.quant import QuantisedMatrix, dequantise
from jaxinfer.quant.make import Recipe, round_to_nearest
from jaxinfer.training import qat
from tests.conftest import TinyModel

INT4, INT8 = Recipe("int", 4, 16), Recipe("int", 8, 16)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 33)), jnp.int32)


@pytest.mark.parametrize("recipe", [INT4, INT8], ids=["int4", "int8"])
def test_it_begins_with_rounding_to_nearest(tiny: TinyModel, recipe: Recipe) -> None:
    """But for the highest code, which int has not."""
    learnt = qat.begin(tiny.params, recipe)
    done = qat.finish(learnt, recipe)
    w = tiny.params["layers"][0]["down"]
    want = round_to_nearest(w, recipe, jnp.bfloat16)
    np.testing.assert_array_equal(done["layers"][0]["down"].codes, want.codes)
    np.testing.assert_array_equal(done["layers"][0]["down"].scales, want.scales)


@pytest.mark.parametrize("recipe", [INT4, INT8], ids=["int4", "int8"])
def test_the_forward_sees_what_comes_out(tiny: TinyModel, recipe: Recipe) -> None:
    learnt = qat.begin(tiny.params, recipe)
    seen, done = qat.faked(learnt, recipe), qat.finish(learnt, recipe)
    for a, b in zip(seen["layers"], done["layers"], strict=True):
        for name in MATRICES:
            assert isinstance(b[name], QuantisedMatrix)
            np.testing.assert_allclose(a[name], dequantise(b[name]), rtol=1e-6, atol=1e-8)


def test_gradients_pass_the_rounding() -> None:
    w = jnp.asarray(np.random.default_rng(1).normal(size=(4, 32)), jnp.float32)
    log_scales = jnp.log(jnp.full((4, 2), 0.1))
    log_scales = log_scales.at[0, 0].set(jnp.log(1e-3))  # all of the group is clipped

    def loss(w: jax.Array, s: jax.Array) -> jax.Array:
        return qat.fake(w, s, INT4).sum()

    by_w, by_s = jax.grad(loss, (0, 1))(w, log_scales)
    inside = np.abs(np.asarray(w) / 0.1 + 0.5) < 7.4
    outside = np.abs(np.asarray(w) / 0.1 + 0.5) > 7.6
    assert inside[1:].any()
    assert outside[1:].any()
    np.testing.assert_allclose(np.asarray(by_w)[1:][inside[1:]], 1, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(by_w)[1:][outside[1:]], 0)
    np.testing.assert_array_equal(np.asarray(by_w)[0, :16], 0)
    # LSQ's gradient: of what is clipped the code, of what is not the rounding error; times s.
    codes = np.clip(np.sign(np.asarray(w)[0, :16]) * 1e9, -8, 7)
    np.testing.assert_allclose(by_s[0, 0], codes.sum() * 1e-3, rtol=1e-2)


def test_training_makes_up_for_rounding(tiny: TinyModel) -> None:
    """A few steps on one batch: the loss of the rounded model falls, and the scales have moved."""
    config = tiny.config
    state = qat.create_state(tiny.params, INT4, optax.adam(3e-3))
    before = [np.asarray(s["down"]) for s in state.params.scales]
    losses = []
    for _ in range(25):
        state, loss = qat.train_step(state, TOKENS, config=config, recipe=INT4)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert all(
        not np.array_equal(a, s["down"]) for a, s in zip(before, state.params.scales, strict=True)
    )
    done = qat.finish(state.params, INT4)
    logits = models.apply(done, config, TOKENS[:, :-1]).logits
    after = -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], -1).mean()
    assert float(after) < 0.8 * losses[0]


@pytest.mark.parametrize(
    "recipe", [Recipe("fp8", 8, -1), Recipe("nf4", 4, 16), Recipe("int", 4, 16, symmetric=False)]
)
def test_recipes_that_cannot_be_trained(tiny: TinyModel, recipe: Any) -> None:
    with pytest.raises(ValueError, match="can be trained"):
        qat.begin(tiny.params, recipe)
