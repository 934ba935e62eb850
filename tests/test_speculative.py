"""Speculation in the engine: whoever guesses, and however much, tokens are those without it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer import LLM, JaxinferError, SamplingParams, eventlog
from jaxinfer.batcher import Guess, Progress, Run
from jaxinfer.config import BatcherConfig, Speculative
from jaxinfer.controller import Costs
from jaxinfer.drafting import Drafter
from jaxinfer.engine import Engine
from jaxinfer.observe import InFlight
from jaxinfer.plans import SequenceSpec
from jaxinfer.types import SamplingParams as Params
from jaxinfer.warmup import GREEDY
from tests.conftest import TinyModel, small_llm

# Pages for two of the longest sequences: they run out, and are shared.
LIMITS = BatcherConfig(
    num_pages=17,
    page_size=8,
    max_num_seqs=4,
    max_model_len=64,
    max_num_batched_tokens=16,
    max_steps=1,
    max_guesses=4,
)
FREE = Costs(1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0)  # guesses cost nothing
HOWS = {
    "draft": Speculative("draft", draft="given", tokens=4, adapt=False),
    "lookup": Speculative("lookup", tokens=3, adapt=False),
    "skip": Speculative("skip", skip=(1,), tokens=2, adapt=False),
    "adapting": Speculative("draft", draft="given", tokens=4),
}
TEXT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]  # two pages and a token


def unlike(tiny: TinyModel, by: float = 0.4) -> dict[str, Any]:
    """Weights somewhat like the model's: some guesses hold."""
    leaves, tree = jax.tree.flatten(tiny.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        x + by * x.std() * jax.random.normal(key, x.shape)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def make(tiny: TinyModel, name: str | None) -> Engine:
    # Several steps a dispatch are other programs: one of the engines has them.
    limits = replace(LIMITS, max_steps=4 if name == "lookup" else 1)
    # Times decide how much is guessed: here every step takes as long.
    clock = itertools.count().__next__
    start = partial(Engine, tiny.params, tiny.config, limits, dtype=jnp.float32, clock=clock)
    if name is None:
        return start()
    how = HOWS[name]
    if how.method != "draft":
        return start(drafter=Drafter(how), costs=FREE)
    return start(drafter=Drafter(how, tiny.config), draft=unlike(tiny), costs=FREE)


@pytest.fixture(scope="module")
def engines(tiny: TinyModel) -> dict[str | None, Engine]:
    return {name: make(tiny, name) for name in (None, *HOWS)}


def said(engine: Engine, specs: Sequence[SequenceSpec]) -> tuple[list[list[int]], list[Run]]:
    """What each sequence says, and what was run; afterwards nothing is left."""
    engine.reset()
    engine._ids = itertools.count()
    ids, runs = engine.submit(specs), []
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    run = engine._run

    def watched(action: Run) -> InFlight:
        runs.append(action)
        return run(action)

    engine._run = watched
    try:
        while not engine.idle:
            for update in engine.step():
                tokens[update.id] += update.tokens
    finally:
        engine._run = run
    assert engine._batcher.pool.available == engine.limits.num_pages - 1
    assert engine._live == {}
    if engine._guesser is not None:
        assert engine._guesser._unread == {}
    return [tokens[i] for i in ids], runs


def guesses(runs: Sequence[Run]) -> int:
    return sum(run.guesses for run in runs)


def test_the_text_beside_the_pages_is_what_was_said(engines: dict[str | None, Engine]):
    """Also of steps that guess nothing, several in one dispatch: nothing else would notice but
    guesses that do not hold."""
    engine, prompt = engines["lookup"], np.array(TEXT, np.int32)
    for speculate, steps in ((False, 4), (True, 2)):
        params = Params(temperature=0, speculate=speculate)
        [tokens], runs = said(engine, [SequenceSpec(prompt, params, 40, 0)])
        assert (max(run.steps for run in runs), guesses(runs) > 0) == (steps, speculate)
        pages = np.asarray(engine._seq.page_table)[0, 0, : 40 // LIMITS.page_size]
        text = np.asarray(engine._cache.tokens)[pages].reshape(-1)
        # Nothing follows the last token: it was never read.
        assert text[:39].tolist() == [*TEXT, *tokens][:39]


ways = st.builds(
    Params,
    temperature=st.sampled_from([0.0, 0.9]),
    speculate=st.sampled_from([True, True, True, False]),
    min_tokens=st.sampled_from([0, 3]),
)
requests = st.builds(
    lambda shared, own, more, params, seed, stop: SequenceSpec(
        np.array(TEXT[:shared] + own, np.int32), params, shared + len(own) + more, seed,
        stop_ids=stop,
    ),
    shared=st.sampled_from([0, 8, 16]),
    own=st.lists(st.integers(1, 30), min_size=1, max_size=16),
    more=st.integers(1, 31),
    params=ways,
    seed=st.integers(0, 9),
    stop=st.sampled_from([(), (3, 9), (5, 250, 600)]),
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["draft", "lookup", *(pytest.param(x, marks=pytest.mark.slow) for x in ("skip", "adapting"))],
)
@settings(max_examples=8)
@given(specs=st.lists(requests, min_size=1, max_size=6))
def test_tokens_are_those_without_speculation(
    engines: dict[str | None, Engine], name: str, specs: list[SequenceSpec]
) -> None:
    """In any batch, with prompts read in chunks, pages shared and sequences preempted."""
    assert said(engines[name], specs)[0] == said(engines[None], specs)[0]


@pytest.mark.parametrize("name", HOWS)
def test_all_of_it_together(engines: dict[str | None, Engine], name: str) -> None:
    """As above, and that each of those things happened."""
    specs = [
        SequenceSpec(
            np.array(TEXT[: 8 * (i % 3)] + [i + 1] * (i + 2), np.int32),
            replace(GREEDY, temperature=0.9 * (i % 2), speculate=i != 4, logprobs=None),
            63 - 3 * i, seed=i,
        )
        for i in range(7)
    ]  # fmt: skip
    engine = engines[name]
    found, runs = said(engine, specs)
    assert found == said(engines[None], specs)[0]
    assert guesses(runs)
    assert sum(len(chunk.pages) for run in runs for chunk in run.chunks)
    assert any(chunk.first and chunk.start for run in runs for chunk in run.chunks)
    assert any(len(run.chunks) and len(run.ids) and not run.guesses for run in runs)
    assert any(record.preemptions for record in list(engine.metrics.requests)[-7:])
    # Random text does not repeat itself.
    assert name == "lookup" or any(step.held for step in engine.metrics.steps)


SLOW = (pytest.param(name, marks=pytest.mark.slow) for name in ("draft", "skip"))


@pytest.mark.parametrize("name", ["lookup", *SLOW])
def test_penalties_truncation_and_log_probabilities(tiny: TinyModel, name: str) -> None:
    params = SamplingParams(
        temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3,
        presence_penalty=0.2, seed=3, max_tokens=20, logprobs=2, ignore_eos=True,
    )  # fmt: skip
    prompts, options = [[5, 6, 7, 5, 6, 7, 5], [*range(30, 42)]], {"max_steps": 1}
    how = HOWS[name]
    draft = (unlike(tiny), tiny.config) if how.method == "draft" else None
    how = replace(how, draft=None)
    with (
        small_llm(tiny, **options) as plain,
        small_llm(tiny, speculative=how, draft=draft, **options) as llm,
    ):
        for got, want in zip(*(x.generate(prompts, params) for x in (llm, plain)), strict=True):
            one, other = got.outputs[0], want.outputs[0]
            assert one.token_ids == other.token_ids
            assert one.logprobs is not None
            assert other.logprobs is not None
            for a, b in zip(one.logprobs, other.logprobs, strict=True):
                assert a.keys() == b.keys()
                assert [x.rank for x in a.values()] == [x.rank for x in b.values()]
                for token, x in a.items():
                    assert x.logprob == pytest.approx(b[token].logprob, abs=1e-5)


def test_a_draft_that_is_the_model_is_always_right(tiny: TinyModel) -> None:
    limits = replace(LIMITS, num_pages=40)
    same = Engine(
        tiny.params, tiny.config, limits, dtype=jnp.float32, costs=FREE,
        drafter=Drafter(HOWS["draft"], tiny.config), draft=tiny.params,
    )  # fmt: skip
    spec = SequenceSpec(np.array(TEXT, np.int32), GREEDY, 17 + 41, seed=0)
    _, runs = said(same, [spec])
    held = sum(step.held for step in same.metrics.steps)
    attempted = sum(step.attempted for step in same.metrics.steps)
    assert held == attempted == 32  # of 41 tokens, one comes with the prompt
    assert sum(run.steps for run in runs if run.guesses) >= 8


@pytest.mark.slow
def test_by_rejection_greedy_tokens_are_the_same(
    tiny: TinyModel, engines: dict[str | None, Engine]
) -> None:
    how = replace(HOWS["draft"], rule="rejection")
    engine = Engine(
        tiny.params, tiny.config, LIMITS, dtype=jnp.float32, costs=FREE,
        drafter=Drafter(how, tiny.config), draft=unlike(tiny),
    )  # fmt: skip
    specs = [SequenceSpec(np.array(TEXT[i:], np.int32), GREEDY, 55, seed=0) for i in (0, 9)]
    found, runs = said(engine, specs)
    assert found == said(engines[None], specs)[0]
    assert guesses(runs)


@pytest.mark.slow
@pytest.mark.parametrize("forced", [0.0, 1.0])
def test_guesses_can_be_made_to_hold(
    tiny: TinyModel, engines: dict[str | None, Engine], forced: float
) -> None:
    how = replace(HOWS["lookup"], forced=forced, shortest=1)
    engine = Engine(
        tiny.params, tiny.config, LIMITS, dtype=jnp.float32, drafter=Drafter(how), costs=FREE
    )
    spec = SequenceSpec(np.array([5, 6] * 8, np.int32), GREEDY, 50, seed=0)
    (tokens,), _ = said(engine, [spec])
    held = sum(step.held for step in engine.metrics.steps)
    assert len(tokens) == 34
    if forced:
        assert held == sum(step.attempted for step in engine.metrics.steps)
    else:
        assert held == 0
        assert [tokens] == said(engines[None], [spec])[0]


def test_a_draft_catches_up(tiny: TinyModel) -> None:
    """With what was said while nothing was guessed, of a sequence that it had read before."""
    how = replace(HOWS["draft"], tokens=2)
    limits = replace(LIMITS, num_pages=40, max_guesses=2)
    same = Engine(
        tiny.params, tiny.config, limits, dtype=jnp.float32, costs=FREE,
        drafter=Drafter(how, tiny.config), draft=tiny.params,
    )  # fmt: skip
    first = SequenceSpec(np.array([1, 2, 3], np.int32), GREEDY, 60, seed=0)
    same.submit([first])
    while not any(step.guesses for step in same.metrics.steps):
        same.step()
    # A long prompt comes: what decodes beside it has no guesses, and is read by the draft later.
    same.submit([SequenceSpec(np.array([*range(50, 110)], np.int32), GREEDY, 62, seed=0)])
    while not same.idle:
        same.step()
    late = [s for s in same.metrics.steps if s.guesses][-10:]
    assert sum(s.attempted for s in late) >= 15
    assert all(s.held == s.attempted for s in late)
    assert any(key.catch_up for key, _ in same.compiler._compiled)


def test_lookup_finds_what_was_said(tiny: TinyModel) -> None:
    """A model that says the same token again and again."""
    layers = [w | {"o": 0 * w["o"], "down": 0 * w["down"]} for w in tiny.params["layers"]]
    repeating = tiny.params | {"layers": layers, "lm_head": tiny.params["embed"]}
    how = replace(HOWS["lookup"], tokens=4)
    engine = Engine(
        repeating, tiny.config, LIMITS, dtype=jnp.float32, drafter=Drafter(how), costs=FREE
    )
    (tokens,), runs = said(engine, [SequenceSpec(np.array([7, 8, 9], np.int32), GREEDY, 44, 0)])
    assert tokens == [9] * 41
    steps = list(engine.metrics.steps)
    assert sum(step.held for step in steps) == sum(step.attempted for step in steps) >= 30
    assert len(runs) < 12


def test_no_guesses_for_who_wants_none(engines: dict[str | None, Engine]) -> None:
    spec = SequenceSpec(np.array(TEXT, np.int32), replace(GREEDY, speculate=False), 50, seed=0)
    assert not guesses(said(engines["draft"], [spec])[1])


def test_no_guesses_where_the_inside_is_wanted(tiny: TinyModel) -> None:
    with small_llm(tiny, speculative=HOWS["lookup"]) as llm, small_llm(tiny) as plain:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        got, want = (
            x.generate([[3, 4, 3, 4, 3]], params, capture=["layers.0.resid"])[0].outputs[0]
            for x in (llm, plain)
        )
        assert got.token_ids == want.token_ids
        assert got.activations is not None
        assert want.activations is not None
        for site, x in got.activations.items():
            np.testing.assert_allclose(x, want.activations[site], atol=1e-5)
        assert not any(step.guesses for step in llm.metrics.steps)


@pytest.mark.parametrize("pages", [True, False])
@pytest.mark.parametrize("name", ["draft", "lookup"])
def test_goes_on_from_a_snapshot(
    tiny: TinyModel, engines: dict[str | None, Engine], name: str, pages: bool
) -> None:
    specs = [
        SequenceSpec(
            np.array(TEXT[:n], np.int32), replace(GREEDY, temperature=0.9 * (n % 2)), 60, n
        )
        for n in (3, 12)
    ]
    want, _ = said(engines[None], specs)
    first, second = engines[name], make(tiny, name)
    first.reset()
    first._ids = itertools.count()
    first.submit(specs)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    updates = [u for _ in range(5) for u in first.step()]
    while first.in_flight:
        updates += first.read()
    second.restore(first.snapshot(pages=pages))
    while not second.idle:
        updates += second.step()
    for update in updates:
        tokens[update.id] += update.tokens
    assert list(tokens.values()) == want
    assert any(step.guesses for step in second.metrics.steps)
    first.reset()


def test_a_snapshot_with_the_text_is_for_engines_that_keep_it(
    engines: dict[str | None, Engine],
) -> None:
    first, second = engines["skip"], engines["draft"]
    for one in (first, second):
        one.reset()
    first.submit([SequenceSpec(np.array(TEXT, np.int32), GREEDY, 50, seed=0)])
    first.step()
    while first.in_flight:
        first.read()
    with pytest.raises(JaxinferError, match="has the text beside them"):
        second.restore(first.snapshot(pages=True))
    first.reset()


def test_the_log_of_a_scheduler_that_guesses_is_replayed(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as log:
        engine = Engine(
            tiny.params, tiny.config, LIMITS, dtype=jnp.float32, drafter=Drafter(HOWS["lookup"]),
            costs=FREE, event_log=log,
        )  # fmt: skip
        said(engine, [SequenceSpec(np.array(TEXT, np.int32), GREEDY, 50, seed=0)])
    steps = list(eventlog.replay(path))
    kinds = {type(event) for step in steps for event in step.events}
    assert {Guess, Progress} <= kinds
    assert any("3 guesses" in eventlog.describe(step) for step in steps)


@pytest.fixture(scope="module")
def warm(tiny: TinyModel) -> Iterator[LLM]:
    how = replace(HOWS["draft"], draft=None)
    draft = (tiny.params, tiny.config)
    with small_llm(tiny, speculative=how, draft=draft, max_steps=1, max_model_len=32) as llm:
        llm.warm_up([SamplingParams(temperature=0)])
        yield llm


def test_nothing_is_compiled_after_a_warm_up(warm: LLM) -> None:
    before = warm.engine.compiler.count
    params = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
    warm.generate([[i + 1] * (3 * i + 2) for i in range(6)], params)
    assert warm.engine.compiler.count == before
    assert any(step.guesses for step in warm.metrics.steps)
