"""What is compiled ahead of time is all that is needed, and bits that differ are noticed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxinfer import LLM, JaxinferError, SamplingParams
from jaxinfer.config import BatcherConfig
from jaxinfer.plans import Kind
from jaxinfer.runner import StepKey
from jaxinfer.warmup import PROBE_TOKENS, covering, probe, probing, variants
from tests.conftest import TinyModel

GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "max_num_seqs": 4, "max_model_len": 96, "max_num_batched_tokens": 24,
    "page_size": 8, "kv_cache_bytes": 40 * 2048, "max_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    with LLM.from_params(tiny.params, tiny.config, **OPTIONS) as llm:
        yield llm


def test_nothing_is_compiled_after_a_warm_up(llm: LLM) -> None:
    first = llm.generate([[1, 2, 3]], GREEDY)
    done = llm.warm_up([GREEDY, SamplingParams(top_k=3, logprobs=0)])
    assert done.programs > 0
    assert done.step_bytes > 0
    count = llm.engine.compiler.count
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 60, n).tolist() for n in (1, 5, 23, 24, 50, 80, 7, 9)]
    params = [GREEDY, SamplingParams(seed=1, max_tokens=5), SamplingParams(top_k=2, max_tokens=4)]
    for group in (prompts, prompts[:1], prompts[2:5]):
        llm.generate(group, [params[i % 3] for i in range(len(group))])
    assert llm.generate([[1, 2, 3]], GREEDY)[0].outputs == first[0].outputs
    assert llm.engine.compiler.count == count
    assert llm.warm_up([GREEDY]).programs == 0


@pytest.mark.slow
def test_penalties_and_scores_are_warmed_up_too(tiny: TinyModel) -> None:
    penalised = SamplingParams(temperature=0.0, max_tokens=4, repetition_penalty=1.3)
    scored = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=0)
    options = {**OPTIONS, "max_num_batched_tokens": 16, "max_steps": 1}
    with LLM.from_params(tiny.params, tiny.config, **options) as llm:
        llm.warm_up([penalised, scored])
        count = llm.engine.compiler.count
        for params in (GREEDY, penalised, scored, GREEDY):
            llm.generate([[1, 2, 3], [4] * 20], params)
        llm.logprobs([[1, 2, 3]])
        assert llm.engine.compiler.count == count


def test_only_an_idle_engine_warms_up(llm: LLM) -> None:
    request = llm.prepare([1, 2], GREEDY)
    llm.submit([request])
    with pytest.raises(JaxinferError, match="idle"):
        llm.warm_up()
    llm.cancel([request])
    while not llm.engine.idle:
        llm.pump()


def test_programs_with_other_bits_are_named(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm.warm_up([GREEDY])
    compiler = llm.engine.compiler
    run, asked = compiler.run, []

    def spoil(key: Any, *args: Any) -> Any:
        cache, seq, sampled = run(key, *args)
        asked.append(key)
        if len(asked) == 3:  # once to have the probe go on, once for what the others should be
            cache = cache._replace(k=tuple(x + 1e-6 for x in cache.k))
        return cache, seq, sampled

    monkeypatch.setattr(compiler, "run", spoil)
    before = len(caplog.records)
    done = llm.warm_up([GREEDY])
    assert asked[2] in done.unequal
    assert asked[1] not in done.unequal
    assert any("not invariant" in r.message for r in caplog.records[before:])


def test_the_probe_is_the_last_of_what_a_program_computes() -> None:
    limits = BatcherConfig(20, 8, 4, 90, max_num_batched_tokens=48, max_chunks=4)
    found = probe(limits, 1000)
    key = StepKey(rows=4, tokens=48, chunks=4, pages=12, page_size=8)
    run = probing(found, key, limits)
    assert [(c.id, c.start, c.stop) for c in run.chunks] == [(1, 0, 36), (0, 0, PROBE_TOKENS)]
    assert not set(found.pages.tolist()) & set(found.other_pages.tolist())
    decode = StepKey(rows=8, tokens=0, chunks=0, pages=12, page_size=8)
    assert probing(found, decode, limits).rows.tolist() == [1, 2, 3, 0]
    alone = BatcherConfig(3, 8, 1, 14, max_num_batched_tokens=16, max_chunks=1)
    assert len(probing(probe(alone, 1000), key, alone).chunks) == 1


def test_variants_are_closed_under_company() -> None:
    sampled, scored = SamplingParams(top_k=3), SamplingParams(temperature=0, logprobs=2)
    assert variants([GREEDY]) == (Kind(),)
    found = variants([GREEDY, sampled, scored])
    assert found == (Kind(), Kind(top=5), Kind(True, True), Kind(True, True, 5))
    assert covering(found, Kind(True)) == Kind(True, True)
    assert covering(found, Kind(top=0)) == Kind(top=5)
    assert covering(found, Kind(top=20)) == Kind(top=20)  # compiled when it is needed
