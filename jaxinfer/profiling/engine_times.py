"""How long the engine takes, seen from outside: through `LLM.generate`, on random tokens."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxinfer.types import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

REPEATS = 3
SHORT = 9  # output tokens of the shorter of two calls
LEAST_CONTEXT = 32


class Window(NamedTuple):
    """Two calls whose difference is decode steps alone: a prompt, and the output tokens of each.

    `context`: tokens that a sequence holds in the mean over those steps.
    """

    prompt: int
    short: int
    long: int

    @property
    def context(self) -> int:
        return self.prompt + (self.short + self.long) // 2


def window(context: int) -> Window:
    """At the end of sequences of `context` tokens, at least `LEAST_CONTEXT`."""
    long = SHORT + 8 * max(1, min(16, context // 32))
    return Window(context - long, SHORT, long)


def decode_seconds(llm: LLM, batch: int, at: Window) -> float:
    """Of a decode step of `batch` sequences: the median over repeats, each on new prompts.

    Args:
        llm: idle, without a prefix cache: both calls of a pair read their prompts, so that this
            cancels.
    """

    def seconds(seed: int, tokens: int) -> float:
        return _seconds(llm, _prompts(llm, seed, batch, at.prompt), tokens)

    seconds(0, at.long)  # compiles
    pairs = [(seconds(i, at.short), seconds(i, at.long)) for i in range(1, 1 + REPEATS)]
    return statistics.median((long - short) / (at.long - at.short) for short, long in pairs)


def prompt_seconds(llm: LLM, tokens: int) -> float:
    """To the first token after a prompt that meets no queue: the median over repeats."""
    _seconds(llm, _prompts(llm, 0, 1, tokens), 1)
    return statistics.median(
        _seconds(llm, _prompts(llm, i, 1, tokens), 1) for i in range(1, 1 + REPEATS)
    )


def _prompts(llm: LLM, seed: int, count: int, tokens: int) -> list[list[int]]:
    ids = np.random.default_rng(seed).integers(0, llm.config.vocab_size, (count, tokens))
    return ids.tolist()


def _seconds(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - began
