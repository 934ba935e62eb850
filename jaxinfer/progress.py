"""Progress bars on stderr, where stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol


@contextmanager
def loading_bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yields a callback of (bytes done, bytes in all), or None where nobody would see it."""
    with _counting(f"loading {name}", ("DownloadColumn", "TransferSpeedColumn")) as advance:
        yield advance


@contextmanager
def layers_bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yields a callback of (layers done, layers in all), or None where nobody would see it."""
    with _counting(f"quantising {name}", ("MofNCompleteColumn", "TimeRemainingColumn")) as advance:
        yield advance


@contextmanager
def training_bar(name: str) -> Iterator[Callable[[int, int, str], None] | None]:
    """Yields a callback of (steps done, steps in all, the loss), or None where nobody would see."""
    columns = ("MofNCompleteColumn", "TimeRemainingColumn")
    with _counting(f"training {name}", columns) as advance:
        yield advance


class _Advance(Protocol):
    def __call__(self, done: int, total: int, said: str = "", /) -> None: ...


@contextmanager
def _counting(title: str, columns: tuple[str, ...]) -> Iterator[_Advance | None]:
    """A bar of (done, in all, what is said beside it). `columns`: names in `rich.progress`, which
    is imported on use."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich
    from rich.console import Console

    shown = (title, rich.BarColumn(), *(getattr(rich, name)() for name in columns))
    shown = (*shown, "{task.description}")
    with rich.Progress(*shown, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def advance(done: int, total: int, said: str = "", /) -> None:
            progress.update(task, completed=done, total=total, description=said)

        yield advance


class RunState(NamedTuple):
    """How far a run of many requests has got.

    Attributes:
        done: requests.
        tokens: generated since the start, those of unfinished requests included.
        running, waiting: sequences in rows, and in the queue.
    """

    done: int
    tokens: int
    running: int
    waiting: int


@contextmanager
def run_bar(done: int, total: int) -> Iterator[Callable[[RunState], None] | None]:
    """Yields a callback for a run of `total` requests, or None where nobody would see it.

    Args:
        done: those that were done before.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tok/s"),
        TextColumn("{task.fields[running]} running, {task.fields[waiting]} waiting"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=done, speed=0.0, running=0, waiting=0)
        # A task of its own, not shown: rich knows the speed of a task lately.
        tokens = progress.add_task("", total=None, visible=False)

        def show(state: RunState) -> None:
            progress.update(tokens, completed=state.tokens)
            speed = next(t.speed for t in progress.tasks if t.id == tokens) or 0.0
            progress.update(
                task,
                completed=state.done,
                speed=speed,
                running=state.running,
                waiting=state.waiting,
            )

        yield show
