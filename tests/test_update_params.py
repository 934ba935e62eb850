"""Other weights in a running LLM: what is served by which, and what is refused."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import (
    LLM,
    AsyncLLM,
    CheckpointError,
    JaxinferError,
    RequestOutput,
    SamplingParams,
    engine,
)
from jaxinfer.models.weights import init_params
from tests.conftest import TinyModel, small_llm

PROMPTS = [[5, 6, 7], [*range(9, 40)], [17, 18]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=30)


@pytest.fixture(scope="module")
def other(tiny: TinyModel) -> dict:
    """Weights of the same model, otherwise drawn; on the host."""
    params = init_params(tiny.config, jax.random.key(9), jnp.float32)
    params["embed"] = params["embed"] * 50
    return jax.tree.map(np.asarray, params)


@pytest.fixture
def llm(tiny: TinyModel) -> Iterator[LLM]:
    with small_llm(tiny) as llm:
        yield llm


def ids(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def wanted(tiny: TinyModel, other: dict) -> list[tuple[int, ...]]:
    """What an LLM says that had the other weights from the start."""
    with small_llm(replace(tiny, params=jax.device_put(other))) as llm:
        return ids(llm.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("place", ["host", "device"])
def test_outputs_are_those_of_the_new_weights(
    llm: LLM, other: dict, wanted: list[tuple[int, ...]], place: str
) -> None:
    """Nothing is compiled, and no cached prefix is used, until the old ones come again."""
    before, params = llm.generate(PROMPTS, GREEDY), llm.params
    llm.logprobs(PROMPTS[0])
    assert ids(before) != wanted
    programs = llm.engine.compiler.count
    new = jax.device_put(other) if place == "device" else other
    llm.update_params(new, version="tuned")
    after = llm.generate(PROMPTS, GREEDY)
    assert ids(after) == wanted
    assert [o.num_cached_tokens for o in after] == [0, 0, 0]
    assert {o.params_version for o in before} == {0}
    assert {o.params_version for o in after} == {"tuned"}
    assert llm.logprobs(PROMPTS[0])[0].params_version == "tuned"
    llm.update_params(params, version=0)
    again = llm.generate(PROMPTS, GREEDY)
    assert ids(again) == ids(before)
    assert [o.num_cached_tokens for o in again] == [0, 0, 0]
    assert llm.engine.compiler.count == programs


def test_arrays_on_the_device_are_taken_as_they_are(llm: LLM, other: dict) -> None:
    new = jax.device_put(other)
    llm.update_params(new)
    places = [
        [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(x)] for x in (llm.params, new)
    ]
    assert places[0] == places[1]


def test_no_second_copy_is_on_the_device(
    llm: LLM, other: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each array goes as its successor comes."""
    place, counts = engine._placed, []

    def counted(*args: Any) -> Any:
        counts.append(len(jax.live_arrays()))
        return place(*args)

    llm.update_params(other)  # the weights before are the fixture's, too
    gc.collect()
    before = len(jax.live_arrays())
    monkeypatch.setattr(engine, "_placed", counted)
    llm.update_params(other)
    assert len(counts) == len(jax.tree.leaves(other))
    assert set(counts) == {before - 1}


def test_the_caller_may_change_his_arrays_afterwards(
    llm: LLM, other: dict, wanted: list[tuple[int, ...]]
) -> None:
    mine = jax.tree.map(np.array, other)
    llm.update_params(mine)
    for leaf in jax.tree.leaves(mine):
        leaf[...] = 0
    assert ids(llm.generate(PROMPTS, GREEDY)) == wanted


def test_what_runs_finishes_first(llm: LLM, other: dict, wanted: list[tuple[int, ...]]) -> None:
    plain = llm.generate(PROMPTS, LONG)
    requests = [llm.prepare(prompt, LONG) for prompt in PROMPTS]
    llm.submit(requests)
    llm.pump()
    llm.update_params(other)
    results = [request.deltas[-1].result for request in requests if request.deltas]
    assert [r.outputs[0].token_ids for r in results if r] == ids(plain)
    assert {r.params_version for r in results if r} == {0}
    assert llm.params_version == 1
    assert ids(llm.generate(PROMPTS, GREEDY)) == wanted


def test_what_runs_is_given_up(llm: LLM, other: dict, wanted: list[tuple[int, ...]]) -> None:
    requests = [llm.prepare(prompt, LONG) for prompt in PROMPTS]
    llm.submit(requests)
    llm.pump()
    llm.update_params(other, in_flight="abort")
    assert all("weights were updated" in str(r.failed) for r in requests)
    assert ids(llm.generate(PROMPTS, GREEDY)) == wanted


def _broken(other: dict, **change: Any) -> dict:
    return {**other, **change}


def test_refusals_change_nothing(llm: LLM, other: dict) -> None:
    plain = ids(llm.generate(PROMPTS, GREEDY))
    norm = other["final_norm"]
    for tree, message in (
        (_broken(other, final_norm=norm[:-1]), r"final_norm: float32\[31\], expected"),
        (_broken(other, final_norm=norm.astype(np.float64)), "float64"),
        (_broken(other, final_norm=norm.tolist()), "final_norm"),
        (_broken(other, extra=norm), "extra: .* nothing there"),
        (_broken(other, layers=other["layers"][:1]), "layers/1/.*missing"),
        ({}, "missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            llm.update_params(tree)
    for options in ({"in_flight": "wait"}, {"version": 1.5}, {"version": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            llm.update_params(other, **options)
    assert llm.params_version == 0
    assert ids(llm.generate(PROMPTS, GREEDY)) == plain
    llm.update_params(llm.params, version="a")
    with pytest.raises(ValueError, match="after 'a'"):
        llm.update_params(llm.params)


def test_an_update_that_breaks_off_closes_the_llm(
    llm: LLM, other: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_placed", fail)
    with pytest.raises(JaxinferError, match="closed: out of memory"):
        llm.update_params(other)
    with pytest.raises(JaxinferError, match="closed"):
        llm.generate(PROMPTS, GREEDY)


# -- served --------------------------------------------------------------------------------------


async def _read(server: AsyncLLM, prompt: list[int], params: SamplingParams) -> RequestOutput:
    result = None
    async for delta in server.generate(prompt, params):
        result = delta.result
    assert result is not None
    return result


def test_a_server_lets_requests_finish_and_others_wait(
    llm: LLM, other: dict, wanted: list[tuple[int, ...]]
) -> None:
    plain = ids(llm.generate(PROMPTS, LONG))

    async def talk() -> None:
        async with AsyncLLM(llm) as server:
            running = [server.generate(prompt, LONG) for prompt in PROMPTS]
            firsts = [await anext(stream) for stream in running]
            update = asyncio.create_task(server.update_params(other, version="new"))
            await asyncio.sleep(0)
            later = [asyncio.create_task(_read(server, p, GREEDY)) for p in PROMPTS]
            for first, stream, want in zip(firsts, running, plain, strict=True):
                deltas = [first, *[delta async for delta in stream]]
                assert tuple(t for delta in deltas for t in delta.token_ids) == want
                assert deltas[-1].result is not None
                assert deltas[-1].result.params_version == 0
            await update
            results = await asyncio.gather(*later)
            assert ids(results) == wanted
            assert {r.params_version for r in results} == {"new"}
            with pytest.raises(CheckpointError):
                await server.update_params({}, version=3)
            assert ids([await _read(server, PROMPTS[0], GREEDY)]) == wanted[:1]

    asyncio.run(asyncio.wait_for(talk(), 60))


def test_a_server_gives_up_what_runs(llm: LLM, other: dict, wanted: list[tuple[int, ...]]) -> None:
    async def talk() -> None:
        async with AsyncLLM(llm) as server:
            running = server.generate(PROMPTS[0], LONG)
            await anext(running)
            await server.update_params(other, in_flight="abort")
            with pytest.raises(JaxinferError, match="weights are updated"):
                async for _ in running:
                    pass
            assert ids([await _read(server, PROMPTS[0], GREEDY)]) == wanted[:1]
        with pytest.raises(JaxinferError, match="closed"):
            await server.update_params(other)

    asyncio.run(asyncio.wait_for(talk(), 60))
