"""Engines side by side on one device: who shares it, whose turn it is, and what each repeat gave.

Engines of a group are all loaded, and take turns at every repeat, in an order that rotates. Where
not all fit in the device's memory there are several groups, the first engine in each of them, so
that every other is compared with it within a group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from bench import cases
from bench.cases import Calls, Case, Figures, Got
from bench.engines import ENGINES, Memory, Options, Output
from bench.engines.client import Client, EngineError, Missing, Reply
from bench.serving import Stream

USABLE = 0.92  # of the device's memory, by all engines of a group
SPARE_BYTES = 4 << 30  # of an engine, beside its weights and its keys and values
MOST_WARM = 3  # calls that may compile, before what is timed
TRIES = 3  # at a repeat, before times that make no sense are a failure
CALL_S = 600.0
SEED = 5000


@dataclass(frozen=True)
class Session:
    """Cases that share engines.

    Attributes:
        checkpoint: directory that all load.
        options: of all engines; each is given its share of memory.
        cases: in order.
        extra: by engine, arguments of its own.
        repeats: of every case.
    """

    checkpoint: Path
    options: Options
    cases: tuple[Case, ...]
    extra: dict[str, dict] = field(default_factory=dict)
    repeats: int = 3


class Trial(NamedTuple):
    """One repeat of one case by one engine.

    Attributes:
        turn: repeats with the same turn had the same requests, one after the other.
        outputs: of the last call; `seen`: of all, for the distribution of ITL.
        compiled: programs compiled meanwhile: a repeat with some is not warm.
    """

    engine: str
    case: Case
    turn: tuple[int, int]
    figures: Figures
    outputs: list[Output]
    seen: list[Stream]
    compiled: int


class Failure(NamedTuple):
    """An engine, or a case of it, that came to nothing. `case`: None if it did not start.
    `missing`: its package is not installed, which is no fault."""

    engine: str
    case: Case | None
    error: str
    tail: str = ""
    missing: bool = False


class Took(NamedTuple):
    """An engine's memory after a session, and the versions of its packages."""

    engine: str
    case: Case
    memory: Memory
    versions: dict[str, str | None]


Event = Trial | Failure | Took


def make_groups(engines: Sequence[str], fit: int) -> list[list[str]]:
    """Groups of at most `fit` engines, the first one in each, if it has company at all."""
    first, others = engines[0], list(engines[1:])
    if fit >= len(engines):
        return [list(engines)]
    if fit < 2:
        return [[name] for name in engines]
    step = fit - 1
    return [[first, *others[i : i + step]] for i in range(0, len(others), step)]


def fitting(
    own: Sequence[Case],
    max_num_seqs: int,
    kv_token: int,
    memory: int | None,
    weights: int,
    engines: int,
) -> int:
    """How many engines fit: by weights, by keys and values of what runs at once, and spare bytes.

    Args:
        own: cases.
        max_num_seqs: requests that run at once, at most.
        kv_token: bytes of keys and values of a token.
        memory: of the device; None: any number fits.
        weights: bytes of the checkpoint.
        engines: there are no more.
    """
    if memory is None:
        return engines
    held = cases.concurrent_tokens(own, max_num_seqs)
    return min(engines, int(USABLE * memory / (weights + held * kv_token + SPARE_BYTES)))


def run(
    session: Session,
    groups: Sequence[Sequence[str]],
    late: Callable[[], bool] = lambda: False,
    *,
    start: Callable[[str, Path, Options], Client] = Client,
) -> Iterator[Event]:
    """Runs every group of engines through the cases. An engine that fails leaves; the rest go on.

    Args:
        session: what is run.
        groups: of `make_groups`.
        late: whether time is up: then what is left is a failure each.
        start: an engine's process.
    """
    for number, group in enumerate(groups):
        share = USABLE / len(group)
        with ExitStack() as stack:
            clients: dict[str, Client] = {}
            for name in group:
                options = replace(
                    session.options, memory_share=share, extra=session.extra.get(name, {})
                )
                clients[name] = stack.enter_context(start(name, session.checkpoint, options))
            yield from _await(clients)
            failures = _warm(session, clients, late)
            yield from failures
            for name in [name for name, client in clients.items() if not client.alive]:
                del clients[name]
            for case in session.cases:
                cold = {failure.engine for failure in failures if failure.case is case}
                yield from _run_case(session, number, case, clients, cold)
            for name, client in clients.items():
                try:
                    yield Took(name, session.cases[-1], client.memory(), client.versions)
                except EngineError as error:
                    yield Failure(name, None, f"memory: {error}", error.tail)


def _await(clients: dict[str, Client]) -> Iterator[Event]:
    """Waits until all have loaded, and takes out those that do not."""
    for name, client in list(clients.items()):
        try:
            client.wait()
        except EngineError as error:
            yield Failure(name, None, str(error), error.tail, isinstance(error, Missing))
            del clients[name]


def _able(case: Case, name: str) -> bool:
    return case.needs <= ENGINES[name].can


def _warm(session: Session, clients: dict[str, Client], late: Callable[[], bool]) -> list[Failure]:
    """Has every engine compile what its cases need, all engines at once: nothing is timed."""
    with ThreadPoolExecutor(max(1, len(clients))) as pool:
        found = pool.map(lambda one: _warm_one(one, session.cases, late), clients.values())
        return [failure for each in found for failure in each]


def _warm_one(client: Client, own: Sequence[Case], late: Callable[[], bool]) -> list[Failure]:
    failures = []
    for case in (case for case in own if _able(case, client.name)):
        if late():
            failures.append(Failure(client.name, case, "not started: out of time"))
            continue
        began = time.monotonic()
        try:
            for i in range(MOST_WARM):
                if not any(r.compiled for r in _ask(client, case.draw(SEED + i))):
                    break
        except EngineError as error:
            failures.append(Failure(client.name, case, str(error), error.tail))
            if not client.alive:
                break
        print(f"  {case.workload} {case.name} {client.name}: warm, "
              f"{time.monotonic() - began:.1f} s", flush=True)  # fmt: skip
    return failures


def _run_case(
    session: Session, number: int, case: Case, clients: dict[str, Client], cold: set[str]
) -> Iterator[Event]:
    """`cold`: engines that could not be warmed up for it."""
    for name in [name for name in clients if not _able(case, name)]:
        lacks = ", ".join(sorted(case.needs - ENGINES[name].can))
        yield Failure(name, case, f"cannot: {lacks}", missing=True)
    warm = [name for name in clients if _able(case, name) and name not in cold]
    for turn in range(session.repeats):
        at = turn % len(warm) if warm else 0
        for name in warm[at:] + warm[:at]:
            seed = SEED + MOST_WARM + number * session.repeats + turn
            try:
                yield _once(clients[name], case, seed, (number, turn))
            except EngineError as error:
                warm.remove(name)
                yield from _failed(clients, name, case, error)


def _failed(
    clients: dict[str, Client], name: str, case: Case, error: EngineError
) -> Iterator[Event]:
    """The engine goes on with the next case if its process has survived this one."""
    yield Failure(name, case, str(error), error.tail)
    if not clients[name].alive:
        del clients[name]


def _ask(client: Client, calls: Calls) -> list[Reply]:
    """All calls of one repeat, one after the other."""
    return [client.generate(call, CALL_S) for call in calls]


def _once(client: Client, case: Case, seed: int, turn: tuple[int, int]) -> Trial:
    """One repeat.

    Raises:
        EngineError: a call failed, or its times make no sense.
    """
    calls, senseless = case.draw(seed), None
    for _ in range(TRIES):
        replies = _ask(client, calls)
        got = [Got(reply.outputs, reply.seconds) for reply in replies]
        try:
            figures = case.measure(calls, got)
        except ValueError as error:  # a machine that was busy with something else
            senseless = error
            continue
        compiled = sum(reply.compiled for reply in replies)
        seen = cases.streams(calls, got)
        return Trial(client.name, case, turn, figures, replies[-1].outputs, seen, compiled)
    raise EngineError(f"{TRIES} times: {senseless}")
