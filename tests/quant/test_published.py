"""Checkpoints as real tools publish them against the tools' own dequantised forward (goldens)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints.load import load_params, stored_sizes
from jaxinfer import LLM, SamplingParams, models
from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.models.families import read_config
from jaxinfer.models.weights import declare
from jaxinfer.quant import Parts, QuantisedMatrix, dequantise

GOLDENS = Path(__file__).parents[1] / "goldens" / "quantised"
NAMES = sorted(p.parent.name for p in GOLDENS.glob("*/golden.safetensors"))
TOLERANCE = 1e-4  # of the largest |logit|
MATRICES = ("qkv", "o", "gate_up", "down")
ROUNDED = [n for n in NAMES if "w8a8" in n or "fp8" in n]  # activations are rounded too


def is_matrix(leaf: Any) -> bool:
    return isinstance(leaf, QuantisedMatrix | Parts)


@cache
def loaded(name: str) -> tuple[Any, Any]:
    config = read_config(GOLDENS / name)
    return config, load_params(GOLDENS / name, declare(config), dtype=jnp.float32)


def dense(params: Any) -> Any:
    return jax.tree.map(lambda w: dequantise(w) if is_matrix(w) else w, params, is_leaf=is_matrix)


def error(logits: Any, name: str) -> float:
    want = load_file(GOLDENS / name / "golden.safetensors")["logits"]
    return float(np.abs(np.asarray(logits) - want).max() / np.abs(want).max())


def apply(name: str, params: Any) -> jax.Array:
    tokens = jnp.asarray(load_file(GOLDENS / name / "golden.safetensors")["tokens"])
    return models.apply(params, loaded(name)[0], tokens).logits


def test_all_formats_have_goldens() -> None:
    assert len(NAMES) == 20


@pytest.mark.parametrize("name", NAMES)
def test_dequantised_forward(name: str) -> None:
    params = loaded(name)[1]
    assert any(is_matrix(params["layers"][0][m]) for m in MATRICES)
    assert error(apply(name, dense(params)), name) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_quantised_forward(name: str) -> None:
    """Weight-only formats compute the same; rounding activations changes little, but something."""
    found = error(apply(name, loaded(name)[1]), name)
    if name in ROUNDED:
        assert 1e-3 < found < 0.15
    else:
        assert found < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_known_before(name: str) -> None:
    config, params = loaded(name)
    actual = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    sizes = stored_sizes(GOLDENS / name, declare(config), jnp.float32)
    expected = sum(jax.tree.leaves(sizes))
    assert abs(actual - expected) < 0.1 * actual


@pytest.mark.parametrize("name", ["gptq-w4g128", "ct-w8a8-dynamic", "bnb-nf4-double"])
def test_generate(name: str) -> None:
    """One of each kind through the engine: greedy tokens are those of the forward."""
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    sizes: dict[str, Any] = {
        "max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 1 << 20, "dtype": "float32",
        "max_num_batched_tokens": 16, "max_steps": 1,
    }  # fmt: skip
    with LLM(GOLDENS / name, **sizes) as llm:
        (output,) = llm.generate([[5, 7, 11]], params)
    config, weights = loaded(name)
    sequence = [5, 7, 11, *output.outputs[0].token_ids]
    logits = models.apply(weights, config, jnp.asarray([sequence])).logits[0]
    assert np.asarray(logits.argmax(-1))[2:-1].tolist() == sequence[3:]


# -- bad input -----------------------------------------------------------------------------------


def copied(name: str, to: Path, **changes: Any) -> Path:
    """A golden's directory with another quantization_config."""
    shutil.copytree(GOLDENS / name, to / name)
    path = to / name / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    return to / name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq-w4g128", {"bits": 3}, "bits = 3 is not read; accepted: 4, 8"),
        ("gptq-w4g128", {"group_size": 64}, "of another shape"),
        ("gptq-w4g128", {"group_size": 256}, "groups of 256 do not divide 128 columns"),
        ("gptq-w4g128", {"bits": 8}, "of another shape"),
        ("gptq-w4g128", {"dynamic": {"-:x": {}}}, "dynamic"),
        ("awq-w4g64", {"version": "gemv"}, "version = 'gemv'"),
        ("awq-w4g64", {"group_size": 128}, "of another shape"),
        ("bnb-nf4", {"bnb_4bit_quant_type": "fp4"}, "missing"),
        ("bnb-nf4", {"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
        ("ct-w4a16", {"config_groups": {}}, "config_groups"),
        ("ct-w4a16", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("ct-w4a16", {"ignore": ["re:("]}, "is no expression"),
        ("ct-w4a16", {"ignore": []}, "missing: lm_head.weight_packed"),
        ("fp8-block", {"weight_block_size": [64, 64]}, "of another shape"),
        ("fp8-block", {"weight_block_size": [0, 64]}, "is not \\[rows, columns\\]"),
        ("fp8-block", {"activation_scheme": "static"}, "activation_scheme static"),
    ],
)
def test_configs_that_contradict(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = copied(name, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_params(folder, declare(read_config(folder)), dtype=jnp.float32)


@pytest.mark.parametrize("method", ["hqq", "torchao", "mxfp4", "exl2", "modelopt", None])
def test_methods_that_are_not_read(tmp_path: Path, method: str | None) -> None:
    folder = copied("gptq-w4g128", tmp_path, quant_method=method)
    with pytest.raises(UnsupportedModel, match=f"quant_method = {method!r} is not read"):
        load_params(folder, declare(read_config(folder)), dtype=jnp.float32)


def test_a_quantised_checkpoint_without_its_config(tmp_path: Path) -> None:
    folder = copied("gptq-w4g128", tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing: .*q_proj\.weight"):
        load_params(folder, declare(read_config(folder)), dtype=jnp.float32)


def test_params_of_another_quantisation_are_no_update() -> None:
    config, params = loaded("gptq-w4g128")
    with LLM.from_params(
        params, config, dtype="float32", max_num_seqs=4, max_model_len=64,
        kv_cache_bytes=1 << 20, max_num_batched_tokens=16,
    ) as llm:  # fmt: skip
        with pytest.raises(CheckpointError, match="layers/0/qkv/scales: missing"):
            llm.update_params(dense(params))
        layer = params["layers"][0]
        wide = replace(layer["o"], scales=layer["o"].scales.astype(jnp.float32))
        with pytest.raises(CheckpointError, match="layers/0/o/scales: float32"):
            llm.update_params({**params, "layers": [{**layer, "o": wide}]})
        llm.update_params(params)
