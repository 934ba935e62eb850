"""Checkpoints of a long run: one directory a step, of which the newest whole one counts.

Each is written by `checkpoints.store` under a name of its own, and the one before is removed only
then: a run that is killed at any moment finds its last checkpoint again.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from checkpoints import store

NAME = re.compile(r"step-(\d+)")


def save_step(directory: Path, step: int, tree: Any, said: dict[str, Any]) -> None:
    """Writes the checkpoint of a step, then removes all others.

    Args:
        directory: of the run's checkpoints; made if it does not exist.
        step: how many are done.
        tree: pytree of arrays, such as a `TrainState`.
        said: what `latest_step` gives back; JSON types.

    Raises:
        CheckpointError: as `store.save`; or this step was saved already.
    """
    path = directory / f"step-{step:08}"
    store.save(path, tree, said)
    for other in directory.glob("step-*"):  # what a killed run had begun to write among them
        if other != path:
            shutil.rmtree(other, ignore_errors=True)


def latest_step(directory: Path) -> tuple[int, dict[str, Any]] | None:
    """(Steps done, `said`) of the newest checkpoint; None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    found = [NAME.fullmatch(path.name) for path in directory.glob("step-*")]
    if not (steps := [int(match[1]) for match in found if match]):
        return None
    return max(steps), store.read_config(directory / f"step-{max(steps):08}")


def restore_step(directory: Path, step: int, abstract: Any) -> Any:
    """The tree of a checkpoint, on the default device. Raises CheckpointError as `store.restore`.

    Args:
        directory: of the run's checkpoints.
        step: of `latest_step`.
        abstract: pytree of `jax.ShapeDtypeStruct` like the tree that was saved.
    """
    return store.restore(directory / f"step-{step:08}", abstract)
