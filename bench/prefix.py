"""Prompts that share a long prefix: what reuse saves, and that it changes no bit.

    python -m bench.prefix --shape llama-3.1-8b

All prompts are given at once. Some of them run again with `prompt_logprobs`, for which a prompt is
computed whole, in the same LLM: the run without reuse, which is checked by `num_cached_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from bench import measuring, outcome, start, workloads
from bench.measuring import Measurement, Setup
from bench.record import Record

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

SEED = 400


def measure(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`prefix.8b.less_prefill`: prompt tokens over those computed. `prefix.8b.identical`."""
    scale = setup.scale
    load = workloads.shared_prefix(scale, llm.config.vocab_size, SEED)
    params = [replace(p, logprobs=0) for p in load.params]
    outputs = llm.generate(load.prompts, params)
    cached = sum(output.num_cached_tokens for output in outputs)
    detail = {
        **setup.detail,
        "prompt_tokens": load.input_tokens,
        "cached_tokens": cached,
        "prefix": scale.prefix,
        "requests": len(outputs),
    }
    ratio = load.input_tokens / (load.input_tokens - cached)
    yield Record(f"prefix.{setup.name}.less_prefill", ratio, "ratio", detail)

    n = scale.prefix_control
    control = llm.generate(load.prompts[-n:], [replace(p, prompt_logprobs=0) for p in params[-n:]])
    reused = sum(output.num_cached_tokens for output in control)
    if reused:
        raise RuntimeError(f"{reused} prompt tokens were not computed, in the run without reuse")
    with_reuse = sum(output.num_cached_tokens > 0 for output in outputs[-n:])
    pairs = list(zip(outputs[-n:], control, strict=True))
    same = [outcome.of(a) == outcome.of(b) for a, b in pairs]
    tokens = [outcome.of(a).tokens == outcome.of(b).tokens for a, b in pairs]
    detail = {
        "requests": n,
        "with_reuse": with_reuse,
        "equal_tokens": sum(tokens),
        "without_reuse": "the same LLM with prompt_logprobs: prompts are computed whole",
    }
    yield Record(f"prefix.{setup.name}.identical", sum(same) / n, "ratio", detail)


MEASUREMENTS = {"prefix": Measurement(measure, 90.0, (start.LOGPROBS,), workloads.for_soak)}


if __name__ == "__main__":
    measuring.main("bench.prefix", MEASUREMENTS)
