"""Named model shapes, as their published `config.json` says. No weights, no network.

Plain data, so that a PyTorch environment without jax can read it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.config import ModelConfig

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# Each by its full name; `short` is what it is called in the names of records.
HF_CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_scaling": _llama3_rope(8.0),
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_scaling": _llama3_rope(32.0),
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "tiny": {
        **_LLAMA,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 131072,
        "rope_scaling": _llama3_rope(8.0),
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}


def hf_config(name: str) -> dict[str, Any]:
    """The shape's `config.json`; `NAME@4` has four layers only, and is compiled in less time.

    Raises:
        ValueError: no such shape.
    """
    shape, _, layers = name.partition("@")
    if shape not in HF_CONFIGS or (layers and not layers.isdecimal()):
        raise ValueError(f"unknown shape {name!r}; known: {', '.join(HF_CONFIGS)}, or NAME@LAYERS")
    return {**HF_CONFIGS[shape], **({"num_hidden_layers": int(layers)} if layers else {})}


def short(name: str) -> str:
    """What the shape is called in the names of records: `llama-3.1-8b` → `8b`."""
    return name.rsplit("-", 1)[-1]


def model_config(name: str) -> ModelConfig:
    """The shape as jaxinfer reads it, through the same door as a checkpoint's config."""
    from jaxinfer.models.families import parse_config

    return parse_config(hf_config(name))
