"""What a process does whose devices another one's engine uses: the same, at its word."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxinfer.distributed import Link
from jaxinfer.engine import Engine
from jaxinfer.observe import DISPATCHES_AHEAD
from jaxinfer.packing import Layout, Packed, flatten
from jaxinfer.runner import Sampled, StepKey


def follow(engine: Engine, link: Link) -> None:
    """Has `engine` do what the controller's does, until that closes the link.

    Raises:
        JaxRuntimeError: something went wrong on a device; or the controller is gone.
    """
    begun: deque[Sampled] = deque()
    layouts: dict[StepKey, Layout] = {}  # of plans, which follow from the keys
    for message in link.messages():
        told = message.told
        if message.name == "reset":
            engine.reset()
            continue
        if told["penalised"]:
            engine.count_penalties()
        if message.name == "compile":
            engine.compile([_key(key) for key in told["keys"]])
            continue
        assert message.name == "run", message.name
        key = _key(told["key"])
        if key not in layouts:
            layouts[key] = flatten(engine.some_plan(key)).layout
        words = np.frombuffer(message.payload, np.uint32)
        begun.append(engine.run(key, Packed(words, layouts[key])))
        if len(begun) > DISPATCHES_AHEAD:  # as the controller, which reads them
            jax.block_until_ready(begun.popleft())


def _key(told: Mapping[str, Any]) -> StepKey:
    """A key that was told as JSON, which has lists for tuples."""
    found: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in told.items()}
    return StepKey(**found)
