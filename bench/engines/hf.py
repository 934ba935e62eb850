"""HF transformers: eager with a cache that grows, or a static cache and a compiled decode step.

Both are the model's own forward in a bare loop; see `bench.engines.static_batches`. Prefill is
eager in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from bench.engines import Engine, Options
from bench.engines.static_batches import StaticBatches, allocated, sample, start

COMPILE_MODE = "reduce-overhead"  # CUDA graphs


def load_model(checkpoint: Path, options: Options, device: str, **how: Any) -> Any:
    """The checkpoint's model on the device, its weights read there."""
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, local_files_only=True, **how
    )
    return model.eval().to(device)


def random_model(config: dict[str, Any], device: str, dtype: Any, std: float = 0.02) -> Any:
    """A model of an HF config with random weights, made on the device."""
    made = AutoConfig.for_model(**config, initializer_range=std)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(made).eval()
    finally:
        torch.set_default_dtype(before)


def token_bytes(config: Any, dtype: str) -> int:
    """Of keys and values of one token, in a cache of `dtype`."""
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize


def load(checkpoint: Path, options: Options, *, static: bool) -> Engine:
    """`static`: with StaticCache and torch.compile; else eager with DynamicCache."""
    device = start(options)
    model = load_model(checkpoint, options, device, **options.extra)
    steps = _Steps(model, options, static=static)
    return StaticBatches(steps, options, device, allocated(device))


class _Steps:
    def __init__(self, model: Any, options: Options, *, static: bool) -> None:
        self.model, self.static = model, static
        self.token = token_bytes(model.config, options.dtype)
        self.cache: Any = None
        self.size: tuple[int, int] | None = None  # of the static cache: rows, tokens

        def step(tokens: Any, cache: Any) -> Any:
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return sample(out.logits[:, -1], options.temperature)

        self._step = step
        self._decode = step
        if static:
            self._decode = torch.compile(step, mode=COMPILE_MODE, fullgraph=True, dynamic=False)

    def prefill(self, ids: Any, length: int) -> Any:
        size = len(ids), length
        if not self.static:
            self.cache = DynamicCache(config=self.model.config)
        elif size == self.size:
            self.cache.reset()
        else:
            self.cache = StaticCache(config=self.model.config, max_cache_len=length)
            self.size = size
        return self._step(ids, self.cache)

    def step(self, tokens: Any) -> Any:
        return self._decode(tokens, self.cache)
