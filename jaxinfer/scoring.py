"""Log-probabilities of tokens that are there: requests that only have their prompts scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxinfer.errors import InvalidRequest
from jaxinfer.requests import Request, activations_of, merged_scores
from jaxinfer.types import MAX_TOP_LOGPROBS, SamplingParams, TokenLogprobs


def scoring_params(top: int) -> SamplingParams:
    """Of a request for `top` of the likeliest tokens at each position of its prompt.

    Raises:
        InvalidRequest: too many, or no integer.
    """
    if not isinstance(top, int | np.integer) or not 0 <= top <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"{top!r} is not an integer from 0 to {MAX_TOP_LOGPROBS}", field="top")
    return SamplingParams(temperature=0.0, prompt_logprobs=int(top))


def share_beginnings(
    requests: Sequence[Request], least: int
) -> tuple[list[Request], list[Request]]:
    """Those whose prompts are to be scored first, and those that begin like one of them with at
    least `least` tokens: they are scored from where they differ on."""
    first: list[Request] = []
    rest: list[Request] = []
    for request in sorted(requests, key=lambda r: r.prompt_ids):
        same = _common(request.prompt_ids, first[-1].prompt_ids) if first else 0
        # What follows the last token that is the same must be computed, and so must that token.
        if same <= least:
            first.append(request)
            continue
        request.score_from, request.like = same - 1, first[-1]
        rest.append(request)
    return first, rest


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with that are the same."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def token_logprobs(request: Request) -> TokenLogprobs:
    """The result of a request that only scored its prompt."""
    scores = merged_scores(request)
    return TokenLogprobs(
        token_ids=request.prompt_ids,
        logprobs=scores.logprob,
        top_ids=scores.top_ids,
        top_logprobs=scores.top_logprobs,
        activations=activations_of(request.samples[0], len(request.prompt_ids)),
        params_version=request.params_version,
    )
