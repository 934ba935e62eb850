"""From what the scheduler decided to what the device is told: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxinfer import batcher, sampling
from jaxinfer.batch import MIN_ROWS, Chunks, Plan
from jaxinfer.buckets import Buckets, fit
from jaxinfer.config import BatcherConfig
from jaxinfer.hooks import Inside
from jaxinfer.pages import pages_for
from jaxinfer.runner import StepKey
from jaxinfer.types import MAX_TOP_LOGPROBS, SamplingParams

FEW_TOP_LOGPROBS = 5


@dataclass(frozen=True)
class SequenceSpec:
    """One sample of one request, as the engine runs it.

    Attributes:
        prompt: int32 [N].
        limit: tokens at which it ends, prompt included; len(prompt) generates nothing.
        priority: a smaller one comes before those that arrived up to `engine.PRIORITY_ARRIVALS`
            earlier, for each step between them.
        stop_ids: tokens at which it ends, the model's own included.
        score: how many of the likeliest tokens to return after each prompt token; None: no
            prompt log-probabilities at all.
        inside: what it wants of the model's inside; None: nothing.
        score_from: tokens before which nothing is scored: so many may be found in the cache.
    """

    prompt: np.ndarray
    params: SamplingParams
    limit: int
    seed: int
    sample: int = 0
    priority: int = 0
    stop_ids: tuple[int, ...] = ()
    score: int | None = None
    inside: Inside | None = None
    score_from: int = 0


class Kind(NamedTuple):
    """What a sequence needs of the program that samples it; see `runner.StepKey`."""

    random: bool = False
    truncated: bool = False
    top: int | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> Kind:
        random = params.temperature > 0
        return cls(random, random and params.truncated, top_bucket(params.logprobs))


def together(kinds: Iterable[Kind]) -> Kind:
    """The kind that serves all of these."""
    found = set(kinds)
    tops = [kind.top for kind in found if kind.top is not None]
    return Kind(
        any(kind.random for kind in found),
        any(kind.truncated for kind in found),
        max(tops, default=None),
    )


def top_bucket(top: int | None) -> int | None:
    """0, a few, or the most: compiled steps differ in how many log-probabilities they return."""
    if top is None or top == 0:
        return top
    return FEW_TOP_LOGPROBS if top <= FEW_TOP_LOGPROBS else MAX_TOP_LOGPROBS


def step_key(
    action: batcher.Run,
    kind: Kind,
    score: int | None,
    inside: Iterable[Inside] = (),
    *,
    limits: BatcherConfig,
    buckets: Buckets,
    invariant: bool,
) -> StepKey:
    """The program that runs an action.

    Args:
        action: of the scheduler.
        kind: of all its sequences together.
        score: the most of the likeliest tokens that a chunk wants after its prompt tokens.
        inside: what any of its sequences wants of the model's inside.
        limits, buckets, invariant: the engine's.
    """
    count, inside = len(action.rows), list(inside)
    sizes = buckets.guessing if action.guesses else buckets.rows
    tokens = sum(chunk.stop - chunk.start for chunk in action.chunks)
    size = fit(buckets.tokens, count + tokens) if tokens else 0
    rows = fit(buckets.mixed_rows(size) if tokens else sizes, count)
    return StepKey(
        rows=rows,
        tokens=size,
        chunks=limits.max_chunks if tokens else 0,
        pages=fit(buckets.pages, pages_for(action.tokens, limits.page_size)),
        page_size=limits.page_size,
        steps=1 if action.steps == 1 else limits.most_steps(action.guesses),
        invariant=invariant,
        random=kind.random,
        truncated=kind.truncated,
        top=kind.top,
        score=score,
        capture=tuple(sorted({site for wanted in inside for site in wanted.capture})),
        # A dict keeps the order of the sequences, a set would not.
        hooks=tuple(dict.fromkeys(bound.hook for wanted in inside for bound in wanted.hooks)),
        guesses=action.guesses,
    )


def padded_tokens(key: StepKey) -> int:
    """Tokens that a program computes, whatever of them is wanted."""
    each = pages_for(key.rows * (key.guesses + 1), MIN_ROWS) * MIN_ROWS
    return key.tokens or each * key.steps


def make_plan(
    action: batcher.Run,
    key: StepKey,
    specs: Mapping[int, SequenceSpec],
    known: Mapping[int, np.ndarray],
    *,
    table_width: int,
    guessed: np.ndarray | None = None,
) -> Plan:
    """What the device is told of an action, in the shapes of `key`.

    Args:
        action: of the scheduler.
        key: of `step_key`.
        specs: at least the sequences of the action's chunks, and those that have hooks.
        known: all tokens of those sequences, int32: prompt, and what was sampled before.
        table_width: columns of the device's page table.
        guessed: bool [n]; for which of the action's rows tokens are guessed; None: for all.
    """
    M = len(action.released)
    rows = np.full(key.rows, M, np.int32)
    rows[: len(action.rows)] = action.rows
    chunks, hooked, guessing = None, None, None
    if key.guesses:
        guessing = np.zeros(key.rows, bool)
        guessing[: len(action.rows)] = True if guessed is None else guessed
    if key.chunks:
        chunks = _chunks(action, key, specs, known, table_width)
    if key.hooks:
        hooked = _hooked(action, key, specs)
    return Plan(
        released=action.released,
        columns=action.columns,
        pages=action.pages,
        rows=rows,
        count=np.int32(len(action.rows)),
        steps=np.int32(action.steps),
        chunks=chunks,
        hooked=hooked,
        guessing=guessing,
    )


def _hooked(action: batcher.Run, key: StepKey, specs: Mapping[int, SequenceSpec]) -> np.ndarray:
    """Which of the key's hooks are for each sequence; see `Plan`."""
    found = np.full((2, key.rows + key.chunks), -1, np.int32)
    places = {hook: place for place, hook in enumerate(key.hooks)}
    reading = [chunk.id for chunk in action.chunks]
    for start, ids in ((0, action.ids.tolist()), (key.rows, reading)):
        for slot, sequence in enumerate(ids, start):
            inside = specs[sequence].inside if sequence in specs else None
            for kind, bound in enumerate(inside[1:] if inside is not None else ()):
                if bound is not None:
                    found[kind, slot] = places[bound.hook]
    return found


def chunk_starts(action: batcher.Run) -> list[int]:
    """Where in the step's flat order of tokens each chunk begins."""
    counts = [chunk.stop - chunk.start for chunk in action.chunks]
    return (len(action.rows) + np.cumsum([0, *counts[:-1]])).tolist() if counts else []


def _chunks(
    action: batcher.Run,
    key: StepKey,
    specs: Mapping[int, SequenceSpec],
    known: Mapping[int, np.ndarray],
    table_width: int,
) -> Chunks:
    T, Q, M = key.tokens, key.chunks, len(action.released)
    tokens, positions, targets = (np.zeros(T, np.int32) for _ in range(3))
    owner, ends = np.full(T, -1, np.int32), np.zeros(Q, np.int32)
    pages = np.zeros((Q, table_width), np.int32)
    starts = chunk_starts(action)
    for i, (at, chunk) in enumerate(zip(starts, action.chunks, strict=True)):
        ends[i:] = end = at + chunk.stop - chunk.start
        tokens[at:end] = known[chunk.id][chunk.start : chunk.stop]
        positions[at:end] = np.arange(chunk.start, chunk.stop)
        owner[at:end] = i
        following = known[chunk.id][chunk.start + 1 : chunk.stop + 1]
        targets[at : at + len(following)] = following
        pages[i, : len(chunk.pages)] = chunk.pages
    chosen = [specs[chunk.id] for chunk in action.chunks]

    def column(values: Iterable[Any], dtype: Any, rest: int = 0) -> np.ndarray:
        found = np.full(Q, rest, dtype)
        made = np.array(list(values), dtype)
        found[: len(made)] = made
        return found

    return Chunks(
        tokens=tokens,
        positions=positions,
        owner=owner,
        ends=ends,
        row=column((c.row for c in action.chunks), np.int32, M),
        length=column((c.stop for c in action.chunks), np.int32),
        prompt=column((len(s.prompt) for s in chosen), np.int32),
        first=column((c.first for c in action.chunks), bool),
        last=column((c.last for c in action.chunks), bool),
        pages=pages,
        limit=column((c.limit for c in action.chunks), np.int32),
        how=_packed(chosen, Q),
        targets=None if key.score is None else targets,
    )


def _packed(specs: Sequence[SequenceSpec], count: int) -> sampling.SamplingRows:
    """How each is sampled, the first repeated up to `count`."""
    rows = [
        sampling.pack_row(
            spec.params,
            seed=spec.seed,
            sample=spec.sample,
            stop_ids=spec.stop_ids,
            min_length=len(spec.prompt) + spec.params.min_tokens,
        )
        for spec in specs
    ]
    rows += rows[:1] * (count - len(rows))
    return sampling.stack_rows(rows)
