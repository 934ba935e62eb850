"""From updates of the engine to text, stops and results, without an engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from jaxinfer.observe import Update
from jaxinfer.requests import Request, Sample, finish, take
from jaxinfer.sampling import Logprobs
from jaxinfer.types import SamplingParams

EOS = 0


@dataclass(frozen=True)
class Letters:
    """Token 1 is `a`, 2 is `b`, …; 0 ends a text."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        end = "" if skip_special_tokens else "<end>"
        return "".join(chr(96 + i) if i else end for i in token_ids)


def ids(text: str) -> list[int]:
    return [ord(c) - 96 if c != "." else EOS for c in text]


def request(n: int = 1, **params: Any) -> Request:
    return Request(
        id="0",
        prompt="xy",
        prompt_ids=tuple(ids("xy")),
        params=SamplingParams(n=n, **params),
        seed=5,
        limit=100,
        eos_ids=(EOS,),
        samples=[Sample(i) for i in range(n)],
        deltas=deque(),
    )


def feed(r: Request, *parts: str, finished: bool = True, index: int = 0) -> Sample:
    """Gives tokens to a sample, part by part; the engine has ended it with the last."""
    sample, tokenizer = r.samples[index], Letters()
    for i, part in enumerate(parts):
        if sample.finish_reason is None:
            last = finished and i == len(parts) - 1
            take(r, sample, Update(i, ids(part), None, None, last), tokenizer)  # type: ignore
    return sample


@pytest.mark.parametrize("parts", [["abcdef"], ["abc", "def"], list("abcdef")])
@pytest.mark.parametrize(
    ("params", "text", "tokens", "reason"),
    [
        ({}, "abcdef", "abcdef", ("length", None)),
        ({"stop": "cd"}, "ab", "abcd", ("stop", "cd")),
        ({"stop": ["e", "cde", "d"]}, "abc", "abcd", ("stop", "d")),
        ({"stop": ["fg"]}, "abcdef", "abcdef", ("length", None)),
        ({"stop": ["fg", "def"]}, "abc", "abcdef", ("stop", "def")),
    ],
)
def test_stop_strings(
    parts: list[str], params: dict[str, Any], text: str, tokens: str, reason: Any
) -> None:
    r = request(**params)
    sample = feed(r, *parts)
    assert (sample.text, sample.tokens) == (text, ids(tokens))
    assert (sample.finish_reason, sample.stop_reason) == reason
    assert r.finished
    assert r.deltas is not None
    assert "".join(d.text for d in r.deltas) == text
    assert [t for d in r.deltas for t in d.token_ids] == ids(tokens)


@pytest.mark.parametrize("parts", [["abc."], ["ab", "c."], list("abc.")])
@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({}, ("stop", None)),
        ({"stop_token_ids": [EOS]}, ("stop", None)),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, ("stop", EOS)),
        ({"stop": "cd"}, ("stop", None)),  # `c` was held back
        ({"ignore_eos": True}, ("length", None)),
    ],
)
def test_stop_tokens_are_tokens_and_not_text(
    parts: list[str], params: dict[str, Any], reason: Any
) -> None:
    sample = feed(request(**params), *parts)
    assert (sample.text, sample.tokens) == ("abc", ids("abc."))
    assert (sample.finish_reason, sample.stop_reason) == reason


def test_stop_ids_are_named_once() -> None:
    assert request(stop_token_ids=[7, EOS, 7]).stop_ids == (EOS, 7)
    assert request(stop_token_ids=[7, EOS], ignore_eos=True).stop_ids == (7, EOS)


def test_a_request_ends_with_its_last_sample() -> None:
    r = request(n=2)
    assert r.deltas is not None
    feed(r, "a", "b", index=1)
    assert not r.finished
    assert [d.result for d in r.deltas] == [None, None]
    feed(r, "c")
    assert r.finished
    result = r.deltas[-1].result
    assert result is not None
    assert [o.text for o in result.outputs] == ["c", "ab"]
    assert (result.seed, result.finished) == (5, True)


def test_an_update_without_news_is_not_told() -> None:
    r = request()
    feed(r, "", finished=False)
    assert not r.deltas
    assert not r.finished


def test_no_reader_no_deltas() -> None:
    r = request()
    r.deltas = None
    assert feed(r, "ab").text == "ab"
    assert r.deltas is None
    assert finish(r, None).outputs[0].text == "ab"


def scores(values: list[float], ids: list[int]) -> Logprobs:
    N = len(values)
    return Logprobs(
        np.array(values, np.float32),
        np.full(N, 3, np.int32),
        np.array(ids, np.int32).reshape(N, -1),
        np.full((N, len(ids) // N), -0.5, np.float32),
    )


def test_logprobs_belong_to_the_tokens_kept() -> None:
    r = request(stop="b", logprobs=1)
    update = Update(0, ids("abc"), scores([-1, -2, -3], [1, 9, 9]), None, True)
    take(r, r.samples[0], update, Letters())  # type: ignore[arg-type]
    (out,) = finish(r, Letters()).outputs  # type: ignore[arg-type]
    assert out.logprobs is not None
    assert [list(entry) for entry in out.logprobs] == [[1], [2, 9]]
    assert out.logprobs[0][1].rank == 3
    assert [entry[i].decoded_token for entry, i in zip(out.logprobs, (1, 9), strict=True)] == [
        "a",
        "i",
    ]
    assert out.cumulative_logprob == pytest.approx(-3.0)


def test_prompt_logprobs_come_in_chunks() -> None:
    r = request(prompt_logprobs=0)
    r.prompt_ids = (1, EOS, 3)
    for chunk in (scores([-1], []), scores([-2], [])):
        take(r, r.samples[0], Update(0, [], None, chunk, False), None)
    first, second, third = finish(r, Letters()).prompt_logprobs or ()  # type: ignore[arg-type]
    assert first is None
    assert second is not None
    assert third is not None
    assert (second[EOS].logprob, second[EOS].decoded_token) == (-1.0, "<end>")
    assert third[3].logprob == -2.0
