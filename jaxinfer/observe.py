"""What a dispatch brought, taken apart for the sequences that were in it: pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import batcher, sampling
from jaxinfer.hooked import NO_FAULT, fault_sites
from jaxinfer.plans import chunk_starts
from jaxinfer.runner import Sampled, StepKey

# The device runs one dispatch while the host reads the one before.
DISPATCHES_AHEAD = 2


class Update(NamedTuple):
    """What one step brought for a sequence.

    `logprobs` describe `tokens`; `scores` the next prompt tokens, each given what comes before it.
    `cached`, with a sequence's first token: how many tokens of its prompt
    were not computed for it.
    `activations`, by site: of the next tokens that went through the model, [n, width].
    `fault`: the site at which the request's own function made something that is not finite; the
    sequence has ended by it.
    """

    id: int
    tokens: list[int]
    logprobs: sampling.Logprobs | None
    scores: sampling.Logprobs | None
    finished: bool
    cached: int = 0
    activations: dict[str, np.ndarray] | None = None
    fault: str | None = None


class InFlight(NamedTuple):
    """A dispatch whose results have not been read.

    `guessed`: bool [n]; for which of the action's sequences tokens are guessed. `under_way`: there
    was another before it, and nothing between them.
    """

    action: batcher.Run
    key: StepKey
    sampled: Sampled
    guessed: np.ndarray
    under_way: bool


class Fault(NamedTuple):
    """A sequence whose function went wrong, the position of the token, and where."""

    sequence: int
    position: int
    site: str


def sequences_of(action: batcher.Run) -> list[int]:
    """Sequences of which an action brings results."""
    return action.ids.tolist() + [chunk.id for chunk in action.chunks]


def start_of(action: batcher.Run, chunk: batcher.Prefill) -> int:
    """Where in the step's flat order a chunk begins."""
    return chunk_starts(action)[[other.id for other in action.chunks].index(chunk.id)]


def faults(done: InFlight) -> Iterator[Fault]:
    """The first of each sequence that has any; none without hooks."""
    if done.sampled.faults is None:
        return
    found, sites = np.asarray(done.sampled.faults), fault_sites(done.key.hooks)
    rows, action = done.key.rows, done.action
    slots = [*enumerate(action.ids.tolist())]
    slots += enumerate((chunk.id for chunk in action.chunks), rows)
    for slot, sequence in slots:
        step = int(np.argmin(found[:, 1, slot]))
        place, position = found[step, :, slot].tolist()
        if place != NO_FAULT:
            yield Fault(sequence, position, sites[place])


def taken(logprobs: Any, index: Any, top: int) -> sampling.Logprobs:
    """Host copies of the rows at `index`, `top` of the likeliest each."""
    out = jax.tree.map(lambda x: np.asarray(x)[index], logprobs)
    return out._replace(top_ids=out.top_ids[:, :top], top_logprobs=out.top_logprobs[:, :top])
