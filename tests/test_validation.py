from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import InvalidRequest
from jaxinfer.types import MAX_SAMPLES, MAX_SEED, MAX_TOP_LOGPROBS, SamplingParams
from jaxinfer.validation import MAX_STOP_TOKEN_IDS, validate, validate_prompt

V = 100
NAN, INF = float("nan"), float("inf")

BAD = {
    "n": [0, -1, MAX_SAMPLES + 1, 1.0, True, None, "2"],
    "temperature": [-0.1, NAN, INF, -INF, 1e9, True, None, "1", 1j],
    "top_p": [0, 0.0, -0.1, 1.01, NAN, True, None],
    "top_k": [-2, 1.5, True, None, NAN],
    "min_p": [-0.1, 1.1, NAN, False, None],
    "repetition_penalty": [0, -1.0, NAN, INF, 1e9, True, None],
    "presence_penalty": [-2.1, 2.1, NAN, INF, True, None],
    "frequency_penalty": [-2.1, 2.1, NAN, -INF, "0", None],
    "seed": [-1, MAX_SEED, 1.0, True],
    "max_tokens": [0, -1, 1.5, True],
    "min_tokens": [-1, 17, 1.0, None],
    "stop": ["", [""], ["a", ""], [1], 3, None, b"x", {"a": 1}],
    "stop_token_ids": [[-1], [V], [1.0], [True], ["a"], 5, None, [1] * (MAX_STOP_TOKEN_IDS + 1)],
    "ignore_eos": [1, None, "yes"],
    "speculate": [0, None, "no"],
    "logprobs": [-1, MAX_TOP_LOGPROBS + 1, 1.0, True],
    "prompt_logprobs": [-1, MAX_TOP_LOGPROBS + 1, True],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_each_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(SamplingParams(**{field: value}), index=3, vocab_size=V)
    assert (caught.value.index, caught.value.field) == (3, field)
    assert "is not" in caught.value.message


def test_every_field_has_bad_values_here() -> None:
    assert set(BAD) == {f.name for f in fields(SamplingParams)}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0, "n": 1, "top_k": -1},
        {"temperature": np.float32(0.5), "top_p": np.float64(1.0), "top_k": np.int64(10**12)},
        {"n": MAX_SAMPLES, "seed": MAX_SEED - 1, "min_p": 1, "repetition_penalty": 1e-3},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "max_tokens": None, "min_tokens": 10**9},
        {"stop": "x", "stop_token_ids": [0, V - 1]},
        {"stop": ["x", "yz"], "stop_token_ids": (1,) * MAX_STOP_TOKEN_IDS, "ignore_eos": True},
        {"logprobs": 0, "prompt_logprobs": MAX_TOP_LOGPROBS, "min_tokens": 16},
    ],
)
def test_good_values_pass(params: dict[str, Any]) -> None:
    validate(SamplingParams(**params), index=0, vocab_size=V)


def test_several_greedy_samples_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="temperature 0") as caught:
        validate(SamplingParams(n=2, temperature=0.0), index=0, vocab_size=V)
    assert caught.value.field == "n"


def test_anything_but_sampling_params_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate({"n": 1}, index=2, vocab_size=V)  # type: ignore[arg-type]
    assert (caught.value.index, caught.value.field) == (2, "params")


@given(
    st.sampled_from(sorted(BAD)),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(),
        st.binary(), st.lists(st.one_of(st.integers(), st.floats(), st.text(), st.none())),
        st.dictionaries(st.integers(), st.integers()),
    ),
)  # fmt: skip
def test_nothing_but_invalid_request_is_raised(field: str, value: Any) -> None:
    with suppress(InvalidRequest):
        validate(SamplingParams(**{field: value}), index=0, vocab_size=V)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ((), "empty"),
        (np.zeros(0, np.int32), "empty"),
        ([1] * 11, "11 tokens; at most 10"),
        ([1, -1], "-1 at position 1"),
        ([V], f"0 to {V - 1}"),
        ([1.0], "not a token id"),
        ([True], "not a token id"),
        (["a"], "not a token id"),
        ([[1, 2]], "not a token id"),
        ([None], "not a token id"),
        (None, "NoneType"),
        (7, "int is neither"),
        (b"ab", "bytes is neither"),
        ("ab", "str is neither"),
    ],
)
def test_bad_prompts_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        validate_prompt(prompt, index=4, vocab_size=V, max_prompt=10)
    assert (caught.value.index, caught.value.field) == (4, "prompt")


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, np.int16)])
def test_good_prompts_become_python_integers(kind: Any) -> None:
    tokens = validate_prompt(kind([0, 5, V - 1]), index=0, vocab_size=V, max_prompt=3)
    assert tokens == (0, 5, V - 1)
    assert all(type(t) is int for t in tokens)
