"""Engines side by side on one device: who shares it, whose turn it is, and what each repeat gave.

Engines of a group are all loaded, and take turns at every repeat, in an order that rotates. Where
not all fit in the device's memory there are several groups, the first engine in each of them, so
that every other is compared with it within a group.

Whatever an engine is asked for is cut off when time is up: its process is ended, what was measured
is kept, and each case that it has no figure of is a `Failure`, `OUT_OF_TIME`. Engines that are not
warm when a part of the time has passed are ended, so that the others can be measured.
"""

from __future__ import annotations

import math
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
from bench.engines.client import START_S, Client, EngineError, Missing, NoAnswer, Reply
from bench.serving import Stream
from bench.until import NEVER, OUT_OF_TIME, Until

USABLE = 0.92  # of the device's memory, by all engines of a group
SPARE_BYTES = 4 << 30  # of an engine, beside its weights and its keys and values
MOST_WARM = 3  # calls that may compile, before what is timed
TRIES = 3  # at a repeat, before times that make no sense are a failure
CALL_S, MEMORY_S = 600.0, 60.0
WARM_SHARE = 0.6  # of a group's time, at most, to load and to compile
SEED = 5000


@dataclass(frozen=True)
class Session:
    """Cases that share engines.

    Attributes:
        checkpoint: directory that all load.
        options: of all engines; each is given its share of memory.
        cases: in order.
        extra: by engine, arguments of its own.
        repeats: of every case; fewer by an engine that takes longer than `case_seconds` for them.
    """

    checkpoint: Path
    options: Options
    cases: tuple[Case, ...]
    extra: dict[str, dict] = field(default_factory=dict)
    repeats: int = 3
    case_seconds: float = math.inf


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
    until: Until = NEVER,
    *,
    start: Callable[[str, Path, Options], Client] = Client,
) -> Iterator[Event]:
    """Runs every group of engines through the cases. An engine that fails leaves; the rest go on.

    Args:
        session: what is run.
        groups: of `make_groups`.
        until: when it is over; groups have equal parts of the time.
        start: an engine's process.
    """
    for number, group in enumerate(groups):
        own = until.part(1 / (len(groups) - number))
        if own.over:
            for name in group:
                yield from _late(name, session.cases)
            continue
        with ExitStack() as stack:
            clients: dict[str, Client] = {}
            for name in group:
                options = replace(
                    session.options,
                    memory_share=USABLE / len(group),
                    extra=session.extra.get(name, {}),
                )
                clients[name] = stack.enter_context(start(name, session.checkpoint, options))
            yield from _measure(session, number, clients, own)


def _measure(
    session: Session, number: int, clients: dict[str, Client], until: Until
) -> Iterator[Event]:
    """What one group has to say."""
    failures = _warm(session, clients, until.part(WARM_SHARE))
    yield from failures
    none = {failure.engine for failure in failures if failure.case is None}  # not even loaded
    for name in [name for name, client in clients.items() if name in none or not client.alive]:
        del clients[name]
    for case in session.cases:
        cold = {failure.engine for failure in failures if failure.case is case}
        yield from _run_case(session, number, case, clients, cold, until)
    for name, client in clients.items():
        if until.over:
            return
        try:
            memory = client.memory(min(MEMORY_S, until.left))
            yield Took(name, session.cases[-1], memory, client.versions)
        except EngineError as error:
            yield Failure(name, None, f"memory: {why(error, until)}", error.tail)


def why(error: EngineError, until: Until) -> str:
    """What an engine's failure is called: one that was cut off has done nothing wrong."""
    return OUT_OF_TIME if isinstance(error, NoAnswer) and until.over else str(error)


def _able(case: Case, name: str) -> bool:
    return case.needs <= ENGINES[name].can


def _late(name: str, own: Sequence[Case]) -> list[Failure]:
    return [Failure(name, case, OUT_OF_TIME) for case in own if _able(case, name)]


def _warm(session: Session, clients: dict[str, Client], until: Until) -> list[Failure]:
    """Has every engine load, and compile what its cases need, all at once: nothing is timed."""
    with ThreadPoolExecutor(max(1, len(clients))) as pool:
        found = pool.map(lambda one: _warm_one(one, session, until), clients.values())
        return [failure for each in found for failure in each]


def _warm_one(client: Client, session: Session, until: Until) -> list[Failure]:
    """One that is cut off cannot be measured at all, but one that only begins nothing more can."""
    name, failures = client.name, []
    own = [case for case in session.cases if _able(case, name)]
    try:
        client.wait(min(START_S, until.left))
    except EngineError as error:
        if why(error, until) == OUT_OF_TIME:
            return _late(name, own)
        return [Failure(name, None, str(error), error.tail, isinstance(error, Missing))]
    for i, case in enumerate(own):
        if until.over:
            return failures + _late(name, own[i:])
        began = time.monotonic()
        try:
            _until_warm(client, case, session.options.warm_up, until)
        except EngineError as error:
            if why(error, until) == OUT_OF_TIME:
                left = [c for c in own if all(f.case is not c for f in failures)]
                return failures + _late(name, left)
            failures.append(Failure(name, case, str(error), error.tail))
            if not client.alive:
                break
            continue
        print(f"  {case.workload} {case.name} {name}: warm, "
              f"{time.monotonic() - began:.1f} s", flush=True)  # fmt: skip
    return failures


def _until_warm(client: Client, case: Case, brief: bool, until: Until) -> None:
    """`brief`: the engine has compiled for all lengths, or compiles for none."""
    for i in range(MOST_WARM):
        calls = case.draw(SEED + i)
        replies = _ask(client, cases.brief(calls) if brief else calls, until)
        if not any(reply.compiled for reply in replies):
            break


def _run_case(
    session: Session, number: int, case: Case, clients: dict[str, Client], cold: set[str],
    until: Until,
) -> Iterator[Event]:  # fmt: skip
    """`cold`: engines that could not be warmed up for it."""
    for name in [name for name in clients if not _able(case, name)]:
        lacks = ", ".join(sorted(case.needs - ENGINES[name].can))
        yield Failure(name, case, f"cannot: {lacks}", missing=True)
    took: dict[str, list[float]] = {
        name: [] for name in clients if _able(case, name) and name not in cold
    }
    for turn in range(session.repeats):
        order = list(took)
        at = turn % len(order) if order else 0
        for name in order[at:] + order[:at]:
            if not _has_time(took[name], session.case_seconds, until):
                continue
            try:
                if not took[name]:  # caches and graphs of another case's sizes are made anew
                    _ask(clients[name], cases.brief(case.draw(SEED)), until)
                began, seed = until.now(), SEED + MOST_WARM + number * session.repeats + turn
                trial = _once(clients[name], case, seed, (number, turn), until)
            except EngineError as error:
                if why(error, until) == OUT_OF_TIME:
                    continue
                yield Failure(name, case, str(error), error.tail)
                del took[name]
                if not clients[name].alive:  # else it goes on with the next case
                    del clients[name]
                continue
            took[name].append(until.now() - began)
            yield trial
    for name in [name for name, each in took.items() if not each]:
        yield from _late(name, [case])


def _has_time(took: Sequence[float], most: float, until: Until) -> bool:
    """Whether one more repeat ends in time, if it takes as long as the last; the first begins."""
    last = took[-1] if took else 0.0
    return until.left > last and sum(took) + last <= most


def _ask(client: Client, calls: Calls, until: Until) -> list[Reply]:
    """All calls of one repeat, one after the other."""
    return [client.generate(call, min(CALL_S, until.left)) for call in calls]


def _once(client: Client, case: Case, seed: int, turn: tuple[int, int], until: Until) -> Trial:
    """One repeat.

    Raises:
        EngineError: a call failed, or its times make no sense.
    """
    calls, senseless = case.draw(seed), None
    for _ in range(TRIES):
        replies = _ask(client, calls, until)
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
