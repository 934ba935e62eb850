"""A sequence while the engine runs it: what of it is known, and what a step adds to that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxinfer import batcher, sampling
from jaxinfer.hooks import Bound
from jaxinfer.observe import InFlight, Update, start_of, taken
from jaxinfer.plans import Kind, SequenceSpec
from jaxinfer.runner import Sampled


@dataclass
class Tracked:
    """A sequence that has not ended.

    Attributes:
        spec: what is to be run.
        outputs: what it has said.
        scored: prompt tokens whose scores were given out; None: it is not scored.
        captured: tokens whose activations were given out.
        cached: while its prompt is read: how many tokens of it were not computed.
        kind: what it needs of programs.
    """

    spec: SequenceSpec
    outputs: list[int] = field(default_factory=list)
    scored: int | None = None
    captured: int = 0
    cached: int | None = None
    kind: Kind = field(init=False)

    def __post_init__(self) -> None:
        self.kind = Kind.of(self.spec.params)

    def __len__(self) -> int:
        """Tokens, those of the prompt included."""
        return len(self.spec.prompt) + len(self.outputs)

    @property
    def tokens(self) -> np.ndarray:
        """int32; all that is known of it: its prompt, and what was sampled."""
        if not self.outputs:
            return self.spec.prompt
        return np.concatenate([self.spec.prompt, np.array(self.outputs, np.int32)])

    @property
    def whole(self) -> bool:
        """Whether it is computed whole: it is scored, its activations are wanted, or the device
        must see its tokens for a penalty."""
        spec = self.spec
        captures = spec.inside is not None and bool(spec.inside.capture)
        return captures or spec.score is not None or spec.params.penalised


def track(spec: SequenceSpec) -> Tracked:
    """A sequence of which nothing has been run."""
    return Tracked(spec, scored=None if spec.score is None else spec.score_from)


def hooks_of(spec: SequenceSpec) -> list[Bound]:
    """The functions that change its inside."""
    return [] if spec.inside is None else spec.inside.hooks


def take_tokens(one: Tracked, id: int, column: list[int], place: int, sampled: Sampled) -> Update:
    """Notes the tokens that a dispatch brought, those of column `place`; -1 is none."""
    spec = one.spec
    there = [i for i, token in enumerate(column) if token >= 0]
    tokens, logprobs = [column[i] for i in there], None
    if spec.params.logprobs is not None and tokens:
        logprobs = taken(sampled.logprobs, (there, place), spec.params.logprobs)
    one.outputs += tokens
    stopped = bool(tokens) and tokens[-1] in spec.stop_ids
    return Update(id, tokens, logprobs, None, len(one) >= spec.limit or stopped)


def take_activations(
    one: Tracked, start: int, count: int, sampled: Sampled, where: Any
) -> dict[str, np.ndarray] | None:
    """Its activations from position `start` on, which lie at `where`, by site: [n, width]; what was
    given out before a preemption is left out. None: none are wanted."""
    inside = one.spec.inside
    if inside is None or not inside.capture:
        return None
    new = max(0, one.captured - start)
    one.captured = max(start + count, one.captured)
    # Copies: a view would keep all of the step in memory.
    return {site: np.asarray(sampled.captured[site])[where][new:].copy() for site in inside.capture}


def take_scores(one: Tracked, chunk: batcher.Prefill, done: InFlight) -> sampling.Logprobs | None:
    """Of a chunk's prompt tokens; those that were given out before a preemption are not given out
    again, and what follows the prompt's last token is no part of it. None: there are none."""
    if one.spec.score is None or one.scored is None:
        return None
    before, last = one.scored, len(one.spec.prompt) - 1
    begin, end = max(before, chunk.start), min(chunk.stop, last)
    if begin >= end and before:
        return None
    one.scored = max(before, end)
    at = start_of(done.action, chunk) - chunk.start
    return taken(done.sampled.scores, slice(at + begin, at + max(begin, end)), one.spec.score)
