"""Model families as data: Hugging Face's `config.json` in, `ModelConfig` out.

Every field of a config is used, known not to change what is computed, or refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.models.fields import flag, integer, number, read_max_position, read_rope, size
from jaxinfer.types import MODEL_STOP_IDS


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        model_type: Hugging Face's short name.
        defaults: the fields that decide what is computed, each with the value that Hugging Face
            takes where a config leaves it out. Other fields are refused (see `parse_config`).
        fixed: fields of `ModelConfig` that no config of this family can change.
        scaled: embeddings are multiplied by the square root of the hidden size.
    """

    model_type: str
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = False


_COMMON = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GEMMA = _COMMON | {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": None,
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_PLUS_ONE = {"activation": "gelu_tanh", "norm_plus_one": True}
_POST_NORMS = _PLUS_ONE | {"post_norms": True}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _COMMON | {"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": Family(
        "mistral",
        _COMMON
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "Qwen2ForCausalLM": Family("qwen2", _QWEN, {"qkv_bias": True}),
    "Qwen3ForCausalLM": Family(
        "qwen3", _QWEN | {"head_dim": 128, "attention_bias": False}, {"qk_norm": True}
    ),
    "GemmaForCausalLM": Family("gemma", _GEMMA, _PLUS_ONE, scaled=True),
    "Gemma2ForCausalLM": Family("gemma2", _GEMMA2, _POST_NORMS, scaled=True),
    "Gemma3ForCausalLM": Family(
        "gemma3_text", _GEMMA3, _POST_NORMS | {"qk_norm": True}, scaled=True
    ),
}

# Fields that change nothing in what the model computes: training, bookkeeping, defaults of Hugging
# Face's own generation loop (here `SamplingParams` alone decide), and how the weights are stored
# (`checkpoints.formats`, `checkpoints.model_store`).
# fmt: off
_HARMLESS = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "_sliding_window_pattern", "architectures",
    "attention_dropout",
    "bos_token", "cache_implementation", "do_sample", "dtype", "eos_token", "finetuning_task",
    "id2label",
    "initializer_range", "is_decoder", "is_llama_config", "jaxinfer", "label2id", "max_length",
    "max_sequence_length", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "quantization_config", "return_dict", "task_specific_params",
    "temperature", "tokenizer_class", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
})
# fmt: on

# Fields that are harmless at these values, in families that do not use them otherwise.
_ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_bias": (False,),
    "chunk_size_feed_forward": (0, None),
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False, None),
    "layer_types": (None,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
}


def read_config(directory: str | Path) -> ModelConfig:
    """Reads `config.json`, and `generation_config.json` where there is one.

    The end-of-sequence tokens of `generation_config.json` replace those of `config.json`, as in
    Hugging Face's `generate`; its other fields are sampling defaults, which are the caller's.

    Raises:
        CheckpointError: `config.json` is missing, or either file is not a JSON object.
        UnsupportedModel: as `parse_config`.
    """
    directory = Path(directory)
    hf = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = _read_json(generation).get("eos_token_id")
        hf = hf | ({} if eos is None else {"eos_token_id": eos})
    return parse_config(hf)


def parse_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Translates the contents of a `config.json`.

    Fields that are absent take Hugging Face's defaults for the family.

    Raises:
        UnsupportedModel: an architecture that is not in `FAMILIES`, a field that is not known, or
            a value that is not computed; the message names field and value.
    """
    name, family = _family(hf)
    _refuse_unknown(hf, name, family)
    c = dict(family.defaults) | dict(hf)
    heads = size(c, "num_attention_heads")
    _check_activation(c)
    layers = _layers(c)
    config = ModelConfig(
        family=name,
        vocab_size=size(c, "vocab_size"),
        hidden_size=size(c, "hidden_size"),
        intermediate_size=size(c, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=heads if c["num_key_value_heads"] is None else size(c, "num_key_value_heads"),
        head_dim=_head_dim(c),
        layers=layers,
        max_position=_max_position(c),
        norm_eps=number(c, "rms_norm_eps", above=0),
        qkv_bias=flag(c, "attention_bias"),
        o_bias=flag(c, "attention_bias"),
        mlp_bias=flag(c, "mlp_bias"),
        embed_scale=size(c, "hidden_size") ** 0.5 if family.scaled else 1.0,
        attention_scale=_attention_scale(c),
        attention_softcap=_optional(c, "attn_logit_softcapping"),
        logit_softcap=_optional(c, "final_logit_softcapping"),
        tie_embeddings=flag(c, "tie_word_embeddings"),
        bos_token_id=_bos(c),
        eos_token_ids=_eos(c),
    )
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedModel(
            f"config.json: num_attention_heads {config.num_heads} is not a multiple of "
            f"num_key_value_heads {config.num_kv_heads}"
        )
    return dataclasses.replace(config, **family.fixed)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model directory must have one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a JSON {type(contents).__name__}, not an object")
    return contents


def _family(hf: Mapping[str, Any]) -> tuple[str, Family]:
    names = hf.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModel(
            f"config.json: architectures = {names!r} is not supported; these are: "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    model_type = hf.get("model_type", family.model_type)
    if model_type != family.model_type:
        raise UnsupportedModel(
            f"config.json: model_type = {model_type!r} contradicts the architecture {name}, whose "
            f"model_type is {family.model_type!r}"
        )
    return name, family


def _refuse_unknown(hf: Mapping[str, Any], name: str, family: Family) -> None:
    faults = []
    for key, value in hf.items():
        if key in family.defaults or key in _HARMLESS or key == "model_type":
            continue
        if key not in _ONLY:
            faults.append(f"{key} = {value!r} (unknown field)")
        elif value not in _ONLY[key]:
            accepted = " or ".join(repr(v) for v in _ONLY[key])
            faults.append(f"{key} = {value!r} (accepted: {accepted})")
    if faults:
        raise UnsupportedModel(
            f"config.json: jaxinfer does not compute these fields of a {name}: {'; '.join(faults)}"
        )


def _head_dim(c: Mapping[str, Any]) -> int:
    if c["head_dim"] is not None:
        head_dim = size(c, "head_dim")
    else:
        hidden_size, heads = size(c, "hidden_size"), size(c, "num_attention_heads")
        head_dim, rest = divmod(hidden_size, heads)
        if rest:
            raise UnsupportedModel(
                f"config.json: hidden_size {hidden_size} is not a multiple of "
                f"num_attention_heads {heads}, and there is no head_dim"
            )
    if head_dim % 2:
        raise UnsupportedModel(f"config.json: head_dim = {head_dim} must be even")
    return head_dim


def _check_activation(c: Mapping[str, Any]) -> None:
    """Of the families that say it in two fields, of which one wins."""
    if "hidden_activation" not in c:
        return  # `_ONLY` has it
    key = "hidden_act" if c["hidden_activation"] is None else "hidden_activation"
    if c[key] != "gelu_pytorch_tanh":
        raise UnsupportedModel(f"config.json: {key} = {c[key]!r} (accepted: 'gelu_pytorch_tanh')")


def _optional(c: Mapping[str, Any], key: str) -> float | None:
    return None if c.get(key) is None else number(c, key, above=0)


def _attention_scale(c: Mapping[str, Any]) -> float | None:
    value = _optional(c, "query_pre_attn_scalar")
    return None if value is None else value**-0.5


def _layers(c: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    """Windows and positions: some families turn the keys of windowed layers otherwise."""
    windows = _windows(c)
    if "rope_local_base_freq" not in c:
        rope = read_rope(c)
        return tuple(LayerConfig(window, rope) for window in windows)
    whole, local = (read_rope(of) for of in _two_ropes(c))
    return tuple(LayerConfig(w, whole if w is None else local) for w in windows)


def _two_ropes(c: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config as one of full layers, and as one of windowed ones."""
    both = c["rope_parameters"]
    if both is not None and not (
        isinstance(both, dict) and set(both) <= {"full_attention", "sliding_attention"}
    ):
        raise UnsupportedModel(
            f"config.json: rope_parameters = {both!r} must have full_attention and"
            " sliding_attention"
        )
    both = both or {}
    local = {"rope_scaling": None, "rope_theta": c["rope_local_base_freq"]}
    return (
        {**c, "rope_parameters": both.get("full_attention")},
        {**c, **local, "rope_parameters": both.get("sliding_attention")},
    )


def _max_position(c: Mapping[str, Any]) -> int:
    if "rope_local_base_freq" in c:  # stated as it is after stretching
        return size(c, "max_position_embeddings")
    return read_max_position(c, read_rope(c))


def _windows(c: Mapping[str, Any]) -> list[int | None]:
    """The sliding window of each layer; None for full attention."""
    num_layers = size(c, "num_hidden_layers")
    sliding = "use_sliding_window" not in c or flag(c, "use_sliding_window")
    window = None
    if sliding and c.get("sliding_window") is not None:
        window = size(c, "sliding_window")
    types = c.get("layer_types")
    if types is None and "sliding_window_pattern" in c:  # every so manyth layer is full
        every = size(c, "sliding_window_pattern")
        return [window if (i + 1) % every else None for i in range(num_layers)]
    if types is None:
        first = integer(c, "max_window_layers", at_least=0) if "max_window_layers" in c else 0
        return [window if i >= first else None for i in range(num_layers)]
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != num_layers or set(map(str, types)) - set(known):
        raise UnsupportedModel(
            f"config.json: layer_types = {types!r} must name {num_layers} layers, each "
            f"{' or '.join(known)}"
        )
    if window is None and "sliding_attention" in types:
        raise UnsupportedModel(
            "config.json: layer_types has sliding_attention, but use_sliding_window is false or "
            "sliding_window is null"
        )
    return [known[t] for t in types]


def _bos(c: Mapping[str, Any]) -> int | None:
    return None if c["bos_token_id"] is None else integer(c, "bos_token_id", at_least=0)


def _eos(c: Mapping[str, Any]) -> tuple[int, ...]:
    ids = c["eos_token_id"]
    if ids is None:
        return ()
    listed = ids if isinstance(ids, list) else [ids]
    if len(listed) > MODEL_STOP_IDS:
        raise UnsupportedModel(
            f"config.json: eos_token_id = {ids}: at most {MODEL_STOP_IDS} are supported"
        )
    return tuple(integer({"eos_token_id": i}, "eos_token_id", at_least=0) for i in listed)
