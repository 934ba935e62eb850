"""The attention calls that are measured, their bytes and their arithmetic.

Plain data, so that a PyTorch environment without jax can read it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

L2_BYTES = 50 << 20  # the largest L2 of the GPUs that are measured
MOST_SETS = 16
WIDTHS = {"bf16": 2, "int8": 1, "fp8": 1}  # bytes of a page's number


@dataclass(frozen=True)
class Group:
    """`batch` sequences of `length` tokens, the last `new` of which are new."""

    batch: int
    length: int
    new: int = 1


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: of its records: `attention.NAME.us`.
        groups: the batch.
        kv: what the pages hold: "bf16", or "int8" or "fp8" with a scale a token and head.
        invariant: False lets the op give up that a row's bits depend on nothing else.
        kv_heads, group, head_dim, page_size: of the model.
    """

    name: str
    groups: tuple[Group, ...]
    kv: str = "bf16"
    invariant: bool = True
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 32

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def new_tokens(self) -> int:
        return sum(g.batch * g.new for g in self.groups)

    @property
    def max_query(self) -> int:
        return max(g.new for g in self.groups)

    @property
    def kv_bytes(self) -> int:
        """Of the pages and scales that are read, once."""
        tokens = sum(g.batch * g.length for g in self.groups)
        scale = 0 if self.kv == "bf16" else 4
        return 2 * tokens * self.kv_heads * (self.head_dim * WIDTHS[self.kv] + scale)

    @property
    def bytes(self) -> int:
        """Fewest bytes to move: keys and values read once, queries read, outputs written."""
        return self.kv_bytes + 2 * 2 * self.new_tokens * self.heads * self.head_dim

    @property
    def flops(self) -> int:
        """Of both products, of what causality leaves: a multiplication and an addition count 2."""
        pairs = sum(g.batch * (g.new * g.length - g.new * (g.new - 1) // 2) for g in self.groups)
        return 4 * pairs * self.heads * self.head_dim

    @property
    def sets(self) -> int:
        """Inputs that are rotated, so that none is still in the L2 cache when its turn comes."""
        return min(MOST_SETS, max(4, ceil(5 * L2_BYTES / self.kv_bytes)))

    def lengths(self) -> list[tuple[int, int]]:
        """(length, new) of every sequence."""
        return [(g.length, g.new) for g in self.groups for _ in range(g.batch)]


def _decode(*sizes: tuple[int, int], name: str = "", kv: str = "bf16", page_size: int = 32) -> Case:
    name = name or "x".join(map(str, sizes[0]))
    suffix = "" if kv == "bf16" else f".{kv}"
    suffix += "" if page_size == 32 else f".page{page_size}"
    groups = tuple(Group(*size) for size in sizes)
    return Case(f"decode.{name}{suffix}", groups, kv, page_size=page_size)


PROMPTS = (Group(4, 4096, 4096),)
CASES = (
    _decode((64, 4096)),
    _decode((64, 4096), kv="int8"),
    _decode((64, 4096), kv="fp8"),
    _decode((64, 4096), page_size=64),
    _decode((64, 4096), kv="int8", page_size=64),
    _decode((256, 1024)),
    _decode((16, 4096)),
    _decode((1, 16384)),
    _decode((8, 32768), (56, 200), name="mixed"),
    Case("prefill.4x4096", PROMPTS),
    Case("prefill.4x4096.page64", PROMPTS, page_size=64),
    Case("prefill.4x4096.free", PROMPTS, invariant=False),
    Case("chunk.512at8192", (Group(1, 8704, 512),)),
)
LAUNCH = _decode((1, 1), name="launch")  # one token against itself: what a launch alone takes
QKV_WRITE = "qkv_write.64"
QKV_WRITE_TOKENS = 64


def select(only: Sequence[str] | None, cases: Sequence[Case] = CASES) -> list[Case]:
    """Cases whose names start with one of `only`; all if None.

    Raises:
        ValueError: one of `only` is the start of no name.
    """
    if only is None:
        return list(cases)
    names = [case.name for case in cases] + [QKV_WRITE]
    for word in only:
        if not any(name.startswith(word) for name in names):
            raise ValueError(f"no case {word!r}: there are {', '.join(names)}")
    return [case for case in cases if case.name.startswith(tuple(only))]


def qkv_write_bytes(
    kv: str, tokens: int, heads: int = 32, kv_heads: int = 8, head_dim: int = 128
) -> int:
    """Read: a product of queries, keys and values in bf16, and the rotations. Written: queries, and
    keys and values as pages hold them, with their scales."""
    queries = tokens * heads * head_dim
    numbers = 2 * tokens * kv_heads * head_dim
    scales = 0 if kv == "bf16" else 2 * tokens * kv_heads * 4
    return 4 * queries + numbers * (2 + WIDTHS[kv]) + scales + tokens * head_dim * 4
