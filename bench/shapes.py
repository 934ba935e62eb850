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
    # Small enough to draft for the others; no published model.
    "llama-draft-100m": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
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


# What the matrices of a shape's layers are rounded to: fields of `quant.make.Recipe`, and the bytes
# of a weight, with its share of the scales.
QUANTISED: dict[str, tuple[dict[str, Any], float]] = {
    "int4": ({"kind": "int", "bits": 4, "group": 128}, 0.5 + 2 / 128),
    "int8": ({"kind": "int", "bits": 8, "group": -1}, 1.0),
    "nf4": ({"kind": "nf4", "bits": 4, "group": 64}, 0.5 + 2 / 64),
    "fp8": ({"kind": "fp8", "bits": 8, "group": -1, "activations": "token"}, 1.0),
}


def hf_config(name: str) -> dict[str, Any]:
    """The shape's `config.json`; `NAME@4` has four layers only, and is compiled in less time;
    `NAME:int4` has quantised layers, and otherwise the same.

    Raises:
        ValueError: no such shape.
    """
    whole, _, quantised = name.partition(":")
    shape, _, layers = whole.partition("@")
    unknown = shape not in HF_CONFIGS or (quantised and quantised not in QUANTISED)
    if unknown or (layers and not layers.isdecimal()):
        raise ValueError(
            f"unknown shape {name!r}; known: {', '.join(HF_CONFIGS)}, with @LAYERS,"
            f" then :{', :'.join(QUANTISED)}"
        )
    return {**HF_CONFIGS[shape], **({"num_hidden_layers": int(layers)} if layers else {})}


def short(name: str) -> str:
    """What the shape is called in the names of records: `llama-3.1-8b:int4` → `8b.int4`."""
    return name.rsplit("-", 1)[-1].replace(":", ".")


def weight_bytes(name: str) -> float:
    """Of one weight of the layers' matrices."""
    quantised = name.partition(":")[2]
    return QUANTISED[quantised][1] if quantised else 2.0


def model_config(name: str) -> ModelConfig:
    """The shape as jaxinfer reads it, through the same door as a checkpoint's config."""
    from jaxinfer.models.families import parse_config

    return parse_config(hf_config(name))


def init_params(name: str, dtype: Any) -> Any:
    """Random weights on the device, the layers' rounded where the name says so."""
    import jax

    from jaxinfer.models import weights
    from jaxinfer.quant.make import Recipe
    from jaxinfer.quantise import Method, quantise_params

    config = model_config(name)
    params = weights.init_params(config, jax.random.key(0), dtype)
    if quantised := name.partition(":")[2]:
        params = quantise_params(params, config, Method(Recipe(**QUANTISED[quantised][0])))
    return jax.block_until_ready(params)
