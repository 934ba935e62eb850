"""Makes the goldens of this directory with PyTorch and Hugging Face transformers, in float32.

Run where torch and transformers are installed (jaxinfer need not be):

    python tests/goldens/make_goldens.py [NAME ...]

Each `NAME/` is a tiny random model in Hugging Face's format, and `golden.safetensors`:

    prompt_lengths  int32 [N]
    tokens          int32 [N, M + 32]    each prompt, its 32 greedy tokens, then zeros
    logprobs        float32 [N, M + 31]  entry i: log p(token i+1 | tokens 0..i), then zeros
    logit_rows      int32 [R, 2]         (prompt, position)
    logits          float32 [R, V]       what follows those positions
    resid           float32 [L, T, E]    the residual stream after each layer, prompt RESID_PROMPT

Seeds are drawn until the greedy tokens are safe from rounding (`MARGIN`) and varied
(`MIN_DISTINCT`). `rope.json` holds
configs with the frequencies that transformers computes from them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).parent
LENGTHS = (1, 7, 29, 65, 90)  # a page is 64 tokens; windows are shorter than 29
RESID_PROMPT = 2
NEW_TOKENS = 32
MARGIN = 2e-3  # least distance of the two best logits on the greedy path, over max |logit|
MIN_DISTINCT = 12  # tokens in each greedy continuation
MAX_BYTES = 300_000

_SIZES = {
    "vocab_size": 139,
    "hidden_size": 48,
    "intermediate_size": 47,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA = _SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_MISTRAL = _SIZES | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
_QWEN2 = _SIZES | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = _SIZES | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 18}
_GEMMA = {k: v for k, v in _SIZES.items() if k != "hidden_act"} | {
    "head_dim": 20,
    "tie_word_embeddings": True,
}

# Each is a config.json as published ones are written: some in the style of transformers 4
# (rope_theta, rope_scaling), some in that of transformers 5 (rope_parameters).
MODELS: dict[str, dict[str, Any]] = {
    "llama-mha": _LLAMA | {"num_key_value_heads": None, "rms_norm_eps": 1e-5},
    "llama-gqa-llama3rope-tied": _LLAMA
    | {
        "hidden_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 48,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    "llama-mqa-bias": _LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama-linear-rope": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama-yarn": _LLAMA
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8,
            "beta_slow": 0.5,
            "mscale": 1.5,
            "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
    "mistral-window": _MISTRAL | {"num_key_value_heads": 3, "sliding_window": 13},
    "mistral-nowindow": _MISTRAL
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "sliding_window": None,
        "rope_theta": 1000000.0,
    },
    "qwen2": _QWEN2 | {"rope_theta": 1000000.0, "intermediate_size": 93},
    "qwen2-mixed-window": _QWEN2
    | {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 11,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen2-yarn": _QWEN2
    | {
        "max_position_embeddings": 32,
        "rope_theta": 1000000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3": _QWEN3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "qwen3-tied-bias": _QWEN3
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "qwen3-layer-types": _QWEN3
    | {
        "vocab_size": 97,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 17,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma": _GEMMA
    | {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "num_key_value_heads": 3,
    },
    "gemma2": _GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": False,
        "query_pre_attn_scalar": 12,
        "sliding_window": 13,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 15.0,
    },
    "gemma3": _GEMMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "query_pre_attn_scalar": 12,
        "sliding_window": 17,
        "sliding_window_pattern": 2,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}

_ROPE = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES: list[dict[str, Any]] = [
    {"head_dim": 128},
    {"head_dim": 18, "rope_theta": 500000.0},
    {"head_dim": 80, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    {
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    {"head_dim": 128, "rope_theta": 1000000.0, "rope_scaling": _YARN},
    {"head_dim": 128, "rope_theta": 1000000.0, "rope_scaling": _YARN | {"attention_factor": 1.25}},
    {
        "head_dim": 64,
        "rope_parameters": _YARN
        | {"rope_theta": 150000.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    },
    {"head_dim": 64, "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}},
    {"head_dim": 64, "rope_scaling": _YARN | {"mscale": 0.707}},
    {"head_dim": 64, "rope_scaling": {"type": "yarn", "factor": 2.0}},
]


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights large enough for attention and logits to be far from flat; no norm of one."""
    gemma = "gemma" in model.config.model_type
    middle = 0 if gemma else 1  # its norms scale by 1 + weight
    embed = 0.3 * (model.config.hidden_size**-0.5 if gemma else 1)  # which it undoes
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            noise = middle + 0.3 * noise
        elif name.endswith("bias"):
            noise = 0.25 * noise
        elif "embed_tokens" in name:
            noise = embed * noise  # small beside what the layers add, or tied models repeat tokens
        else:
            gain = 3.0 if "lm_head" in name else 1.5
            noise = gain * noise / p.shape[1] ** 0.5
        p.data.copy_(noise)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int] | None:
    """The prompt and its greedy tokens; None if logits come too close or tokens repeat."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        if best[0] - best[1] < MARGIN * logits.abs().max():
            return None
        tokens.append(int(logits.argmax()))
    return tokens if len(set(tokens[len(prompt) :])) >= MIN_DISTINCT else None


@torch.no_grad()
def residuals(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """float32 [L, T, E]: the output of each decoder layer."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out))
        for layer in model.model.layers
    ]
    model(torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def record(model: torch.nn.Module, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    """Runs each sequence alone, so that no padding takes part."""
    tokens = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int32)
    logprobs = torch.zeros(len(sequences), tokens.shape[1] - 1)
    rows, logits = [], []
    for i, (sequence, length) in enumerate(zip(sequences, LENGTHS, strict=True)):
        ids = torch.tensor(sequence)
        tokens[i, : len(ids)] = ids
        out = model(ids[None], use_cache=False).logits[0]
        scores = out.log_softmax(-1)[:-1]
        logprobs[i, : len(ids) - 1] = scores.gather(1, ids[1:, None])[:, 0]
        # A few positions keep the files small; `logprobs` covers the others.
        kept = sorted({*range(0, length, 8), *range(max(0, length - 3), length)})
        rows += [(i, position) for position in kept]
        logits.append(out[kept])
    return {
        "prompt_lengths": torch.tensor(LENGTHS, dtype=torch.int32),
        "tokens": tokens,
        "logprobs": logprobs,
        "logit_rows": torch.tensor(rows, dtype=torch.int32),
        "logits": torch.cat(logits),
        "resid": residuals(model, sequences[RESID_PROMPT][: LENGTHS[RESID_PROMPT]]),
    }


@torch.no_grad()
def float32_error(model: torch.nn.Module, golden: dict[str, torch.Tensor]) -> float:
    """How far the logits are from float64 ones, over max |logit|. Makes `model` float64."""
    model.double()
    ids = golden["tokens"].long()
    exact = torch.stack(
        [model(ids[i : i + 1, : t + 1]).logits[0, -1] for i, t in golden["logit_rows"].tolist()]
    )
    return float((exact - golden["logits"]).abs().max() / golden["logits"].abs().max())


def draw(config: Any) -> tuple[torch.nn.Module, list[list[int]]]:
    """A random model, and prompts with greedy tokens that `greedy` accepts."""
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        randomise(model, generator)
        sequences = []
        for length in LENGTHS:
            prompt = torch.randint(config.vocab_size, (length,), generator=generator)
            sequence = greedy(model, prompt.tolist())
            if sequence is None:
                break
            sequences.append(sequence)
        else:
            return model, sequences
    raise RuntimeError("no seed gives acceptable greedy tokens")


def make(name: str, config: dict[str, Any]) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model, sequences = draw(AutoConfig.from_pretrained(folder))
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    golden = record(model, sequences)
    save_file(golden, folder / "golden.safetensors")
    size = sum(f.stat().st_size for f in folder.iterdir())
    error = float32_error(model, golden)
    print(f"{name}: {size} bytes, float32 error {error:.1e}", flush=True)
    if size > MAX_BYTES:
        raise RuntimeError(f"{name} takes {size} bytes; the limit is {MAX_BYTES}")


def make_ropes() -> None:
    cases = []
    for case in ROPES:
        config = _ROPE | {"hidden_size": 2 * case["head_dim"], "model_type": "llama"} | case
        path = HERE / "rope"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        rope = LlamaRotaryEmbedding(AutoConfig.from_pretrained(path))
        shutil.rmtree(path)
        cases.append(
            {
                "config": config,
                "frequencies": rope.inv_freq.tolist(),
                "attention_factor": rope.attention_scaling,
            }
        )
    lines = ",\n".join(json.dumps(case) for case in cases)
    (HERE / "rope.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_ropes()
    for name in sys.argv[1:] or MODELS:
        make(name, MODELS[name])
