"""Everything that an engine may need to run, compiled before it serves; and checked.

Which programs there are follows from the buckets and from the kinds of sampling that are wanted.
Each is then run once on a probe: a few tokens whose keys and values, and the token after them, must
come out with the same bits from every program, which is what `invariant` promises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np

from jaxinfer import batcher
from jaxinfer.buckets import Buckets
from jaxinfer.config import BatcherConfig
from jaxinfer.pages import pages_for
from jaxinfer.plans import Kind, together, top_bucket
from jaxinfer.runner import StepKey
from jaxinfer.types import SamplingParams

PROBE_TOKENS = 12  # with one more, no more than the smallest program takes
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9)


class WarmUp(NamedTuple):
    """What a warm-up did.

    Attributes:
        programs: compiled, by this call.
        seconds: that it took.
        step_bytes: temporary device memory of the hungriest program; 0 if the backend does not say.
        unequal: programs in which the probe's bits were not those of the others; none if all is
            well, or without `invariant`.
    """

    programs: int
    seconds: float
    step_bytes: int
    unequal: tuple[StepKey, ...]


def variants(params: Iterable[SamplingParams]) -> tuple[Kind, ...]:
    """The kinds of sampling that steps of such requests, in any company, may need."""
    kinds = {Kind.of(p) for p in params}
    subsets = chain.from_iterable(combinations(kinds, n) for n in range(1, len(kinds) + 1))
    return tuple(sorted({together(some) for some in subsets}, key=_size))


def covering(kinds: Sequence[Kind], wanted: Kind) -> Kind:
    """The first of `kinds` whose programs can do all that `wanted` needs; itself if none can."""
    return next((kind for kind in kinds if together((kind, wanted)) == kind), wanted)


def step_keys(
    params: Sequence[SamplingParams],
    *,
    limits: BatcherConfig,
    buckets: Buckets,
    invariant: bool,
) -> list[StepKey]:
    """Every program that requests with such parameters may need."""
    scores = {None} | {top_bucket(p.prompt_logprobs) for p in params}
    decode = [(rows, 0, steps, None) for rows in buckets.rows for steps in {1, limits.max_steps}]
    mixed = [
        (rows, tokens, 1, score)
        for score in scores
        for tokens in buckets.tokens
        for rows in buckets.mixed_rows(tokens)
    ]
    return [
        StepKey(
            rows=rows, tokens=tokens, chunks=limits.max_chunks if tokens else 0, pages=pages,
            page_size=limits.page_size, steps=steps, invariant=invariant, random=kind.random,
            truncated=kind.truncated, top=kind.top, score=score,
        )
        for kind in variants(params)
        for pages in buckets.pages
        for rows, tokens, steps, score in (*mixed, *decode)
    ]  # fmt: skip


def probe(limits: BatcherConfig, vocab_size: int) -> np.ndarray:
    """A short prompt, int32; a token of output fits behind it."""
    count = min(PROBE_TOKENS, limits.max_model_len - 2, limits.max_num_batched_tokens - 1)
    return (np.arange(count, dtype=np.int32) * 7 + 3) % vocab_size


def probe_pages(limits: BatcherConfig) -> np.ndarray:
    """The pages that it is read into, by an engine that runs nothing."""
    return np.arange(1, 1 + pages_for(PROBE_TOKENS + 2, limits.page_size), dtype=np.int32)


def probing(count: int, limits: BatcherConfig, *, read: bool) -> batcher.Run:
    """Reads `count` tokens into row 0 and samples the next; or decodes one more of them."""
    M, W = limits.max_num_seqs, pages_for(limits.max_steps, limits.page_size) + 1
    longest = limits.max_model_len
    chunk = batcher.Prefill(0, 0, 0, count, True, True, longest, probe_pages(limits))
    row = np.arange(0 if read else 1)
    return batcher.Run(
        steps=1, rows=row, ids=row, tokens=count + 1, columns=np.zeros(M, np.int32),
        pages=np.zeros((M, W), np.int32), chunks=(chunk,) if read else (),
        released=np.full(M, read),
    )  # fmt: skip


def _size(kind: Kind) -> tuple[int, int, int]:
    return int(kind.random), int(kind.truncated), -1 if kind.top is None else kind.top
