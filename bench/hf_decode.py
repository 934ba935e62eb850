"""Decode in HF transformers on PyTorch, on the shapes and by the method of `bench.decode`.

    python -m bench.hf_decode --shape llama-3.2-1b --mode compile

`eager` grows a DynamicCache; `compile` is the static cache with the decode step, argmax included,
under `torch.compile` (CUDA graphs by its mode). The loop is a bare one: no token is read back and
no stopping rule is evaluated between steps, so it is never slower than `model.generate`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from bench import parts, shapes
from bench.parts import emit
from bench.record import Record
from bench.timing import LONG, REPEATS, SHORT, step_records

COMPILE_MODE = "reduce-overhead"


def build(name: str, device: str, dtype: torch.dtype, std: float = 0.02) -> LlamaForCausalLM:
    """A model of the named shape with random weights, made on the device."""
    config = LlamaConfig(**shapes.hf_config(name), initializer_range=std)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def generator(
    model: LlamaForCausalLM, mode: str, max_length: int, device: str
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(prompt [B, T], n) → the n greedy tokens after it, [B, n]. Prefill is always eager."""
    static = StaticCache(config=model.config, max_cache_len=max_length)

    def step(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    decode = torch.compile(step, mode=COMPILE_MODE, fullgraph=True) if mode == "compile" else step

    def generate(prompt: torch.Tensor, n: int) -> torch.Tensor:
        with torch.no_grad():
            if mode == "compile":
                static.reset()
            cache = static if mode == "compile" else DynamicCache(config=model.config)
            found = [step(prompt, cache)]
            for _ in range(n - 1):
                torch.compiler.cudagraph_mark_step_begin()
                # The graph's output buffer is overwritten by its next replay.
                found.append(decode(found[-1], cache).clone())
            return torch.cat(found, dim=1).cpu()  # waits for the device

    return generate


def measure(name: str, mode: str, batch: int, context: int, repeats: int) -> list[Record]:
    """Milliseconds per decode step, with the compile time in the detail."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts.check_platform(device)
    model = build(name, device, torch.bfloat16)
    generate = generator(model, mode, context + LONG, device)

    def prompt(seed: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, model.config.vocab_size, (batch, context), generator=random)
        return ids.to(device)

    def seconds(ids: torch.Tensor, n: int) -> float:
        began = time.perf_counter()
        generate(ids, n)
        return time.perf_counter() - began

    warm_s = seconds(prompt(0), 8)
    seconds(prompt(1), 8)
    pairs = [(seconds(prompt(i), SHORT), seconds(prompt(i), LONG)) for i in range(2, 2 + repeats)]
    detail = {
        "mode": mode if mode == "eager" else f"static cache, torch.compile {COMPILE_MODE}",
        "first_call_s": round(warm_s, 2),
        "median_short_s": statistics.median(short for short, _ in pairs),
    }
    return step_records(f"hf.{mode}", name, batch, context, pairs, detail)


def main() -> None:
    parser = argparse.ArgumentParser(description="decode in HF transformers")
    parser.add_argument("--shape", required=True, choices=shapes.HF_CONFIGS)
    parser.add_argument("--mode", choices=("eager", "compile"), default="compile")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    for found in measure(args.shape, args.mode, args.batch, args.context, args.repeats):
        emit(args.records, found)


if __name__ == "__main__":
    main()
