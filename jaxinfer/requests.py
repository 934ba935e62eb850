"""One request as the API sees it: from prompt to `RequestOutput`, its samples' text and stops.

Host side only: the engine knows sequences, this module knows what a user asked for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxinfer import detokenizer
from jaxinfer.hooks import Inside
from jaxinfer.plans import SequenceSpec
from jaxinfer.types import (
    CompletionOutput,
    Delta,
    Logprob,
    RequestOutput,
    SamplingParams,
)

if TYPE_CHECKING:
    from jaxinfer.errors import JaxinferError
    from jaxinfer.observe import Update
    from jaxinfer.response_cache import Key
    from jaxinfer.tokenizer import Tokenizer


@dataclass
class Sample:
    """One of a request's `n` samples, as far as it has got.

    `sequence` is the engine's name for it, once it has been submitted.
    """

    index: int
    sequence: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative: float = 0.0
    text: str = ""
    detok: detokenizer.DetokState | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    activations: list[dict[str, np.ndarray]] = field(default_factory=list)


@dataclass
class Request:
    """A validated request.

    Attributes:
        limit: tokens at which every sample ends, prompt included.
        eos_ids: the model's own stop tokens.
        deltas: for a reader of a stream; None where nobody reads before the end.
        scores: prompt log-probabilities, chunk by chunk.
        failed: why the request was given up.
        priority: a smaller one is served first.
        cached: prompt tokens that were not computed, of all samples.
        key: under which its answer is kept, where it is to be kept.
        answer: the result, where it is not to be made of the samples.
        inside: what it wants of the model's inside.
        params_version: of the weights that serve it.
        index: position among those of the same call.
        score_from: tokens before which nothing is scored; `like` has the scores of these.
    """

    id: str
    prompt: str | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    limit: int
    eos_ids: tuple[int, ...]
    samples: list[Sample]
    deltas: deque[Delta] | None = None
    scores: list[Any] = field(default_factory=list)
    failed: JaxinferError | None = None
    priority: int = 0
    cached: int = 0
    key: Key | None = None
    answer: RequestOutput | None = None
    inside: Inside | None = None
    params_version: int | str = 0
    index: int = 0
    score_from: int = 0
    like: Request | None = None
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.samples)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a sample: the model's own, unless ignored, and the request's."""
        own = () if self.params.ignore_eos else self.eos_ids
        return tuple(dict.fromkeys((*own, *map(int, self.params.stop_token_ids))))

    @property
    def finished(self) -> bool:
        return self.unfinished == 0


def take(request: Request, sample: Sample, update: Update, tokenizer: Tokenizer | None) -> None:
    """Adds what a step brought to a sample, and tells the reader of the stream.

    Once a stop string is found the sample is finished, whatever the engine says: the caller then
    cancels its sequence.
    """
    if update.scores is not None:
        request.scores.append(update.scores)
    if update.activations is not None:
        sample.activations.append(update.activations)
    if not update.tokens and not update.finished:
        return
    request.cached += update.cached
    before, text = len(sample.tokens), ""
    for position, token in enumerate(update.tokens):
        sample.tokens.append(token)
        _note_logprobs(request, sample, update, position, tokenizer)
        last = update.finished and position == len(update.tokens) - 1
        text += _detokenise(request, sample, token, last, tokenizer)
        if sample.finish_reason:
            break
    if update.finished and sample.finish_reason is None:
        sample.finish_reason = "length"
    sample.text += text
    request.unfinished -= sample.finish_reason is not None
    if request.deltas is not None:
        request.deltas.append(
            Delta(
                index=sample.index,
                text=text,
                token_ids=tuple(sample.tokens[before:]),
                finish_reason=sample.finish_reason,
                result=finish(request, tokenizer) if request.finished else None,
            )
        )


def finish(request: Request, tokenizer: Tokenizer | None) -> RequestOutput:
    """The request's result so far."""
    if request.answer is not None:
        return request.answer
    return RequestOutput(
        request_id=request.id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_ids,
        outputs=tuple(_completion(sample, request) for sample in request.samples),
        finished=request.finished,
        seed=request.seed,
        prompt_logprobs=_prompt_logprobs(request, tokenizer),
        num_cached_tokens=request.cached,
        params_version=request.params_version,
    )


def answer(request: Request, known: RequestOutput) -> None:
    """Finishes a request with the answer to another that was the same, and tells the reader."""
    request.answer = replace(known, request_id=request.id, prompt=request.prompt, seed=request.seed)
    request.unfinished = 0
    if request.deltas is not None:
        last = len(known.outputs) - 1
        request.deltas.extend(
            Delta(
                index=output.index,
                text=output.text,
                token_ids=output.token_ids,
                finish_reason=output.finish_reason,
                result=request.answer if place == last else None,
            )
            for place, output in enumerate(known.outputs)
        )


def merged_scores(request: Request) -> Any:
    """Prompt log-probabilities of all chunks, one after the other; None if there are none."""
    parts = list(request.scores)
    if request.like is not None:
        before = merged_scores(request.like)
        parts.insert(0, type(before)(*(x[: request.score_from] for x in before)))
    if not parts:
        return None
    return type(parts[0])(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def refused(prompt: Any, error: JaxinferError, request_id: str) -> RequestOutput:
    """The result of a prompt that was not served, or not to its end."""
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=(),
        outputs=(),
        error=error,
    )


def sequences(request: Request) -> list[SequenceSpec]:
    """What the engine runs for a request, one sequence a sample."""
    prompt = np.asarray(request.prompt_ids, np.int32)
    return [
        SequenceSpec(
            prompt=prompt,
            params=request.params,
            limit=request.limit,
            seed=request.seed,
            sample=sample.index,
            priority=request.priority,
            stop_ids=request.stop_ids,
            # The prompt is the same for every sample: one scores it for all.
            score=request.params.prompt_logprobs if sample.index == 0 else None,
            inside=request.inside,
            score_from=request.score_from,
        )
        for sample in request.samples
    ]


def activations_of(sample: Sample, count: int) -> dict[str, np.ndarray] | None:
    """Of the first `count` tokens: of what came after a stop string nothing was asked."""
    if not sample.activations:
        return None
    sites = sample.activations[0]
    parts = {site: [part[site] for part in sample.activations] for site in sites}
    return {site: np.concatenate(found)[:count] for site, found in parts.items()}


def _detokenise(
    request: Request, sample: Sample, token: int, last: bool, tokenizer: Tokenizer | None
) -> str:
    """Text that `token` adds; sets the finish reason where it ends the sample."""
    stops_here = token in request.stop_ids
    if stops_here:
        sample.finish_reason = "stop"
        own = token in request.eos_ids and not request.params.ignore_eos
        sample.stop_reason = None if own else token
    if tokenizer is None:
        return ""
    if sample.detok is None:
        sample.detok = detokenizer.start(tokenizer.decode, request.prompt_ids)
    # The stop token itself is not text.
    new = () if stops_here else (token,)
    sample.detok, pushed = detokenizer.push(
        sample.detok, tokenizer.decode, new, request.params.stop_strings, last or stops_here
    )
    if pushed.stop is not None:
        sample.finish_reason, sample.stop_reason = "stop", pushed.stop
    return pushed.text


def _note_logprobs(
    request: Request, sample: Sample, update: Update, position: int, tokenizer: Tokenizer | None
) -> None:
    if update.logprobs is None:
        return
    entry = _logprob_entry(update.logprobs, position, sample.tokens[-1], tokenizer)
    sample.logprobs.append(entry)
    sample.cumulative += entry[sample.tokens[-1]].logprob


def _logprob_entry(
    logprobs: Any, position: int, token: int, tokenizer: Tokenizer | None
) -> dict[int, Logprob]:
    """The likeliest tokens at a position, and the token that stands there."""

    def decoded(i: int) -> str | None:
        return None if tokenizer is None else tokenizer.decode([i], skip_special_tokens=False)

    top = {
        int(i): Logprob(float(value), rank + 1, decoded(int(i)))
        for rank, (i, value) in enumerate(
            zip(logprobs.top_ids[position], logprobs.top_logprobs[position], strict=True)
        )
    }
    chosen = Logprob(
        float(logprobs.logprob[position]), int(logprobs.rank[position]), decoded(token)
    )
    return {token: chosen} | {i: entry for i, entry in top.items() if i != token}


def _completion(sample: Sample, request: Request) -> CompletionOutput:
    wanted = request.params.logprobs is not None
    return CompletionOutput(
        index=sample.index,
        text=sample.text,
        token_ids=tuple(sample.tokens),
        cumulative_logprob=sample.cumulative if wanted else None,
        logprobs=tuple(sample.logprobs) if wanted else None,
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
        activations=activations_of(sample, len(request.prompt_ids) + len(sample.tokens) - 1),
    )


def _prompt_logprobs(
    request: Request, tokenizer: Tokenizer | None
) -> tuple[dict[int, Logprob] | None, ...] | None:
    if request.params.prompt_logprobs is None:
        return None
    scores = merged_scores(request)
    rest = () if scores is None else range(len(scores.logprob))
    ids = request.prompt_ids
    return (None, *(_logprob_entry(scores, i, ids[i + 1], tokenizer) for i in rest))
