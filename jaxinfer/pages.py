"""The page pool of the KV cache: who holds which page, and what unheld pages still remember.

Pure, NumPy alone: every function returns a new pool, whose arrays are read-only.

A page is held by any number of sequences. One that nobody holds may be granted again, but if its
contents were published it can be found until then, by a key that names every token up to its end:
a later sequence that begins with the same tokens takes the page instead of computing it. Pages
that nobody can find are granted first, the latest to be let go of; then the others, the one let go
of longest ago first.

What a page remembers that is granted anew may go to the host's memory (`tier`), from where it is
copied into another page when it is asked for.

Page 0 is the trash page: it is never granted. Shapes: N pages. What a call costs depends on the
pages that it names, and hardly on N: it runs between any two steps of the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxinfer import tier
from jaxinfer.persistent import Table, table, updated
from jaxinfer.tier import Tier

KEY_BYTES = 16
NO_KEYS = np.empty((0, 2), np.uint64)
NO_KEYS.flags.writeable = False


class PagePool(NamedTuple):
    """The pages of one cache.

    Attributes:
        holders: int32 [N], sequences that hold each page; 1 for the trash page.
        available: pages that nobody holds.
        spare: int32 [n], those of them that remember nothing; granted from the end on.
        queue: int32 [m], those of them that do, in the order in which they were let go of; and
            others, which have been held again since.
        passed: what stood in the queue before, and was taken out.
        places: of each page that remembers something and is not held, its place in the queue, those
            passed included.
        names: the key of each page that remembers something.
        known: the page of each of these keys.
        host: what remembers pages that were granted anew; None: nothing does.
    """

    holders: np.ndarray
    available: int
    spare: np.ndarray
    queue: np.ndarray
    passed: int
    places: Table
    names: Table
    known: Table
    host: Tier | None = None


def create(num_pages: int, host_slots: int = 0) -> PagePool:
    """A pool of `num_pages` pages, all but the trash page free, and so many slots of the host.

    Raises:
        ValueError: fewer than two pages.
    """
    if num_pages < 2:
        raise ValueError(f"num_pages={num_pages}: expected at least 2 (page 0 is never granted)")
    holders = np.zeros(num_pages, np.int32)
    holders[0] = 1
    spare, queue = np.arange(num_pages - 1, 0, -1, dtype=np.int32), np.empty(0, np.int32)
    none, host = table(), tier.create(host_slots) if host_slots else None
    return _sealed(PagePool(holders, num_pages - 1, spare, queue, 0, none, none, none, host))


def allocate(pool: PagePool, count: int, keys: np.ndarray = NO_KEYS) -> tuple[PagePool, np.ndarray]:
    """Grants `count` pages, int32 [count], each with one holder. What they remembered is lost, or
    goes to the host.

    The first of them are filled with what the host knows by a run of `keys` from the first on, and
    are known by these keys.

    Raises:
        ValueError: fewer than `count` are free.
    """
    if pool.available < count:
        raise ValueError(f"{count} pages wanted, {pool.available} free")
    slots = [] if pool.host is None else tier.find(pool.host, numbers(keys[:count]))
    left = max(0, len(pool.spare) - count)
    granted = pool.spare[left:][::-1]
    if len(granted) < count:
        pool, evicted = _evict(pool, count - len(granted), slots)
        granted = np.concatenate([granted, evicted])
    holders = pool.holders.copy()
    holders[granted] = 1
    available = pool.available - count
    pool = pool._replace(holders=holders, spare=pool.spare[:left], available=available)
    if slots:
        assert pool.host is not None
        filled = granted[: len(slots)]
        pool = pool._replace(host=tier.load(pool.host, slots, filled))
        pool = publish(pool, filled, keys[: len(slots)])
    return _sealed(pool), granted


def share(pool: PagePool, pages: np.ndarray) -> PagePool:
    """One more holder for each page: held ones, or ones that `find` has found.

    Raises:
        ValueError: a page that is out of range or the trash page, or that nobody holds and that
            remembers nothing.
    """
    if not len(pages):
        return pool
    some = _checked(pool, pages)
    back = [page for page, n in zip(some, pool.holders[pages].tolist(), strict=True) if not n]
    if any(pool.names.find(page) is None for page in back):
        raise ValueError(f"pages {some}: some are neither held nor remembered")
    holders = pool.holders.copy()
    holders[pages] += 1
    places = updated(pool.places, dict.fromkeys(back))
    available = pool.available - len(back)
    return _sealed(pool._replace(holders=holders, places=places, available=available))


def release(pool: PagePool, pages: np.ndarray) -> PagePool:
    """One holder less for each page, in the order of a sequence's tokens.

    Of pages that remember something, later ones are granted again first: a key names all that comes
    before, so that a page is no use without those before it.

    Raises:
        ValueError: a page that is out of range, the trash page, or free already.
    """
    some = _checked(pool, pages)
    holders = pool.holders.copy()
    holders[pages] -= 1
    left = holders[pages].tolist()
    if min(left, default=0) < 0:
        raise ValueError(f"pages {some}: some are free already")
    spare, named = [], []
    for page, n in zip(reversed(some), reversed(left), strict=True):
        if not n:
            (spare if pool.names.find(page) is None else named).append(page)
    end = pool.passed + len(pool.queue)
    pool = pool._replace(
        holders=holders,
        available=pool.available + len(spare) + len(named),
        spare=_joined(pool.spare, spare),
        queue=_joined(pool.queue, named),
        places=updated(pool.places, {page: end + i for i, page in enumerate(named)}),
    )
    return _sealed(_tidied(pool))


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
    some = _checked(pool, pages)
    if not pool.holders[pages].all():
        raise ValueError(f"pages {some}: some are held by nobody")
    new: dict[int, int] = {}
    for page, key in zip(some, numbers(keys), strict=True):
        name = pool.names.find(page)
        if name is not None and name != key:
            raise ValueError(f"pages {some}: some are known by another key")
        if name is None and pool.known.find(key) is None:
            new.setdefault(key, page)
    if not new:
        return pool
    names = updated(pool.names, {page: key for key, page in new.items()})
    return pool._replace(names=names, known=updated(pool.known, new))


def find(pool: PagePool, keys: np.ndarray) -> np.ndarray:
    """The pages known by the longest run of `keys` from the first on, int32 [n]; not held yet."""
    found = []
    for key in numbers(keys):
        page = pool.known.find(key)
        if page is None:
            break
        found.append(page)
    return np.array(found, np.int32)


def kept(pool: PagePool) -> np.ndarray:
    """Pages that are held or remember something, int32, ascending; the trash page too."""
    some = pool.holders > 0
    some[[page for page, _ in pool.names.items()]] = True
    return some.nonzero()[0].astype(np.int32)


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


def numbers(keys: np.ndarray) -> list[int]:
    """Each of `page_keys` as one number."""
    raw = keys.tobytes()
    return [
        int.from_bytes(raw[at : at + KEY_BYTES], "little") for at in range(0, len(raw), KEY_BYTES)
    ]


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
    names, places = dict(pool.names.items()), dict(pool.places.items())
    assert {key: page for page, key in names.items()} == dict(pool.known.items()), "keys and pages"
    free = set(np.flatnonzero(pool.holders == 0).tolist())
    assert places.keys() == free & names.keys(), "a page that remembers is not in the queue"
    assert all(pool.queue[at - pool.passed] == page for page, at in places.items()), "places"
    assert sorted(pool.spare.tolist()) == sorted(free - names.keys()), "a page was lost"
    assert pool.available == len(free), f"{len(free)} are free, {pool.available} noted"
    if pool.host is not None:
        tier.check(pool.host)


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that `tokens` tokens take."""
    return -(-tokens // page_size)


def _evict(pool: PagePool, count: int, keep: list[int]) -> tuple[PagePool, np.ndarray]:
    """Takes the `count` pages that were let go of longest ago out of all but `holders`. What they
    remember goes to the host, where slots `keep` are still wanted."""
    gone: dict[int, int] = {}  # and their keys
    at = 0
    while len(gone) < count:
        page = int(pool.queue[at])
        if pool.places.find(page) == pool.passed + at:
            key = pool.names.find(page)
            assert key is not None, f"page {page} waits in the queue without a key"
            gone[page] = key
        at += 1
    pool = pool._replace(
        queue=pool.queue[at:],
        passed=pool.passed + at,
        places=updated(pool.places, dict.fromkeys(gone)),
        names=updated(pool.names, dict.fromkeys(gone)),
        known=updated(pool.known, dict.fromkeys(gone.values())),
        host=None if pool.host is None else tier.store(pool.host, gone, keep),
    )
    return pool, np.array(list(gone), np.int32)


def _tidied(pool: PagePool) -> PagePool:
    """Leaves out of the queue what was held again since, once that is more than all the pages."""
    if len(pool.queue) <= 2 * len(pool.holders):
        return pool
    places = sorted((at, page) for page, at in pool.places.items())
    queue = np.array([page for _, page in places], np.int32)
    renumbered = table((page, pool.passed + i) for i, page in enumerate(queue.tolist()))
    return pool._replace(queue=queue, places=renumbered)


def _joined(array: np.ndarray, more: list[int]) -> np.ndarray:
    return np.concatenate([array, np.array(more, np.int32)]) if more else array


def _checked(pool: PagePool, pages: np.ndarray) -> list[int]:
    """The pages as numbers."""
    some = pages.tolist()
    if some and (min(some) < 1 or max(some) >= len(pool.holders)):
        raise ValueError(f"pages {some}: expected 1 to {len(pool.holders) - 1}")
    if len(set(some)) != len(some):
        raise ValueError(f"pages {some}: some are named twice")
    return some


def _sealed(pool: PagePool) -> PagePool:
    for array in (pool.holders, pool.spare, pool.queue):
        array.setflags(write=False)
    return pool
