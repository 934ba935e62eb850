"""`generate --metrics`: what the engine measured, as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from jaxinfer.llm import LLM
    from jaxinfer.metrics import Metrics, Percentiles, Together

PERCENTILES = ("queue_s", "ttft_s", "tpot_s", "itl_s", "e2e_s")  # of the summary


def metrics_path(name: str | None) -> Path | None:
    """Where metrics go, if they are wanted.

    Raises:
        typer.BadParameter: no file can be there.
    """
    if name is None:
        return None
    path = Path(name).expanduser().resolve()
    if not path.parent.is_dir() or path.is_dir():
        raise typer.BadParameter(f"{name}: expected a file in a folder that exists")
    return path


@contextmanager
def metrics_written(path: Path | None, llm: LLM) -> Iterator[None]:
    """Writes an LLM's metrics when the block is left, in whatever way; nothing without a path.

    The name stands for a whole file or for what was there before.
    """
    try:
        yield
    finally:
        if path is not None:
            _write(path, llm.metrics)


def _write(path: Path, metrics: Metrics | Together) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w") as file:
            for line in lines(metrics):
                print(json.dumps(line), file=file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lines(metrics: Metrics | Together) -> Iterator[dict[str, Any]]:
    """The steps, then the requests, then the summary; times are seconds."""
    for step in metrics.steps:
        yield {"kind": "step", **step._asdict()}
    for r in metrics.requests:
        derived = {"queue_s": r.queue_s, "ttft_s": r.ttft_s, "tpot_s": r.tpot_s, "e2e_s": r.e2e_s}
        yield {"kind": "request", **r._asdict(), **derived}
    figures = metrics.summary()._asdict()
    yield {"kind": "summary", **figures, **{x: _both(figures[x]) for x in PERCENTILES}}


def _both(values: Percentiles | None) -> dict[str, float] | None:
    return None if values is None else values._asdict()
