"""The shapes that steps are compiled in: few, but such that padding costs little.

On a GPU a step of up to 64 rows takes as long as one of 8: it reads the weights. Above some 256
tokens its time grows with them, so that buckets lie closer there. On a CPU, where attention is
computed over all columns of the page table, each size is a few times the one before: there it is
compiling that takes time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.config import BatcherConfig, Policy
from jaxinfer.pages import pages_for

GPU_ROWS = (8, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792)
GPU_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288)
# Rows that decode beside chunks: few, or as many as there are tokens.
GPU_FEW, CPU_FEW = (64,), (8,)
# `makespan` fills nearly every step up to a size, and reads a prompt or two in it: so sizes lie
# close, and logits, of rows that decode and of chunks, are worth more sizes than the few prompts.
MAKESPAN_TOKENS = (128, *range(256, 768, 64), 1024, *GPU_TOKENS[8:])
MAKESPAN_FEW = (192, 384, 512, 640, 768)
MOST_CHUNKS, MAKESPAN_CHUNKS = 32, 8
CPU_CHUNKS = 4  # each costs as much as the longest
GPU_SHORT = 8192  # tokens: page tables of sequences up to here are looked at as one size
# Rows that guess: the step is of some tokens for each. With more, computing them takes longer.
GPU_GUESSING, CPU_GUESSING, MOST_GUESSING = (1, 8, 32), (8,), 64
MULTIPLE = 64  # of tokens, in steps that are larger


@dataclass(frozen=True)
class Buckets:
    """Sizes, ascending; the last of each holds the most that is ever needed.

    Attributes:
        rows: of steps that only decode.
        tokens: of steps with chunks of prompts, in all.
        pages: columns of the page table.
        few: rows; see `mixed_rows`.
        guessing: rows of steps that guess tokens; with more rows, none does.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    few: tuple[int, ...]
    guessing: tuple[int, ...]

    def mixed_rows(self, tokens: int) -> tuple[int, ...]:
        """Rows that decode in a step of so many tokens: few, or as many as can be."""
        return _up_to(self.few, min(tokens, self.rows[-1]))


def make_buckets(limits: BatcherConfig, *, gpu: bool) -> Buckets:
    """The buckets of an engine with these limits."""
    rows, pages = limits.max_num_seqs, pages_for(limits.max_model_len, limits.page_size)
    fours = [4**i for i in range(16)]
    eights = [8**i for i in range(1, 8)]
    makespan = limits.policy == "makespan"
    tokens = (MAKESPAN_TOKENS if makespan else GPU_TOKENS) if gpu else fours[2:]
    few = MAKESPAN_FEW if makespan else GPU_FEW
    budget = limits.max_num_batched_tokens
    largest = budget if budget <= MULTIPLE else pages_for(budget, MULTIPLE) * MULTIPLE
    return Buckets(
        # Matmuls have been seen to agree on rows for multiples of 8 only.
        rows=_up_to(GPU_ROWS if gpu else eights, pages_for(rows, 8) * 8),
        tokens=_up_to(tokens, max(largest, tokens[0])),
        pages=_up_to([GPU_SHORT // limits.page_size] if gpu else fours[2::2], pages),
        few=few if gpu else CPU_FEW,
        guessing=_up_to(
            GPU_GUESSING if gpu else CPU_GUESSING, pages_for(min(rows, MOST_GUESSING), 8) * 8
        ),
    )


def max_chunks(policy: Policy, *, gpu: bool) -> int:
    """Prompts that one step reads from, at most: each costs a row of logits, whether it is there
    or not."""
    if not gpu:
        return CPU_CHUNKS
    return MAKESPAN_CHUNKS if policy == "makespan" else MOST_CHUNKS


def fit(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest of `sizes` that holds `wanted`.

    Raises:
        ValueError: none does.
    """
    for size in sizes:
        if size >= wanted:
            return size
    raise ValueError(f"{wanted} does not fit: the sizes are {sizes}")


def _up_to(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    return (*(size for size in sizes if size < most), most)
