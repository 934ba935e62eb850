"""Which replica a request goes to: a pure state machine, without jax.

Replicas are alike, so that it decides when tokens come, never which. A request goes where most of
its beginning has been sent before, as its pages are then likely to be in that replica's cache; but
not where much more is to be done than elsewhere. All samples of a request go to one replica: they
have their prompt in common.

What is outstanding is counted in tokens, those of which a sequence is sure not to have more: how
many it will have, nobody knows before its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxinfer.persistent import Table, table, updated

# A beginning is followed to a replica that has at most so many times the request's own tokens more
# to do than the least loaded one.
SLACK = 4


class Replica(NamedTuple):
    """What one replica was sent.

    Attributes:
        tokens: that its sequences which have not ended may come to have.
        recent, before: keys of pages, those of latest requests and those before them: a key that is
            not sent again is forgotten in time, as the page is by the cache.
        num_recent: keys in `recent`.
    """

    tokens: int
    recent: Table
    before: Table
    num_recent: int


class RouterState(NamedTuple):
    """All replicas.

    Attributes:
        most_keys: that `recent` may hold.
    """

    replicas: tuple[Replica, ...]
    most_keys: int


class Request(NamedTuple):
    """What is to be sent somewhere.

    Attributes:
        tokens: that all its samples together may come to have, the prompt counted once.
        keys: of the pages of its prompt, as of `pages.numbers`.
    """

    tokens: int
    keys: Sequence[int]


def create(replicas: int, most_keys: int) -> RouterState:
    """Replicas that have nothing to do. `most_keys`: about as many as each has pages.

    Raises:
        ValueError: a number below 1.
    """
    for name, value in {"replicas": replicas, "most_keys": most_keys}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    none = table()
    return RouterState((Replica(0, none, none, 0),) * replicas, most_keys)


def route(state: RouterState, request: Request) -> tuple[RouterState, int]:
    """Sends a request to the replica that is returned: of those with no more to do than `SLACK`
    allows the one that knows most of its beginning; of equals the least loaded; the first."""
    loads = [replica.tokens for replica in state.replicas]
    most = min(loads) + SLACK * request.tokens
    chosen = min(
        (i for i, load in enumerate(loads) if load <= most),
        key=lambda i: (-_known(state.replicas[i], request.keys), loads[i], i),
    )
    replica = _told(state.replicas[chosen], request.keys[: state.most_keys], state.most_keys)
    replica = replica._replace(tokens=replica.tokens + request.tokens)
    return _with(state, chosen, replica), chosen


def ended(state: RouterState, replica: int, tokens: int) -> RouterState:
    """So many of the tokens that a replica was sent are not to be expected any more.

    Raises:
        ValueError: more than it was sent.
    """
    found = state.replicas[replica]
    if tokens > found.tokens:
        raise ValueError(f"replica {replica}: {tokens} tokens ended of {found.tokens}")
    return _with(state, replica, found._replace(tokens=found.tokens - tokens))


def forget(state: RouterState) -> RouterState:
    """No page of before is found any more: the weights have changed, or the caches are empty."""
    none = table()
    return state._replace(
        replicas=tuple(x._replace(recent=none, before=none, num_recent=0) for x in state.replicas)
    )


def _known(replica: Replica, keys: Sequence[int]) -> int:
    """How many of the keys, from the first on, the replica was sent."""
    for count, key in enumerate(keys):
        if replica.recent.find(key) is None and replica.before.find(key) is None:
            return count
    return len(keys)


def _told(replica: Replica, keys: Sequence[int], most: int) -> Replica:
    """The replica, which is sent at most `most` keys."""
    if replica.num_recent + len(keys) > most:
        replica = replica._replace(recent=table(), before=replica.recent, num_recent=0)
    new = {key: 1 for key in keys if replica.recent.find(key) is None}
    recent = updated(replica.recent, new)
    return replica._replace(recent=recent, num_recent=replica.num_recent + len(new))


def _with(state: RouterState, at: int, replica: Replica) -> RouterState:
    some = state.replicas
    return state._replace(replicas=(*some[:at], replica, *some[at + 1 :]))
