"""lm-eval's requests in the engine's terms; none of it needs lm-eval."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxinfer import InvalidRequest
from jaxinfer.eval_arguments import (
    GENERATION_NAMES,
    Ends,
    fit_pair,
    fit_prompt,
    sampling_params,
    score,
    special_tokens,
    split_options,
)
from jaxinfer.types import SamplingParams, TokenLogprobs
from jaxinfer.validation import validate
from tests.conftest import TinyModel

ENDS = Ends("<end>", {"<end>": 0, "<turn>": 3}, 256)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ({}, {"temperature": 0.0, "max_tokens": 256, "stop": ("<end>",), "stop_token_ids": (0,)}),
        ({"until": "\n"}, {"stop": ("\n", "<end>"), "stop_token_ids": (0,)}),
        ({"until": ["\n", "", "<turn>"]}, {"stop": ("\n", "<turn>", "<end>")}),
        ({"until": ["\n", "<turn>"]}, {"stop_token_ids": (3, 0)}),
        ({"until": None, "max_new_tokens": 5}, {"max_tokens": 5, "stop": ("<end>",)}),
        ({"max_gen_toks": 7, "max_tokens": 7}, {"max_tokens": 7}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, {"temperature": 0.0, "top_p": 1}),
        ({"temperature": 0.0, "num_beams": 1}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_k": 5}, {"temperature": 0.7, "top_k": 5}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.2}, {"temperature": 0.2}),
        ({"repetition_penalty": 1.2}, {"temperature": 0.0, "repetition_penalty": 1.2}),
    ],
)
def test_generation_arguments(arguments: dict[str, Any], want: dict[str, Any]) -> None:
    params = sampling_params(arguments, 0, ENDS)
    validate(params, index=0, vocab_size=4)
    assert {name: getattr(params, name) for name in want} == want


def test_every_name_is_taken() -> None:
    values = dict.fromkeys(GENERATION_NAMES, 1) | {"until": "a", "do_sample": True}
    assert sampling_params(values, 0, ENDS).min_p == 1


def test_a_seed_for_each_request() -> None:
    seeds = [sampling_params({"seed": s}, i, ENDS).seed for s in (0, 1) for i in range(3)]
    assert len(set(seeds)) == 6
    assert seeds[1] == sampling_params({"seed": 0}, 1, ENDS).seed
    assert sampling_params({}, 0, ENDS).seed is None


def test_no_end_of_sequence() -> None:
    params = sampling_params({"until": ["\n"]}, 0, Ends(None, {}, 8))
    assert (params.stop, params.stop_token_ids) == (("\n",), ())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"penalty_alpha": 0.6, "best_of": 2}, r"best_of, penalty_alpha: not known; accepted are"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"max_gen_toks": 7, "max_tokens": 8}, "max_gen_toks.*max_tokens.*one length"),
        ({"max_gen_toks": "7"}, "'7'"),
        ({"max_gen_toks": 0}, "at least 1"),
        ({"max_gen_toks": True}, "True"),
        ({"until": 5}, "until=5"),
        ({"until": ["a", None]}, "until=.*None"),
    ],
)
def test_generation_arguments_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as error:
        sampling_params(arguments, 3, ENDS)
    assert (error.value.index, error.value.field) == (3, "generation_kwargs")


def test_pairs_keep_their_end() -> None:
    assert fit_pair([1, 2, 3], [4, 5], 0, 8) == (1, 2, 3, 4, 5)
    assert fit_pair([1, 2, 3], [4, 5], 0, 5) == (1, 2, 3, 4, 5)
    assert fit_pair([1, 2, 3], [4, 5], 0, 3) == (3, 4, 5)
    for context, continuation in (([1], [2, 3, 4]), ([1], []), ([], [2])):
        with pytest.raises(InvalidRequest, match=f"{len(continuation)}: expected") as error:
            fit_pair(context, continuation, 2, 3)
        assert (error.value.index, error.value.field) == (2, "continuation")


def test_prompts_leave_room() -> None:
    params = SamplingParams(max_tokens=4)
    assert fit_prompt([1, 2, 3], params, 0, 7) == [1, 2, 3]
    assert fit_prompt([1, 2, 3], params, 0, 5) == [3]
    with pytest.raises(InvalidRequest, match=r"4 tokens to generate .* in 4: give 3 or less"):
        fit_prompt([1], params, 0, 4)


def test_scores() -> None:
    result = TokenLogprobs(
        token_ids=(7, 1, 2, 3),
        logprobs=np.float32([-1, -2, -4]),
        top_ids=np.int32([[9], [2], [3]]),
        top_logprobs=np.zeros((3, 1), np.float32),
    )
    assert score(result, 1) == (-4.0, True)
    assert score(result, 2) == (-6.0, True)
    assert score(result, 3) == (-7.0, False)


def test_special_tokens(tiny: TinyModel) -> None:
    assert special_tokens(tiny.tokenizer.backend) == {"<|endoftext|>": 0}


def test_model_arguments() -> None:
    given = {"pretrained": "demo", "dtype": "float32", "max_gen_toks": 9}
    want = {"model": "demo", "dtype": "float32"}, {"max_gen_toks": 9}
    assert split_options(given) == want


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "float32"}, "pretrained is missing"),
        ({"pretrained": "demo", "dtyp": "float32"}, "dtyp: not known; accepted .* max_model_len"),
        ({"pretrained": "demo", "model": "demo"}, "model: not known"),
        ({"pretrained": "demo", "device": "cuda:0"}, "device: not known"),
    ],
)
def test_model_arguments_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_options(arguments)
