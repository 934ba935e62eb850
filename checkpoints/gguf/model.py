"""GGUF's metadata → a model's config, its tensors' names, and what its tokenizer is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.gguf.reader import Gguf, open_gguf, read_rows
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.models.families import parse_config
from jaxinfer.rope import rope_frequencies

# GGUF's architecture: Hugging Face's. Mistral's models are written as llama.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
WINDOWED = {"gemma2": 2, "gemma3": 6}  # every so manyth layer is full
# Layers of the models whose scores are scaled by the width of a head as if heads made up the hidden
# size: the files do not say so.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
POST_NORMS = {"post_attention_layernorm": "post_attention_norm",
              "pre_feedforward_layernorm": "ffn_norm",
              "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
# What a rope_freqs tensor may be: Llama 3.1 and 3.3 are stretched by 8, 3.2 by 32.
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA3_FACTORS = (8.0, 32.0)


def gguf_name(architecture: str, name: str) -> str:
    """`blk.3.attn_q.weight` of `model.layers.3.self_attn.q_proj.weight`."""
    names = NAMES | (POST_NORMS if architecture in WINDOWED else {})
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if layer is None:
        return f"{names[module]}.{kind}"
    return f"blk.{layer[1]}.{names[layer[2]]}.{kind}"


def norm_offset(gguf: Gguf, name: str) -> int:
    """What llama.cpp has added to this tensor: one, to norms that scale by 1 + weight."""
    gemma = gguf.metadata["general.architecture"].startswith("gemma")
    return int(gemma and name.endswith("norm.weight"))


def read_config(path: str | Path | Gguf) -> ModelConfig:
    """The model of a GGUF file.

    Raises:
        CheckpointError: as `open_gguf`; or a key is missing or of another type.
        UnsupportedModel: an architecture, or a value, that is not computed.
    """
    gguf = open_gguf(path)
    found = gguf.metadata
    name = found.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{gguf.path}: general.architecture = {name!r} is not supported; these are: "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture, model_type = ARCHITECTURES[name]
    heads = _key(gguf, "attention.head_count")
    if "token_embd.weight" not in gguf.tensors:
        raise CheckpointError(f"{gguf.path}: no tensor token_embd.weight")
    hf: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "hidden_size": _key(gguf, "embedding_length"),
        "intermediate_size": _key(gguf, "feed_forward_length"),
        "num_hidden_layers": _key(gguf, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _key(gguf, "attention.head_count_kv", heads),
        "max_position_embeddings": _key(gguf, "context_length"),
        "rms_norm_eps": _key(gguf, "attention.layer_norm_rms_epsilon"),
        "head_dim": _key(gguf, "attention.key_length", None),
        "rope_theta": _key(gguf, "rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(gguf),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": found.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _stops(found),
    }
    if name == "llama" and "blk.0.attn_q.bias" in gguf.tensors:
        hf["attention_bias"] = True
    window = _key(gguf, "attention.sliding_window", 0)
    if name in WINDOWED:
        hf |= _windowed(gguf, hf, window)
    elif window:
        raise UnsupportedModel(f"{gguf.path}: attention.sliding_window = {window} is not supported")
    _check_head_dims(gguf, hf)
    return parse_config(hf)


def _windowed(gguf: Gguf, hf: dict[str, Any], window: Any) -> dict[str, Any]:
    """What Gemma 2 and 3 have beside: windows, soft-caps, the scale of scores."""
    name = gguf.metadata["general.architecture"]
    found: dict[str, Any] = {
        "sliding_window": window or None,
        "sliding_window_pattern": _key(gguf, "attention.sliding_window_pattern", WINDOWED[name]),
    }
    for cap, usual in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        found[cap] = _key(gguf, cap, usual if name == "gemma2" else None)
    if name == "gemma3":
        found["rope_theta"] = _key(gguf, "rope.freq_base", 1e6)
        found["rope_local_base_freq"] = _key(gguf, "rope.freq_base_swa", 1e4)
    width = hf["head_dim"]
    if hf["num_hidden_layers"] == SCALED_BY_WIDTH[name]:
        width = hf["hidden_size"] // hf["num_attention_heads"]
    return found | {"query_pre_attn_scalar": width}


_REQUIRED = object()


def _key(gguf: Gguf, key: str, default: Any = _REQUIRED) -> Any:
    name = f"{gguf.metadata['general.architecture']}.{key}"
    value = gguf.metadata.get(name, default)
    if value is _REQUIRED:
        raise CheckpointError(f"{gguf.path}: no key {name}")
    return value


def _stops(found: dict[str, Any]) -> list[int] | None:
    """The end of a text, and of a turn where it is another token."""
    ids = [found.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    return sorted({i for i in ids if i is not None}) or None


def _check_head_dims(gguf: Gguf, hf: dict[str, Any]) -> None:
    """Values of the width of keys, and all of it turned: nothing else is computed."""
    heads = hf["num_attention_heads"]
    if type(heads) is not int or heads < 1 or type(hf["hidden_size"]) is not int:
        return  # `parse_config` says so
    width = hf["head_dim"] or hf["hidden_size"] // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if _key(gguf, key, width) != width:
            raise UnsupportedModel(
                f"{gguf.path}: {key} = {_key(gguf, key)}, and heads are {width} wide"
            )


def _rope_scaling(gguf: Gguf) -> dict[str, Any] | None:
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3(gguf)
    kind = _key(gguf, "rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _key(gguf, "rope.scaling.factor")}
    original = _key(gguf, "rope.scaling.original_context_length", None)
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3(gguf: Gguf) -> dict[str, Any]:
    """The Llama 3 scaling that divides the frequencies as `rope_freqs` says."""
    tensor = gguf.tensors["rope_freqs.weight"]
    if tensor.type.name != "F32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{gguf.path}: rope_freqs.weight is no vector of float32")
    wanted = read_rows(gguf, tensor, 0, 1).view(np.float32)[0]
    theta, head_dim = float(_key(gguf, "rope.freq_base", 10000.0)), 2 * len(wanted)
    plain = rope_frequencies(RopeConfig(theta), head_dim)[0]
    for factor in LLAMA3_FACTORS:
        rope = RopeConfig(theta, "llama3", factor, 8192, 1.0, 4.0)
        if np.allclose(plain / rope_frequencies(rope, head_dim)[0], wanted, rtol=1e-3):
            return LLAMA3 | {"factor": factor}
    raise UnsupportedModel(
        f"{gguf.path}: rope_freqs.weight is not that of Llama 3 with a factor of "
        f"{' or '.join(str(f) for f in LLAMA3_FACTORS)}"
    )


def tokenizer_fields(path: str | Path | Gguf) -> dict[str, Any] | None:
    """The `tokenizer.*` keys, without that prefix; None where there is no tokenizer."""
    metadata = open_gguf(path).metadata
    prefix = "tokenizer."
    fields = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    if "ggml.tokens" not in fields:
        return None
    return fields | {"architecture": metadata.get("general.architecture")}


def permuted(gguf: Gguf, name: str) -> bool:
    """Whether llama.cpp stores the rows of this tensor in its own order of rotated pairs."""
    is_llama = gguf.metadata.get("general.architecture") == "llama"
    return is_llama and re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", name) is not None


def rows_in_order(rows: int, head_dim: int) -> np.ndarray:
    """For each row in Hugging Face's order (halves), its place in llama.cpp's (pairs)."""
    index = np.arange(rows).reshape(-1, head_dim // 2, 2)
    return index.swapaxes(1, 2).reshape(-1)
