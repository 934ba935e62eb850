"""The second tier of the prefix cache: slots of the host's memory, for what pages remember that
have to leave the device.

Pure, NumPy alone, as `pages`. A slot holds what a page held, and is found by the same key; the one
that was used longest ago is used again first. What has to be copied for that is noted, until the
scheduler takes it along with the next step: first all stores, then all loads. So what a slot holds
of which such a copy is noted, it holds until then.

Shapes: S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxinfer.persistent import Table, table, updated


class Tier(NamedTuple):
    """Slots, and the copies that are due.

    Attributes:
        used: int64 [S], when each was used last, all different; negative: never.
        clock: uses so far.
        names: the key of each slot that holds something.
        known: the slot of each of these keys.
        stores: int32 [n, 2]; pages, and the slots that they are to be copied to.
        loads: int32 [m, 2]; slots, and the pages that they are to be copied to, after that.
    """

    used: np.ndarray
    clock: int
    names: Table
    known: Table
    stores: np.ndarray
    loads: np.ndarray


def create(slots: int) -> Tier:
    """A tier that holds nothing yet."""
    none = np.empty((0, 2), np.int32)
    return _sealed(Tier(np.arange(-slots, 0), 0, table(), table(), none, none))


def find(tier: Tier, keys: Sequence[int]) -> list[int]:
    """The slots known by the longest run of `keys` from the first on."""
    found = []
    for key in keys:
        slot = tier.known.find(key)
        if slot is None:
            break
        found.append(slot)
    return found


def store(tier: Tier, gone: Mapping[int, int], keep: Sequence[int] = ()) -> Tier:
    """Keeps what pages hold that are granted anew: `gone`, and their keys.

    Nothing is copied of what a slot holds already. Where there are too few slots, for `keep` and
    those with copies due are not to be had, the last pages are kept.
    """
    slots = {key: s for key in gone.values() if (s := tier.known.find(key)) is not None}
    new = [(page, key) for page, key in gone.items() if key not in slots]
    due = [*tier.stores[:, 1].tolist(), *tier.loads[:, 0].tolist()]
    free = _oldest(tier.used, len(new), {*keep, *slots.values(), *due})
    new = new[len(new) - len(free) :]
    slots |= {key: slot for (_, key), slot in zip(new, free, strict=True)}
    tier = _used(tier, [slots[key] for key in gone.values() if key in slots])
    lost = [key for slot in free if (key := tier.names.find(slot)) is not None]
    mine = {key: slots[key] for _, key in new}
    copies = np.array([(page, slots[key]) for page, key in new], np.int32).reshape(-1, 2)
    return _sealed(
        tier._replace(
            names=updated(tier.names, {slot: key for key, slot in mine.items()}),
            known=updated(tier.known, dict.fromkeys(lost) | mine),
            stores=np.concatenate([tier.stores, copies]),
        )
    )


def load(tier: Tier, slots: Sequence[int], pages: np.ndarray) -> Tier:
    """Has slots, found for a run of keys, copied to these pages."""
    copies = np.stack([np.array(slots, np.int32), pages], axis=1)
    # Of two slots, the one without which the other is no use stays longer.
    tier = _used(tier, slots[::-1])
    return _sealed(tier._replace(loads=np.concatenate([tier.loads, copies])))


def take(tier: Tier) -> tuple[Tier, np.ndarray, np.ndarray]:
    """The tier, and the copies that were due: `stores` and `loads`."""
    none = tier.stores[:0]
    return tier._replace(stores=none, loads=none), tier.stores, tier.loads


def check(tier: Tier) -> None:
    """Raises AssertionError unless slots, keys and the copies that are due agree."""
    names = dict(tier.names.items())
    assert {key: slot for slot, key in names.items()} == dict(tier.known.items()), "keys and slots"
    assert set(np.flatnonzero(tier.used > 0)) == names.keys(), "what was used holds something"
    assert len(set(tier.used.tolist())) == len(tier.used), "two slots were used at once"
    stored, filled = tier.stores[:, 1].tolist(), tier.loads[:, 1].tolist()
    assert len(set(stored)) == len(stored), "a slot is to hold two pages"
    assert len(set(filled)) == len(filled), "a page is to hold two slots"
    assert {*stored, *tier.loads[:, 0].tolist()} <= names.keys(), "a slot was given up too early"


def _oldest(used: np.ndarray, count: int, but: set[int]) -> list[int]:
    """The `count` slots used longest ago, or as many as there are, without some."""
    count = min(count, len(used) - len(but))
    if count <= 0:
        return []
    age = used.copy()
    age[list(but)] = np.iinfo(np.int64).max
    some = np.argpartition(age, count - 1)[:count]
    return some[np.argsort(age[some])].tolist()


def _used(tier: Tier, slots: Sequence[int]) -> Tier:
    """These slots are used, one after the other."""
    used, now = tier.used.copy(), tier.clock + len(slots)
    used[list(slots)] = np.arange(tier.clock, now) + 1
    return tier._replace(used=used, clock=now)


def _sealed(tier: Tier) -> Tier:
    for array in (tier.used, tier.stores, tier.loads):
        array.setflags(write=False)
    return tier
