"""The strongest simple baseline: a decoder in plain PyTorch, compiled, in the manner of gpt-fast.

Static keys and values, one decode step under `torch.compile(mode="reduce-overhead",
fullgraph=True)` (CUDA graphs), a prefill compiled layer by layer, fused matrices for q, k, v and
for gate and up. Decode attention is grouped: keys and values are read once for all heads that share
them. Llama, Mistral and Qwen3 as far as they are plain; anything else is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from torch import nn  # pyright: ignore[reportMissingImports]

from bench.engines import Engine, Options
from bench.engines.static_batches import StaticBatches, allocated, sample, start

FAMILIES = ("llama", "mistral", "qwen3")
STRANGE = ("attention_bias", "mlp_bias", "sliding_window", "quantization_config")
Tensor = Any
Part = Callable[..., Any]


class Config(NamedTuple):
    """Of the decoder: sizes by their usual letters, and the rotations a position, [D/2]."""

    L: int
    H: int
    K: int
    D: int
    eps: float
    rotations: Tensor


class At(NamedTuple):
    """Positions, int64 [T], and cosine and sine of their rotations, float32 [T, D/2]."""

    positions: Tensor
    cos: Tensor
    sin: Tensor


def read_config(hf: dict[str, Any]) -> Config:
    """Raises ValueError for what is not computed here."""
    odd = [name for name in STRANGE if hf.get(name)]
    if hf["model_type"] not in FAMILIES or odd:
        raise ValueError(f"{hf['model_type']} with {odd}: expected one of {FAMILIES}, and plain")
    heads = hf["num_attention_heads"]
    width = hf.get("head_dim") or hf["hidden_size"] // heads
    kv_heads = hf.get("num_key_value_heads", heads)
    rope = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {})}
    return Config(
        hf["num_hidden_layers"], heads, kv_heads, width, hf["rms_norm_eps"],
        _rotations(rope | (hf.get("rope_parameters") or {}), width),
    )  # fmt: skip


def _rotations(rope: dict[str, Any], width: int) -> Tensor:
    """Angle a position of each pair; llama3's rule stretches those that turn slowly."""
    angles = rope["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return angles
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r}: expected default or llama3")
    turns = rope["original_max_position_embeddings"] * angles / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return angles * (kept + (1 - kept) / rope["factor"])


def read_weights(checkpoint: Path, layers: int, device: str, dtype: Any) -> nn.Module:
    """Every tensor on the device, as buffers, whose places a CUDA graph may rely on; matrices with
    the same input are one."""
    found: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found |= {k: v.to(dtype) for k, v in load_file(path, device=device).items()}

    def fused(prefix: str, *names: str) -> Tensor:
        return torch.cat([found.pop(f"{prefix}.{name}_proj.weight") for name in names])

    made = []
    for i in range(layers):
        at = f"model.layers.{i}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        made.append(_holder({
            "qkv": fused(attention, "q", "k", "v"),
            "out": found.pop(f"{attention}.o_proj.weight"),
            "up": fused(mlp, "gate", "up"),
            "down": found.pop(f"{mlp}.down_proj.weight"),
            "norm": found.pop(f"{at}.input_layernorm.weight"),
            "mlp_norm": found.pop(f"{at}.post_attention_layernorm.weight"),
            "q_norm": found.pop(f"{attention}.q_norm.weight", None),
            "k_norm": found.pop(f"{attention}.k_norm.weight", None),
            "keys": None,
            "values": None,
        }))  # fmt: skip
    embed = found["model.embed_tokens.weight"]
    head = found.get("lm_head.weight", embed)
    position = torch.zeros(1, device=device, dtype=torch.int64)
    model = _holder(
        {"embed": embed, "head": head, "norm": found["model.norm.weight"], "position": position}
    )
    model.layers = nn.ModuleList(made)
    return model


def _holder(tensors: dict[str, Tensor | None]) -> nn.Module:
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_buffer(name, tensor)
    return made


def begin(c: Config, model: Any, ids: Tensor) -> tuple[Tensor, At]:
    """Embeddings [B, T, E] of `ids` [B, T], and where they are: from `model.position` on."""
    positions = model.position + torch.arange(ids.shape[1], device=ids.device)
    angles = positions[:, None].float() * c.rotations
    return F.embedding(ids, model.embed), At(positions, angles.cos(), angles.sin())


def layer(c: Config, w: Any, x: Tensor, keys: Tensor, values: Tensor, at: At) -> Tensor:
    """Of x [B, T, E]. One token each is decode; more are a prompt, from position 0 on. Writes
    `keys` and `values`, [B, K, S, D]; a prompt reads nothing from them."""
    B, T, _ = x.shape
    h = _norm(x, w.norm, c.eps)
    q, k, v = F.linear(h, w.qkv).split([c.H * c.D, c.K * c.D, c.K * c.D], -1)
    q, k, v = (t.view(B, T, -1, c.D) for t in (q, k, v))
    if w.q_norm is not None:
        q, k = _norm(q, w.q_norm, c.eps), _norm(k, w.k_norm, c.eps)
    q, k = _rotate(q, at).transpose(1, 2), _rotate(k, at).transpose(1, 2)
    v = v.transpose(1, 2)
    keys.index_copy_(2, at.positions, k)
    values.index_copy_(2, at.positions, v)
    if T == 1:
        y = _grouped(q.reshape(B, c.K, c.H // c.K, c.D), keys, values, at.positions)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2)
    x = x + F.linear(y.reshape(B, T, c.H * c.D), w.out)
    gate, up = F.linear(_norm(x, w.mlp_norm, c.eps), w.up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w.down)


def end(c: Config, model: Any, x: Tensor, temperature: float) -> Tensor:
    """Tokens [B, 1] after the last of x [B, T, E]. Moves `position`, int64 [1], to the next one."""
    model.position.add_(x.shape[1])
    return sample(F.linear(_norm(x[:, -1], model.norm, c.eps), model.head), temperature)


def forward(model: Any, ids: Tensor, start: Part, middle: Part, finish: Part) -> Tensor:
    """The tokens [B, 1] after `ids` [B, T], by `begin`, `layer` and `end`, compiled or not."""
    x, at = start(ids)
    for w in model.layers:
        x = middle(w, x, w.keys, w.values, at)
    return finish(x)


def _grouped(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Of one query each, [B, K, G, D], over positions up to its own."""
    scores = (q @ keys.mT).float() / math.sqrt(q.shape[-1])
    ahead = torch.arange(keys.shape[2], device=q.device) > position
    return torch.softmax(scores.masked_fill(ahead, -math.inf), -1).to(q.dtype) @ values


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


def _rotate(x: Tensor, at: At) -> Tensor:
    """Of [B, T, heads, D]: the first half of D turns with the second."""
    cos, sin = at.cos[:, None, :], at.sin[:, None, :]
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def load(checkpoint: Path, options: Options) -> Engine:
    """The checkpoint in this decoder."""
    device = start(options)
    hf = json.loads((checkpoint / "config.json").read_text())
    config = read_config(hf)
    config = config._replace(rotations=config.rotations.to(device))
    model = read_weights(checkpoint, config.L, device, getattr(torch, options.dtype))
    steps = _Steps(config, model, options.temperature)
    return StaticBatches(steps, options, device, allocated(device))


class _Steps:
    def __init__(self, c: Config, model: nn.Module, temperature: float) -> None:
        self.c, self.model = c, model
        self.token = 2 * c.L * c.K * c.D * model.embed.itemsize
        self.size: tuple[int, int] | None = None  # of the cache: rows, tokens

        def start(ids: Tensor) -> tuple[Tensor, At]:
            return begin(c, model, ids)

        def middle(w: Any, x: Tensor, keys: Tensor, values: Tensor, at: At) -> Tensor:
            return layer(c, w, x, keys, values, at)

        def finish(x: Tensor) -> Tensor:
            return end(c, model, x, temperature)

        def step(tokens: Tensor) -> Tensor:
            return forward(model, tokens, start, middle, finish)

        # A prompt is long enough to hide its launches: no graphs. Its layers share one program,
        # for any length of prompt and cache. Whole, 16 layers took ten times as long to compile,
        # and again for each cache: shapes of a module's buffers are constants to the compiler.
        self._prompt = [
            torch.compile(part, dynamic=True, fullgraph=True) for part in (start, middle, finish)
        ]
        self._decode = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def prefill(self, ids: Tensor, length: int) -> Tensor:
        if self.size != (len(ids), length):
            self.size = len(ids), length
            shape = len(ids), self.c.K, length, self.c.D
            for w in self.model.layers:
                w.keys, w.values = None, None  # the old ones make room first
                w.keys, w.values = (self.model.embed.new_zeros(shape) for _ in range(2))
        self.model.position.zero_()
        return forward(self.model, ids, *self._prompt)

    def step(self, tokens: Tensor) -> Tensor:
        return self._decode(tokens)
