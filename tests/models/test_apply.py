"""The forward as a pure function: sites, changes, and what JAX's transformations make of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.load import load_params
from jaxinfer import InvalidRequest
from jaxinfer.config import LayerConfig, ModelConfig, RopeConfig
from jaxinfer.models import ForwardOutput, apply, declare, read_config
from jaxinfer.models.sites import LAYER_SITES, match, widths
from tests.models.test_forward import BASE, random_params

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = ["llama-gqa-llama3rope-tied", "llama-mqa-bias", "mistral-window", "qwen2", "qwen3"]
TOKENS = np.arange(2 * 9, dtype=np.int32).reshape(2, 9) % BASE.vocab_size
ALL = ("*",)


def close(got: jax.Array, want: jax.Array, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# -- sites ---------------------------------------------------------------------------------------


def test_patterns_name_sites_in_the_order_of_the_model() -> None:
    assert match(["final_norm", "layers.1.resid", "embed"], BASE) == (
        "embed", "layers.1.resid", "final_norm",
    )  # fmt: skip
    assert match(["layers.*.resid", "layers.0.*"], BASE) == (
        *(f"layers.0.{name}" for name in LAYER_SITES), "layers.1.resid",
    )  # fmt: skip
    assert match([], BASE) == ()


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["layers.2.resid"], r"'layers.2.resid' names no site.* N from 0 to 1"),
        (["layers.0.residual"], r"is it layers.N.resid\?"),
        (["logits"], "embed, final_norm, layers.N.attn_norm"),
        ([3], "3 names no site"),
        ("embed", "'embed' is not a list"),
        (None, "None is not a list"),
    ],
)
def test_what_names_no_site(patterns: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        match(patterns, BASE)  # type: ignore[arg-type]
    assert error.value.field == "capture"
    with pytest.raises(InvalidRequest, match=message):
        apply(random_params(BASE), BASE, TOKENS, capture=patterns)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [BASE, replace(BASE, o_bias=True, mlp_bias=True)])
def test_every_site_has_its_width_and_adds_up(config: ModelConfig) -> None:
    found = apply(random_params(config), config, TOKENS, capture=ALL)
    assert isinstance(found, ForwardOutput)
    acts = found.activations
    assert {site: x.shape for site, x in acts.items()} == {
        site: (*TOKENS.shape, width) for site, width in widths(config).items()
    }
    before = acts["embed"]
    for i in range(config.num_layers):
        here = {name: acts[f"layers.{i}.{name}"] for name in LAYER_SITES}
        close(here["resid_mid"], before + here["attn_out"])
        close(here["resid"], here["resid_mid"] + here["mlp_out"])
        before = here["resid"]
    assert apply(random_params(config), config, TOKENS).activations == {}


def test_capturing_changes_nothing() -> None:
    params = random_params(BASE)
    close(apply(params, BASE, TOKENS, capture=ALL).logits, apply(params, BASE, TOKENS).logits)


@pytest.mark.parametrize("site", widths(BASE))
def test_a_change_is_seen_from_its_site_on(site: str) -> None:
    params = random_params(BASE)
    plain = apply(params, BASE, TOKENS, capture=ALL)
    same = apply(params, BASE, TOKENS, change={site: lambda x: x})
    close(same.logits, plain.logits)
    double = apply(params, BASE, TOKENS, capture=ALL, change={site: lambda x: 1 + 2 * x})
    names = list(widths(BASE))
    for name in names[: names.index(site)]:
        np.testing.assert_array_equal(double.activations[name], plain.activations[name])
    close(double.activations[site], 1 + 2 * plain.activations[site])
    assert np.abs(double.logits - plain.logits).max() > 1e-3


def test_changes_are_named_one_by_one() -> None:
    params = random_params(BASE)
    for change in ({"layers.*.resid": jnp.sin}, {"resid": jnp.sin}):
        with pytest.raises(InvalidRequest) as error:
            apply(params, BASE, TOKENS, change=change)
        assert error.value.field == "change"


# -- positions -----------------------------------------------------------------------------------


def test_positions_turn_keys_and_queries() -> None:
    params = random_params(BASE)
    plain = apply(params, BASE, TOKENS).logits
    places = jnp.arange(9, dtype=jnp.int32)
    np.testing.assert_array_equal(apply(params, BASE, TOKENS, positions=places).logits, plain)
    # Only differences of positions count.
    for shifted in (places + 7, jnp.stack([places, places + 30])):
        close(apply(params, BASE, TOKENS, positions=shifted).logits, plain, 1e-4)
    stretched = apply(params, BASE, TOKENS, positions=2 * places).logits
    assert np.abs(stretched - plain).max() > 1e-3


# -- transformations -----------------------------------------------------------------------------


def test_one_sequence_a_batch_and_vmap_are_alike() -> None:
    params = random_params(BASE)
    run = jax.jit(lambda tokens: apply(params, BASE, tokens, capture=("layers.1.resid",)))
    batch, each = run(TOKENS), [run(row) for row in TOKENS]
    mapped = jax.vmap(run)(TOKENS)
    for i, one in enumerate(each):
        close(one.logits, batch.logits[i])
        close(one.logits, mapped.logits[i])
        close(one.activations["layers.1.resid"], mapped.activations["layers.1.resid"][i])


def test_vmap_over_models() -> None:
    models = [random_params(BASE, seed) for seed in (0, 5)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    found = jax.vmap(lambda params: apply(params, BASE, TOKENS).logits)(stacked)
    for params, logits in zip(models, found, strict=True):
        close(logits, apply(params, BASE, TOKENS).logits, 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_every_family(name: str) -> None:
    """Each weight's directional derivative is what a small step along it gives."""
    config = read_config(GOLDENS / name)
    params = load_params(GOLDENS / name, declare(config), dtype=jnp.float32)
    tokens = jnp.arange(10, dtype=jnp.int32)[None] * 7 % config.vocab_size

    def loss(params: dict) -> jax.Array:
        scores = jax.nn.log_softmax(apply(params, config, tokens).logits)
        return -jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], -1).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path
    length = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradients)))
    step = 1e-2 / length
    moved = [
        loss(jax.tree.map(lambda p, g, s=s: p + s * step * g / length, params, gradients))
        for s in (1, -1)
    ]
    np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), length, rtol=2e-2)


def test_gradients_of_activations() -> None:
    """As attribution does: of a logit by what is added to the residual stream."""
    params = random_params(BASE)

    def logit(by: jax.Array) -> jax.Array:
        out = apply(params, BASE, TOKENS, change={"layers.0.resid": lambda x: x + by})
        return out.logits[0, -1, 3]

    gradient = jax.grad(logit)(jnp.zeros((*TOKENS.shape, BASE.hidden_size)))
    assert np.abs(gradient[0]).max() > 0
    assert not gradient[1].any()  # another sequence


def test_two_ropes_and_windows_have_gradients_too() -> None:
    other = LayerConfig(window=3, rope=RopeConfig(theta=500.0))
    config = replace(BASE, qk_norm=True, layers=(LayerConfig(), other, LayerConfig(rope=None)))
    gradients = jax.grad(lambda p: apply(p, config, TOKENS).logits.std())(random_params(config))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
