"""The requests that the batching benchmarks send: lengths, ids, arrivals. Pure, and without jax."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxinfer.types import SamplingParams

Prompt = list[int]


@dataclass(frozen=True)
class Scale:
    """How large the benchmarks are: as asked for, or small enough for a CPU in a test.

    Attributes:
        rows, max_model_len, page_size, kv_cache_bytes: options of the LLM that most of them share.
        few_rows, few_tokens: max_num_seqs and max_num_batched_tokens where latency counts.
        soak_rows, soak_cache_bytes: of the soak and of shared prefixes, few enough that sequences
            are preempted.
        requests: of the lognormal list; `shrink` divides its lengths.
        static_rows, static_requests: a batch of static batching, and the first requests so served.
        serve_seconds: how long requests arrive.
        prefix, suffix, prefix_requests, prefix_tokens: tokens that all prompts begin with, most
            tokens after them, prompts, and output tokens of each.
        prefix_control: of these prompts, those run without reuse as well.
        steady, sampled: batch and context of the decode steps.
        short, long: output tokens, between which the decode steps are timed.
        scored: sequences whose tokens are scored, and tokens of each.
        scoring_tokens: max_num_batched_tokens for it.
        soak_prompt, soak_tokens: mean prompt and output of the soak; `soak_longest` of either.
    """

    rows: int = 1024
    max_model_len: int = 2304
    page_size: int = 32
    kv_cache_bytes: int | None = None
    few_rows: int = 128
    few_tokens: int = 512
    soak_rows: int = 64
    soak_cache_bytes: int = 4_000_000_000
    requests: int = 1000
    shrink: int = 1
    static_rows: int = 32
    static_requests: int = 128
    serve_seconds: float = 30.0
    prefix: int = 2000
    suffix: int = 128
    prefix_requests: int = 200
    prefix_tokens: int = 32
    prefix_control: int = 64
    steady: tuple[int, int] = (64, 1024)
    sampled: tuple[int, int] = (64, 128)
    short: int = 33
    long: int = 289
    soak_prompt: int = 400
    soak_tokens: int = 400
    soak_longest: int = 1100
    scored: tuple[int, int] = (256, 2048)
    scoring_tokens: int = 8192


FULL = Scale()
TINY = Scale(
    rows=16, max_model_len=160, page_size=8, kv_cache_bytes=96 << 11, few_rows=16, few_tokens=64,
    soak_rows=16, soak_cache_bytes=96 << 11, requests=24, shrink=32,
    static_rows=4, static_requests=8, serve_seconds=0.5, prefix=60, suffix=8,
    prefix_requests=6, prefix_tokens=4, prefix_control=3, steady=(4, 32), sampled=(4, 16),
    short=9, long=41, soak_prompt=24, soak_tokens=16, soak_longest=64, scored=(8, 120),
    scoring_tokens=64,
)  # fmt: skip
# The demo model on a CPU: steps of some milliseconds.
DEMO = replace(
    TINY, max_model_len=512, page_size=32, soak_cache_bytes=32 << 20, scored=(8, 400),
    scoring_tokens=256, short=9, long=73, steady=(8, 128),
)  # fmt: skip


def scale_of(shape: str) -> Scale:
    """Of a shape of `bench.shapes`, or of `demo`."""
    return {"tiny": TINY, "demo": DEMO}.get(shape, FULL)


@dataclass(frozen=True)
class Workload:
    """Prompts, and the output tokens of each; every end-of-sequence token is ignored."""

    prompts: tuple[Prompt, ...]
    tokens: tuple[int, ...]

    @property
    def params(self) -> list[SamplingParams]:
        return [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in self.tokens]

    @property
    def output_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def first(self, n: int) -> Workload:
        """The first `n` requests."""
        return Workload(self.prompts[:n], self.tokens[:n])


def for_latency(scale: Scale) -> dict[str, int]:
    """Options of an LLM with few rows and short steps."""
    return {"max_num_seqs": scale.few_rows, "max_num_batched_tokens": scale.few_tokens}


def for_soak(scale: Scale) -> dict[str, int]:
    """Options of an LLM whose cache is full at once."""
    return {
        "max_num_seqs": scale.soak_rows,
        "max_num_batched_tokens": scale.few_tokens,
        "kv_cache_bytes": scale.soak_cache_bytes,
    }


def for_scoring(scale: Scale) -> dict[str, int]:
    """Options of an LLM with long steps and few rows, and room for other weights beside its own."""
    return {
        "max_num_seqs": scale.few_rows,
        "max_num_batched_tokens": scale.scoring_tokens,
        "kv_cache_bytes": 2 * scale.soak_cache_bytes,
    }


def lengths(n: int = 1000) -> tuple[list[int], list[int]]:
    """Prompt and output lengths of the first `n` of the 1000 requests, in order of arrival.

    Lognormal with means of 250 and 222 tokens and sigmas of 1.1 and 1.0, from 4 to 1024 each; the
    list that the engine we are compared with was measured on.
    """
    r = random.Random(7)

    def some(mean: float, s: float) -> list[int]:
        def one() -> int:
            return max(4, min(1024, round(r.lognormvariate(math.log(mean) - s * s / 2, s))))

        return [one() for _ in range(1000)]

    prompts, outputs = some(250, 1.1), some(222, 1.0)
    return prompts[:n], outputs[:n]


def lognormal(scale: Scale, vocab_size: int, seed: int) -> Workload:
    """The list of `lengths` with random ids of `seed`, so that no two runs share a prefix."""
    prompts, outputs = ([max(2, x // scale.shrink) for x in xs] for xs in lengths(scale.requests))
    return Workload(random_ids(seed, prompts, vocab_size), tuple(outputs))


def random_ids(seed: int, counts: Sequence[int], vocab_size: int) -> tuple[Prompt, ...]:
    """Prompts of uniformly random ids, `counts` of them long."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, sum(counts)).tolist()
    ends = np.cumsum(counts).tolist()
    return tuple(ids[end - n : end] for n, end in zip(counts, ends, strict=True))


def arrivals(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Times of a Poisson process of `rate` a second, until `seconds`."""
    r, now, found = random.Random(seed), 0.0, []
    while (now := now + r.expovariate(rate)) < seconds:
        found.append(now)
    return found


def gamma_arrivals(count: int, rate: float, burstiness: float, seed: int = 0) -> list[float]:
    """`count` times whose gaps are gamma-distributed with a mean of 1 / `rate` seconds and the
    shape `burstiness`, as in `vllm bench serve`: 1 is Poisson, less comes in bursts. An infinite
    rate: all at once.

    Raises:
        ValueError: a rate or burstiness that is not above 0.
    """
    if not (rate > 0 and burstiness > 0):
        raise ValueError(f"rate={rate}, burstiness={burstiness}: expected both above 0")
    r, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += 0.0 if math.isinf(rate) else r.gammavariate(burstiness, 1 / (rate * burstiness))
        found.append(now)
    return found


def shared_prefix(scale: Scale, vocab_size: int, seed: int) -> Workload:
    """Prompts that begin with the same tokens, and end with 1 to `scale.suffix` of their own."""
    n, rng = scale.prefix_requests, np.random.default_rng(seed)
    (prefix,) = random_ids(seed + 1, [scale.prefix], vocab_size)
    own = random_ids(seed + 2, rng.integers(1, scale.suffix + 1, n).tolist(), vocab_size)
    return Workload(tuple(prefix + ids for ids in own), (scale.prefix_tokens,) * n)


def longest_of_batches(tokens: Sequence[int], rows: int) -> int:
    """Decode steps of static batching: of each batch, as many as its longest output."""
    return sum(max(tokens[i : i + rows]) for i in range(0, len(tokens), rows))
