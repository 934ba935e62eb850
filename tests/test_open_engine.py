"""What requests want of the model's inside: activations, interventions, functions of logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import (
    LLM,
    Chain,
    FunctionFault,
    Intervention,
    InvalidRequest,
    JaxinferError,
    LogitsFn,
    RequestOutput,
    SamplingParams,
)
from jaxinfer.models import apply
from jaxinfer.models.sites import widths
from tests.conftest import TinyModel, small_llm

PROMPTS = [[5, 6, 7], [300], [*range(9, 40)], [17, 18]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SITE = "layers.0.resid"


@pytest.fixture(scope="module")
def shared(tiny: TinyModel) -> Iterator[LLM]:
    with small_llm(tiny) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared LLM; afterwards nothing may be left in it."""
    yield shared
    engine = shared.engine
    assert shared._owners == {}
    assert engine._live == {}
    while not engine.idle:
        assert engine.step() == []
    assert engine._batcher.pool.available == shared.memory_plan.num_pages - 1


def add(where: Any, x: jax.Array, aux: Any) -> jax.Array:
    return x + aux["by"]


def adding(seed: int, sites: Sequence[str] = (SITE,), scale: float = 3.0) -> Intervention:
    by = scale * np.random.default_rng(seed).normal(size=32).astype(np.float32)
    return Intervention(add, sites, {"by": by})


def ids(outputs: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


def applied(tiny: TinyModel, tokens: Sequence[int], **options: Any) -> Any:
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    found = apply(tiny.params, tiny.config, padded, **options)
    return jax.tree.map(lambda x: np.asarray(x[0, : len(tokens)]), found)


# -- activations ---------------------------------------------------------------------------------


def check_activations(tiny: TinyModel, output: RequestOutput) -> None:
    for sample in output.outputs:
        tokens = [*output.prompt_token_ids, *sample.token_ids][:-1]
        want = applied(tiny, tokens, capture=("*",)).activations
        found = sample.activations
        assert found is not None
        for site, x in found.items():
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, want[site], **CLOSE, err_msg=site)


def test_every_site_of_every_token(tiny: TinyModel, llm: LLM) -> None:
    """Prompts longer than a step, and shorter; chunks beside rows that decode."""
    outputs = llm.generate(PROMPTS, GREEDY, capture=("*",))
    for output in outputs:
        assert list(output.outputs[0].activations or ()) == list(widths(tiny.config))
        check_activations(tiny, output)
    assert ids(outputs) == ids(llm.generate(PROMPTS, GREEDY))


def test_samples_have_their_own(tiny: TinyModel, llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=6)
    (output,) = llm.generate([PROMPTS[2]], params, capture=("layers.*.resid", "final_norm"))
    assert len(set(ids([output]))) > 1
    check_activations(tiny, output)


@pytest.mark.slow
def test_nothing_is_found_in_the_cache_or_given_twice(tiny: TinyModel) -> None:
    """A prompt that was read before is read again; who is preempted sends nothing again."""
    with small_llm(tiny, kv_cache_bytes=9 * 8 * 256, max_num_seqs=4) as llm:
        prompts = [[*range(i, i + 9)] for i in (1, 20, 40)]
        params = replace(GREEDY, max_tokens=20)
        plain = llm.generate(prompts, params)
        outputs = llm.generate(prompts, params, capture=(SITE,))
        assert llm.metrics.summary().preemptions > 0
    assert ids(outputs) == ids(plain)
    for output in outputs:
        assert output.num_cached_tokens == 0
        check_activations(tiny, output)


def test_what_follows_a_stop_string_is_not_there(tiny: TinyModel, llm: LLM) -> None:
    (plain,) = llm.generate([PROMPTS[0]], GREEDY)
    assert llm.tokenizer is not None
    stop = llm.tokenizer.decode([plain.outputs[0].token_ids[3]])
    (output,) = llm.generate([PROMPTS[0]], replace(GREEDY, stop=stop), capture=(SITE,))
    assert output.outputs[0].finish_reason == "stop"
    check_activations(tiny, output)


def test_activations_of_what_is_scored(tiny: TinyModel, llm: LLM) -> None:
    plain = llm.logprobs(PROMPTS)
    for one, before in zip(llm.logprobs(PROMPTS, capture=("layers.*.resid",)), plain, strict=True):
        want = applied(tiny, one.token_ids, capture=("layers.*.resid",)).activations
        assert one.activations is not None
        assert set(one.activations) == set(want)
        for site, x in one.activations.items():
            np.testing.assert_allclose(x, want[site], **CLOSE)
        np.testing.assert_allclose(one.logprobs, before.logprobs, **CLOSE)
        assert before.activations is None


def test_unused_it_costs_no_program(tiny: TinyModel) -> None:
    with small_llm(tiny) as llm:
        llm.generate(PROMPTS, GREEDY)
        plain = {key for key, _ in llm.engine.compiler._compiled}
        llm.generate(PROMPTS, GREEDY, capture=(SITE,), intervene=adding(0))
        llm.generate(PROMPTS, GREEDY)
        others = {key for key, _ in llm.engine.compiler._compiled} - plain
    assert others
    assert all(key.capture and key.hooks for key in others)


# -- interventions -------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["embed", "layers.0.attn_heads", "layers.1.mlp_out", "final_norm"])
def test_an_intervention_is_the_change_of_apply(tiny: TinyModel, llm: LLM, site: str) -> None:
    steer = adding(3, (site,))
    outputs = llm.generate(PROMPTS, GREEDY, intervene=steer)
    assert ids(outputs) != ids(llm.generate(PROMPTS, GREEDY))
    for output in outputs:
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        change = {site: lambda x: x + steer.aux["by"]}
        logits = applied(tiny, tokens[:-1], change=change).logits
        greedy = logits.argmax(-1)[len(output.prompt_token_ids) - 1 :]
        assert tuple(greedy.tolist()) == output.outputs[0].token_ids


def test_each_request_has_its_own_and_the_others_none(llm: LLM) -> None:
    def double(where: Any, x: jax.Array, aux: Any) -> jax.Array:
        return 2 * x

    each = [adding(1), None, adding(2), Intervention(double, ("layers.1.attn_out", SITE))]
    together = llm.generate(PROMPTS, GREEDY, intervene=each)
    alone = [
        llm.generate([prompt], GREEDY, intervene=one)[0]
        for prompt, one in zip(PROMPTS, each, strict=True)
    ]
    assert ids(together) == ids(alone)
    plain = llm.generate(PROMPTS, GREEDY)
    same = [a == b for a, b in zip(ids(together), ids(plain), strict=True)]
    assert same == [False, True, False, False]
    swapped = llm.generate(PROMPTS[:1], GREEDY, intervene=adding(2))
    assert ids(swapped) != ids(together[:1])


def test_positions_are_told(tiny: TinyModel, llm: LLM) -> None:
    """Patching: one position's activations replaced, whatever chunk it comes in."""

    def patch(where: Any, x: jax.Array, aux: Any) -> jax.Array:
        return jnp.where((where.positions == aux["at"])[:, None], aux["x"], x)

    x = np.random.default_rng(0).normal(size=32).astype(np.float32)
    aux = {"at": np.int32(20), "x": x}
    steer = Intervention(patch, (SITE,), aux)
    prompt = PROMPTS[2]
    (output,) = llm.generate([prompt], GREEDY, intervene=steer, capture=(SITE,))
    found = (output.outputs[0].activations or {})[SITE]
    np.testing.assert_array_equal(found[20], x)
    change = {SITE: lambda y: y.at[:, 20].set(x)}
    tokens = [*prompt, *output.outputs[0].token_ids][:-1]
    want = applied(tiny, tokens, change=change, capture=(SITE,)).activations[SITE]
    np.testing.assert_allclose(found, want, **CLOSE)


def test_pages_are_shared_by_those_that_change_alike(tiny: TinyModel) -> None:
    with small_llm(tiny) as llm:
        prompt = PROMPTS[2]

        def run(steer: Intervention | None) -> RequestOutput:
            return llm.generate([prompt], GREEDY, intervene=steer)[0]

        first, again, other, plain = (run(s) for s in (adding(1), adding(1), adding(2), None))
        assert [o.num_cached_tokens for o in (first, again, other, plain)] == [0, 24, 0, 0]
        assert ids([first]) == ids([again])
        assert len({*ids([first]), *ids([other]), *ids([plain])}) == 3
        assert run(None).num_cached_tokens == 24


def test_scores_under_an_intervention(tiny: TinyModel, llm: LLM) -> None:
    steer = adding(5)
    for one in llm.logprobs(PROMPTS[2:], intervene=steer):
        change = {SITE: lambda x: x + steer.aux["by"]}
        logits = applied(tiny, one.token_ids, change=change).logits
        want = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(one.logprobs)),
                                                      one.token_ids[1:]]  # fmt: skip
        np.testing.assert_allclose(one.logprobs, want, **CLOSE)


# -- functions of logits -------------------------------------------------------------------------


def ban(logits: jax.Array, rows: Any, aux: Any) -> jax.Array:
    banned = jnp.any(jnp.arange(logits.shape[1]) == aux["ids"][..., None], axis=1)
    return jnp.where(banned, -jnp.inf, logits)


def test_banned_tokens_are_not_sampled(llm: LLM) -> None:
    plain = ids(llm.generate(PROMPTS, GREEDY))
    banned = [LogitsFn(ban, {"ids": np.array(tokens[:2])}) for tokens in plain]
    outputs = ids(llm.generate(PROMPTS, GREEDY, logits_fn=[banned[0], None, *banned[2:]]))
    assert outputs[1] == plain[1]
    for i in (0, 2, 3):
        assert not {*outputs[i]} & {*plain[i][:2]}
        assert outputs[i : i + 1] == ids(llm.generate(PROMPTS[i], GREEDY, logits_fn=banned[i]))


def test_functions_are_chained_and_sampling_follows(llm: LLM) -> None:
    def only(logits: jax.Array, rows: Any, aux: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(logits.shape[1]) == aux[:, None], logits + 100, logits)

    chain = LogitsFn(Chain((only, ban)), ((np.int32(3)), {"ids": np.array([7, 8])}))
    params = SamplingParams(seed=3, max_tokens=5, ignore_eos=True)
    assert ids(llm.generate([PROMPTS[0]], params, logits_fn=chain)) == [(3,) * 5]
    assert Chain((only, ban)) == Chain((only, ban))  # nothing is compiled anew


def test_what_rows_know(tiny: TinyModel, llm: LLM) -> None:
    """Contrast with an early exit: the last layer's logits less those after the first (DoLa)."""
    norm, head = tiny.params["final_norm"], tiny.params["lm_head"]

    def contrast(logits: jax.Array, rows: Any, aux: Any) -> jax.Array:
        x = rows.activations[SITE]
        early = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + tiny.config.norm_eps) * norm
        found = logits - 0.5 * early @ head.T
        # The token before may not come again, but at an even position.
        again = jnp.arange(logits.shape[1]) == rows.tokens[:, None]
        return jnp.where(again & (rows.positions % 2 == 1)[:, None], -jnp.inf, found)

    outputs = llm.generate(PROMPTS, GREEDY, logits_fn=LogitsFn(contrast, sites=(SITE,)))
    for output in outputs:
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        found = applied(tiny, tokens[:-1], capture=(SITE,))
        x = found.activations[SITE]
        early = x / np.sqrt((x * x).mean(-1, keepdims=True) + tiny.config.norm_eps) * norm
        logits = np.array(found.logits - 0.5 * early @ head.T)
        for position in range(len(logits)):
            if position % 2 == 0:
                logits[position, tokens[position]] = -np.inf
        greedy = logits.argmax(-1)[len(output.prompt_token_ids) - 1 :]
        assert tuple(greedy.tolist()) == output.outputs[0].token_ids


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    params = replace(GREEDY, logprobs=0)
    (output,) = llm.generate(
        PROMPTS[:1], params, logits_fn=LogitsFn(ban, {"ids": np.array([11, 12])})
    )
    scored = llm.logprobs([[*output.prompt_token_ids, *output.outputs[0].token_ids]])[0]
    entries = output.outputs[0].logprobs or ()
    said = [entry[t].logprob for t, entry in zip(output.outputs[0].token_ids, entries, strict=True)]
    np.testing.assert_allclose(said, scored.logprobs[-len(said) :], **CLOSE)


# -- what goes wrong -----------------------------------------------------------------------------


def breaking(where: Any, x: jax.Array, aux: Any) -> jax.Array:
    return jnp.where((where.positions == aux["at"])[:, None], aux["to"][:, None], x)


def broken(at: int, to: float = np.nan, sites: Sequence[str] = (SITE,)) -> Intervention:
    return Intervention(breaking, sites, {"at": np.int32(at), "to": np.float32(to)})


# Of the first chunk, the second, what is generated.
@pytest.mark.parametrize(("at", "to"), [(0, np.nan), (20, np.inf), (34, 1e20), (34, np.nan)])
def test_a_fault_ends_its_request_alone(llm: LLM, at: int, to: float) -> None:
    plain = llm.generate(PROMPTS, GREEDY)
    each = [adding(1), None, broken(at, to, ("layers.1.attn_out", "layers.1.resid")), None]
    outputs = llm.generate(PROMPTS, GREEDY, intervene=each, on_error="return")
    error = outputs[2].error
    assert isinstance(error, FunctionFault)
    assert (error.index, error.site, outputs[2].outputs) == (2, "layers.1.attn_out", ())
    assert error.request_id == outputs[2].request_id
    assert ids(outputs[1::2]) == ids(plain[1::2])
    assert ids(outputs[:1]) == ids(llm.generate(PROMPTS[:1], GREEDY, intervene=adding(1)))
    with pytest.raises(FunctionFault, match=r"request 2, layers.1.attn_out: "):
        llm.generate(PROMPTS, GREEDY, intervene=each)
    assert ids(llm.generate(PROMPTS, GREEDY)) == ids(plain)


def test_who_shares_the_faulty_page_has_the_fault_too(llm: LLM) -> None:
    """As alone; and what was written is not found again."""
    steer, prompt = broken(3), PROMPTS[2]
    prompts = [prompt, [*prompt[:24], 1, 2], [*prompt[:2], 9, 9]]
    for _ in range(2):
        outputs = llm.generate(prompts, GREEDY, intervene=steer, on_error="return")
        assert [isinstance(o.error, FunctionFault) for o in outputs] == [True, True, True]
        later = replace(steer, aux={**steer.aux, "at": np.int32(25)})
        outputs = llm.generate(prompts, GREEDY, intervene=later, on_error="return")
        assert [o.error is None for o in outputs] == [False, False, True]


@pytest.mark.parametrize("to", [np.nan, -np.inf])
def test_logits_from_which_nothing_can_be_sampled(llm: LLM, to: float) -> None:
    def spoil(logits: jax.Array, rows: Any, aux: Any) -> jax.Array:
        return jnp.where((rows.positions >= aux)[:, None], to, logits)

    each = [LogitsFn(spoil, np.int32(6)), None]
    outputs = llm.generate(PROMPTS[:2], GREEDY, logits_fn=each, on_error="return")
    error = outputs[0].error
    assert isinstance(error, FunctionFault)
    assert error.site == "logits"
    assert ids(outputs[1:]) == ids(llm.generate(PROMPTS[1:2], GREEDY))


def test_a_stream_ends_with_the_fault(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY, intervene=broken(5))
    first = next(stream).token_ids
    assert first == ids(llm.generate(PROMPTS[:1], replace(GREEDY, max_tokens=1)))[0]
    with pytest.raises(FunctionFault):
        list(stream)


BAD = [
    ({"capture": ("layers.9.resid",)}, "capture", "names no site"),
    ({"capture": "embed"}, "capture", "'embed' is not a list"),
    ({"intervene": "steer"}, "intervene", "is not an Intervention"),
    ({"intervene": adding(0, ("nowhere",))}, "intervene.sites", "names no site"),
    ({"intervene": adding(0, ())}, "intervene.sites", "names none"),
    ({"intervene": Intervention(lambda w, x, a: x[:3], (SITE,))}, "intervene at", r"\(3, 32\)"),
    ({"intervene": Intervention(lambda w, x, a: x > 0, (SITE,))}, "intervene at", "bool"),
    ({"intervene": Intervention(lambda w, x, a: (x, x), (SITE,))}, "intervene at", "expected"),
    ({"intervene": Intervention(lambda w, x, a: None, (SITE,))}, "intervene at", "None"),
    ({"intervene": Intervention(lambda x: x, (SITE,))}, "intervene at", "TypeError"),
    ({"intervene": Intervention(add, (SITE,), {"other": 1.0})}, "intervene at", "KeyError"),
    ({"intervene": Intervention(add, (SITE,), {"by": "a"})}, "intervene.aux", "pytree of arrays"),
    ({"intervene": Intervention(3, (SITE,))}, "intervene.fn", "3 is not a function"),  # type: ignore
    ({"intervene": [adding(0)] * 3}, "intervene", "3 for 2 prompts"),
    ({"logits_fn": 5}, "logits_fn.fn", "5 is not a function"),
    ({"logits_fn": lambda logits, rows, aux: logits[:, :4]}, "logits_fn", r"\(8, 4\)"),
    ({"logits_fn": LogitsFn(ban, sites=("x",))}, "logits_fn.sites", "names no site"),
    ({"logits_fn": [None]}, "logits_fn", "1 for 2 prompts"),
]


@pytest.mark.parametrize(("wanted", "field", "message"), BAD)
def test_refusals(llm: LLM, wanted: dict[str, Any], field: str, message: str) -> None:
    before = llm.engine.compiler.count
    with pytest.raises(InvalidRequest, match=message) as error:
        llm.generate(PROMPTS[:2], GREEDY, **wanted)
    assert error.value.field.startswith(field)
    assert llm.engine.compiler.count == before
    assert llm.engine.idle


def test_sites_that_do_not_fit_in_memory(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    every = sum(widths(llm.config).values()) * 4  # bytes a token; steps of 16 tokens, two ahead
    small = replace(llm.memory_plan, limit=1 << 30, steps=2 * 16 * every - 1)
    monkeypatch.setattr(llm, "memory_plan", small)
    with pytest.raises(InvalidRequest, match=r"18 sites take .* lower max_num_batched_tokens"):
        llm.generate(PROMPTS[0], GREEDY, capture=("*",))
    llm.generate(PROMPTS[0], GREEDY, capture=("layers.*.resid",))


def test_one_bad_request_beside_good_ones(llm: LLM) -> None:
    each = [None, Intervention(lambda w, x, a: x[:3], (SITE,)), None]
    outputs = llm.generate(PROMPTS[:3], GREEDY, intervene=each, on_error="return")
    assert [o.error is None for o in outputs] == [True, False, True]
    assert isinstance(outputs[1].error, InvalidRequest)
    assert outputs[1].error.index == 1


def test_functions_cannot_be_written(llm: LLM, tmp_path: Any) -> None:
    request = llm.prepare(PROMPTS[0], GREEDY, intervene=adding(0))
    llm.submit([request])
    try:
        with pytest.raises(JaxinferError, match="functions of their own"):
            llm.save(tmp_path / "state")
    finally:
        llm.cancel([request])


def test_functions_of_long_ago_are_let_go_of(tiny: TinyModel) -> None:
    with small_llm(tiny) as llm:
        first = Intervention(lambda w, x, a: x + 1, (SITE,))
        want = ids(llm.generate(PROMPTS[:1], GREEDY, intervene=first))
        for i in range(20):
            other = Intervention(lambda w, x, a, i=i: x + i, (SITE,))
            llm.engine._hooks.add([b.hook for b in _bound(llm, other)], ())
        assert len(llm.engine._hooks._known) == 16
        assert not [key for key, _ in llm.engine.compiler._compiled if key.hooks]
        assert ids(llm.generate(PROMPTS[:1], GREEDY, intervene=first)) == want


def _bound(llm: LLM, intervene: Intervention) -> Any:
    inside = llm.prepare(PROMPTS[0], GREEDY, intervene=intervene).inside
    assert inside is not None
    return inside.hooks


# -- all of it at once ---------------------------------------------------------------------------


KINDS: list[dict[str, Any]] = [
    {},
    {"capture": (SITE, "final_norm")},
    {"intervene": adding(1)},
    {"intervene": adding(2), "capture": ("layers.1.resid",)},
    {"logits_fn": LogitsFn(ban, {"ids": np.array([3, 9])})},
    {"intervene": adding(1), "logits_fn": LogitsFn(ban, {"ids": np.array([1, 2])})},
]
asked = st.lists(
    st.tuples(st.integers(0, len(KINDS) - 1), st.integers(1, 30), st.integers(1, 12)),
    min_size=1, max_size=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def crowded(tiny: TinyModel) -> Iterator[LLM]:
    """Ten pages for what may want twenty: many are preempted."""
    with small_llm(tiny, kv_cache_bytes=11 * 8 * 256) as llm:
        yield llm


@pytest.mark.slow
@given(asked=asked)
def test_any_requests_are_what_they_are_alone(
    crowded: LLM, asked: list[tuple[int, int, int]]
) -> None:
    check_alone(crowded, asked)


def test_requests_of_all_kinds_are_what_they_are_alone(crowded: LLM) -> None:
    preempted = crowded.metrics.summary().preemptions
    check_alone(crowded, [(kind, 5 + kind, 30) for kind in (0, 3, 5, 0, 3, 5)])
    assert crowded.metrics.summary().preemptions > preempted


def check_alone(crowded: LLM, asked: list[tuple[int, int, int]]) -> None:
    def request(kind: int, length: int, tokens: int) -> Any:
        prompt = [(7 * i + kind) % 50 for i in range(length)]
        return crowded.prepare(prompt, replace(GREEDY, max_tokens=tokens), **KINDS[kind])

    def run(requests: list[Any]) -> list[Any]:
        crowded.submit(requests)
        while not all(r.finished for r in requests):
            assert not any(r.failed for r in requests)
            crowded.pump()
        return [r.deltas[-1].result.outputs[0] for r in requests]

    together = run([request(*one) for one in asked])
    for one, sample in zip(asked, together, strict=True):
        (alone,) = run([request(*one)])
        assert sample.token_ids == alone.token_ids
        assert (sample.activations is None) == (alone.activations is None)
        for site, x in (sample.activations or {}).items():
            np.testing.assert_allclose(x, (alone.activations or {})[site], **CLOSE)
