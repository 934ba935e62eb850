"""The scheduler: a pure state machine over NumPy arrays.

`step(state, events, config) -> (state, actions)`: no clock, no I/O, no randomness, no jax. It
sees lengths and keys, never tokens. Same state and same events give the same actions, so that any
run can be replayed.

Sequences come in order of rank, those of one rank in order of their ids, which are given in order
of arrival. A sequence is granted pages for its prompt when it is admitted, and more as it grows.
Where they run out, the last running sequence in that order is preempted: it gives all its pages
back, and waits again with the tokens it has until then, which are computed anew. So the first
always gets on. Pages of a prompt whose keys are known already are shared instead of computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.config import BatcherConfig
from jaxinfer.pages import (
    PagePool,
    allocate,
    create,
    find,
    pages_for,
    publish,
    release,
    share,
)

NO_SEQUENCE = -1


class Submit(NamedTuple):
    """Sequences join the queue. int64 arrays [n]: ids, prompt lengths, and the most tokens
    (prompt included) that each may reach; their ranks. `keys`, objects [n]: of each prompt's full
    pages, of `pages.page_keys`; without any, the prompt shares nothing."""

    ids: np.ndarray
    prompts: np.ndarray
    limits: np.ndarray
    ranks: np.ndarray
    keys: np.ndarray


class Return(NamedTuple):
    """A preempted sequence of which nothing is on its way any more waits again, with `tokens`
    tokens; `keys` as in `Submit`."""

    id: int
    tokens: int
    keys: np.ndarray


class Cancel(NamedTuple):
    """A sequence, waiting, running or preempted, is given up by the host."""

    id: int


class Finished(NamedTuple):
    """Sequences that the device has ended itself. int64 [n]; `keys`, objects [n]: of the pages that
    all their tokens but the last fill, to be found by whoever goes on from there."""

    ids: np.ndarray
    keys: np.ndarray


Event = Submit | Return | Cancel | Finished


class Prefill(NamedTuple):
    """Run prompt tokens `start` to `stop` of sequence `id` in `row`.

    `pages` int32 [n]: all pages of the row. `first` begins the sequence; what is before its `start`
    is in the pages already. `last` completes the prompt.
    """

    id: int
    row: int
    start: int
    stop: int
    first: bool
    last: bool
    limit: int
    pages: np.ndarray
    released: np.ndarray


class Decode(NamedTuple):
    """Run `steps` decode steps of rows 0 to `rows`.

    `ids` [rows]: the sequence in each row that takes part, or -1. `tokens`: the longest that any
    of them may have become afterwards. `pages` int32 [M, W]: pages granted to each row, 0 for none,
    from column `columns` [M] of its page table on.
    """

    rows: int
    steps: int
    ids: np.ndarray
    tokens: int
    released: np.ndarray
    columns: np.ndarray
    pages: np.ndarray


class Preempt(NamedTuple):
    """Sequence `id` has no pages any more. The host says `Return` once it has read all results."""

    id: int


class Refuse(NamedTuple):
    """Sequence `id` was not taken into the queue."""

    id: int
    reason: str


Action = Prefill | Decode | Preempt | Refuse


class Rows(NamedTuple):
    """The running sequences, int64 [M] each; id -1: the row is free.

    `prompt`: tokens to read before it can go on: its prompt, and what it had when it was preempted.
    `prefilled`: prompt tokens that were dispatched, or are shared; 0 before the first chunk.
    `scheduled`: output tokens that the steps dispatched so far may have produced.
    """

    id: np.ndarray
    prompt: np.ndarray
    limit: np.ndarray
    rank: np.ndarray
    prefilled: np.ndarray
    scheduled: np.ndarray


class BatcherState(NamedTuple):
    """Everything the scheduler knows. `pages` int32 [M, P_max], 0 where none is granted.

    `keys`, objects [M]: of the full pages of each running sequence's prompt. `released` [M]: rows
    that the device must be told to stop, with the next action. `parked` int64 [n, 3]: preempted
    sequences, their limits and ranks.
    """

    waiting: Submit
    parked: np.ndarray
    rows: Rows
    pages: np.ndarray
    keys: np.ndarray
    pool: PagePool
    released: np.ndarray


def create_state(config: BatcherConfig) -> BatcherState:
    """A state with nothing waiting and nothing running."""
    M = config.max_num_seqs
    none = np.empty(0, np.int64)
    zero = np.zeros(M, np.int64)
    state = BatcherState(
        waiting=Submit(none, none, none, none, np.empty(0, object)),
        parked=np.empty((0, 3), np.int64),
        rows=Rows(np.full(M, NO_SEQUENCE), zero, zero, zero, zero, zero),
        pages=np.zeros((M, pages_for(config.max_model_len, config.page_size)), np.int32),
        keys=np.full(M, None),
        pool=create(config.num_pages),
        released=np.zeros(M, bool),
    )
    _seal(state, state.waiting, state.rows)
    return state


def step(
    state: BatcherState, events: tuple[Event, ...], config: BatcherConfig
) -> tuple[BatcherState, tuple[Action, ...]]:
    """Takes events in order, then schedules at most one step of work.

    The state passed in is left as it was; arrays of what is returned are read-only.

    Raises:
        ValueError: an event that names a sequence which is neither waiting nor running nor
            preempted, or a submission that could never fit.
    """
    actions: list[Action] = []
    for event in events:
        match event:
            case Submit():
                state, refused = _submit(state, event, config)
                actions += refused
            case Return():
                state = _return(state, event)
            case Cancel():
                state = _leave(state, event.id, tell_device=True)
            case Finished():
                for sequence, keys in zip(event.ids, event.keys, strict=True):
                    state = _remember(state, int(sequence), keys)
                    state = _leave(state, int(sequence), tell_device=False)
    state = _admit(state, config)
    state, run = _schedule(state, config)
    _seal(state, state.waiting, state.rows, *run)
    return state, (*actions, *run)


def objects(items: Sequence[Any]) -> np.ndarray:
    """An array of objects [n], as events hold keys."""
    found = np.empty(len(items), object)
    found[:] = items
    return found


def idle(state: BatcherState) -> bool:
    """Whether nothing waits, runs, or is preempted."""
    still = bool((state.rows.id == NO_SEQUENCE).all())
    return still and not len(state.waiting.ids) and not len(state.parked)


def _submit(
    state: BatcherState, event: Submit, config: BatcherConfig
) -> tuple[BatcherState, list[Action]]:
    most = min(config.max_model_len, (config.num_pages - 1) * config.page_size)
    if len(event.ids) and (
        event.limits.max() > most or event.prompts.min() < 1 or (event.limits < event.prompts).any()
    ):
        raise ValueError(
            f"submission out of bounds: 1 <= prompt <= limit <= {most} tokens, of sequences "
            f"{event.ids.tolist()} with prompts {event.prompts.tolist()} and limits "
            f"{event.limits.tolist()}"
        )
    room = max(0, config.max_waiting - len(state.waiting.ids))
    waiting = _in_order(
        *(np.concatenate([a, b[:room]]) for a, b in zip(state.waiting, event, strict=True))
    )
    reason = f"the queue is full: {config.max_waiting} sequences wait already"
    return state._replace(waiting=waiting), [Refuse(int(i), reason) for i in event.ids[room:]]


def _return(state: BatcherState, event: Return) -> BatcherState:
    """Back to the queue, to its place in the order."""
    (at,) = np.nonzero(state.parked[:, 0] == event.id)
    if not len(at):
        raise ValueError(f"sequence {event.id} is not preempted")
    _, limit, rank = (int(x) for x in state.parked[at[0]])
    if not 1 <= event.tokens < limit:
        raise ValueError(f"sequence {event.id}: {event.tokens} tokens, expected 1 to {limit - 1}")
    new = (*([x] for x in (event.id, event.tokens, limit, rank)), objects([event.keys]))
    waiting = _in_order(*(np.append(a, x) for a, x in zip(state.waiting, new, strict=True)))
    return state._replace(waiting=waiting, parked=np.delete(state.parked, at, axis=0))


def _in_order(*columns: np.ndarray) -> Submit:
    queue = Submit(*columns)
    order = np.lexsort((queue.ids, queue.ranks))
    return Submit(*(column[order] for column in queue))


def _remember(state: BatcherState, sequence: int, keys: np.ndarray) -> BatcherState:
    """Publishes the pages of a running sequence."""
    found = np.flatnonzero(state.rows.id == sequence)
    if not len(found):
        return state
    pages = state.pages[found[0], : len(keys)]
    return state._replace(pool=publish(state.pool, pages, keys))


def _leave(state: BatcherState, sequence: int, *, tell_device: bool) -> BatcherState:
    """Forgets a sequence, wherever it is."""
    waits = state.waiting.ids == sequence
    if waits.any():
        return state._replace(waiting=Submit(*(a[~waits] for a in state.waiting)))
    parked = state.parked[:, 0] == sequence
    if parked.any():
        return state._replace(parked=state.parked[~parked])
    found = np.flatnonzero(state.rows.id == sequence)
    if not len(found):
        raise ValueError(f"sequence {sequence} is neither waiting nor running nor preempted")
    return _free(state, int(found[0]), tell_device=tell_device)


def _free(state: BatcherState, row: int, *, tell_device: bool) -> BatcherState:
    """Empties a row. Its pages may be granted again at once: steps run in the order dispatched,
    and any step dispatched from here on finds the row stopped."""
    granted = state.pages[row]
    return state._replace(
        rows=state.rows._replace(id=_with(state.rows.id, row, NO_SEQUENCE)),
        pages=_with(state.pages, row, 0),
        keys=_with(state.keys, row, None),
        pool=release(state.pool, granted[granted > 0]),
        released=_with(state.released, row, tell_device),
    )


def _admit(state: BatcherState, config: BatcherConfig) -> BatcherState:
    """Moves the head of the queue into the lowest free row, while one fits."""
    while len(state.waiting.ids):
        rows = state.rows
        free = np.flatnonzero(rows.id == NO_SEQUENCE)
        if not len(free):
            break
        running = rows.id != NO_SEQUENCE
        if config.policy == "static" and (running & (rows.scheduled > 1)).any():
            break
        sequence, prompt, limit, rank = (int(a[0]) for a in state.waiting[:4])
        wanted = pages_for(prompt, config.page_size)
        # A page more for each that runs already: to admit one only to preempt it is no gain.
        if wanted + np.count_nonzero(running) > state.pool.available:
            break
        pool, pages = allocate(state.pool, wanted)
        row = int(free[0])
        new = (sequence, prompt, limit, rank, 0, 0)  # in the order of Rows
        granted = np.zeros(state.pages.shape[1], np.int32)
        granted[:wanted] = pages
        state = state._replace(
            waiting=Submit(*(a[1:] for a in state.waiting)),
            rows=Rows(*(_with(a, row, value) for a, value in zip(rows, new, strict=True))),
            pages=_with(state.pages, row, granted),
            keys=_with(state.keys, row, state.waiting.keys[0]),
            pool=pool,
        )
    return state


def _schedule(
    state: BatcherState, config: BatcherConfig
) -> tuple[BatcherState, tuple[Action, ...]]:
    rows = state.rows
    unread = np.flatnonzero((rows.id != NO_SEQUENCE) & (rows.prefilled < rows.prompt))
    if len(unread):
        first = unread[np.lexsort((rows.id[unread], rows.rank[unread]))[0]]
        return _prefill(state, int(first), config)
    preempted: list[Action] = []
    while True:
        rows = state.rows
        running = rows.id != NO_SEQUENCE
        left = np.where(running, rows.limit - rows.prompt - rows.scheduled, 0)
        if not (left > 0).any():
            return state, tuple(preempted)
        steps = int(min(config.max_steps, left.max()))
        scheduled = rows.scheduled + np.clip(left, 0, steps)
        had = np.count_nonzero(state.pages, axis=1)
        # The last token of all is not in the cache before the step after it.
        wanted = -(-(rows.prompt + scheduled - 1) // config.page_size)
        new = np.where(left > 0, np.maximum(wanted - had, 0), 0)
        if new.sum() <= state.pool.available:
            break
        last = int(np.lexsort((rows.id, rows.rank, running))[-1])
        preempted.append(Preempt(int(rows.id[last])))
        parked = np.array([[rows.id[last], rows.limit[last], rows.rank[last]]])
        state = _free(state, last, tell_device=True)
        state = state._replace(parked=np.concatenate([state.parked, parked]))
    state, granted = _grant(state, had, new, pages_for(config.max_steps, config.page_size) + 1)
    part = left > 0
    count = int(np.flatnonzero(part)[-1]) + 1
    action = Decode(
        rows=count,
        steps=steps,
        ids=np.where(part, rows.id, NO_SEQUENCE)[:count],
        tokens=int((rows.prompt + scheduled)[part].max()),
        released=state.released,
        columns=had.astype(np.int32),
        pages=granted,
    )
    return state._replace(
        rows=rows._replace(scheduled=scheduled), released=np.zeros_like(state.released)
    ), (*preempted, action)


def _grant(
    state: BatcherState, had: np.ndarray, new: np.ndarray, width: int
) -> tuple[BatcherState, np.ndarray]:
    """`new` [M] more pages for each row, after the `had` [M] that it has; int32 [M, width]."""
    pool, pages = allocate(state.pool, int(new.sum()))
    row = np.repeat(np.arange(len(new)), new)
    place = np.arange(len(row)) - np.repeat(np.cumsum(new) - new, new)
    granted = np.zeros((len(new), width), np.int32)
    granted[row, place] = pages
    table = state.pages.copy()
    table[row, had[row] + place] = pages
    return state._replace(pages=table, pool=pool), granted


def _prefill(
    state: BatcherState, row: int, config: BatcherConfig
) -> tuple[BatcherState, tuple[Action, ...]]:
    first = not state.rows.prefilled[row]
    if first:
        state = _share(state, row, config)
    rows = state.rows
    start, prompt = int(rows.prefilled[row]), int(rows.prompt[row])
    stop = min(prompt, start + config.max_chunk)
    granted = state.pages[row]
    action = Prefill(
        id=int(rows.id[row]),
        row=row,
        start=start,
        stop=stop,
        first=first,
        last=stop == prompt,
        limit=int(rows.limit[row]),
        pages=granted[granted > 0],
        released=state.released,
    )
    rows = rows._replace(
        prefilled=_with(rows.prefilled, row, stop),
        scheduled=_with(rows.scheduled, row, int(stop == prompt)),
    )
    # Steps run in the order dispatched: whoever is scheduled from here on finds these pages full.
    full = slice(start // config.page_size, min(stop // config.page_size, len(state.keys[row])))
    pool = publish(state.pool, granted[full], state.keys[row][full])
    return state._replace(rows=rows, pool=pool, released=np.zeros_like(state.released)), (action,)


def _share(state: BatcherState, row: int, config: BatcherConfig) -> BatcherState:
    """Takes the pages of a prompt's beginning that others have filled, for the row's own.

    The last token is computed in any case: what follows it is wanted.
    """
    most = (int(state.rows.prompt[row]) - 1) // config.page_size
    found = find(state.pool, state.keys[row][:most])
    own = state.pages[row].copy()
    pool = release(share(state.pool, found), own[: len(found)])
    own[: len(found)] = found
    prefilled = _with(state.rows.prefilled, row, len(found) * config.page_size)
    return state._replace(
        rows=state.rows._replace(prefilled=prefilled), pages=_with(state.pages, row, own), pool=pool
    )


def _with(array: np.ndarray, index: int, value: int | np.ndarray | None) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


def _seal(*records: NamedTuple) -> None:
    for record in records:
        for value in record:
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
