"""Making quantised matrices and models: each method against what it promises, and read back."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from checkpoints.formats.export import Writer, quantization_config
from checkpoints.load import load_params
from checkpoints.model_store import restore_model, save_model, saved_bytes
from jaxinfer import LLM, SamplingParams, models
from jaxinfer.cli.quantizing import QuantizeOptions, choose, quantize, read_text
from jaxinfer.errors import CheckpointError, InvalidRequest, UnsupportedModel
from jaxinfer.models.families import read_config
from jaxinfer.models.weights import declare
from jaxinfer.quality import compare
from jaxinfer.quant import Parts, QuantisedMatrix, dequantise
from jaxinfer.quant.make import (
    NF4,
    Recipe,
    awq_scales,
    gptq,
    round_clipped,
    round_to_nearest,
    smooth_scales,
)
from jaxinfer.quantise import Method, quantise_params
from jaxinfer.training.lm import log_probs

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo" / "draft"
INT4 = Recipe("int", 4, 32)
RECIPES = [
    INT4,
    Recipe("int", 4, 32, symmetric=False),
    Recipe("int", 4, -1),
    Recipe("int", 8, 32),
    Recipe("int", 8, -1, symmetric=False),
    Recipe("int", 8, -1, activations="token"),
    Recipe("nf4", 4, 64),
    Recipe("fp8", 8, -1),
    Recipe("fp8", 8, 64, activations="group", rows=64),
    Recipe("int", 8, -1, activations="tensor", rows=-1),
]
METHODS = [
    Method(INT4),
    Method(INT4, "gptq"),
    Method(Recipe("int", 4, 32, symmetric=False), "gptq", act_order=True),
    Method(INT4, "awq"),
    Method(Recipe("int", 8, -1, activations="token"), "smoothquant"),
    Method(Recipe("fp8", 8, -1, activations="token")),
    Method(Recipe("fp8", 8, 32, activations="group", rows=32)),
    Method(Recipe("int", 8, -1, activations="tensor")),
    Method(Recipe("int", 8, -1, activations="tensor", rows=-1), "smoothquant"),
]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_weight_goes_to_the_nearest(recipe: Recipe) -> None:
    """No weight could be closer with the scales that were chosen: half a step at most."""
    w = random(16, 128)
    matrix = round_to_nearest(jnp.asarray(w), recipe)
    error = np.abs(np.asarray(dequantise(matrix)) - w)
    scale = np.repeat(np.asarray(matrix.scales), matrix.group, axis=1)
    if recipe.kind == "int":
        steps = 0.5 if not recipe.symmetric else 1.0  # the highest code of 2^bits is missing
        assert (error <= (steps + 1e-3) * scale).all()
        assert np.mean(error <= 0.501 * scale) > 0.99
    elif recipe.kind == "nf4":
        nearest = np.abs(w[..., None] / scale[..., None] - np.array(NF4)).min(-1) * scale
        np.testing.assert_allclose(error, nearest, atol=1e-5)
    else:
        assert (error <= np.maximum(np.abs(w) / 16, scale * 2.0**-9) * 1.01).all()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_zeros_stay_zeros(recipe: Recipe) -> None:
    np.testing.assert_array_equal(
        dequantise(round_to_nearest(jnp.zeros((4, 128)), recipe)), np.zeros((4, 128))
    )


def inputs(tokens: int, K: int) -> np.ndarray:
    """Correlated inputs, with some columns much larger than others."""
    mix = random(K, K, seed=1) / K**0.5 + np.eye(K, dtype=np.float32)
    return random(tokens, K, seed=2) @ mix * np.exp(random(K, seed=3))


def product_error(matrix: QuantisedMatrix, w: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x @ (np.asarray(dequantise(matrix)) - w).T).mean())


def test_gptq_of_unrelated_inputs_is_rounding() -> None:
    w = jnp.asarray(random(8, 64))
    a, b = gptq(w, jnp.eye(64), INT4), round_to_nearest(w, INT4)
    np.testing.assert_allclose(a.scales, b.scales, rtol=1e-6)
    assert np.mean(np.asarray(a.codes) == b.codes) > 0.97  # but for ties


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_changes_products_less(act_order: bool, symmetric: bool) -> None:
    recipe = Recipe("int", 4, 32, symmetric)
    w, x = random(32, 128), inputs(1024, 128)
    hessian = jnp.asarray(x.T @ x / len(x))
    solved = gptq(jnp.asarray(w), hessian, recipe, act_order=act_order)
    assert solved.order is None
    plain = round_to_nearest(jnp.asarray(w), recipe)
    assert product_error(solved, w, x) < 0.6 * product_error(plain, w, x)


def test_gptq_of_inputs_that_are_always_zero() -> None:
    x = inputs(256, 64)
    x[:, 5] = 0
    solved = gptq(jnp.asarray(random(8, 64)), jnp.asarray(x.T @ x), INT4)
    assert np.isfinite(np.asarray(dequantise(solved))).all()
    np.testing.assert_array_equal(np.asarray(dequantise(solved))[:, 5], 0)


def test_awq_changes_products_less() -> None:
    w, x = random(32, 128), inputs(1024, 128)
    hessian = jnp.asarray(x.T @ x / len(x))
    s = np.asarray(awq_scales(jnp.asarray(w), hessian, jnp.abs(x).mean(0), INT4))
    plain = round_to_nearest(jnp.asarray(w), INT4)
    scaled = np.asarray(dequantise(round_to_nearest(jnp.asarray(w * s), INT4))) / s
    error = float(np.square(x @ (scaled - w).T).mean())
    assert error < 0.8 * product_error(plain, w, x)


@pytest.mark.parametrize("recipe", [INT4, Recipe("int", 4, 32, False), Recipe("nf4", 4, 32)])
def test_clipping_changes_products_less(recipe: Recipe) -> None:
    w = random(32, 128) ** 3  # a few weights are much larger than the rest
    x = random(512, 128, seed=2)
    clipped = round_clipped(jnp.asarray(w), jnp.asarray(x.T @ x / len(x)), recipe)
    plain = round_to_nearest(jnp.asarray(w), recipe)
    assert product_error(clipped, w, x) < 0.98 * product_error(plain, w, x)
    assert (np.asarray(clipped.scales) <= np.asarray(plain.scales) * 1.001).all()


def test_smooth_scales_even_out() -> None:
    w, largest = random(8, 16), np.exp(random(16, seed=3))
    s = np.asarray(smooth_scales(jnp.asarray(w), jnp.asarray(largest)))
    np.testing.assert_allclose(largest / s, np.abs(w * s).max(axis=0), rtol=1e-5)


# -- models ---------------------------------------------------------------------------------------


@cache
def demo() -> tuple[Any, Any, Any]:
    config = read_config(DEMO)
    params = load_params(DEMO, declare(config), dtype=jnp.float32)
    text = np.random.default_rng(0).integers(0, config.vocab_size, (4, 64))
    return config, params, jnp.asarray(text)


@cache
def made(method: Method) -> tuple[Any, list[tuple[int, int]]]:
    """The demo quantised, and what was said of its progress."""
    config, params, tokens = demo()
    calls: list[tuple[int, int]] = []
    done = quantise_params(
        params, config, method, tokens, progress=lambda *call: calls.append(call)
    )
    return done, calls


def divergence(params: Any, tokens: Any) -> float:
    """Mean KL of the next token, against the dense model."""
    config, dense, _ = demo()
    p, q = (
        jax.nn.log_softmax(models.apply(tree, config, tokens).logits) for tree in (dense, params)
    )
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.algorithm}-{m.recipe.kind}")
def test_models(method: Method) -> None:
    config, params, tokens = demo()
    done, calls = made(method)
    n = config.num_layers
    assert calls == [(i + 1, n) for i in range(n)]
    for layer in done["layers"]:
        assert all(isinstance(layer[m], QuantisedMatrix) for m in ("qkv", "o", "gate_up", "down"))
    assert done["embed"] is params["embed"]
    limit = 0.5 if method.recipe.bits == 4 else 0.06
    assert 0 < divergence(done, tokens) < limit


def test_what_solves_is_better_than_rounding() -> None:
    tokens = demo()[2]
    rtn, solved, searched = (
        divergence(made(Method(INT4, a))[0], tokens) for a in ("rtn", "gptq", "awq")
    )
    assert solved < 0.8 * rtn
    assert searched < rtn


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.algorithm}-{m.recipe.kind}")
def test_written_and_read_back(method: Method, tmp_path: Path) -> None:
    """The very arrays come back, and the tensors are those of a published checkpoint."""
    config, _, tokens = demo()
    done, _ = made(method)
    weights = declare(config)
    writer = Writer(tmp_path)
    rest = {k: v for k, v in weights.items() if k != "layers"}
    writer.write({k: v for k, v in done.items() if k != "layers"}, rest)
    for layer, weight in zip(done["layers"], weights["layers"], strict=True):
        writer.write(layer, weight)
    hf = json.loads((DEMO / "config.json").read_text())
    said = quantization_config(method.recipe, act_order=method.act_order)
    writer.close(hf | {"quantization_config": said})
    back = load_params(tmp_path, weights, dtype=jnp.float32)
    got, want = (models.apply(tree, config, tokens).logits for tree in (back, done))
    np.testing.assert_array_equal(got, want)
    assert jax.tree.structure(back) == jax.tree.structure(done)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(done), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# -- the command ----------------------------------------------------------------------------------


def options(tmp_path: Path, **changes: Any) -> QuantizeOptions:
    given: dict[str, Any] = {
        "model": str(DEMO), "out": tmp_path / "out", "method": "gptq", "bits": 4, "group_size": 32,
        "symmetric": True, "act_order": False, "data": Path(__file__), "samples": 4, "length": 64,
    }  # fmt: skip
    return QuantizeOptions(**given | changes)


def test_the_command(tmp_path: Path) -> None:
    quantize(options(tmp_path), None)
    out = tmp_path / "out"
    config = read_config(out)
    params = load_params(out, declare(config), dtype=jnp.bfloat16)
    assert isinstance(params["layers"][0]["qkv"], QuantisedMatrix | Parts)
    assert (out / "tokenizer.json").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "np") as f:
            assert name in f.keys()  # noqa: SIM118
    with pytest.raises(UnsupportedModel, match="quantised already"):
        quantize(options(tmp_path, model=str(out), out=tmp_path / "again"), None)


@pytest.mark.parametrize("form", ["compressed-tensors", "orbax"])
def test_the_report_is_that_of_the_whole_models(tmp_path: Path, form: str) -> None:
    """Layers side by side give what the two models give."""
    own = options(tmp_path, method="awq", form=form, report=Path(__file__), samples=2, length=128)
    found = quantize(own, None)
    assert found is not None
    assert json.loads((own.out / "quality.json").read_text()) == found._asdict()
    config = read_config(own.out)
    load = restore_model if form == "orbax" else partial(load_params, dtype=jnp.bfloat16)
    dense = load_params(DEMO, declare(config), dtype=jnp.bfloat16)
    made = load(own.out, declare(config))
    texts = read_text(own, DEMO, "report")
    want, got = (
        [np.asarray(log_probs(params, config, jnp.asarray([t])))[0] for t in texts]
        for params in (dense, made)
    )
    whole = compare(want, got, texts, values=1, stored=0)
    assert found.positions == 256
    assert 4 < found.bits_per_weight < 5
    assert 0 < found.mean_kl == pytest.approx(whole.mean_kl, rel=0.05)
    assert found.perplexity == pytest.approx(whole.perplexity, rel=0.01)
    assert found.perplexity_dense == pytest.approx(whole.perplexity_dense, rel=0.01)
    with LLM(own.out, max_model_len=64, max_num_seqs=2, kv_cache_bytes=1 << 22) as llm:
        assert llm.config == config


@pytest.mark.parametrize("method", ["nf4", "gptq", "fp8"])
def test_our_own_form(tmp_path: Path, method: str) -> None:
    """The same weights as in the other form, and text out of the engine."""
    own = options(tmp_path, method=method, form="orbax", group_size=64)
    quantize(own, None)
    config = read_config(own.out)
    params = restore_model(own.out, declare(config))
    assert saved_bytes(own.out) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if method != "nf4":
        quantize(replace(own, form="compressed-tensors", out=tmp_path / "other"), None)
        other = load_params(tmp_path / "other", declare(config), dtype=jnp.bfloat16)
        assert jax.tree.structure(params) == jax.tree.structure(other)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    sizes: dict[str, Any] = {
        "max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 1 << 22,
        "dtype": "float32" if method == "nf4" else "bfloat16",  # saved as bfloat16
        "max_num_batched_tokens": 32, "max_steps": 1,
    }  # fmt: skip
    with LLM(own.out, **sizes) as llm:
        (output,) = llm.generate("def ", SamplingParams(temperature=0.0, max_tokens=4))
    assert output.outputs[0].text


@pytest.mark.parametrize(
    "damage",
    [
        lambda said: said.pop("arrays"),
        lambda said: said["arrays"].pop("final_norm"),
        lambda said: said["arrays"].update({"embed": ["bfloat16", [3, 3]]}),
        lambda said: said["schemes"].popitem(),
        lambda said: said["schemes"].update({"layers.0.qkv": {"kind": "x"}}),
        lambda said: said["schemes"].update({"layers.0.qkv": {"table": [1.0]}}),
    ],
)
def test_our_own_form_damaged(tmp_path: Path, damage: Any) -> None:
    config = demo()[0]
    done, _ = made(Method(INT4))
    save_model(tmp_path / "saved", done, json.loads((DEMO / "config.json").read_text()))
    path = tmp_path / "saved" / "config.json"
    hf = json.loads(path.read_text())
    damage(hf["jaxinfer"])
    path.write_text(json.dumps(hf))
    with pytest.raises(CheckpointError):
        restore_model(tmp_path / "saved", declare(config))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "rtn", "scales": "block"}, ValueError, "are of W8A8, not of rtn"),
        ({"scales": "column"}, ValueError, "--scales column, --activations dynamic: expected row"),
        ({"method": "int8", "scales": "block"}, ValueError, "are for FP8 in blocks"),
        ({"method": "fp8", "scales": "block", "activations": "static"}, ValueError, "by group"),
        ({"method": "int8", "activations": "static", "data": None}, InvalidRequest, "--data"),
        ({"report": Path("none.txt")}, InvalidRequest, "none.txt cannot be read"),
        ({"form": "gguf"}, ValueError, "--format gguf: expected compressed-tensors or orbax"),
        ({"method": "nf4", "group_size": 64}, ValueError, "compressed-tensors has no NF4"),
        ({"method": "hqq"}, ValueError, "--method hqq: expected rtn, gptq"),
        ({"bits": 3}, ValueError, "int of 4 or 8 bits"),
        ({"group_size": 100}, ValueError, "groups of 100 do not divide"),
        ({"group_size": 33}, ValueError, "even number"),
        ({"method": "rtn", "act_order": True}, ValueError, "act_order is of gptq"),
        ({"data": None}, InvalidRequest, "needs a calibration text"),
        ({"data": Path("/nowhere")}, InvalidRequest, "cannot be read"),
        ({"length": 100000}, InvalidRequest, "not one piece of 100000"),
        ({"samples": 1, "length": 64}, InvalidRequest, "64 tokens is too short"),
        ({"out": Path(__file__).parent}, CheckpointError, "exists already"),
    ],
)
def test_commands_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize(options(tmp_path, **changes), None)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


def test_methods_of_the_command(tmp_path: Path) -> None:
    made = {name: choose(options(tmp_path, method=name)) for name in ("fp8", "int8", "smoothquant")}
    assert made["fp8"].recipe == Recipe("fp8", 8, -1, activations="token")
    assert made["int8"].algorithm == "rtn"
    assert made["smoothquant"].recipe == made["int8"].recipe


@pytest.mark.parametrize(
    "recipe", [Recipe("nf4", 4, 64), Recipe("fp8", 8, 128)], ids=["nf4", "fp8 by groups"]
)
def test_what_the_format_cannot_say(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="compressed-tensors has no"):
        quantization_config(recipe)


@pytest.mark.parametrize(
    "tokens", [None, [], [[1, 2], [1]], [[1] * 16], [[10**6] * 128], [[-1] * 128]], ids=str
)
def test_texts_that_do_not_do(tokens: Any) -> None:
    config, params, _ = demo()
    with pytest.raises(InvalidRequest):
        quantise_params(params, config, Method(INT4, "gptq"), tokens)
