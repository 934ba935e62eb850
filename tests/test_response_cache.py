"""Answers that are kept: the same as computed ones, and only where a request is the same."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from jaxinfer import LLM, AsyncLLM, Delta, JaxinferError, RequestOutput, SamplingParams
from jaxinfer.response_cache import Key, ResponseCache, response_key
from tests.conftest import TinyModel, of_kinds, small_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
RANDOM = replace(GREEDY, temperature=1.0, seed=7)
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def shared(tiny: TinyModel) -> Iterator[LLM]:
    with small_llm(tiny, response_cache=8) as llm:
        of_kinds(llm.engine, replace(RANDOM, logprobs=2))
        yield llm


@pytest.fixture
def llm(shared: LLM) -> LLM:
    """With nothing kept, and nothing counted."""
    shared.response_cache = ResponseCache(8)
    return shared


@pytest.fixture
def still(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has the engine refuse to be used from when it is called."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the engine was used")

    def stop() -> None:
        monkeypatch.setattr(llm.engine, "step", refuse)
        monkeypatch.setattr(llm.engine, "submit", lambda new: refuse() if new else [])

    return stop


def counts(llm: LLM) -> tuple[int, int]:
    return llm.response_cache.hits, llm.response_cache.misses


def same(a: RequestOutput, b: RequestOutput) -> bool:
    """But for what belongs to the one asking."""
    return a.request_id != b.request_id and a == replace(
        b, request_id=a.request_id, seed=a.seed, prompt=a.prompt
    )


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        RANDOM,
        pytest.param(replace(RANDOM, n=3, max_tokens=9), marks=pytest.mark.slow),
        pytest.param(replace(GREEDY, logprobs=2, prompt_logprobs=3), marks=pytest.mark.slow),
        replace(RANDOM, n=2, logprobs=0, prompt_logprobs=0, stop=["zz", "q"], stop_token_ids=[4]),
        pytest.param(
            replace(RANDOM, top_p=0.9, top_k=50, min_p=0.01, presence_penalty=0.5),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_request_that_comes_again_gets_the_same_answer(
    llm: LLM, still: Callable[[], None], params: SamplingParams
) -> None:
    (computed,) = llm.generate(PROMPT, params)
    assert counts(llm) == (0, 1)
    still()
    (kept,) = llm.generate(PROMPT, params)
    assert counts(llm) == (1, 1)
    assert same(kept, computed)
    assert kept.finished
    (once_more,) = llm.generate([PROMPT], [params])
    assert len({r.request_id for r in (computed, kept, once_more)}) == 3


@pytest.mark.slow
def test_what_was_kept_is_what_is_computed_without_a_store(tiny: TinyModel, llm: LLM) -> None:
    params = replace(RANDOM, n=2, logprobs=1)
    llm.generate(PROMPT, params)
    (kept,) = llm.generate(PROMPT, params)
    with small_llm(tiny, response_cache=0) as plain:
        (computed,) = plain.generate(PROMPT, params)
        assert kept.outputs == computed.outputs
        plain.generate(PROMPT, params)
        assert counts(plain) == (0, 0)
        assert len(plain.response_cache) == 0


def test_text_and_its_tokens_are_the_same_request(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("import os")
    (by_ids,) = llm.generate(ids, GREEDY)
    (by_text,) = llm.generate("import os", GREEDY)
    assert counts(llm) == (1, 1)
    assert same(by_text, by_ids)
    assert (by_ids.prompt, by_text.prompt) == (None, "import os")


def test_stops_may_be_written_in_several_ways(llm: LLM) -> None:
    llm.generate(PROMPT, replace(GREEDY, stop="zz", stop_token_ids=[4]))
    llm.generate(PROMPT, replace(GREEDY, stop=["zz"], stop_token_ids=(4,)))
    assert counts(llm) == (1, 1)


def test_greedy_needs_no_seed_and_keeps_that_of_the_asker(llm: LLM) -> None:
    llm.generate(PROMPT, GREEDY)
    (kept,) = llm.generate(PROMPT, replace(GREEDY, seed=3))
    assert counts(llm) == (1, 1)
    assert kept.seed == 3


def test_a_request_that_asks_for_a_fresh_seed_is_always_run(llm: LLM) -> None:
    params = replace(RANDOM, seed=None)
    first, second = (llm.generate(PROMPT, params)[0] for _ in range(2))
    assert first.seed != second.seed
    assert counts(llm) == (0, 0)
    assert len(llm.response_cache) == 0


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"temperature": 0.9},
        {"max_tokens": 5},
        {"n": 2},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"ignore_eos": False},
        {"stop": "zz"},
        pytest.param({"frequency_penalty": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_other_parameters_are_another_request(llm: LLM, other: dict[str, Any]) -> None:
    llm.generate(PROMPT, RANDOM)
    llm.generate(PROMPT, replace(RANDOM, **other))
    llm.generate([*PROMPT, 8], RANDOM)
    assert counts(llm) == (0, 3)


def test_other_weights_are_another_model(llm: LLM) -> None:
    llm.generate(PROMPT, GREEDY)
    llm.update_params(llm.params)
    llm.generate(PROMPT, GREEDY)
    assert counts(llm) == (0, 2)
    llm.generate(PROMPT, GREEDY)
    assert counts(llm) == (1, 2)


def test_what_ran_while_the_weights_changed_is_not_kept(llm: LLM) -> None:
    stream = llm.stream(PROMPT, GREEDY)
    next(stream)
    llm.update_params(llm.params)
    list(stream)
    assert len(llm.response_cache) == 0


def test_what_did_not_finish_is_not_kept(llm: LLM) -> None:
    stream = llm.stream(PROMPT, GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(llm.response_cache) == 0


def test_scoring_a_prompt_is_not_completing_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, prompt_logprobs=1)
    llm.logprobs(PROMPT, top=1)
    llm.generate(PROMPT, params)
    assert counts(llm) == (0, 1)
    assert len(llm.logprobs(PROMPT, top=1)[0].logprobs) == len(PROMPT) - 1
    assert counts(llm) == (0, 1)


def test_what_a_caller_does_to_an_answer_stays_with_him(llm: LLM) -> None:
    params = replace(GREEDY, logprobs=1, prompt_logprobs=1)
    (want,) = llm.generate(PROMPT, params)
    for _ in range(2):
        (spoilt,) = llm.generate(PROMPT, params)
        assert same(spoilt, want)
        assert spoilt.outputs[0].logprobs
        assert spoilt.prompt_logprobs
        assert spoilt.prompt_logprobs[1] is not None
        spoilt.outputs[0].logprobs[0].clear()
        spoilt.prompt_logprobs[1].clear()


def test_some_of_a_call_are_known(llm: LLM) -> None:
    prompts = [[9, 8], PROMPT, [300]]
    (alone,) = llm.generate(PROMPT, GREEDY)
    together = llm.generate(prompts, GREEDY)
    assert counts(llm) == (1, 3)
    assert [list(r.prompt_token_ids) for r in together] == prompts
    assert same(together[1], alone)


def test_a_known_request_takes_no_place_in_the_queue(tiny: TinyModel) -> None:
    with small_llm(tiny, response_cache=8, max_waiting=1) as llm:
        (want,) = llm.generate(PROMPT, GREEDY)
        first, second, _ = llm.generate([PROMPT, PROMPT, [4]], GREEDY)
        assert same(first, want)
        assert same(second, want)


def test_chat_is_answered_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "chat_tokens", lambda messages: [4, len(messages)])
    asked = [{"role": "user", "content": "hello"}]
    (computed,), (kept,) = (llm.chat(asked, GREEDY) for _ in range(2))
    assert same(kept, computed)
    assert counts(llm) == (1, 1)


@pytest.mark.parametrize("params", [GREEDY, replace(RANDOM, n=3, logprobs=0)])
def test_a_stream_gets_each_sample_at_once(
    llm: LLM, still: Callable[[], None], params: SamplingParams
) -> None:
    *_, last = llm.stream(PROMPT, params)
    computed = last.result
    still()
    deltas = list(llm.stream(PROMPT, params))
    check_whole(deltas, computed, params.n)
    assert counts(llm) == (1, 1)
    assert same(llm.generate(PROMPT, params)[0], deltas[-1].result)  # type: ignore[arg-type]


def check_whole(deltas: list[Delta], computed: RequestOutput | None, n: int) -> None:
    assert computed is not None
    assert [d.index for d in deltas] == list(range(n))
    assert [d.result is None for d in deltas] == [True] * (n - 1) + [False]
    for delta, output in zip(deltas, computed.outputs, strict=True):
        assert delta.text == output.text
        assert delta.token_ids == output.token_ids
        assert delta.finish_reason == output.finish_reason is not None
    assert deltas[-1].result is not None
    assert same(deltas[-1].result, computed)


@pytest.mark.parametrize("params", [GREEDY, replace(RANDOM, n=2)])
def test_async(tiny: TinyModel, params: SamplingParams) -> None:
    llm = small_llm(tiny, response_cache=8)

    async def talk() -> tuple[list[Delta], list[Delta], Delta]:
        async with AsyncLLM(llm) as server:
            first = [d async for d in server.generate(PROMPT, params)]
            long = server.generate([4], replace(GREEDY, max_tokens=40))
            begun = await anext(long)  # one that is known is answered beside one that runs
            second = [d async for d in server.generate(PROMPT, params)]
            rest = [d async for d in long]
            return first, second, (rest or [begun])[-1]

    first, second, last = asyncio.run(asyncio.wait_for(talk(), 60))
    check_whole(second, first[-1].result, params.n)
    assert last.result is not None
    assert counts(llm) == (1, 2)


def test_async_takes_no_turn_for_what_is_known(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = small_llm(tiny, response_cache=8)
    llm.generate(PROMPT, GREEDY)
    turns: list[int] = []
    monkeypatch.setattr(llm, "pump", lambda: turns.append(1))

    async def talk() -> list[Delta]:
        async with AsyncLLM(llm) as server:
            return [delta async for delta in server.generate(PROMPT, GREEDY)]

    (delta,) = asyncio.run(asyncio.wait_for(talk(), 60))
    assert delta.result is not None
    assert turns == []


def test_an_answer_that_cannot_be_made_fails_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "_keep", lambda request: 1 / 0)
    with pytest.raises(JaxinferError, match="ZeroDivisionError"):
        llm.generate(PROMPT, GREEDY)
    monkeypatch.undo()
    assert llm.generate(PROMPT, GREEDY)[0].finished


# -- the store alone -----------------------------------------------------------------------------


def key(number: int) -> Key | None:
    return response_key((number,), GREEDY, 0)


def output(number: int) -> RequestOutput:
    return RequestOutput(str(number), None, (number,), ())


def test_the_least_recently_used_goes_first() -> None:
    store = ResponseCache(2)
    store.put(key(1), output(1))
    store.put(key(2), output(2))
    assert store.get(key(1)) == output(1)
    store.put(key(3), output(3))
    assert store.get(key(2)) is None
    assert store.get(key(1)) == output(1)
    assert store.get(key(3)) == output(3)
    assert (store.hits, store.misses, len(store)) == (3, 1, 2)
    store.put(key(1), output(9))
    assert store.get(key(1)) == output(9)
    store.clear()
    assert len(store) == 0


@pytest.mark.parametrize("entries", [0, 1, 3, 5])
def test_the_store_against_a_plain_list(entries: int) -> None:
    store, model = ResponseCache(entries), OrderedDict()
    draw = random.Random(entries)
    for _ in range(500):
        number = draw.randrange(7)
        if draw.random() < 0.5:
            found = store.get(key(number))
            assert found == model.get(number)
            if number in model:
                model.move_to_end(number)
        elif entries:
            store.put(key(number), output(number))
            model[number] = output(number)
            model.move_to_end(number)
            while len(model) > entries:
                model.popitem(last=False)
        else:
            store.put(key(number), output(number))
        assert len(store) == len(model) <= entries


def test_no_key_is_never_found() -> None:
    store = ResponseCache(2)
    store.put(None, output(1))
    assert store.get(None) is None
    assert (len(store), store.hits, store.misses) == (0, 0, 0)
    assert response_key((1,), replace(RANDOM, seed=None), 0) is None
