"""How much `bench.compare` asks for, and what it must know of a model. Plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench import timing


@dataclass(frozen=True)
class Sizes:
    """How much is asked; names as of `vllm bench`, where it has them.

    Attributes:
        batch_sizes, input_lens: of latency, every pair.
        output_lens: between which decode steps are timed: a short call and a long one.
        prefill_lens: prompt lengths.
        num_prompts: of throughput and serve.
        datasets: `lognormal`, `prefix_repetition`, or `random:INPUT:OUTPUT`.
        request_rates: a second, of serve.
        burstiness: of the gaps between requests; 1 is Poisson, less comes in bursts.
        goodput: limits in ms, by `ttft`, `tpot`, `e2el`.
        shrink: lengths of the lognormal list, and of the prefixes, are divided by it.
        case_seconds: an engine repeats a case no more often than fits in these, but once.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    input_lens: tuple[int, ...] = (128, 1024, 8192, 32768)
    output_lens: tuple[int, int] = (timing.SHORT, timing.LONG)
    prefill_lens: tuple[int, ...] = (1024, 4096, 32768)
    num_prompts: int = 1000
    datasets: tuple[str, ...] = (
        "lognormal", "random:1024:1024", "random:128:128", "random:2048:128", "prefix_repetition",
    )  # fmt: skip
    request_rates: tuple[float, ...] = (16.0,)
    burstiness: tuple[float, ...] = (1.0, 0.25)
    goodput: Mapping[str, float] = field(default_factory=lambda: {"ttft": 250.0, "tpot": 40.0})
    shrink: int = 1
    case_seconds: float = math.inf


FULL = Sizes()
# What each of these costs, in seconds, is in docs/comparison.md.
SHORT = Sizes(
    batch_sizes=(1, 64), input_lens=(1024,), output_lens=(33, 161), prefill_lens=(4096,),
    num_prompts=64, datasets=("lognormal",), burstiness=(1.0,), case_seconds=30.0,
)  # fmt: skip
SMOKE = Sizes(
    batch_sizes=(1, 2), input_lens=(16,), output_lens=(3, 35), prefill_lens=(32,), num_prompts=6,
    datasets=("lognormal", "random:8:4"), request_rates=(40.0,), burstiness=(1.0, 0.25), shrink=32,
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What cases must know of a checkpoint: its HF config, bytes of a weight of its layers, and of
    any other number."""

    config: Mapping[str, Any]
    weight_bytes: float = 2.0
    width: int = 2

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]
