"""Requests are checked here, before any work is done. Never imports jax."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from jaxinfer.errors import InvalidRequest
from jaxinfer.types import (
    MAX_SAMPLES,
    MAX_SEED,
    MAX_STOP_IDS,
    MAX_TOP_LOGPROBS,
    MODEL_STOP_IDS,
    SamplingParams,
)

MAX_STOP_TOKEN_IDS = MAX_STOP_IDS - MODEL_STOP_IDS
MAX_TEMPERATURE = 1000.0
MAX_REPETITION_PENALTY = 1000.0


def validate(params: SamplingParams, *, index: int, vocab_size: int) -> None:
    """Checks every value of `params`.

    Args:
        params: what a caller gave; of any type and with fields of any type.
        index: position of the request, for the error.
        vocab_size: of the model.

    Raises:
        InvalidRequest: the first bad value; `field` names it.
    """
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(
            f"{reprlib.repr(params)} is not SamplingParams", index=index, field="params"
        )

    def check(field: str, good: Callable[[Any], bool], expected: str) -> None:
        value = getattr(params, field)
        if not good(value):
            message = f"{reprlib.repr(value)} is not {expected}"
            raise InvalidRequest(message, index=index, field=field)

    penalty = "a number from -2 to 2"
    top = f"None or an integer from 0 to {MAX_TOP_LOGPROBS}"
    check("n", _integer(1, MAX_SAMPLES), f"an integer from 1 to {MAX_SAMPLES}")
    check(
        "temperature",
        _real(0, MAX_TEMPERATURE),
        f"a number from 0 (greedy) to {MAX_TEMPERATURE:g}",
    )
    check("top_p", lambda v: _real(0, 1)(v) and v > 0, "a number above 0 and at most 1")
    check("top_k", _integer(-1, math.inf), "an integer: 1 or more, or 0 or -1 for all")
    check("min_p", _real(0, 1), "a number from 0 to 1")
    check(
        "repetition_penalty",
        lambda v: _real(0, MAX_REPETITION_PENALTY)(v) and v > 0,
        f"a number above 0 and at most {MAX_REPETITION_PENALTY:g}",
    )
    check("presence_penalty", _real(-2, 2), penalty)
    check("frequency_penalty", _real(-2, 2), penalty)
    check("seed", _optional(_integer(0, MAX_SEED - 1)), "None or an integer from 0 to 2**63 - 1")
    check("max_tokens", _optional(_integer(1, math.inf)), "None or an integer of at least 1")
    most = math.inf if params.max_tokens is None else params.max_tokens
    check("min_tokens", _integer(0, most), "an integer from 0 to max_tokens")
    check("speculate", lambda v: isinstance(v, bool), "True or False")
    check("stop", _stop_strings, "a string or a list of strings, none of them empty")
    check(
        "stop_token_ids",
        lambda v: _token_ids(v, vocab_size),
        f"a list of at most {MAX_STOP_TOKEN_IDS} token ids from 0 to {vocab_size - 1}",
    )
    check("ignore_eos", lambda v: isinstance(v, bool), "True or False")
    check("logprobs", _optional(_integer(0, MAX_TOP_LOGPROBS)), top)
    check("prompt_logprobs", _optional(_integer(0, MAX_TOP_LOGPROBS)), top)
    if params.temperature == 0:
        check("n", _integer(1, 1), "1: with temperature 0 every sample would be the same")


def validate_prompt(
    prompt: Any, *, index: int, vocab_size: int, max_prompt: int
) -> tuple[int, ...]:
    """Checks token ids.

    Args:
        prompt: what a caller gave, or what a tokenizer made of it.
        index: position of the request, for the error.
        vocab_size: of the model.
        max_prompt: longest prompt that can be served, in tokens.

    Returns:
        The ids as Python integers.

    Raises:
        InvalidRequest: not token ids, none at all, too many, or one that the model does not have.
    """

    def refuse(message: str) -> InvalidRequest:
        return InvalidRequest(message, index=index, field="prompt")

    if not isinstance(prompt, Iterable) or isinstance(prompt, str | bytes):
        raise refuse(f"{type(prompt).__name__} is neither text nor a list of token ids")
    tokens = tuple(prompt)
    if not tokens:
        raise refuse("it is empty; at least one token is needed")
    if len(tokens) > max_prompt:
        raise refuse(f"it has {len(tokens)} tokens; at most {max_prompt} can be served")
    # Plain integers, as they mostly are: at once, for a prompt may have a hundred thousand.
    if set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < vocab_size:
        return tokens
    is_token = _integer(0, vocab_size - 1)
    for place, token in enumerate(tokens):
        if not is_token(token):
            raise refuse(
                f"{reprlib.repr(token)} at position {place} is not a token id, "
                f"an integer from 0 to {vocab_size - 1}"
            )
    return tuple(map(int, tokens))


def as_prompts(prompts: Any) -> Sequence[Any]:
    """One prompt, text or token ids, is a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    several = as_list(prompts, "prompt")
    one = len(several) and isinstance(several[0], Integral)
    return [several] if one else several


def as_list(value: Any, field: str) -> Sequence[Any]:
    """`value` as a list of things, if it is one."""
    if isinstance(value, np.ndarray) and value.ndim:
        return list(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidRequest(f"{type(value).__name__} is not a list", field=field)
    return value


def one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    """Parameters for each of `count` prompts.

    Raises:
        InvalidRequest: a list of another length.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    several = as_list(params, "params")
    if len(several) != count:
        raise InvalidRequest(f"{len(several)} SamplingParams for {count} prompts", field="params")
    return several


def one_or_each(value: Any, count: int, field: str) -> Sequence[Any]:
    """`value` for each of `count` prompts, if it is not a list of them already.

    Raises:
        InvalidRequest: a list of another length.
    """
    if not isinstance(value, list | tuple | np.ndarray):
        return [value] * count
    if len(value) != count:
        message = f"{len(value)} for {count} prompts: give one, or one for each"
        raise InvalidRequest(message, field=field)
    return list(value)


def next_version(before: int | str, wanted: Any) -> int | str:
    """The name of new weights: the one that is wanted, or the number after the one before.

    Raises:
        ValueError: it is not an integer or a string; or none was given, and the last is no number.
    """
    if wanted is None and isinstance(before, int):
        return before + 1
    if isinstance(wanted, bool) or not isinstance(wanted, int | str):
        raise ValueError(f"version={wanted!r}: expected an integer or a string, after {before!r}")
    return wanted


def _integer(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: _is(v, Integral) and low <= v <= high


def _real(low: float, high: float) -> Callable[[Any], bool]:
    # NaN fails both comparisons.
    return lambda v: _is(v, Real) and low <= v <= high


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _optional(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: v is None or good(v)


def _stop_strings(value: Any) -> bool:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple):
        return False
    return all(isinstance(s, str) and s for s in strings)


def _token_ids(value: Any, vocab_size: int) -> bool:
    if not isinstance(value, list | tuple) or len(value) > MAX_STOP_TOKEN_IDS:
        return False
    return all(map(_integer(0, vocab_size - 1), value))
