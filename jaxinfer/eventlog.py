"""The scheduler's event log: written while an engine runs, and replayed without one.

The scheduler is pure: from its config and its events alone follows all that it did. A log is JSON
lines: first `{"version": 3, "config": {...}}`, then for each step `{"events": [...], "actions":
[...]}`. Actions are there to be compared: a replay that differs names the step. An engine that has
forgotten everything after a failure begins again with such a first line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from jaxinfer import batcher
from jaxinfer.batcher import Action, BatcherState, Event, Move, Preempt, Prefill, Refuse, Run
from jaxinfer.config import BatcherConfig
from jaxinfer.errors import InvalidRequest

VERSION = 3
EVENTS = {
    kind.__name__: kind
    for kind in (
        batcher.Submit,
        batcher.Return,
        batcher.Cancel,
        batcher.Finished,
        batcher.Guess,
        batcher.Progress,
    )
}


class Step(NamedTuple):
    """One replayed step: its line in the log, what came in, what went out, the state afterwards."""

    number: int
    events: tuple[Event, ...]
    actions: tuple[Action, ...]
    state: BatcherState


def write_header(file: TextIO, config: BatcherConfig) -> None:
    """Begins a log."""
    print(json.dumps({"version": VERSION, "config": asdict(config)}), file=file, flush=True)


def write_step(file: TextIO, events: Sequence[Event], actions: Sequence[Action]) -> None:
    """Adds a step, at once on disk as a whole line."""
    line = {"events": [_plain(e) for e in events], "actions": [_plain(a) for a in actions]}
    print(json.dumps(line), file=file, flush=True)


def replay(path: Path) -> Iterator[Step]:
    """Runs the scheduler again over a log.

    A last line that was cut off, as by a kill, is left out.

    Raises:
        InvalidRequest: the file is no such log, or of another version, or the scheduler now does
            something else than it did; says at which line.
    """
    config = state = None
    with path.open() as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                return
            line = _line(path, number, text)
            if "config" in line and line.get("version") == VERSION:
                config = _config(path, number, line["config"])
                state = batcher.create_state(config)
                continue
            if config is None or state is None or "events" not in line:
                raise InvalidRequest(
                    f"{path}, line {number}: not an event log of version {VERSION}"
                )
            events = tuple(_event(e) for e in line["events"])
            state, actions = batcher.step(state, events, config)
            if [_plain(a) for a in actions] != line["actions"]:
                raise InvalidRequest(
                    f"{path}, line {number}: the scheduler now does {[*map(_name, actions)]}, not "
                    f"{[a['kind'] for a in line['actions']]} as logged, or with other numbers"
                )
            yield Step(number, events, actions, state)


def describe(step: Step) -> str:
    """A step in a few words: events, what was run, what waits and why, pages left."""
    came = ", ".join(_event_words(e) for e in step.events)
    ran = ", ".join(_action_words(a) for a in step.actions) or "nothing to run"
    state = step.state
    running = int(np.count_nonzero(state.rows.id != batcher.NO_SEQUENCE))
    left = f"{running} run, {len(state.waiting.ids)} wait, {state.pool.available} pages free"
    why = f" ({_why(state)})" if len(state.waiting.ids) else ""
    return f"{step.number}: {came + ' -> ' if came else ''}{ran}; {left}{why}"


def _why(state: BatcherState) -> str:
    """Why the head of the queue was not admitted, as things stand after the step."""
    if (state.rows.id != batcher.NO_SEQUENCE).all():
        return "no row is free"
    head, tokens = int(state.waiting.ids[0]), int(state.waiting.prompts[0])
    return f"{head} needs pages for {tokens} tokens, or its turn"


def _event_words(event: Event) -> str:
    match event:
        case batcher.Submit():
            return f"{len(event.ids)} submitted"
        case batcher.Finished():
            return f"{_some(event.ids.tolist())} finished"
        case batcher.Return():
            return f"{event.id} returns with {event.tokens} tokens"
        case batcher.Cancel():
            return f"{event.id} cancelled"
        case batcher.Guess():
            return f"{event.tokens} guesses a step"
        case batcher.Progress():
            return f"{_some(event.ids.tolist())} got on"


def _action_words(action: Action) -> str:
    match action:
        case Run():
            some = [_chunk_words(chunk) for chunk in action.chunks]
            if len(action.ids):
                guesses = f" with {action.guesses} guesses" if action.guesses else ""
                some.append(f"{action.steps} steps{guesses} of {_some(action.ids.tolist())}")
            return ", ".join(some)
        case Move():
            return f"{len(action.stores)} pages to the host, {len(action.loads)} from it"
        case Preempt():
            return f"{action.id} preempted: no pages left"
        case Refuse():
            return f"{action.id} refused: {action.reason}"


def _chunk_words(chunk: Prefill) -> str:
    shared = f", {chunk.start} shared" if chunk.first and chunk.start else ""
    return f"read {chunk.id} [{chunk.start}:{chunk.stop}]{shared}"


def _some(ids: list[int]) -> str:
    shown = " ".join(map(str, ids[:8]))
    return shown if len(ids) <= 8 else f"{shown} and {len(ids) - 8} more"


def _name(record: Any) -> str:
    return type(record).__name__


def _plain(record: Any) -> dict[str, Any]:
    """A record as JSON: its kind and fields."""
    fields = {name: _value(x) for name, x in zip(record._fields, record, strict=True)}
    return {"kind": _name(record), **fields}


def _value(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return [_value(i) for i in x] if x.dtype == object else x.tolist()
    return [_plain(record) for record in x] if isinstance(x, tuple) else x


def _event(fields: dict[str, Any]) -> Event:
    kind = EVENTS[fields["kind"]]
    values: dict[str, Any] = {}
    for name in kind._fields:
        x = fields[name]
        if name == "keys":
            several = kind is not batcher.Return
            made = [np.array(k, np.uint64).reshape(-1, 2) for k in (x if several else [x])]
            for keys in made:
                keys.flags.writeable = False
            values[name] = batcher.objects(made) if several else made[0]
        else:
            values[name] = np.array(x, np.int64) if isinstance(x, list) else x
    return kind(**values)


def _config(path: Path, number: int, fields: dict[str, Any]) -> BatcherConfig:
    try:
        return BatcherConfig(**fields)
    except TypeError as error:
        raise InvalidRequest(
            f"{path}, line {number}: not the scheduler's config: {error}"
        ) from error


def _line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{path}, line {number}: not JSON: {error}") from error
    return line if isinstance(line, dict) else {}
