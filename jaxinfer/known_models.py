"""Models that are known by name: what their published `config.json` says. No weights, no network.

Plain data without jax, in Hugging Face's field names: `models.families.parse_config` reads it, as
it reads a checkpoint's. Only fields that decide sizes or what is computed are here. Each name is
that of the model on the Hugging Face Hub, in small letters and without its maker.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# What random matrices are rounded to: fields of `quant.make.Recipe`.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "int4": {"kind": "int", "bits": 4, "group": 128},
        "int8": {"kind": "int", "bits": 8, "group": -1},
        "w8a8": {"kind": "int", "bits": 8, "group": -1, "activations": "token"},
        "nf4": {"kind": "nf4", "bits": 4, "group": 64},
        "fp8": {"kind": "fp8", "bits": 8, "group": -1, "activations": "token"},
    }
)


def _shape(
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab_size: int,
    max_position: int,
    **others: Any,
) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position,
        **others,
    }


def _family(architecture: str, model_type: str, **others: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **others}


def _llama3(factor: float) -> dict[str, Any]:
    """Of Llama 3.1 and 3.2, whose positions are stretched by `factor`."""
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _LLAMA | {
        "rope_theta": 500000.0,
        "rope_scaling": rope,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


_LLAMA = _family(
    "LlamaForCausalLM",
    "llama",
    hidden_act="silu",
    rms_norm_eps=1e-5,
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
)
_MISTRAL = _family(
    "MistralForCausalLM", "mistral", rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None
)
_QWEN2 = _family("Qwen2ForCausalLM", "qwen2", rope_theta=1e6)
_QWEN3 = _family("Qwen3ForCausalLM", "qwen3", rope_theta=1e6, head_dim=128)
_GEMMA2 = _family("Gemma2ForCausalLM", "gemma2")
_GEMMA3 = _family("Gemma3ForCausalLM", "gemma3_text")
_V3, _LONG = {"vocab_size": 128256}, {"max_position": 131072}  # Llama 3's

HF_CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "llama-3.2-1b": _llama3(32.0)
    | _shape(2048, 8192, 16, 32, 8, **_V3, **_LONG, head_dim=64, tie_word_embeddings=True),
    "llama-3.1-8b": _llama3(8.0) | _shape(4096, 14336, 32, 32, 8, **_V3, **_LONG, head_dim=128),
    "llama-3.1-70b": _llama3(8.0) | _shape(8192, 28672, 80, 64, 8, **_V3, **_LONG),
    "llama-3.1-405b": _llama3(8.0) | _shape(16384, 53248, 126, 128, 8, **_V3, **_LONG),
    "llama-2-7b": _LLAMA | _shape(4096, 11008, 32, 32, 32, vocab_size=32000, max_position=4096),
    "llama-2-70b": _LLAMA | _shape(8192, 28672, 80, 64, 8, vocab_size=32000, max_position=4096),
    # version 0.3
    "mistral-7b": _MISTRAL | _shape(4096, 14336, 32, 32, 8, vocab_size=32768, max_position=32768),
    "qwen2.5-7b": _QWEN2 | _shape(3584, 18944, 28, 28, 4, vocab_size=152064, **_LONG),
    "qwen2.5-72b": _QWEN2
    | _shape(8192, 29568, 80, 64, 8, vocab_size=152064, **_LONG, rms_norm_eps=1e-5),
    "qwen3-8b": _QWEN3 | _shape(4096, 12288, 36, 32, 8, vocab_size=151936, max_position=40960),
    "qwen3-32b": _QWEN3 | _shape(5120, 25600, 64, 64, 8, vocab_size=151936, max_position=40960),
    "gemma-2-9b": _GEMMA2
    | _shape(
        3584, 14336, 42, 16, 8, vocab_size=256000, max_position=8192, head_dim=256,
        query_pre_attn_scalar=256, sliding_window=4096,
    ),
    # the text model
    "gemma-3-27b": _GEMMA3
    | _shape(
        5376, 21504, 62, 32, 16, vocab_size=262208, **_LONG, head_dim=128,
        query_pre_attn_scalar=168, sliding_window=1024,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
})  # fmt: skip
