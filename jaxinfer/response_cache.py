"""Answers kept for requests that come again: a bounded store, least recently used out first.

A request's tokens depend on the request alone, so an answer that was computed once is the answer.
Host side only, and nothing of the engine: keys go in, results come out.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple

from jaxinfer.types import CompletionOutput, Logprob, RequestOutput, SamplingParams

Position = dict[int, Logprob]


class Key(NamedTuple):
    """All that an answer depends on. `seed` is None where nothing is drawn."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int | None
    params_version: int | str


def response_key(
    prompt_ids: tuple[int, ...], params: SamplingParams, params_version: int | str
) -> Key | None:
    """The key of a valid request; None where it is not to be repeated: it asks for a fresh seed.

    Args:
        prompt_ids: the prompt's tokens.
        params: as validated. Ways to write the same stops give the same key.
        params_version: of the model's weights.
    """
    greedy = params.temperature == 0
    if params.seed is None and not greedy:
        return None
    hashable = replace(
        params, seed=None, stop=params.stop_strings, stop_token_ids=tuple(params.stop_token_ids)
    )
    return Key(prompt_ids, hashable, None if greedy else params.seed, params_version)


class ResponseCache:
    """At most `entries` answers; 0 keeps none, and counts nothing.

    Attributes:
        hits, misses: look-ups with a key, since the start.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.hits = self.misses = 0
        self._kept: OrderedDict[Key, RequestOutput] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key | None) -> RequestOutput | None:
        """The answer kept under a key, which is now the last to go. It is the caller's own."""
        if key is None or not self.entries:
            return None
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return _copy(found)

    def put(self, key: Key | None, answer: RequestOutput) -> None:
        """Keeps an answer, at the cost of the one that was not asked for longest."""
        if key is None or not self.entries:
            return
        self._kept[key] = _copy(answer)
        self._kept.move_to_end(key)
        if len(self._kept) > self.entries:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forgets every answer; the counts stay."""
        self._kept.clear()


def _copy(answer: RequestOutput) -> RequestOutput:
    """With dicts of its own, the only part of an answer that a caller could change."""
    return replace(
        answer,
        outputs=tuple(_copy_output(output) for output in answer.outputs),
        prompt_logprobs=_copy_positions(answer.prompt_logprobs),
    )


def _copy_output(output: CompletionOutput) -> CompletionOutput:
    if output.logprobs is None:
        return output
    return replace(output, logprobs=tuple(dict(position) for position in output.logprobs))


def _copy_positions(
    positions: tuple[Position | None, ...] | None,
) -> tuple[Position | None, ...] | None:
    if positions is None:
        return None
    return tuple(None if position is None else dict(position) for position in positions)
