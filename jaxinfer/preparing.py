"""From what a user asks for to a checked `Request`: before any work, and touching nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidRequest
from jaxinfer.hooks import Hook, Inside, bind, check
from jaxinfer.models.sites import widths
from jaxinfer.observe import DISPATCHES_AHEAD
from jaxinfer.parallel import said
from jaxinfer.plans import SequenceSpec
from jaxinfer.requests import Request, Sample, sequences
from jaxinfer.sizing import MemoryPlan
from jaxinfer.types import MAX_PRIORITY, MAX_SEED, SamplingParams
from jaxinfer.validation import one_or_each, validate, validate_prompt

if TYPE_CHECKING:
    from jaxinfer.tokenizer import Tokenizer


class Rules(NamedTuple):
    """What requests are checked by.

    Attributes:
        config: of the model.
        tokenizer: None: prompts are token ids.
        memory: see `sizing`.
        step_tokens: most tokens of a step.
        dtype: of activations.
        mesh: devices that share the model; None: one has all.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    memory: MemoryPlan
    step_tokens: int
    dtype: Any
    mesh: Mesh | None


def prepare(
    rules: Rules,
    prompt: Any,
    params: SamplingParams,
    index: int,
    *,
    ids: Iterator[int],
    seeds: random.Random,
    encode: Callable[[Any], Any] | None = None,
    generate: bool = True,
    priority: int = 0,
    inside: Inside | None = None,
) -> Request:
    """Checks a request and tokenises it.

    Args:
        rules: of the LLM.
        prompt: text or token ids, or what `encode` takes.
        params: how it is sampled.
        index: position among those of the same call, for errors.
        ids, seeds: from which a name is taken, and a seed where `params` has none; last of all.
        encode: makes token ids of the prompt; None: the tokenizer.
        generate: False: the prompt is only scored, and may be as long as a sequence.
        priority: a smaller one is served first.
        inside: what it wants of the model's inside.

    Raises:
        InvalidRequest: names what is wrong.
    """
    validate(params, index=index, vocab_size=rules.config.vocab_size)
    if not isinstance(priority, int | np.integer) or not abs(priority) <= MAX_PRIORITY:
        raise InvalidRequest(
            f"{priority!r} is not an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}",
            index=index, field="priority",
        )  # fmt: skip
    if params.stop_strings and rules.tokenizer is None:
        raise InvalidRequest("stop strings need a tokenizer", index=index, field="stop")
    longest = rules.memory.max_model_len
    tokens = validate_prompt(
        _encode(rules.tokenizer, prompt, encode, index),
        index=index,
        vocab_size=rules.config.vocab_size,
        max_prompt=longest - 1 if generate else longest,
    )
    most = longest if params.max_tokens is None else len(tokens) + params.max_tokens
    return Request(
        id=str(next(ids)),
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_ids=tokens,
        params=params,
        seed=seeds.randrange(MAX_SEED) if params.seed is None else params.seed,
        limit=min(most, longest) if generate else len(tokens),
        eos_ids=rules.config.eos_token_ids,
        samples=[Sample(i) for i in range(params.n)],
        priority=int(priority),
        inside=inside,
        index=index,
    )


def _encode(
    tokenizer: Tokenizer | None, prompt: Any, encode: Callable[[Any], Any] | None, index: int
) -> Any:
    """Token ids of text; what is not text is taken for token ids, and checked later."""
    try:
        if encode is not None:
            return encode(prompt)
        if not isinstance(prompt, str):
            return prompt
        if tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: give token ids")
        return tokenizer.encode(prompt)
    except InvalidRequest as error:  # the tokenizer does not know which request it serves
        raise InvalidRequest(error.message, index=index, field=error.field) from error


def insides(
    rules: Rules, count: int, capture: Any, intervene: Any, logits_fn: Any
) -> Callable[[int], Inside | None]:
    """What each of `count` requests wants of the inside, checked when it is asked for.

    Raises:
        InvalidRequest: several devices share the model; or a list of another length. What is
            returned raises it for what does not fit the model or the memory.
    """
    named = {"capture": capture, "intervene": intervene, "logits_fn": logits_fn}
    for name, value in named.items():
        if value is not None and not (name == "capture" and not value):
            check_one_device(rules.mesh, name)
    changes = one_or_each(intervene, count, "intervene")
    logits = one_or_each(logits_fn, count, "logits_fn")
    checked: set[Hook] = set()

    def of(index: int) -> Inside | None:
        found = bind(capture, changes[index], logits[index], rules.config, index=index)
        _check_room(rules, found.capture if found else (), index)
        new = {bound.hook for bound in (found.hooks if found else ())} - checked
        for hook in new:
            check(hook, rules.config, rules.dtype, index=index)
        checked.update(new)
        return found

    return of


def check_one_device(mesh: Mesh | None, field: str) -> None:
    """Raises InvalidRequest where several devices share the model: each sees a part of it."""
    if mesh is not None:
        raise InvalidRequest(f"not with {said(mesh)}: expected 1", field=field)


def _check_room(rules: Rules, capture: Sequence[str], index: int) -> None:
    """Raises InvalidRequest if steps that capture these sites could run out of memory."""
    every, tokens = widths(rules.config), rules.step_tokens
    token_bytes = sum(every[site] for site in capture) * jnp.dtype(rules.dtype).itemsize
    needed = DISPATCHES_AHEAD * tokens * token_bytes
    if rules.memory.limit is not None and needed > rules.memory.steps:
        raise InvalidRequest(
            f"{len(capture)} sites take {needed} bytes in steps of {tokens} tokens, "
            f"{rules.memory.steps} are free: name fewer, or lower max_num_batched_tokens",
            index=index, field="capture",
        )  # fmt: skip


def single_sequences(requests: Sequence[Request]) -> list[SequenceSpec]:
    """What `functional` runs for requests, a row for each.

    Raises:
        InvalidRequest: one has several samples, or penalties.
    """
    for index, request in enumerate(requests):
        if request.params.n > 1 or request.params.penalised:
            raise InvalidRequest(
                "n > 1 and penalties are not for `functional`: fork rows, or use generate",
                index=index, field="params",
            )  # fmt: skip
    return [sequences(request)[0] for request in requests]
