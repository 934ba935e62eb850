"""Named model shapes, as their published `config.json` says. No weights, no network.

Plain data, so that a PyTorch environment without jax can read it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxinfer import known_models

if TYPE_CHECKING:
    from jaxinfer.config import ModelConfig

# Each by its full name; `short` is what it is called in the names of records.
HF_CONFIGS: dict[str, dict[str, Any]] = {
    **{
        name: dict(known_models.HF_CONFIGS[name])
        for name in ("llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b")
    },
    # Small enough to draft for the others; no published model.
    "llama-draft-100m": {
        **known_models.HF_CONFIGS["llama-3.2-1b"],
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    # a Llama 3.1 of two layers
    "tiny": {
        **known_models.HF_CONFIGS["llama-3.1-8b"],
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}


# What the matrices of a shape's layers may be rounded to (`known_models.RECIPES`): the bytes of a
# weight, with its share of the scales.
QUANTISED: dict[str, float] = {"int4": 0.5 + 2 / 128, "int8": 1.0, "nf4": 0.5 + 2 / 64, "fp8": 1.0}


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
    return QUANTISED[quantised] if quantised else 2.0


def model_config(name: str) -> ModelConfig:
    """The shape as jaxinfer reads it, through the same door as a checkpoint's config."""
    from jaxinfer.models.families import parse_config

    return parse_config(hf_config(name))


def init_params(name: str, dtype: Any) -> Any:
    """Random weights on the device, the layers' rounded where the name says so."""
    from jaxinfer.profiling.weights import random_params

    return random_params(model_config(name), name.partition(":")[2], dtype)
