"""What lm-eval asks for, in the engine's terms. Pure functions, which do not need lm-eval."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxinfer.errors import InvalidRequest
from jaxinfer.llm import LLM
from jaxinfer.offline import seed_of
from jaxinfer.types import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# lm-eval's names for one thing
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
TRUNCATIONS = ("top_p", "top_k", "min_p")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
GENERATION_NAMES = (
    *("until", *LENGTH_NAMES, "do_sample", "temperature"),
    *(*TRUNCATIONS, *PENALTIES, "seed", "num_beams"),
)
OWN_OPTIONS = ("prefix_token_id", "max_gen_toks")

Scored = tuple[float, bool]


class Ends(NamedTuple):
    """What ends a generation beside `until`.

    Attributes:
        eos: the tokenizer's end-of-sequence token as text; None: it has none.
        special: ids of the special tokens, by their text. They are not part of a generated text,
            so a stop string that is one would never be found there.
        max_tokens: where the task names no length.
    """

    eos: str | None
    special: Mapping[str, int]
    max_tokens: int


def sampling_params(arguments: Mapping[str, Any], index: int, ends: Ends) -> SamplingParams:
    """One request's generation arguments as SamplingParams; values are checked by `LLM.generate`.

    As in lm-eval, it is greedy unless `do_sample` is true, or it is not given and `temperature` is
    above 0; what shapes sampling is then of no effect. Sampling without a temperature takes 1.

    Args:
        arguments: a task's `generation_kwargs`.
        index: the request's position; with `seed` it gives each request a seed of its own, so that
            repeats of one question differ.
        ends: the model's.

    Raises:
        InvalidRequest: an argument that is not known, or that contradicts another.
    """

    def refuse(message: str) -> InvalidRequest:
        return InvalidRequest(message, index=index, field="generation_kwargs")

    unknown = sorted(arguments.keys() - set(GENERATION_NAMES))
    if unknown:
        raise refuse(f"{', '.join(unknown)}: not known; accepted are {', '.join(GENERATION_NAMES)}")
    if arguments.get("num_beams", 1) != 1:
        raise refuse(f"num_beams={arguments['num_beams']!r}: there is no beam search; give 1")
    do_sample, temperature = arguments.get("do_sample"), arguments.get("temperature")
    if do_sample not in (None, True, False):
        raise refuse(f"do_sample={do_sample!r}: give True or False")
    if do_sample is None:
        do_sample = bool(temperature)
    stops = stop_strings(arguments.get("until"), index, ends.eos)
    seed = arguments.get("seed")
    names = (*TRUNCATIONS, *PENALTIES) if do_sample else PENALTIES
    return SamplingParams(
        temperature=(1.0 if temperature is None else temperature) if do_sample else 0.0,
        max_tokens=_length(arguments, ends.max_tokens, refuse),
        stop=stops,
        stop_token_ids=tuple(ends.special[stop] for stop in stops if stop in ends.special),
        seed=None if seed is None else seed_of(seed, index),
        **{name: arguments[name] for name in names if name in arguments},
    )


def _length(
    arguments: Mapping[str, Any], default: int, refuse: Callable[[str], InvalidRequest]
) -> int:
    lengths = {name: arguments[name] for name in LENGTH_NAMES if arguments.get(name) is not None}
    bad = {n: length for n, length in lengths.items() if type(length) is not int or length < 1}
    if bad:
        raise refuse(f"{bad}: give an integer of at least 1")
    if len(set(lengths.values())) > 1:
        raise refuse(f"{lengths} are names of one length: give one of them")
    return next(iter(lengths.values()), default)


def stop_strings(until: Any, index: int, eos: str | None) -> tuple[str, ...]:
    """`until` as a tuple without empty strings, and as in lm-eval with the end of sequence.

    Raises:
        InvalidRequest: `until` is neither text nor a list of texts.
    """
    strings = [until] if isinstance(until, str) else ([] if until is None else until)
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise InvalidRequest(
            f"until={until!r}: give a string or a list of strings",
            index=index, field="generation_kwargs",
        )  # fmt: skip
    return tuple(dict.fromkeys(s for s in (*strings, eos) if s))


def fit_pair(
    context: Sequence[int], continuation: Sequence[int], index: int, longest: int
) -> tuple[int, ...]:
    """Context and continuation as one sequence: its last `longest` tokens, at least one of context.

    Raises:
        InvalidRequest: there is no continuation or no context, or no room for both.
    """
    if not context or not continuation or len(continuation) >= longest:
        raise InvalidRequest(
            f"a context of {len(context)} tokens and a continuation of {len(continuation)}: "
            f"expected at least 1, and from 1 to {longest - 1}",
            index=index, field="continuation",
        )  # fmt: skip
    return (*context, *continuation)[-longest:]


def fit_prompt(
    prompt: Sequence[int], params: SamplingParams, index: int, longest: int
) -> Sequence[int]:
    """The end of a prompt that leaves room for `max_tokens` more in `longest` tokens.

    Raises:
        InvalidRequest: no prompt would be left.
    """
    assert params.max_tokens is not None
    room = longest - params.max_tokens
    if room < 1:
        raise InvalidRequest(
            f"{params.max_tokens} tokens to generate leave no room for a prompt in {longest}: "
            f"give {longest - 1} or less, or raise max_model_len",
            index=index, field="max_gen_toks",
        )  # fmt: skip
    return prompt[-room:]


def score(result: TokenLogprobs, length: int) -> Scored:
    """Log-probability of the last `length` tokens, and whether each was the likeliest."""
    likeliest = result.top_ids[-length:, 0]
    return (
        float(np.sum(result.logprobs[-length:], dtype=np.float64)),
        bool(np.array_equal(likeliest, result.token_ids[-length:])),
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the special tokens, which decoding leaves out, by their text."""
    added = tokenizer.added_tokens_decoder
    return {token.content: index for index, token in added.items() if token.special}


def split_options(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's model arguments as (those of `LLM`, those of `JaxinferLM`).

    Raises:
        ValueError: `pretrained` is missing, or an argument is not known.
    """
    if arguments.get("pretrained") is None:
        raise ValueError("pretrained is missing: a directory, a Hub id, or demo")
    options = [name for name in inspect.signature(LLM).parameters if name != "model"]
    accepted = ("pretrained", *OWN_OPTIONS, *options)
    unknown = sorted(arguments.keys() - set(accepted))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not known; accepted are {', '.join(accepted)}")
    theirs = {name: arguments[name] for name in options if name in arguments}
    own = {name: arguments[name] for name in OWN_OPTIONS if name in arguments}
    return {"model": str(arguments["pretrained"]), **theirs}, own
