"""The shapes that steps are compiled in: few, but such that padding costs little.

On a GPU a step of up to 64 rows takes as long as one of 8: it reads the weights. Above some 256
tokens its time grows with them, so that buckets lie closer there. On a CPU, where attention is
computed over all columns of the page table, each size is a few times the one before: there it is
compiling that takes time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.config import BatcherConfig
from jaxinfer.pages import pages_for

GPU_ROWS = (8, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792)
GPU_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288)
# Where every step is filled up to a size, more of them make for less to fill up.
GPU_TOKENS_MAKESPAN = (*range(64, 448, 64), 512, 576, 640, 768, *GPU_TOKENS[6:])
GPU_FEW, CPU_FEW = 64, 8  # rows that decode beside chunks: few, or as many as there are tokens
GPU_SHORT = 8192  # tokens: page tables of sequences up to here are looked at as one size
MULTIPLE = 64  # of tokens, in steps that are larger


@dataclass(frozen=True)
class Buckets:
    """Sizes, ascending; the last of each holds the most that is ever needed.

    Attributes:
        rows: of steps that only decode.
        tokens: of steps with chunks of prompts, in all.
        pages: columns of the page table.
        few: rows; see `mixed_rows`.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    few: int

    def mixed_rows(self, tokens: int) -> tuple[int, ...]:
        """Rows that decode in a step of so many tokens: few, or as many as can be."""
        most = min(tokens, self.rows[-1])
        return (self.few, most) if self.few < most else (most,)


def make_buckets(limits: BatcherConfig, *, gpu: bool) -> Buckets:
    """The buckets of an engine with these limits."""
    rows, pages = limits.max_num_seqs, pages_for(limits.max_model_len, limits.page_size)
    fours = [4**i for i in range(16)]
    eights = [8**i for i in range(1, 8)]
    of_policy = GPU_TOKENS_MAKESPAN if limits.policy == "makespan" else GPU_TOKENS
    tokens = of_policy if gpu else fours[2:]
    budget = limits.max_num_batched_tokens
    largest = budget if budget <= MULTIPLE else pages_for(budget, MULTIPLE) * MULTIPLE
    return Buckets(
        # Matmuls have been seen to agree on rows for multiples of 8 only.
        rows=_up_to(GPU_ROWS if gpu else eights, pages_for(rows, 8) * 8),
        tokens=_up_to(tokens, max(largest, tokens[0])),
        pages=_up_to([GPU_SHORT // limits.page_size] if gpu else fours[2::2], pages),
        few=GPU_FEW if gpu else CPU_FEW,
    )


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
