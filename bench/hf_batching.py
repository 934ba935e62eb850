"""HF transformers' continuous batching on PyTorch, on the first requests of `bench.throughput`.

    python -m bench.hf_batching --shape llama-3.1-8b --requests 128

The paged cache with torch's own attention (`sdpa`): no flash-attn, and nothing from the Hub.
Greedy, no end-of-sequence token, each request with its own number of tokens; the manager is warmed
up with other requests. Sizes (pages, tokens a batch) are those that transformers chooses itself, in
half of the memory: these requests need a quarter of that.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from transformers import GenerationConfig

from bench import hf_decode, parts, shapes, workloads
from bench.parts import emit
from bench.record import Record
from bench.workloads import Workload

ATTENTION = "paged|sdpa"  # said in full, or it looks for flash-attn
SEED = 700
# By itself it takes nine tenths of the memory for the cache, and then fails in a matrix product.
DEFAULT = {"max_memory_percent": 0.5}
WARM_UP = 16  # requests
TAIL = 4000


def run(manager: Any, load: Workload, latest: float) -> float:
    """Seconds from the first request's submission to the last one's end.

    Raises:
        RuntimeError: a request failed, or ended with other than its tokens, or too late.
    """
    began = time.perf_counter()
    wanted = {}
    for prompt, tokens in zip(load.prompts, load.tokens, strict=True):
        name = manager.add_request(prompt, max_new_tokens=tokens, eos_token_id=-1)
        wanted[name] = tokens
    got: dict[str, int] = {}
    while len(got) < len(wanted):
        result = manager.get_result(timeout=1)
        if time.monotonic() > latest:
            raise RuntimeError(f"out of time with {len(got)} of {len(wanted)} requests")
        if result is None:
            if not manager.is_running():
                raise RuntimeError(f"the manager ended after {len(got)} of {len(wanted)} requests")
        elif result.error is not None:
            raise RuntimeError(f"{result.request_id}: {result.error}")
        elif result.is_finished():
            got[result.request_id] = len(result.generated_tokens)
    took = time.perf_counter() - began
    if got != wanted:
        raise RuntimeError(f"other numbers of tokens: {sum(got.values())}, {sum(wanted.values())}")
    return took


def measure(shape: str, requests: int, seconds: float, config: dict[str, Any]) -> Record:
    """`throughput.8b.hf_continuous.out_tok_s`."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    latest = time.monotonic() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts.check_platform(device)
    model: Any = hf_decode.build(shape, device, torch.bfloat16)
    model.set_attn_implementation(ATTENTION)
    scale, vocab_size = workloads.scale_of(shape), model.config.vocab_size
    other, load = (
        workloads.lognormal(scale, vocab_size, seed).first(n)
        for seed, n in ((SEED, WARM_UP), (SEED + 1, requests))
    )
    generation = GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(load.tokens)
    )
    with model.continuous_batching_context_manager(
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(**config),
        block=True,
        timeout=5,
    ) as manager:
        try:
            warm_s = run(manager, other, latest)
            took = run(manager, load, latest)
        except RuntimeError:
            manager.stop(block=False, hard_stop=True)  # else it goes on to the last request
            raise
        used = getattr(manager, "continuous_batching_config", None)
        chosen = {
            name: getattr(used, name, None)
            for name in ("block_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch")
        }
    detail = {
        "requests": requests,
        "input_tokens": load.input_tokens,
        "output_tokens": load.output_tokens,
        "wall_s": took,
        "warm_up_s": warm_s,
        "attention": ATTENTION,
        "chosen": chosen,
        "config": str(used),
    }
    name = f"throughput.{shapes.short(shape)}.hf_continuous.out_tok_s"
    return Record(name, load.output_tokens / took, "tok/s", detail)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="HF transformers' continuous batching")
    parser.add_argument("--shape", choices=shapes.HF_CONFIGS, default="llama-3.1-8b")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=180.0, help="for all of it")
    parser.add_argument(
        "--config", type=json.loads, default=DEFAULT, help="ContinuousBatchingConfig"
    )
    parser.add_argument("--records", type=Path)
    args = parser.parse_args(argv)
    try:
        emit(args.records, measure(args.shape, args.requests, args.seconds, args.config))
    except Exception as error:
        text = traceback.format_exc()
        print(text, flush=True)
        name = f"throughput.{shapes.short(args.shape)}.hf_continuous.failed"
        told = {"output_tail": text[-TAIL:]}
        emit(args.records, Record(name, None, "", told, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
