"""The page pool: which pages of the KV cache are free. Pure, NumPy alone.

Page 0 is the trash page: it is never granted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PagePool(NamedTuple):
    """`free` [num_pages]: whether a page may be granted. Read-only."""

    free: np.ndarray

    @property
    def available(self) -> int:
        return int(self.free.sum())


def create(num_pages: int) -> PagePool:
    """A pool of `num_pages` pages, all but the trash page free.

    Raises:
        ValueError: fewer than two pages.
    """
    if num_pages < 2:
        raise ValueError(f"num_pages={num_pages}: expected at least 2 (page 0 is never granted)")
    free = np.ones(num_pages, bool)
    free[0] = False
    return _sealed(free)


def allocate(pool: PagePool, count: int) -> tuple[PagePool, np.ndarray]:
    """Grants the `count` lowest free pages, int32 [count].

    Raises:
        ValueError: fewer than `count` are free.
    """
    pages = np.flatnonzero(pool.free)[:count].astype(np.int32)
    if len(pages) < count:
        raise ValueError(f"{count} pages wanted, {len(pages)} free")
    free = pool.free.copy()
    free[pages] = False
    return _sealed(free), pages


def release(pool: PagePool, pages: np.ndarray) -> PagePool:
    """Takes pages back.

    Raises:
        ValueError: a page that is out of range, the trash page, or free already.
    """
    if len(pages) and (pages.min() < 1 or pages.max() >= len(pool.free)):
        raise ValueError(f"pages {pages.tolist()}: expected 1 to {len(pool.free) - 1}")
    if pool.free[pages].any() or len(np.unique(pages)) != len(pages):
        raise ValueError(f"pages {pages.tolist()}: some are free already")
    free = pool.free.copy()
    free[pages] = True
    return _sealed(free)


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that `tokens` tokens take."""
    return -(-tokens // page_size)


def _sealed(free: np.ndarray) -> PagePool:
    free.flags.writeable = False
    return PagePool(free)
