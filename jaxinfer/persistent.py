"""A persistent map of integers: an update returns a new map and leaves the old one as it was.

The entries lie in a fixed number of dicts, of which an update copies those that it changes: so it
costs as much for a map of ten thousands of entries as for one of hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

BUCKETS = 257  # a prime: keys may have a pattern in their bits


class Table(NamedTuple):
    """Integers by integers of any size. The dicts are never changed once they are in a table."""

    buckets: tuple[dict[int, int], ...]

    def find(self, key: int) -> int | None:
        """The value of a key, or None."""
        return self.buckets[key % BUCKETS].get(key)

    def items(self) -> Iterator[tuple[int, int]]:
        """All entries, in no particular order."""
        return chain.from_iterable(bucket.items() for bucket in self.buckets)


def table(entries: Iterable[tuple[int, int]] = ()) -> Table:
    """A table of these."""
    return updated(Table(({},) * BUCKETS), dict(entries))


def updated(old: Table, changes: Mapping[int, int | None]) -> Table:
    """`old` with other values for some keys; None takes a key out.

    Raises:
        KeyError: a key to take out is not there.
    """
    if not changes:
        return old
    buckets, copied = list(old.buckets), set()
    for key, value in changes.items():
        at = key % BUCKETS
        if at not in copied:
            buckets[at] = buckets[at].copy()
            copied.add(at)
        if value is None:
            del buckets[at][key]
        else:
            buckets[at][key] = value
    return Table(tuple(buckets))
