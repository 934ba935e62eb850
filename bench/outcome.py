"""What a request came to, so that two runs of it can be compared bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxinfer.types import RequestOutput


class Result(NamedTuple):
    """Of all samples of a request, one after the other; `bits`: float32, of the log-probabilities
    of the tokens that were chosen, and empty where none were asked for."""

    tokens: tuple[tuple[int, ...], ...]
    bits: bytes


def of(output: RequestOutput) -> Result:
    """The result of a request."""
    chosen = [
        entry[token].logprob
        for completion in output.outputs
        for token, entry in zip(completion.token_ids, completion.logprobs or (), strict=False)
    ]
    tokens = tuple(completion.token_ids for completion in output.outputs)
    return Result(tokens, np.array(chosen, np.float32).tobytes())


def digest(results: Iterable[Result]) -> str:
    """A hash of all tokens and bits, to compare with those of another machine."""
    hashed = hashlib.sha256()
    for result in results:
        for tokens in result.tokens:
            hashed.update(np.array([len(tokens), *tokens], np.int64).tobytes())
        hashed.update(result.bits)
    return hashed.hexdigest()[:16]
