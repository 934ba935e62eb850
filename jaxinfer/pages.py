"""The page pool of the KV cache: who holds which page, and what unheld pages still remember.

Pure, NumPy alone: every function returns a new pool, whose arrays are read-only.

A page is held by any number of sequences. One that nobody holds may be granted again, but if its
contents were published it can be found until then, by a key that names every token up to its end:
a later sequence that begins with the same tokens takes the page instead of computing it. Pages
that nobody can find are granted first, then those let go of longest ago.

Page 0 is the trash page: it is never granted. Shapes: N pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

KEY_BYTES = 16


class PagePool(NamedTuple):
    """The pages of one cache.

    Attributes:
        holders: int32 [N], sequences that hold each page; 1 for the trash page.
        keys: uint64 [N, 2], what each page was published as; zeros: nothing.
        stamps: int64 [N], when each page was let go of last, on the pool's own clock.
        clock: the next stamp.
        first_halves: uint64 [E], the first half of every key that can be found, ascending.
        pages: int32 [E], the page of each.
    """

    holders: np.ndarray
    keys: np.ndarray
    stamps: np.ndarray
    clock: int
    first_halves: np.ndarray
    pages: np.ndarray

    @property
    def free(self) -> np.ndarray:
        """bool [N]: whether a page may be granted."""
        return self.holders == 0

    @property
    def available(self) -> int:
        return int(np.count_nonzero(self.free))


def create(num_pages: int) -> PagePool:
    """A pool of `num_pages` pages, all but the trash page free.

    Raises:
        ValueError: fewer than two pages.
    """
    if num_pages < 2:
        raise ValueError(f"num_pages={num_pages}: expected at least 2 (page 0 is never granted)")
    holders = np.zeros(num_pages, np.int32)
    holders[0] = 1
    return _sealed(
        PagePool(
            holders,
            np.zeros((num_pages, 2), np.uint64),
            np.zeros(num_pages, np.int64),
            1,
            np.empty(0, np.uint64),
            np.empty(0, np.int32),
        )
    )


def allocate(pool: PagePool, count: int) -> tuple[PagePool, np.ndarray]:
    """Grants `count` pages, int32 [count], each with one holder. What they remembered is lost.

    Raises:
        ValueError: fewer than `count` are free.
    """
    free = np.flatnonzero(pool.free)
    if len(free) < count:
        raise ValueError(f"{count} pages wanted, {len(free)} free")
    some = free[: 4 * count + 64]  # mostly enough
    granted = some[pool.keys[some, 0] == 0][:count]
    if len(granted) < count:
        known = pool.keys[free, 0] != 0
        granted = free[~known][:count]
        evicted = _oldest(pool, free[known], count - len(granted))
        granted = np.concatenate([granted, evicted])
        pool = _forget(pool, evicted) if len(evicted) else pool
    holders = pool.holders.copy()
    holders[granted] = 1
    return _sealed(pool._replace(holders=holders)), granted.astype(np.int32)


def share(pool: PagePool, pages: np.ndarray) -> PagePool:
    """One more holder for each page: held ones, or ones that `find` has found.

    Raises:
        ValueError: a page that is out of range or the trash page, or that nobody holds and that
            remembers nothing.
    """
    _check(pool, pages)
    if ((pool.holders[pages] == 0) & (pool.keys[pages, 0] == 0)).any():
        raise ValueError(f"pages {pages.tolist()}: some are neither held nor remembered")
    holders = pool.holders.copy()
    holders[pages] += 1
    return _sealed(pool._replace(holders=holders))


def release(pool: PagePool, pages: np.ndarray) -> PagePool:
    """One holder less for each page, in the order of a sequence's tokens.

    Of pages let go of at once, later ones are granted again first: a key names all that comes
    before, so that a page is no use without those before it.

    Raises:
        ValueError: a page that is out of range, the trash page, or free already.
    """
    _check(pool, pages)
    if (pool.holders[pages] == 0).any():
        raise ValueError(f"pages {pages.tolist()}: some are free already")
    holders, stamps = pool.holders.copy(), pool.stamps.copy()
    holders[pages] -= 1
    stamps[pages] = pool.clock + np.arange(len(pages))[::-1]
    return _sealed(pool._replace(holders=holders, stamps=stamps, clock=pool.clock + len(pages)))


def fork(pool: PagePool, pages: np.ndarray, full: int) -> tuple[PagePool, np.ndarray, np.ndarray]:
    """A second sequence with the same tokens so far, whose first `full` pages are full.

    Full pages are never written again and get a second holder; the others will be, so that each
    holder needs its own.

    Returns:
        The pool; the new sequence's pages, int32 [n]; and those of the old one's that must be
        copied to the new one's from `full` on, int32 [n - full].

    Raises:
        ValueError: too few pages are free; or as `share`.
    """
    pool = share(pool, pages[:full])
    pool, own = allocate(pool, len(pages) - full)
    return pool, np.concatenate([pages[:full], own]).astype(np.int32), pages[full:]


def publish(pool: PagePool, pages: np.ndarray, keys: np.ndarray) -> PagePool:
    """Makes held, full pages known by their `keys`, uint64 [n, 2]; see `page_keys`.

    A key that is known already stays with the page that it is known by.

    Raises:
        ValueError: a page that nobody holds, or that is known by another key.
    """
    _check(pool, pages)
    if (pool.holders[pages] == 0).any():
        raise ValueError(f"pages {pages.tolist()}: some are held by nobody")
    known = pool.keys[pages, 0] != 0
    if (pool.keys[pages[known]] != keys[known]).any():
        raise ValueError(f"pages {pages.tolist()}: some are known by another key")
    first, unique = np.unique(keys[~known, 0], return_index=True)
    new = np.flatnonzero(~known)[unique]
    at = np.searchsorted(pool.first_halves, first)
    taken = np.isin(first, pool.first_halves, assume_unique=True)
    first, new, at = first[~taken], new[~taken], at[~taken]
    if not len(new):
        return pool
    all_keys = pool.keys.copy()
    all_keys[pages[new]] = keys[new]
    return _sealed(
        pool._replace(
            keys=all_keys,
            first_halves=np.insert(pool.first_halves, at, first),
            pages=np.insert(pool.pages, at, pages[new]).astype(np.int32),
        )
    )


def find(pool: PagePool, keys: np.ndarray) -> np.ndarray:
    """The pages known by the longest run of `keys` from the first on, int32 [n]; not held yet."""
    if not len(pool.pages):
        return np.empty(0, np.int32)
    at = np.minimum(np.searchsorted(pool.first_halves, keys[:, 0]), len(pool.pages) - 1)
    pages = pool.pages[at]
    known = (pool.keys[pages] == keys).all(axis=1)
    return pages[: len(keys) if known.all() else int(known.argmin())]


def page_keys(tokens: np.ndarray, page_size: int, salt: bytes = b"") -> np.ndarray:
    """uint64 [n, 2]: the key of each full page of a sequence that starts with `tokens` [T].

    A key is a BLAKE2b digest of all tokens up to the page's end, and of `salt`: whatever else the
    cached values depend on (adapter, weights' version, tenant). At most 64 bytes.
    """
    full = len(tokens) // page_size
    rows = np.ascontiguousarray(tokens[: full * page_size], np.int32).reshape(full, page_size)
    keys = np.empty((full, 2), np.uint64)
    digest = b""
    for i, row in enumerate(rows):
        digest = hashlib.blake2b(digest + row.tobytes(), digest_size=KEY_BYTES, key=salt).digest()
        keys[i] = np.frombuffer(digest, np.uint64)
    keys[:, 0] |= np.uint64(1)  # zero stands for no key
    keys.flags.writeable = False
    return keys


def check(pool: PagePool, held: Iterable[np.ndarray]) -> None:
    """That the sequences which hold these pages, and nobody else, are the pool's holders.

    Raises:
        AssertionError: a page leaked, was freed too early, or cannot be found as it should.
    """
    count = np.zeros(len(pool.holders), np.int32)
    count[0] = 1
    for pages in held:
        np.add.at(count, pages, 1)
    wrong = np.flatnonzero(count != pool.holders)
    assert not len(wrong), (
        f"pages {wrong.tolist()}: {count[wrong]} hold, {pool.holders[wrong]} noted"
    )
    assert (np.diff(pool.first_halves.astype(object)) > 0).all(), "keys are not in order"
    assert (pool.keys[pool.pages, 0] == pool.first_halves).all(), "a key leads to another page"
    assert np.count_nonzero(pool.keys[:, 0]) == len(pool.pages), "a page is known, but not found"


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that `tokens` tokens take."""
    return -(-tokens // page_size)


def _oldest(pool: PagePool, pages: np.ndarray, count: int) -> np.ndarray:
    """The `count` of these that were let go of first, in that order. No two stamps are equal."""
    if not count:
        return pages[:0]
    stamps = pool.stamps[pages]
    first = np.argpartition(stamps, count - 1)[:count]
    return pages[first[np.argsort(stamps[first])]]


def _forget(pool: PagePool, pages: np.ndarray) -> PagePool:
    keys = pool.keys.copy()
    keys[pages] = 0
    kept = keys[pool.pages, 0] != 0
    return pool._replace(keys=keys, first_halves=pool.first_halves[kept], pages=pool.pages[kept])


def _check(pool: PagePool, pages: np.ndarray) -> None:
    if len(pages) and (pages.min() < 1 or pages.max() >= len(pool.holders)):
        raise ValueError(f"pages {pages.tolist()}: expected 1 to {len(pool.holders) - 1}")
    if len(np.unique(pages)) != len(pages):
        raise ValueError(f"pages {pages.tolist()}: some are named twice")


def _sealed(pool: PagePool) -> PagePool:
    for value in pool:
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return pool
