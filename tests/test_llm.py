"""The offline API on a tiny model: what goes in, what comes out, and what may not matter."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import (
    LLM,
    CapacityError,
    CheckpointError,
    CompletionOutput,
    Delta,
    InvalidRequest,
    JaxinferError,
    QueueFull,
    RequestOutput,
    SamplingParams,
    UnsupportedModel,
)
from jaxinfer.models import decoder
from jaxinfer.models.weights import init_params
from jaxinfer.tokenizer import Tokenizer
from tests.conftest import TinyModel, of_kinds

IDS = [[5, 6, 7], [300], [9, 8, 7, 6, 5, 4, 3, 2, 1], [17, 18]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
RANDOM = SamplingParams(seed=7, max_tokens=8)
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_model_len": 128,
    "kv_cache_bytes": 1 << 20,
    "max_num_batched_tokens": 16,
    "max_steps": 4,
    "page_size": 8,
}


def make(tiny: TinyModel, **options: Any) -> LLM:
    tokenizer = options.pop("tokenizer", tiny.tokenizer)
    return LLM.from_params(tiny.params, tiny.config, tokenizer=tokenizer, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def shared(tiny: TinyModel) -> Iterator[LLM]:
    with make(tiny) as llm:
        of_kinds(llm.engine, replace(RANDOM, logprobs=2))
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared LLM; afterwards nothing may be left in it."""
    yield shared
    check_idle(shared)


def check_idle(llm: LLM) -> None:
    assert llm._owners == {}
    engine = llm.engine
    assert engine._live == {}
    assert not engine._preempted
    while not llm.engine.idle:
        assert llm.engine.step() == []
    assert llm.engine.waiting == 0
    assert llm.engine._batcher.pool.available == llm.memory_plan.num_pages - 1


def tokens(outputs: Sequence[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def only(llm: LLM, prompt: Any, params: SamplingParams) -> CompletionOutput:
    (output,) = llm.generate(prompt, params)
    (sample,) = output.outputs
    return sample


# -- what goes in --------------------------------------------------------------------------------


def test_prompts_of_every_kind_give_the_same(llm: LLM) -> None:
    text = "import os"
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(text)
    want = tokens(llm.generate([text], GREEDY))
    for prompt in (
        text,
        ids,
        tuple(ids),
        np.array(ids),
        np.array(ids, np.uint16),
        np.array([ids]),
        [ids],
        [tuple(ids)],
        [np.array(ids)],
    ):
        outputs = llm.generate(prompt, GREEDY)
        assert tokens(outputs) == want
        assert outputs[0].prompt_token_ids == tuple(ids)
        assert outputs[0].prompt == (text if isinstance(prompt, str) else None)


def test_mixed_prompts_come_back_in_order(llm: LLM) -> None:
    outputs = llm.generate(["import os", IDS[0], np.array(IDS[2])], GREEDY)
    assert [o.prompt for o in outputs] == ["import os", None, None]
    assert [list(o.prompt_token_ids) for o in outputs[1:]] == [IDS[0], IDS[2]]
    assert len({o.request_id for o in outputs}) == 3
    assert all(o.finished and o.error is None for o in outputs)


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []
    assert llm.logprobs([]) == []
    assert llm.chat([]) == []


def test_params_for_each(llm: LLM) -> None:
    outputs = llm.generate(IDS[:2], [GREEDY, replace(GREEDY, max_tokens=3)])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [8, 3]
    with pytest.raises(InvalidRequest, match="3 SamplingParams for 2 prompts") as error:
        llm.generate(IDS[:2], [GREEDY] * 3)
    assert error.value.field == "params"


def test_default_params_sample_16_tokens(llm: LLM) -> None:
    (output,) = llm.generate(IDS[:1])
    assert 1 <= len(output.outputs[0].token_ids) <= 16
    assert tokens(llm.generate(IDS[:1], SamplingParams(seed=output.seed))) == tokens([output])


# -- refusals ------------------------------------------------------------------------------------

BAD_PROMPTS = [
    ([[]], "empty"),
    ([""], "empty"),
    ([[1] * 128], "128 tokens; at most 127"),
    ([[1, 4096]], "4096 at position 1"),
    ([[-1]], "-1 at position 0"),
    ([[1.5]], "1.5"),
    ([["a"]], "'a'"),
    ([[True]], "True"),
    ([None], "NoneType"),
    ([b"abc"], "bytes"),
    (b"abc", "bytes"),
    (5, "int is not a list"),
    (None, "NoneType is not a list"),
    ({"prompt": "a"}, "dict is not a list"),
    (np.array(5), "ndarray is not a list"),
    (["\ud800"], "UTF-8"),
]
BAD_PARAMS = [
    ("temperature", float("nan")),
    ("temperature", -1.0),
    ("temperature", 1e9),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", float("nan")),
    ("top_k", -2),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", float("inf")),
    ("presence_penalty", 3.0),
    ("frequency_penalty", float("nan")),
    ("n", 0),
    ("n", 10**6),
    ("seed", -1),
    ("seed", 2**63),
    ("max_tokens", 0),
    ("min_tokens", 17),
    ("stop", [""]),
    ("stop_token_ids", [4096]),
    ("stop_token_ids", list(range(25))),
    ("logprobs", 21),
    ("prompt_logprobs", -1),
]


@pytest.fixture
def unharmed(llm: LLM) -> Iterator[LLM]:
    """Whatever the test does: greedy tokens before and after are the same."""
    before = tokens(llm.generate(IDS[:1], GREEDY))
    yield llm
    check_idle(llm)
    assert tokens(llm.generate(IDS[:1], GREEDY)) == before


def test_bad_prompts_are_refused(unharmed: LLM) -> None:
    for prompt, words in BAD_PROMPTS:
        with pytest.raises(InvalidRequest, match=words) as error:
            unharmed.generate(prompt, GREEDY)
        assert (error.value.index, error.value.field) == (0, "prompt")


def test_bad_params_are_refused(unharmed: LLM) -> None:
    for field, value in BAD_PARAMS:
        with pytest.raises(InvalidRequest) as error:
            unharmed.generate(IDS[:2], [GREEDY, replace(SamplingParams(), **{field: value})])
        assert (error.value.index, error.value.field) == (1, field), value
    for params in (5, "greedy", [None], [{"temperature": 0}], {"temperature": 0}):
        with pytest.raises(InvalidRequest) as error:
            unharmed.generate(IDS[:1], params)  # type: ignore[arg-type]
        assert error.value.field == "params"
        with pytest.raises(InvalidRequest):
            unharmed.stream(IDS[0], params)  # type: ignore[arg-type]


def test_one_bad_request_stops_the_call_before_any_work(unharmed: LLM) -> None:
    unharmed.engine.step()
    for bad in ([], "\ud800"):
        with pytest.raises(InvalidRequest) as error:
            unharmed.generate([IDS[0], bad], GREEDY)
        assert error.value.index == 1
        assert unharmed.engine._events == []


def test_errors_returned(unharmed: LLM) -> None:
    first, bad, last = unharmed.generate([IDS[0], "", IDS[1]], GREEDY, on_error="return")
    assert tokens([first, last]) == tokens(unharmed.generate(IDS[:2], GREEDY))
    assert isinstance(bad.error, InvalidRequest)
    assert (bad.error.index, bad.prompt, bad.outputs) == (1, "", ())
    with pytest.raises(ValueError, match="on_error='ignore'"):
        unharmed.generate(IDS, GREEDY, on_error="ignore")  # type: ignore[arg-type]


def test_bad_logprobs_calls_are_refused(unharmed: LLM) -> None:
    for top in (-1, 21, None, 1.0):
        with pytest.raises(InvalidRequest) as error:
            unharmed.logprobs(IDS, top=top)  # type: ignore[arg-type]
        assert error.value.field == "top"
    with pytest.raises(InvalidRequest) as error:
        unharmed.logprobs([IDS[0], [1] * 129])
    assert error.value.index == 1


def test_the_queue_is_bounded(tiny: TinyModel) -> None:
    with make(tiny, max_waiting=3, max_num_seqs=1, max_steps=1) as llm:
        with pytest.raises(QueueFull, match="4 sequences do not fit"):
            llm.generate(IDS, GREEDY)
        with pytest.raises(QueueFull):
            llm.generate(IDS[:1], replace(RANDOM, n=4))
        want = tokens(llm.generate(IDS[:3], GREEDY))
        assert len(want) == 3
        check_idle(llm)


def test_cancelled_sequences_leave_the_queue_at_once(tiny: TinyModel) -> None:
    with make(tiny, max_waiting=1, max_num_seqs=1, max_steps=1) as llm:
        first, second = llm.stream(IDS[0], GREEDY), llm.stream(IDS[1], GREEDY)
        next(first)
        llm.submit([llm.prepare(IDS[1], GREEDY)])
        assert llm.engine.waiting == 1
        with pytest.raises(QueueFull):
            next(second)
        llm.cancel([request for request, _ in llm._owners.values()][1:])
        assert llm.engine.waiting == 0
        list(first)
        check_idle(llm)


def test_without_a_tokenizer(tiny: TinyModel) -> None:
    with make(tiny, tokenizer=None) as bare, make(tiny) as full:
        outputs = bare.generate(IDS, GREEDY)
        assert tokens(outputs) == tokens(full.generate(IDS, GREEDY))  # two in one process
        assert {o.outputs[0].text for o in outputs} == {""}
        with pytest.raises(InvalidRequest, match="no tokenizer") as error:
            bare.generate([IDS[0], "text"], GREEDY)
        assert (error.value.index, error.value.field) == (1, "prompt")
        with pytest.raises(InvalidRequest, match="need a tokenizer") as error:
            bare.generate(IDS[:1], replace(GREEDY, stop="a"))
        assert error.value.field == "stop"
        with pytest.raises(InvalidRequest, match="no tokenizer") as error:
            bare.chat([{"role": "user", "content": "hi"}])
        assert error.value.field == "messages"
        assert bare.generate(IDS[:1], replace(GREEDY, stop_token_ids=[5])) is not None


# -- ends ----------------------------------------------------------------------------------------


def test_max_tokens(llm: LLM) -> None:
    sample = only(llm, IDS[:1], replace(GREEDY, max_tokens=5, ignore_eos=True))
    assert (len(sample.token_ids), sample.finish_reason, sample.stop_reason) == (5, "length", None)
    one = only(llm, IDS[:1], replace(GREEDY, max_tokens=1))
    assert one.token_ids == sample.token_ids[:1]


def test_as_many_tokens_as_fit(tiny: TinyModel) -> None:
    with make(tiny, max_model_len=20) as llm:
        for max_tokens in (None, 10**6):
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            sample = only(llm, IDS[:1], params)
            assert (len(sample.token_ids), sample.finish_reason) == (17, "length")
        longest = only(llm, [[1] * 19], replace(GREEDY, ignore_eos=True))
        assert len(longest.token_ids) == 1
        with pytest.raises(InvalidRequest, match="at most 19"):
            llm.generate([[1] * 20])
        assert llm.logprobs([[1] * 20])[0].logprobs.shape == (19,)


def test_stop_token_ids(llm: LLM) -> None:
    assert llm.tokenizer is not None
    full = only(llm, IDS[:1], GREEDY)
    stop = full.token_ids[3]
    sample = only(llm, IDS[:1], replace(GREEDY, stop_token_ids=[4000, stop, stop]))
    assert sample.token_ids == full.token_ids[: full.token_ids.index(stop) + 1]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert full.text.startswith(sample.text)
    assert len(sample.text) < len(only(llm, IDS[:1], replace(GREEDY, max_tokens=4)).text)


def test_end_of_sequence_and_min_tokens(tiny: TinyModel, llm: LLM) -> None:
    full = only(llm, IDS[:1], GREEDY)
    eos = full.token_ids[2]
    config = replace(tiny.config, eos_token_ids=(eos,))
    with make(replace(tiny, config=config)) as other:
        sample = only(other, IDS[:1], GREEDY)
        assert sample.token_ids == full.token_ids[: full.token_ids.index(eos) + 1]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", None)
        ignored = only(other, IDS[:1], replace(GREEDY, ignore_eos=True))
        assert ignored == full
        named = only(other, IDS[:1], replace(GREEDY, ignore_eos=True, stop_token_ids=[eos]))
        assert (named.token_ids, named.stop_reason) == (sample.token_ids, eos)
        longer = only(other, IDS[:1], replace(GREEDY, min_tokens=5))
        assert eos not in longer.token_ids[:5]
        assert len(longer.token_ids) > 5 or longer.token_ids[:2] == full.token_ids[:2]


def test_stop_strings(llm: LLM) -> None:
    full = only(llm, IDS[:1], GREEDY)
    for at, size in itertools.product(range(1, len(full.text) - 8, 5), (1, 4, 8)):
        stop = full.text[at : at + size]  # many begin in one token and end in another
        for stops in (stop, ["not there", stop], [full.text[-2:], stop]):
            sample = only(llm, IDS[:1], replace(GREEDY, stop=stops))
            found = stop if isinstance(stops, str) else sample.stop_reason
            assert (sample.finish_reason, sample.stop_reason) == ("stop", found)
            assert sample.text == full.text[: full.text.index(found)]
            assert sample.token_ids == full.token_ids[: len(sample.token_ids)]
    unseen = only(llm, IDS[:1], replace(GREEDY, stop=full.text + "x"))
    assert unseen == full  # held back, then given


def test_a_stop_token_releases_what_was_held_for_a_stop_string(llm: LLM) -> None:
    full = only(llm, IDS[:1], GREEDY)
    held = only(llm, IDS[:1], replace(GREEDY, max_tokens=3)).text
    params = replace(GREEDY, stop=held + "!", stop_token_ids=[full.token_ids[3]])
    sample = only(llm, IDS[:1], params)
    assert (sample.text, sample.stop_reason) == (held, full.token_ids[3])


# -- chance --------------------------------------------------------------------------------------

COMPANY = [
    GREEDY,
    SamplingParams(seed=3, top_k=5, max_tokens=12),
    SamplingParams(seed=4, top_p=0.5, presence_penalty=1.5, max_tokens=3),
    SamplingParams(seed=5, temperature=1.7, min_p=0.01, repetition_penalty=1.3, logprobs=2),
]


@pytest.fixture(scope="module")
def mixed(tiny: TinyModel) -> Iterator[LLM]:
    """Its program changes with the company, and not only its rows."""
    with make(tiny, max_steps=1) as llm:
        of_kinds(llm.engine, GREEDY, RANDOM, SamplingParams(top_p=0.9, logprobs=2))
        yield llm


@pytest.mark.parametrize(
    "params",
    [
        RANDOM,
        GREEDY,
        SamplingParams(seed=8, max_tokens=8, top_p=0.9, top_k=50, min_p=1e-4),
        pytest.param(
            SamplingParams(seed=9, max_tokens=8, frequency_penalty=2.0, repetition_penalty=2.0),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tokens_do_not_depend_on_the_company(mixed: LLM, params: SamplingParams) -> None:
    (want,) = tokens(mixed.generate(IDS[:1], params))
    for place in (0, len(COMPANY)):  # at once, and in the first row that becomes free
        each = [*COMPANY[:place], params, *COMPANY[place:]]
        prompts = [[*IDS[1:], [30]][i - (i > place)] if i != place else IDS[0] for i in range(5)]
        assert tokens(mixed.generate(prompts, each))[place] == want
    check_idle(mixed)


def test_samples_of_one_request(llm: LLM) -> None:
    (three,) = llm.generate(IDS[:1], replace(RANDOM, n=3))
    assert [s.index for s in three.outputs] == [0, 1, 2]
    assert len({s.token_ids for s in three.outputs}) == 3
    (six,) = llm.generate(IDS[:1], replace(RANDOM, n=6))  # more than rows
    assert six.outputs[:3] == three.outputs
    assert only(llm, IDS[:1], RANDOM) == three.outputs[0]


def test_a_drawn_seed_repeats_the_request(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, n=2)
    outputs = llm.generate([IDS[0], IDS[0]], params)
    assert outputs[0].seed != outputs[1].seed
    assert tokens(outputs[:1]) != tokens(outputs[1:])
    for output in outputs:
        assert tokens(llm.generate(IDS[:1], replace(params, seed=output.seed))) == tokens([output])


def test_the_engine_seed_repeats_the_run(tiny: TinyModel) -> None:
    def run(seed: int) -> list[Any]:
        with make(tiny, seed=seed) as llm:
            return tokens(llm.generate(IDS[:2], SamplingParams(max_tokens=4)))

    assert run(1) == run(1) != run(2)


def reference_logits(tiny: TinyModel, ids: Sequence[int]) -> np.ndarray:
    """float32 [len(ids), V], without a cache; of a padded length, to compile once."""
    padded = np.zeros((1, 48), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_apply(tiny.params, tiny.config, padded).logits)[0, : len(ids)]


_apply = jax.jit(decoder.apply, static_argnums=1)


@pytest.mark.parametrize(
    ("repetition", "presence", "frequency"), [(1.5, 1.0, 0.5), (0.5, -1.0, -0.5)]
)
def test_penalties_match_numpy(
    tiny: TinyModel, llm: LLM, repetition: float, presence: float, frequency: float
) -> None:
    plain = replace(GREEDY, max_tokens=10, ignore_eos=True)
    prompt = [*only(llm, [5, 6], plain).token_ids, 5, 6]  # what it would say has been said
    params = replace(
        plain,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    got = only(llm, prompt, params).token_ids
    assert got != only(llm, prompt, plain).token_ids
    logits = reference_logits(tiny, [*prompt, *got])
    for step, token in enumerate(got):
        x = logits[len(prompt) - 1 + step].copy()
        counts = np.bincount(got[:step], minlength=len(x))
        seen = np.union1d(prompt, got[:step]).astype(int)
        x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
        x -= frequency * counts + presence * (counts > 0)
        assert x[token] == pytest.approx(x.max(), abs=1e-4)


# -- streams -------------------------------------------------------------------------------------


def joined(deltas: Sequence[Delta], index: int = 0) -> tuple[str, tuple[int, ...]]:
    mine = [d for d in deltas if d.index == index]
    return "".join(d.text for d in mine), tuple(t for d in mine for t in d.token_ids)


@pytest.mark.parametrize(
    "params", [replace(GREEDY, seed=1), replace(RANDOM, n=3, logprobs=2, prompt_logprobs=2)]
)
def test_stream_is_generate_in_parts(llm: LLM, params: SamplingParams) -> None:
    deltas = list(llm.stream("import os", params))
    (want,) = llm.generate("import os", params)
    assert [d.result is None for d in deltas] == [True] * (len(deltas) - 1) + [False]
    assert deltas[-1].result == replace(want, request_id=deltas[-1].result.request_id)
    for sample in want.outputs:
        assert joined(deltas, sample.index) == (sample.text, sample.token_ids)
        ends = [d.finish_reason for d in deltas if d.index == sample.index]
        assert ends == [None] * (len(ends) - 1) + [sample.finish_reason]
    assert len(deltas) > 1


def test_stream_never_shows_a_stop_string(llm: LLM) -> None:
    full = only(llm, IDS[0], GREEDY).text
    stop = full[10:18]
    deltas = list(llm.stream(IDS[0], replace(GREEDY, stop=stop)))
    assert joined(deltas)[0] == deltas[-1].result.outputs[0].text == full[: full.index(stop)]


def test_streams_side_by_side(llm: LLM) -> None:
    params = [replace(GREEDY, max_tokens=20), replace(RANDOM, max_tokens=20), GREEDY]
    alone = [list(llm.stream(prompt, p)) for prompt, p in zip(IDS, params, strict=False)]
    first, second = llm.stream(IDS[0], params[0]), llm.stream(IDS[1], params[1])
    got: tuple[list[Delta], list[Delta]] = ([next(first)], [next(second)])
    between = only(llm, IDS[2], params[2])
    for a, b in itertools.zip_longest(first, second):
        got[0].extend([a] if a else [])
        got[1].extend([b] if b else [])
    assert [joined(g) for g in got] == [joined(a) for a in alone[:2]]
    assert (between.text, between.token_ids) == joined(alone[2])


def test_closing_a_stream_frees_everything(llm: LLM) -> None:
    want = tokens(llm.generate(IDS, GREEDY))
    for read in (0, 1, 2):
        stream = llm.stream(IDS[0], SamplingParams(n=6, max_tokens=None))
        for _ in range(read):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        check_idle(llm)
    llm.stream(IDS[0])  # never read
    for _ in llm.stream(IDS[0], GREEDY):
        break  # given up by dropping it
    check_idle(llm)
    assert tokens(llm.generate(IDS, GREEDY)) == want


def test_stream_checks_its_request_at_once(unharmed: LLM) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        unharmed.stream("")


# -- chat ----------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def chatty(tiny: TinyModel, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(tiny.tokenizer.backend, "chat_template", TEMPLATE)
    return llm


def test_chat(chatty: LLM) -> None:
    assert chatty.tokenizer is not None
    ids = chatty.tokenizer.encode("user: hi\nassistant:")
    (want,) = tokens(chatty.generate(ids, GREEDY))
    one = chatty.chat(HELLO, GREEDY)
    assert list(one[0].prompt_token_ids) == ids == chatty.chat_tokens(HELLO)
    assert tokens(one) == [want]
    assert tokens(chatty.chat([HELLO, HELLO], GREEDY)) == [want, want]


def test_chat_refusals(chatty: LLM) -> None:
    robot = [{"role": "robot", "content": "hi"}]
    with pytest.raises(InvalidRequest, match="no robots") as error:
        chatty.chat([HELLO, robot], GREEDY)
    assert (error.value.index, error.value.field) == (1, "messages")
    good, bad = chatty.chat([HELLO, robot], GREEDY, on_error="return")
    assert good.error is None
    assert isinstance(bad.error, InvalidRequest)
    for messages in ("hi", ["hi"], [[]], [{"content": "hi"}], 5):
        with pytest.raises(InvalidRequest) as error:
            chatty.chat(messages)  # type: ignore[arg-type]
        assert error.value.field == "messages"


def test_chat_without_a_template(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat(HELLO)


# -- log-probabilities ---------------------------------------------------------------------------

SCORED = [*IDS, list(range(100, 140))]  # the last takes three chunks


def test_logprobs_are_the_models(tiny: TinyModel, llm: LLM) -> None:
    for scores, ids in zip(llm.logprobs(SCORED, top=3), SCORED, strict=True):
        want = np.asarray(jax.nn.log_softmax(reference_logits(tiny, ids)))[:-1]
        N = len(ids) - 1
        assert scores.token_ids == tuple(ids)
        assert scores.logprobs.shape == (N,)
        assert scores.logprobs.dtype == np.float32
        assert scores.top_ids.shape == scores.top_logprobs.shape == (N, 3)
        np.testing.assert_allclose(scores.logprobs, want[range(N), ids[1:]], atol=1e-4)
        np.testing.assert_allclose(scores.top_logprobs, np.sort(want)[:, :-4:-1], atol=1e-4)
        found = np.take_along_axis(want, scores.top_ids, 1)
        np.testing.assert_allclose(found, scores.top_logprobs, atol=1e-4)


def test_logprobs_without_the_likeliest(llm: LLM) -> None:
    for plain, three in zip(llm.logprobs(SCORED), llm.logprobs(SCORED, top=3), strict=True):
        assert plain.top_ids.shape == (len(plain.token_ids) - 1, 0)
        np.testing.assert_array_equal(plain.logprobs, three.logprobs)


def test_logprobs_of_text_and_of_one_token(llm: LLM) -> None:
    assert llm.tokenizer is not None
    (text,) = llm.logprobs("import os")
    (ids,) = llm.logprobs(llm.tokenizer.encode("import os"))
    np.testing.assert_array_equal(text.logprobs, ids.logprobs)
    (one,) = llm.logprobs([[5]], top=2)
    assert (one.logprobs.shape, one.top_ids.shape) == ((0,), (0, 2))


@pytest.mark.parametrize("top", [0, 2])
def test_beginnings_are_scored_once(tiny: TinyModel, top: int) -> None:
    """Answers to a question, whole and in part; a sequence twice, and one that begins another."""
    question, other = [*range(10, 40)], [*range(60, 79)]
    sequences = [
        [*question, 1, 2], [*question, 3], other, question, [*question, 1, 2], [*question[:20], 5],
        [*other, 7, 7, 7], [8], [*question[:9], 4],
    ]  # fmt: skip
    with make(tiny, prefix_caching=False) as llm:
        want = llm.logprobs(sequences, top=top)
    with make(tiny) as llm:
        got = llm.logprobs(sequences, top=top)
        computed = sum(step.read for step in llm.metrics.steps)
    for a, b in zip(got, want, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(a.top_ids, b.top_ids)
        assert a.top_logprobs.shape == (len(a.token_ids) - 1, top)
    assert computed < 0.75 * sum(map(len, sequences))


def test_logprobs_whatever_the_chunks(tiny: TinyModel, llm: LLM) -> None:
    want = llm.logprobs(SCORED[-1:])[0].logprobs
    with make(tiny, max_num_batched_tokens=128) as whole:
        got = whole.logprobs(SCORED[-1:])[0].logprobs
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_generated_logprobs(llm: LLM) -> None:
    for params in (replace(GREEDY, logprobs=2), replace(RANDOM, temperature=2.0, logprobs=2)):
        sample = only(llm, IDS[0], params)
        assert sample.logprobs is not None
        assert len(sample.logprobs) == len(sample.token_ids)
        (scores,) = llm.logprobs([[*IDS[0], *sample.token_ids]], top=2)
        rest = slice(len(IDS[0]) - 1, None)
        chosen = [entry[t] for entry, t in zip(sample.logprobs, sample.token_ids, strict=True)]
        np.testing.assert_allclose([c.logprob for c in chosen], scores.logprobs[rest], atol=1e-5)
        assert sample.cumulative_logprob == pytest.approx(sum(c.logprob for c in chosen))
        for entry, token, top in zip(
            sample.logprobs, sample.token_ids, scores.top_ids[rest], strict=True
        ):
            assert list(entry) == [token, *(t for t in top.tolist() if t != token)]
            assert [entry[t].rank for t in top.tolist()] == [1, 2]
            assert entry[token].decoded_token == llm.tokenizer.decode([token])  # type: ignore
        if params.temperature == 0:
            assert {c.rank for c in chosen} == {1}
        else:
            assert any(c.rank and c.rank > 2 for c in chosen)


def test_logprobs_are_given_as_asked(llm: LLM) -> None:
    none, zero = llm.generate([IDS[0]] * 2, [GREEDY, replace(GREEDY, logprobs=0)])
    assert none.outputs[0].logprobs is none.outputs[0].cumulative_logprob is None
    assert none.prompt_logprobs is None
    assert [len(entry) for entry in zero.outputs[0].logprobs or ()] == [1] * 8
    assert zero.outputs[0].token_ids == none.outputs[0].token_ids


def test_prompt_logprobs(llm: LLM) -> None:
    for n, ids in itertools.product((1, 3), (SCORED[-1], [5])):
        (output,) = llm.generate([ids], replace(RANDOM, n=n, prompt_logprobs=2))
        (scores,) = llm.logprobs([ids], top=2)
        first, *rest = output.prompt_logprobs or ()
        assert first is None
        values = [entry[token].logprob for entry, token in zip(rest, ids[1:], strict=True)]
        assert values == scores.logprobs.tolist()
        for entry, token, top in zip(rest, ids[1:], scores.top_ids.tolist(), strict=True):
            assert set(entry) == {token, *top}
        assert tokens([output]) == tokens(llm.generate([ids], replace(RANDOM, n=n)))


def test_special_tokens_are_decoded(llm: LLM) -> None:
    (output,) = llm.generate([[5, 0, 6]], replace(GREEDY, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[1] is not None
    assert output.prompt_logprobs[1][0].decoded_token == "<|endoftext|>"


# -- what may not matter -------------------------------------------------------------------------

MANY = [[i + 1, *range(50, 50 + i % 7)] for i in range(11)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_seqs": 1}, marks=pytest.mark.slow),
        {"max_num_seqs": 3},
        pytest.param({"max_num_seqs": 8, "max_steps": 1}, marks=pytest.mark.slow),
        {"max_num_seqs": 8, "max_steps": 6},  # not a multiple of the steps between two looks
        {"policy": "static"},
        {"kv_cache_bytes": 6 * 4096, "max_model_len": 40},  # five pages: two requests at a time
    ],
)
def test_arrangements(tiny: TinyModel, llm: LLM, options: dict[str, Any]) -> None:
    params = [replace(GREEDY, max_tokens=2 + i % 5) for i in range(len(MANY))]
    want = tokens(llm.generate(MANY, params))
    with make(tiny, **options) as other:
        assert tokens(other.generate(MANY, params)) == want
        check_idle(other)


@pytest.mark.parametrize(
    "params",
    [
        replace(RANDOM, max_tokens=24, n=2, logprobs=2, repetition_penalty=1.3),
        pytest.param(replace(GREEDY, max_tokens=24), marks=pytest.mark.slow),
        pytest.param(
            replace(GREEDY, max_tokens=20, prompt_logprobs=1, frequency_penalty=0.7),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_preempted_request_gives_the_same(
    tiny: TinyModel, llm: LLM, params: SamplingParams
) -> None:
    prompts = [list(range(20 + i, 29 + 2 * i)) for i in range(6)]
    want = llm.generate(prompts, params)
    # Room for a fourth of what they need at the end.
    with make(tiny, max_model_len=48, kv_cache_bytes=11 * 2048, max_steps=1) as small:
        preempted = []
        step = small.engine._schedule

        def schedule() -> Any:
            actions = step()
            preempted.extend(small.engine._batcher.parked)
            return actions

        small.engine._schedule = schedule  # type: ignore[method-assign]
        got = small.generate(prompts, params)
        check_idle(small)
    assert preempted
    assert tokens(got) == tokens(want)
    # A CPU rounds a decode step's row and the same row of a chunk differently, by an ulp.
    for a, b in zip(got, want, strict=True):
        for one, other in zip(a.outputs, b.outputs, strict=True):
            assert one.text == other.text
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
        assert (a.prompt_logprobs is None) == (b.prompt_logprobs is None)
        for x, y in zip(a.prompt_logprobs or (), b.prompt_logprobs or (), strict=True):
            assert (x and x.keys()) == (y and y.keys())


@pytest.mark.parametrize(
    "params",
    [pytest.param(GREEDY, marks=pytest.mark.slow), replace(RANDOM, n=2, logprobs=2)],
)
def test_prompts_that_begin_alike_are_computed_once(
    tiny: TinyModel, params: SamplingParams
) -> None:
    beginning = list(range(40, 80))
    prompts = [[*beginning, *range(100 + i, 100 + 3 * i)] for i in range(1, 6)]
    with make(tiny, prefix_caching=False) as plain:
        want = plain.generate(prompts, params)
    with make(tiny) as llm:
        got = llm.generate(prompts, params)
        again = llm.generate(prompts, params)
        check_idle(llm)
    assert [out.outputs for out in got] == [out.outputs for out in want]
    assert [out.outputs for out in again] == [out.outputs for out in want]
    assert [out.num_cached_tokens for out in want] == [0] * 5
    # Of whole pages of 8; a prompt's last token is computed in any case.
    own = [(len(prompt) - 1) // 8 * 8 for prompt in prompts]
    others = [0, 40, 40, 40, 40]
    assert [out.num_cached_tokens for out in got] == [
        first + (params.n - 1) * all_ for first, all_ in zip(others, own, strict=True)
    ]
    assert [out.num_cached_tokens for out in again] == [params.n * all_ for all_ in own]


def test_priorities_decide_who_is_served_first(tiny: TinyModel) -> None:
    with make(tiny, max_num_seqs=1, max_steps=1) as llm:
        alone = [tokens(llm.generate([p], GREEDY))[0] for p in IDS]
        submitted = [llm.prepare(p, GREEDY, priority=i) for p, i in zip(IDS, (1, 0, -3, 0))]  # noqa: B905
        llm.submit(submitted)
        ended: list[str] = []
        while len(ended) < len(submitted):
            llm.pump()
            ended += [r.id for r in submitted if r.finished and r.id not in ended]
        assert ended == [submitted[i].id for i in (2, 1, 3, 0)]
        assert tokens(llm.generate(IDS, GREEDY, priority=[3, 2, 1, 0])) == alone
        check_idle(llm)


@pytest.mark.parametrize("priority", [1001, 0.5, "high", [0, 1]])
def test_bad_priorities(llm: LLM, priority: Any) -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        llm.generate([IDS[0]], GREEDY, priority=priority)


def test_a_conversation_goes_on_from_what_was_said(tiny: TinyModel) -> None:
    params = replace(GREEDY, max_tokens=20, ignore_eos=True)
    with make(tiny) as llm:
        said = (
            *range(40, 50),
            *llm.generate([list(range(40, 50))], params)[0].outputs[0].token_ids,
        )
        (again,) = llm.generate([[*said, 7, 8]], GREEDY)
    with make(tiny, prefix_caching=False) as plain:
        assert tokens([again]) == tokens(plain.generate([[*said, 7, 8]], GREEDY))
    assert again.num_cached_tokens == 24  # of 29: the last one said was never read


@pytest.mark.parametrize(
    "params",
    [
        replace(GREEDY, repetition_penalty=1.2),
        pytest.param(replace(GREEDY, prompt_logprobs=1), marks=pytest.mark.slow),
    ],
)
def test_what_needs_the_whole_prompt_computes_it(tiny: TinyModel, params: SamplingParams) -> None:
    prompt = list(range(40, 80))
    with make(tiny) as llm:
        first = llm.generate(prompt, params)
        assert llm.generate(prompt, GREEDY)[0].num_cached_tokens > 0
        second = llm.generate(prompt, params)
    assert first[0].outputs == second[0].outputs
    assert first[0].prompt_logprobs == second[0].prompt_logprobs
    assert second[0].num_cached_tokens == 0


# -- life ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kv_cache_dtype",
    ["int8", *(pytest.param(t, marks=pytest.mark.slow) for t in ("fp8", "fp8_e4m3"))],
)
def test_a_quantised_cache(tiny: TinyModel, llm: LLM, kv_cache_dtype: str) -> None:
    prompt = list(range(2, 60))
    want = llm.logprobs([prompt])[0].logprobs
    with LLM.from_params(
        tiny.params, tiny.config, dtype="float32", kv_cache_dtype=kv_cache_dtype,
        max_num_batched_tokens=32, max_model_len=128, max_num_seqs=4, page_size=8,
    ) as quantised:  # fmt: skip
        pages = jax.tree.leaves(quantised.engine._cache)
        assert sum(x.nbytes for x in pages) == quantised.memory_plan.cache
        got = quantised.logprobs([prompt])[0].logprobs
        np.testing.assert_allclose(got, want, atol=0.1)
        assert not np.array_equal(got, want)
        greedy = SamplingParams(temperature=0, max_tokens=8)
        first, second = (quantised.generate([prompt], greedy)[0].outputs[0] for _ in range(2))
        assert first.token_ids == second.token_ids


def test_random_weights(tiny: TinyModel) -> None:
    """They are those of `init_params`, and of the seed."""
    greedy = SamplingParams(temperature=0, max_tokens=4)
    params = init_params(tiny.config, jax.random.key(3), jnp.float32)
    with LLM.from_params(params, tiny.config, **OPTIONS) as given:
        want = given.logprobs([[5, 6, 7]])[0].logprobs
    found = {}
    for seed in (3, 4):
        with LLM.from_config(tiny.config, weights_seed=seed, **OPTIONS) as llm:
            found[seed] = llm.logprobs([[5, 6, 7]])[0].logprobs
            assert len(llm.generate([[5, 6, 7]], greedy)[0].outputs[0].token_ids) == 4
    np.testing.assert_array_equal(found[3], want)
    assert not np.array_equal(found[4], want)
    with pytest.raises(CapacityError):
        LLM.from_config(tiny.config, **{**OPTIONS, "device_weight_bytes": 1})


def test_nothing_works_after_close(tiny: TinyModel) -> None:
    with make(tiny) as llm:
        assert llm.generate(IDS[:1], GREEDY)
        stream = llm.stream(IDS[0], replace(GREEDY, max_tokens=20))
        next(stream)
    for use in (
        llm.generate,
        llm.logprobs,
        lambda ids: next(llm.stream(ids[0])),
        lambda _: llm.engine,
    ):
        with pytest.raises(JaxinferError, match="closed"):
            use(IDS)
    with pytest.raises(JaxinferError, match="closed"):
        list(stream)
    llm.close()


def test_in_a_running_event_loop(llm: LLM) -> None:
    async def notebook() -> list[list[tuple[int, ...]]]:
        return tokens(llm.generate(IDS, GREEDY))

    assert asyncio.run(notebook()) == tokens(llm.generate(IDS, GREEDY))


@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_interrupted_in_a_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException, donated: bool
) -> None:
    """Ctrl-C and failures come through; what was running fails; the LLM goes on."""
    want = tokens(llm.generate(IDS, GREEDY))
    stream = llm.stream(IDS[0], replace(GREEDY, max_tokens=30))
    next(stream)
    compiler, run = llm.engine.compiler, llm.engine.compiler.run
    left = iter([False, True])

    def broken(*args: Any) -> Any:
        if next(left, False):
            if donated:
                run(*args)
            raise error
        return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "run", broken)
        with pytest.raises(type(error)) as raised:
            llm.generate(IDS, GREEDY)
        assert raised.value is error
    with pytest.raises(JaxinferError, match=f"interrupted by {type(error).__name__}"):
        list(stream)
    check_idle(llm)
    assert tokens(llm.generate(IDS, GREEDY)) == want


def test_interrupted_while_news_are_given_out(
    llm: LLM, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = tokens(llm.generate(IDS, GREEDY))
    stream = llm.stream(IDS[0], replace(GREEDY, max_tokens=30))
    next(stream)

    class Broken(Tokenizer):
        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm, "tokenizer", Broken(tiny.tokenizer.backend, tiny.tokenizer._decode))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(IDS, GREEDY)
    with pytest.raises(JaxinferError, match="interrupted by KeyboardInterrupt"):
        list(stream)
    check_idle(llm)
    assert tokens(llm.generate(IDS, GREEDY)) == want


# -- making one ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        {"dtype": "int8"},
        {"kv_cache_dtype": "fp4"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"dtype": jnp.float32},
        {"page_size": 24},
        {"page_size": 4},
        {"page_size": "64"},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 0},
        {"data_parallel_size": 2},
        {"data_parallel_size": 0},
        {"event_log": "log", "data_parallel_size": 2},
        {"max_model_len": 0},
        {"max_model_len": 513},
        {"max_num_seqs": 0},
        {"max_steps": 1.5},
        {"kv_cache_bytes": -1},
        {"gpu_memory_utilization": 0.0},
        {"gpu_memory_utilization": float("nan")},
        {"policy": "fifo"},
        {"response_cache": -1},
        {"response_cache": True},
        {"response_cache": 1.5},
    ],
)
def test_options_out_of_range(tiny: TinyModel, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        make(tiny, **option)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"kv_cache_bytes": 100}, "no memory for one page of 8 tokens"),
        ({"kv_cache_bytes": 9 * 2048, "max_model_len": 65}, "lower max_model_len to 64"),
    ],
)
def test_too_little_memory(tiny: TinyModel, option: dict[str, Any], words: str) -> None:
    with pytest.raises(CapacityError, match=words):
        make(tiny, **option)


def test_params_that_are_not_the_configs(tiny: TinyModel) -> None:
    norm, embed = tiny.params["final_norm"], tiny.params["embed"]
    layers = tiny.params["layers"]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    for params, words in [
        ({k: v for k, v in tiny.params.items() if k != "embed"}, "embed: missing"),
        ({**tiny.params, "extra": norm}, r"extra: float32\[32\], expected nothing there"),
        (
            {**tiny.params, "final_norm": norm[:4]},
            r"final_norm: float32\[4\], expected float32\[32",
        ),
        ({**tiny.params, "embed": embed.astype(jnp.bfloat16)}, "embed: bfloat16"),
        ({**tiny.params, "embed": 1.0}, "embed: float,"),
        ({**tiny.params, "layers": layers[:1]}, "layers/1/qkv: missing"),
        (half, "dtype='float32'"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            make(replace(tiny, params=params))


def test_params_on_the_host(tiny: TinyModel, llm: LLM) -> None:
    with make(replace(tiny, params=jax.device_get(tiny.params))) as other:
        assert tokens(other.generate(IDS, GREEDY)) == tokens(llm.generate(IDS, GREEDY))


MODEL = Path(__file__).parent / "goldens" / "qwen2"


def edited(tmp_path: Path, **fields: Any) -> Path:
    """A copy of a model whose config has other fields; ... removes one."""
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    (directory / "golden.safetensors").unlink()
    config = json.loads((directory / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def open_model(directory: Path | str) -> LLM:
    return LLM(directory, **OPTIONS)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM"),
        ({"attention_sinks": 4}, "attention_sinks"),
        ({"hidden_act": "relu6"}, "relu6"),
    ],
)
def test_a_config_that_is_not_supported(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        open_model(edited(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\."),
        ({"intermediate_size": 96}, r"mlp\.gate_proj\.weight"),
        ({"vocab_size": 140}, r"embed_tokens\.weight"),
    ],
)
def test_a_config_that_does_not_match_its_weights(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_model(edited(tmp_path, **fields))


def test_broken_weights(tmp_path: Path) -> None:
    weights = edited(tmp_path) / "model.safetensors"
    good = weights.read_bytes()
    for bad in (good[:-100], good[:4], b"", b"\xff" * 8 + good[8:], good[:8] + b"[" + good[9:]):
        weights.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_model(weights.parent)
    weights.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        open_model(weights.parent)


def test_memory_is_planned_before_weights_are_read(tmp_path: Path) -> None:
    directory = edited(tmp_path)
    (directory / "model.safetensors").write_bytes(b"")
    with pytest.raises(CapacityError, match="no memory for one page"):
        LLM(directory, **{**OPTIONS, "kv_cache_bytes": 100})


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with open_model(edited(tmp_path)) as llm:
        assert llm.tokenizer is None
        (output,) = llm.generate(IDS[:1], GREEDY)
        assert (len(output.outputs[0].token_ids), output.outputs[0].text) == (8, "")


def test_the_demo_writes_python(demo: LLM) -> None:
    (greedy,) = demo.generate("def read_config(", SamplingParams(temperature=0.0, max_tokens=24))
    deltas = list(demo.stream("def read_config(", SamplingParams(temperature=0.0, max_tokens=24)))
    assert joined(deltas) == (greedy.outputs[0].text, greedy.outputs[0].token_ids)
    assert "self" in greedy.outputs[0].text


@pytest.fixture
def demo() -> Iterator[LLM]:
    with LLM("demo", **{**OPTIONS, "kv_cache_bytes": 2 << 20}) as llm:
        yield llm
