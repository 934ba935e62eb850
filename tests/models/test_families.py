"""Configs of published models, and everything that `parse_config` must refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.config import RopeConfig
from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.models.families import FAMILIES, parse_config, read_config

LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_32_1B = LLAMA_31_8B | {
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_7B_V03 = MISTRAL_7B_V01 | {
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_llama_2() -> None:
    c = parse_config(LLAMA_2_7B)
    assert (c.family, c.num_layers, c.vocab_size) == ("LlamaForCausalLM", 32, 32000)
    assert (c.num_heads, c.num_kv_heads, c.head_dim) == (32, 32, 128)
    assert (c.hidden_size, c.intermediate_size, c.max_position) == (4096, 11008, 4096)
    assert (c.bos_token_id, c.eos_token_ids, c.norm_eps) == (1, (2,), 1e-5)
    assert not any([c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm, c.tie_embeddings])
    assert {layer.rope for layer in c.layers} == {RopeConfig(10000.0)}
    assert {layer.window for layer in c.layers} == {None}


def test_llama_3() -> None:
    c = parse_config(LLAMA_31_8B)
    assert (c.num_kv_heads, c.eos_token_ids) == (8, (128001, 128008, 128009))
    assert c.max_position == 131072
    assert c.layers[0].rope == RopeConfig(
        500000.0, "llama3", 8.0, original_max_position=8192, low_freq_factor=1, high_freq_factor=4
    )
    small = parse_config(LLAMA_32_1B)
    assert (small.head_dim, small.num_layers, small.tie_embeddings) == (64, 16, True)
    assert small.layers[0].rope is not None
    assert small.layers[0].rope.factor == 32


def test_llama_biases() -> None:
    c = parse_config(LLAMA_2_7B | {"attention_bias": True})
    assert (c.qkv_bias, c.o_bias, c.mlp_bias) == (True, True, False)
    c = parse_config(LLAMA_2_7B | {"mlp_bias": True})
    assert (c.qkv_bias, c.o_bias, c.mlp_bias) == (False, False, True)


def test_mistral_windows() -> None:
    assert [layer.window for layer in parse_config(MISTRAL_7B_V01).layers] == [4096] * 32
    v03 = parse_config(MISTRAL_7B_V03)
    assert [layer.window for layer in v03.layers] == [None] * 32
    assert v03.layers[0].rope == RopeConfig(1e6)


def test_qwen2() -> None:
    c = parse_config(QWEN25_7B)
    assert (c.qkv_bias, c.o_bias, c.qk_norm, c.head_dim) == (True, False, False, 128)
    assert {layer.window for layer in c.layers} == {None}


def test_qwen2_windows() -> None:
    sliding = QWEN25_7B | {"use_sliding_window": True, "sliding_window": 512}
    split = parse_config(sliding | {"max_window_layers": 26})
    assert [layer.window for layer in split.layers] == [None] * 26 + [512] * 2
    types = ["full_attention", "sliding_attention"] * 14
    named = parse_config(sliding | {"layer_types": types})
    assert [layer.window for layer in named.layers] == [None, 512] * 14


def test_qwen3() -> None:
    c = parse_config(QWEN3_8B)
    assert (c.qkv_bias, c.o_bias, c.qk_norm, c.num_layers) == (False, False, True, 36)
    biased = parse_config(QWEN3_8B | {"attention_bias": True})
    assert (biased.qkv_bias, biased.o_bias) == (True, True)


@pytest.mark.parametrize("max_position", [32768, 131072])  # both ways of writing it exist
def test_qwen_yarn(max_position: int) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    c = parse_config(QWEN25_7B | {"rope_scaling": scaling, "max_position_embeddings": max_position})
    rope = c.layers[0].rope
    assert rope is not None
    assert (rope.kind, rope.factor, rope.original_max_position) == ("yarn", 4.0, 32768)
    assert rope.attention_factor == pytest.approx(1.1386294361119891)
    assert c.max_position == 131072


def test_linear_scaling_multiplies_the_stated_length() -> None:
    c = parse_config(LLAMA_2_7B | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert c.max_position == 8192


def test_both_styles_of_rope_fields_mean_the_same() -> None:
    new = {k: v for k, v in LLAMA_31_8B.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = LLAMA3_ROPE | {"rope_theta": 500000.0}
    assert parse_config(new) == parse_config(LLAMA_31_8B)


GEMMA_3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


def test_gemma3_turns_keys_of_windowed_layers_otherwise() -> None:
    config = parse_config(
        GEMMA_3 | {"num_hidden_layers": 7, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    )
    full, local = config.layers[5], config.layers[0]
    assert (full.window, local.window) == (None, 4096)
    assert full.rope is not None
    assert local.rope is not None
    assert (full.rope.theta, full.rope.kind, full.rope.factor) == (1e6, "linear", 8.0)
    assert (local.rope.theta, local.rope.kind) == (1e4, "default")
    assert config.max_position == 131072  # as it is stated: not stretched again
    new = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
           "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}  # fmt: skip
    assert parse_config(GEMMA_3 | {"num_hidden_layers": 7, "rope_parameters": new}) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_fields_take_hugging_faces_defaults(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoConfig.for_model(FAMILIES[name].model_type)
    bare = {"architectures": [name]}
    assert parse_config(bare) == parse_config(hf.to_dict() | bare)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA_2_7B, {"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        (LLAMA_2_7B, {"architectures": None}, "architectures = None"),
        (LLAMA_2_7B, {"model_type": "mixtral"}, "model_type = 'mixtral'"),
        (LLAMA_2_7B, {"logit_scale": 0.5}, "logit_scale = 0.5"),
        (LLAMA_2_7B, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (LLAMA_2_7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (LLAMA_2_7B, {"sliding_window": 4096}, "sliding_window = 4096"),
        (LLAMA_2_7B, {"num_key_value_heads": 5}, "num_key_value_heads 5"),
        (LLAMA_2_7B, {"head_dim": 127}, "head_dim = 127 must be even"),
        (LLAMA_2_7B, {"hidden_size": 4097}, "hidden_size 4097"),
        (LLAMA_2_7B, {"hidden_size": 0}, "hidden_size = 0"),
        (LLAMA_2_7B, {"vocab_size": "32000"}, "vocab_size = '32000'"),
        (LLAMA_2_7B, {"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0"),
        (LLAMA_2_7B, {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        (LLAMA_2_7B, {"tie_word_embeddings": None}, "tie_word_embeddings = None"),
        (LLAMA_2_7B, {"eos_token_id": [2, -1]}, "eos_token_id = -1"),
        (LLAMA_2_7B, {"rope_theta": 0}, "rope_theta = 0"),
        (LLAMA_2_7B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*yarn"),
        (LLAMA_2_7B, {"rope_scaling": {"type": "linear"}}, "factor = None"),
        (LLAMA_2_7B, {"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "beta"),
        (LLAMA_2_7B, {"rope_scaling": {"type": "yarn", "rope_type": "linear"}}, "rope_type"),
        (LLAMA_2_7B, {"rope_scaling": [2.0]}, r"rope_scaling = \[2.0\]"),
        (LLAMA_31_8B, {"rope_parameters": {"rope_theta": 1e4}}, "contradicts rope_parameters"),
        (LLAMA_31_8B, {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq"),
        (MISTRAL_7B_V01, {"layer_types": ["full_attention"] * 32}, "layer_types"),
        (MISTRAL_7B_V01, {"sliding_window": 0}, "sliding_window = 0"),
        (MISTRAL_7B_V01, {"mlp_bias": True}, "mlp_bias = True"),
        (QWEN25_7B, {"use_mrope": True}, "use_mrope = True"),
        (QWEN25_7B, {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window is false"),
        (QWEN25_7B, {"layer_types": ["full_attention"]}, "must name 28 layers"),
        (QWEN25_7B, {"layer_types": ["chunked_attention"] * 28}, "chunked_attention"),
        (GEMMA_3, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        (GEMMA_3, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA_3, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        (GEMMA_3, {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping = -1.0"),
        (GEMMA_3, {"rope_parameters": {"rope_theta": 1e4}}, "must have full_attention"),
        (GEMMA_3, {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        (GEMMA_3, {"vision_config": {}}, "vision_config"),
    ],
)
def test_refused(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        parse_config(base | change)


def test_one_error_lists_every_unknown_field() -> None:
    with pytest.raises(UnsupportedModel, match=r"hidden_act = 'relu'.*num_experts = 8"):
        parse_config(LLAMA_2_7B | {"num_experts": 8, "hidden_act": "relu"})


def _write(directory: Path, **files: Any) -> Path:
    for name, contents in files.items():
        text = contents if isinstance(contents, str) else json.dumps(contents)
        (directory / f"{name}.json").write_text(text)
    return directory


def test_read_config(tmp_path: Path) -> None:
    _write(tmp_path, config=QWEN3_8B)
    assert read_config(tmp_path) == parse_config(QWEN3_8B)
    _write(tmp_path, generation_config={"eos_token_id": [151645, 151643], "temperature": 0.6})
    assert read_config(str(tmp_path)).eos_token_ids == (151645, 151643)
    _write(tmp_path, generation_config={"temperature": 0.6})
    assert read_config(tmp_path).eos_token_ids == (151645,)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"config\.json does not exist"),
        ({"config": "{"}, r"config\.json cannot be read"),
        ({"config": [1]}, r"config\.json holds a JSON list"),
        ({"config": QWEN3_8B, "generation_config": "x"}, r"generation_config\.json cannot be read"),
    ],
)
def test_unreadable_files(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(_write(tmp_path, **files))


def test_more_stop_tokens_than_the_device_checks_are_refused():
    with pytest.raises(UnsupportedModel, match="eos_token_id"):
        parse_config(LLAMA_2_7B | {"eos_token_id": list(range(9))})
