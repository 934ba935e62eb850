"""The scheduler: a pure state machine over NumPy arrays.

`step(state, events, config) -> (state, actions)`: no clock, no I/O, no randomness, no jax. It
sees lengths and keys, never tokens. Same state and same events give the same actions, so that any
run can be replayed. A sequence's pages are granted whole when it is admitted, so nothing is
preempted. Pages of a prompt whose keys are known already are shared instead of computed.
"""

from __future__ import annotations

from typing import NamedTuple

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
    (prompt included) that each may reach. `keys`, objects [n]: of each prompt's full pages, of
    `pages.page_keys`; without any, the prompt shares nothing."""

    ids: np.ndarray
    prompts: np.ndarray
    limits: np.ndarray
    keys: np.ndarray


class Cancel(NamedTuple):
    """A sequence, waiting or running, is given up by the host."""

    id: int


class Finished(NamedTuple):
    """A sequence that the device has ended itself. int64 [n]."""

    ids: np.ndarray


Event = Submit | Cancel | Finished


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
    of them may have become afterwards.
    """

    rows: int
    steps: int
    ids: np.ndarray
    tokens: int
    released: np.ndarray


class Refuse(NamedTuple):
    """Sequence `id` was not taken into the queue."""

    id: int
    reason: str


Action = Prefill | Decode | Refuse


class Rows(NamedTuple):
    """The running sequences, int64 [M] each; id -1: the row is free.

    `begun`: whether some of it was dispatched. `prefilled`: prompt tokens that were, or are shared.
    `scheduled`: output tokens that the steps dispatched so far may have produced.
    """

    id: np.ndarray
    prompt: np.ndarray
    limit: np.ndarray
    begun: np.ndarray
    prefilled: np.ndarray
    scheduled: np.ndarray


class BatcherState(NamedTuple):
    """Everything the scheduler knows. `pages` int32 [M, P_max], 0 where none is granted.

    `keys`, objects [M]: of the full pages of each running sequence's prompt. `released` [M]: rows
    that the device must be told to stop, with the next action.
    """

    waiting: Submit
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
        waiting=Submit(none, none, none, np.empty(0, object)),
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
        ValueError: an event that names a sequence which is neither waiting nor running, or a
            submission that could never fit.
    """
    actions: list[Action] = []
    for event in events:
        match event:
            case Submit():
                state, refused = _submit(state, event, config)
                actions += refused
            case Cancel():
                state = _cancel(state, event.id)
            case Finished():
                for sequence in event.ids:
                    state = _free(state, _row_of(state, int(sequence)), tell_device=False)
    state = _admit(state, config)
    state, run = _schedule(state, config)
    _seal(state, state.waiting, state.rows, *run)
    return state, (*actions, *run)


def idle(state: BatcherState) -> bool:
    """Whether nothing waits and nothing runs."""
    return not len(state.waiting.ids) and bool((state.rows.id == NO_SEQUENCE).all())


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
    waiting = Submit(
        *(np.concatenate([a, b[:room]]) for a, b in zip(state.waiting, event, strict=True))
    )
    reason = f"the queue is full: {config.max_waiting} sequences wait already"
    return state._replace(waiting=waiting), [Refuse(int(i), reason) for i in event.ids[room:]]


def _cancel(state: BatcherState, sequence: int) -> BatcherState:
    waits = state.waiting.ids == sequence
    if waits.any():
        return state._replace(waiting=Submit(*(a[~waits] for a in state.waiting)))
    return _free(state, _row_of(state, sequence), tell_device=True)


def _row_of(state: BatcherState, sequence: int) -> int:
    found = np.flatnonzero(state.rows.id == sequence)
    if not len(found):
        raise ValueError(f"sequence {sequence} is neither waiting nor running")
    return int(found[0])


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
        sequence, prompt, limit = (int(a[0]) for a in state.waiting[:3])
        wanted = pages_for(limit, config.page_size)
        if wanted > state.pool.available:
            break
        pool, pages = allocate(state.pool, wanted)
        row = int(free[0])
        new = (sequence, prompt, limit, 0, 0, 0)  # in the order of Rows
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
    running = rows.id != NO_SEQUENCE
    unread = np.flatnonzero(running & (rows.prefilled < rows.prompt))
    if len(unread):
        return _prefill(state, int(unread[0]), config)
    left = np.where(running, rows.limit - rows.prompt - rows.scheduled, 0)
    if not (left > 0).any():
        return state, ()
    steps = int(min(config.max_steps, left.max()))
    count = int(np.flatnonzero(left > 0)[-1]) + 1
    scheduled = rows.scheduled + np.clip(left, 0, steps)
    part = left > 0
    action = Decode(
        rows=count,
        steps=steps,
        ids=np.where(part, rows.id, NO_SEQUENCE)[:count],
        tokens=int((rows.prompt + scheduled)[part].max()),
        released=state.released,
    )
    return state._replace(
        rows=rows._replace(scheduled=scheduled), released=np.zeros_like(state.released)
    ), (action,)


def _prefill(
    state: BatcherState, row: int, config: BatcherConfig
) -> tuple[BatcherState, tuple[Action, ...]]:
    first = not state.rows.begun[row]
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
        begun=_with(rows.begun, row, 1),
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
