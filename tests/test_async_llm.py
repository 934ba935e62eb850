"""`AsyncLLM`: the same tokens as `LLM`, whoever reads, stops reading or fails beside."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from jaxinfer import (
    LLM,
    AsyncLLM,
    Delta,
    InvalidRequest,
    JaxinferError,
    QueueFull,
    RequestOutput,
    SamplingParams,
    async_llm,
    delivery,
)
from tests.conftest import TinyModel, small_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = [[5, 6, 7], [300], [9, 8, 7, 6, 5, 4, 3, 2, 1], [17, 18]]


def serve(llm: LLM, talk: Callable[[AsyncLLM], Awaitable[Any]]) -> Any:
    """Runs `talk`, drains, and looks whether anything is left in the engine."""
    engine = llm.engine

    async def whole() -> Any:
        server = AsyncLLM(llm)
        try:
            return await asyncio.wait_for(talk(server), 60)
        finally:
            await server.close(drain=True)

    found = asyncio.run(whole())
    while not engine.idle:
        engine.step()
    assert engine._batcher.pool.available == engine.limits.num_pages - 1
    return found


async def read(server: AsyncLLM, prompt: Any, params: SamplingParams = GREEDY) -> list[Delta]:
    return [delta async for delta in server.generate(prompt, params)]


def result(deltas: list[Delta]) -> RequestOutput:
    assert deltas[-1].result is not None
    assert all(d.result is None for d in deltas[:-1])
    assert "".join(d.text for d in deltas) == deltas[-1].result.outputs[0].text
    return deltas[-1].result


def test_many_at_once_give_what_they_give_alone(tiny: TinyModel) -> None:
    params = [replace(GREEDY, max_tokens=3 + i, temperature=i / 3, seed=i) for i in range(4)]
    with small_llm(tiny) as llm:
        want = [llm.generate(p, one)[0] for p, one in zip(PROMPTS, params, strict=True)]

    async def talk(server: AsyncLLM) -> list[list[Delta]]:
        pairs = zip(PROMPTS, params, strict=True)
        return await asyncio.gather(*(read(server, p, one) for p, one in pairs))

    got = [result(deltas) for deltas in serve(small_llm(tiny), talk)]
    assert [g.outputs for g in got] == [w.outputs for w in want]


def test_who_stops_reading_cancels_and_harms_nobody(tiny: TinyModel) -> None:
    async def talk(server: AsyncLLM) -> list[list[Delta]]:
        left = server.generate(PROMPTS[0], replace(GREEDY, max_tokens=50))
        await anext(left)
        task = asyncio.create_task(read(server, PROMPTS[1], replace(GREEDY, max_tokens=50)))
        other = asyncio.create_task(read(server, PROMPTS[2]))
        await anext(left)
        await left.aclose()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return [await other, await read(server, PROMPTS[3])]

    with small_llm(tiny) as llm:
        want = [llm.generate(p, GREEDY)[0].outputs for p in PROMPTS[2:]]
    assert [result(deltas).outputs for deltas in serve(small_llm(tiny), talk)] == want


def test_a_slow_reader_finds_everything(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "MAX_UNREAD", 2)

    async def talk(server: AsyncLLM) -> tuple[list[Delta], list[Delta]]:
        slow = server.generate(PROMPTS[0], GREEDY)
        first = await anext(slow)
        quick = await read(server, PROMPTS[1], replace(GREEDY, max_tokens=40))
        return [first, *[delta async for delta in slow]], quick

    slow, quick = serve(small_llm(tiny), talk)
    assert len(slow) <= 4
    with small_llm(tiny) as llm:
        assert result(slow).outputs == llm.generate(PROMPTS[0], GREEDY)[0].outputs
    assert sum(len(d.token_ids) for d in slow) == 20
    assert len(result(quick).outputs[0].token_ids) == 40


def test_refusals(tiny: TinyModel) -> None:
    async def talk(server: AsyncLLM) -> None:
        with pytest.raises(InvalidRequest, match="4096"):
            server.generate([4096], GREEDY)
        with pytest.raises(QueueFull):
            await read(server, PROMPTS[0], replace(GREEDY, n=9, temperature=1.0))
        assert len(result(await read(server, PROMPTS[0])).outputs[0].token_ids) == 20

    serve(small_llm(tiny, max_waiting=4), talk)


def test_what_breaks_one_request_fails_it_alone(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = delivery.take

    def fragile(request: Any, *rest: Any) -> None:
        if request.prompt_ids == tuple(PROMPTS[1]):
            raise UnicodeError("no such text")
        take(request, *rest)

    monkeypatch.setattr(delivery, "take", fragile)

    async def talk(server: AsyncLLM) -> list[Any]:
        return await asyncio.gather(*(read(server, p) for p in PROMPTS), return_exceptions=True)

    good, bad, *others = serve(small_llm(tiny), talk)
    assert isinstance(bad, JaxinferError)
    assert "UnicodeError: no such text" in str(bad)
    assert all(len(result(deltas).outputs[0].token_ids) == 20 for deltas in (good, *others))


def test_a_failed_step_fails_what_was_running_and_the_next_request_is_served(
    tiny: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    llm = small_llm(tiny)
    step, calls = llm.engine.step, []

    def fragile() -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the device is gone")
        return step()

    llm.engine.step = fragile  # type: ignore[method-assign]

    async def talk(server: AsyncLLM) -> list[Delta]:
        with pytest.raises(JaxinferError, match="the device is gone"):
            await read(server, PROMPTS[0])
        return await read(server, PROMPTS[0])

    assert len(result(serve(llm, talk)).outputs[0].token_ids) == 20
    assert "a step failed" in caplog.text


def test_closing_without_draining(tiny: TinyModel) -> None:
    async def whole() -> None:
        server = AsyncLLM(small_llm(tiny))
        running, unread = (server.generate(p, replace(GREEDY, max_tokens=50)) for p in PROMPTS[:2])
        await anext(running)
        await server.close()
        with pytest.raises(JaxinferError, match="closed"):
            async for _ in running:
                pass
        with pytest.raises(JaxinferError, match="closed"):
            await anext(unread)
        with pytest.raises(JaxinferError, match="closed"):
            server.generate(PROMPTS[0])

    asyncio.run(whole())
