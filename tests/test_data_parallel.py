"""Replicas on simulated CPU devices: a request has the same bits on any of them.

Runs itself as a child process, as `test_tensor_parallel` does.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer import LLM, AsyncLLM, Intervention, SamplingParams
from jaxinfer.replicas import Replicas
from tests.test_tensor_parallel import (
    CONFIG,
    GREEDY,
    PENALISED,
    PROMPTS,
    SAMPLED,
    child,
    guessing_by,
    weights,
)
from tests.test_tensor_parallel import main as run_parts
from tests.test_tensor_parallel import make as make_parallel

SMALL = replace(CONFIG, layers=CONFIG.layers[1:])
SITE = "layers.0.resid"
DRAWN = [SamplingParams(temperature=0.9, seed=i, max_tokens=9, logprobs=0) for i in range(4)]


def make(replicas: int, devices: int = 1, **options: Any) -> LLM:
    sizes: dict[str, Any] = {"kv_cache_bytes": 1 << 14, "max_model_len": 48} | options
    return make_parallel(devices, SMALL, data_parallel_size=replicas, **sizes)


def said(llm: LLM, params: Any = GREEDY) -> list[Any]:
    """Tokens of every sample; with log-probabilities to the last bit, where they are asked for."""
    found: list[Any] = []
    for s in (s for output in llm.generate(PROMPTS, params) for s in output.outputs):
        likely = zip(s.logprobs or (), s.token_ids, strict=False)
        found.append([list(s.token_ids), [at[i].logprob.hex() for at, i in likely]])
    return found


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [tokens for tokens, _ in outputs]


def replicas_of(llm: LLM) -> Replicas:
    assert isinstance(llm.engine, Replicas)
    return llm.engine


def dispatches(llm: LLM) -> list[int]:
    return [len(engine.metrics.steps) for engine in replicas_of(llm).engines]


def idle(llm: LLM) -> bool:
    """Whether nothing is left of any request."""
    while llm.engine.in_flight:
        llm.pump(schedule=False)
    engines, routed = replicas_of(llm).engines, replicas_of(llm)._router.replicas
    return not (
        llm._owners or replicas_of(llm)._where or any(e._live for e in engines)
        or any(r.tokens for r in routed)
    )  # fmt: skip


def error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# -- what the child finds -------------------------------------------------------------------------


def alike(folder: Path) -> dict[str, Any]:
    """One replica, and two on devices of their own, with pages on the host; and all that an LLM
    does with two."""
    three, far = replace(DRAWN[0], n=3), {"kv_host_bytes": 1 << 14, "kv_cache_bytes": 1 << 13}
    with make(1, **far) as one, make(2, **far) as two:
        found: dict[str, Any] = {
            name: [said(one, how), said(two, how)]
            for name, how in {"greedy": GREEDY, "sampled": DRAWN, "samples": three}.items()
        }
        found["dispatches"] = dispatches(two)
        found["programs"] = [program(e) for e in (one.engine, *replicas_of(two).engines)]
        found["plans"] = [repr(one.memory_plan), repr(two.memory_plan)]
        held = [jax.tree.leaves((e.params, e._cache, e._seq)) for e in replicas_of(two).engines]
        found["places"] = [sorted({str(d) for x in some for d in x.devices()}) for some in held]
        summary = two.metrics.summary()
        found["summary"] = [summary.requests, len(two.metrics.requests), sum(found["dispatches"])]
        found["steps"] = len(two.metrics.steps)
        found["given up"] = given_up(two)
        found["broken"] = broken(two)
        found["kept"] = kept(one, two, folder)
        found["updated"] = updated(one, two)
        copied = [(step.stored, step.loaded) for step in two.metrics.steps]
        found["copied"] = np.sum(copied, axis=0).tolist()
        found["served"] = asyncio.run(served(AsyncLLM(two)))  # closes it
    return found


def program(engine: Any) -> list[str]:
    """What a decode step does, without what says where it runs and is written."""
    found = next(p for (key, _), p in engine.compiler._compiled.items() if not key.tokens)
    lines = found.as_text().split("ENTRY", 1)[1].splitlines()
    braces = r"\{([^{}]|\{[^{}]*\})*\}"
    return [re.sub(f", (metadata|sharding|frontend_attributes)={braces}", "", x) for x in lines]


def given_up(llm: LLM) -> list[Any]:
    requests = [llm.prepare(prompt, GREEDY) for prompt in PROMPTS]
    llm.submit(requests)
    for _ in range(5):
        llm.pump()
    llm.cancel(requests[1:3])
    while not (requests[0].finished and requests[3].finished):
        llm.pump()
    return [[r.samples[0].tokens for r in (requests[0], requests[3])], idle(llm)]


def broken(llm: LLM) -> list[Any]:
    """Something goes wrong with one request's text."""
    import jaxinfer.delivery as module

    good, requests = module.take, [llm.prepare(prompt, GREEDY) for prompt in PROMPTS]

    def fragile(request: Any, *rest: Any) -> None:
        if request is requests[1]:
            raise KeyError("bad")
        good(request, *rest)

    module.take = fragile
    try:
        llm.submit(requests)
        while not all(r.finished or r.failed for r in requests):
            llm.pump()
    finally:
        module.take = good
    return [[r.samples[0].tokens for r in requests], [str(r.failed) for r in requests], idle(llm)]


def kept(one: LLM, two: LLM, folder: Path) -> list[Any]:
    """Saved in the middle by two replicas, and by one; gone on with by the other."""
    found: list[Any] = []
    for at, (llm, other) in enumerate([(two, one), (one, two)]):
        requests = [llm.prepare(prompt, GREEDY) for prompt in PROMPTS]
        llm.submit(requests)
        for _ in range(6):
            llm.pump()
        llm.save(folder / str(at))
        found.append(error(partial(llm.save, folder / f"{at} pages", pages=True)))
        llm.cancel(requests)
        again = other.load(folder / str(at))
        found.append(any(r.samples[0].tokens for r in again))
        while any(not r.finished for r in again):
            other.pump()
        found.append([r.samples[0].tokens for r in again])
    found.append(error(partial(two.load, folder / "1 pages")))
    return [*found, idle(two)]


def updated(one: LLM, two: LLM) -> list[Any]:
    count = [e.compiler.count for e in replicas_of(two).engines]
    found = []
    for seed in (1, 0):
        new = jax.tree.map(np.asarray, weights(SMALL, seed=seed))
        for llm in (one, two):
            llm.update_params(new)
            found.append(said(llm))
    return [*found, [e.compiler.count for e in replicas_of(two).engines] == count]


async def served(server: AsyncLLM) -> list[Any]:
    """From asyncio, one of them given up; streamed."""

    async def read(prompt: list[int], most: int) -> list[int]:
        tokens: list[int] = []
        async for delta in server.generate(prompt, GREEDY):
            tokens += delta.token_ids
            if len(tokens) >= most:
                break
        return tokens

    async with server:
        found = await asyncio.gather(*(read(p, 99 if i else 2) for i, p in enumerate(PROMPTS)))
    return [found[0][:2], *found[1:]]


def errors(_: Path) -> dict[str, str]:
    """What is refused, before any weights are looked at; and the queue, which is for all."""
    found = {
        "devices": error(lambda: make(9)),
        "both": error(lambda: make(3, 4)),
        "tensor": error(lambda: make(2, 16, max_num_seqs=3)),
        "size": error(lambda: make(0)),
        "log": error(lambda: make(2, event_log="events.jsonl")),
    }
    with make(2, max_waiting=3) as llm:
        found["queue"] = error(lambda: llm.submit([llm.prepare([1], GREEDY) for _ in range(4)]))
        llm.submit(some := [llm.prepare([1], GREEDY) for _ in range(2)])
        found["more"] = error(lambda: llm.submit([llm.prepare([1], GREEDY) for _ in range(2)]))
        llm.cancel(some)
        found["idle"] = str(idle(llm))
    return found


def both(_: Path) -> dict[str, Any]:
    """Replicas of two devices each."""
    found: dict[str, Any] = {}
    with make(1, 2) as one, make(2, 2) as two:
        for name, how in {"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED}.items():
            found[name] = [said(one, how), said(two, how)]
        found["dispatches"] = dispatches(two)
        found["updated"] = updated(one, two)
    return found


def inside(_: Path) -> dict[str, Any]:
    """Activations and functions of requests on either replica; one of them goes wrong."""

    def change(where: Any, x: Any, aux: Any) -> Any:
        return x + aux[:, None]

    def seen(llm: LLM) -> list[Any]:
        done = llm.generate(
            PROMPTS, GREEDY, capture=[SITE], intervene=[None, *by], on_error="return"
        )
        found = [o.outputs[0].activations or {} for o in done if not o.error]
        arrays = [np.asarray(x[SITE]).tobytes().hex() for x in found]
        return [arrays, [str(o.error) for o in done if o.error]]

    by = [Intervention(change, [SITE], aux=np.float32(x)) for x in (0.5, np.nan, 0.25)]
    found: dict[str, Any] = {}
    with make(1) as one, make(2) as two:
        done = two.warm_up([GREEDY])
        found["warm"] = [done.programs, list(done.unequal), said(two) == said(one)]
        found["warm"].append(sum(e.compiler.count for e in replicas_of(two).engines))
        found["inside"] = [seen(one), seen(two)]
        found["penalised"] = [said(one, PENALISED), said(two, PENALISED)]
        found["scores"] = [
            [x.logprobs.tobytes().hex() for x in llm.logprobs(PROMPTS)] for llm in (one, two)
        ]
        found["dispatches"] = dispatches(two)
        state = two.functional(PROMPTS[:1], GREEDY)
        found["functional"] = int(state.step(two.params, state.state)[1].tokens[0])
        found["first"] = said(one)[0][0][0]
        found["idle"] = idle(two)
    return found


def speculated(_: Path) -> dict[str, Any]:
    small = replace(SMALL, num_heads=2, num_kv_heads=1)
    hows = guessing_by(small, skip="")
    del hows["skip"]  # there is but one layer
    found: dict[str, Any] = {}
    for name, how in hows.items():
        with make(2, kv_cache_bytes=1 << 16, **how) as llm:
            found[name] = [said(llm), said(llm, SAMPLED)]
            found[f"{name} steps"] = [
                sum(s.attempted for s in e.metrics.steps) for e in replicas_of(llm).engines
            ]
    return found


PARTS = {f.__name__: f for f in (alike, errors, both, inside, speculated)}

# -- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return child(tmp_path_factory.mktemp("quick"), "alike", "errors", file=__file__)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "samples"])
def test_bits_do_not_depend_on_the_replica(quick, kind):
    one, two = quick["alike"][kind]
    assert two == one
    assert len({str(tokens) for tokens in one}) == len(one)


def test_replicas_run_the_same_program_on_devices_of_their_own(quick):
    found = quick["alike"]
    plain, *others = found["programs"]
    assert others == [plain, plain]
    first, second = found["places"]
    assert len(first) == len(second) == 1
    assert first != second
    assert min(found["dispatches"]) > 10
    assert found["plans"][0] == found["plans"][1]


def test_metrics_are_those_of_all(quick):
    found = quick["alike"]
    requests, records, dispatches = found["summary"]
    assert requests == records == 4 + 4 + 12
    assert found["steps"] == dispatches
    assert min(found["copied"]) > 0


def test_one_request_leaves_the_others_alone(quick):
    found = quick["alike"]
    want = tokens_of(found["greedy"][0])
    assert found["given up"] == [[want[0], want[3]], True]
    tokens, failed, idle = found["broken"]
    assert [tokens[i] for i in (0, 2, 3)] == [want[i] for i in (0, 2, 3)]
    assert [text == "None" for text in failed] == [True, False, True, True]
    assert idle


def test_states_go_from_any_number_of_replicas_to_any_other(quick):
    want = tokens_of(quick["alike"]["greedy"][0])
    refused, begun, done, nothing, begun_too, back, pages, idle = quick["alike"]["kept"]
    assert done == back == want
    assert begun
    assert begun_too
    assert re.search("data_parallel_size=2: pages of several replicas are not kept", refused)
    assert nothing == "nothing"
    assert re.search("data_parallel_size=2: the saved state has the pages of one", pages)
    assert idle


def test_other_weights_reach_every_replica(quick):
    one, two, back, back_too, same = quick["alike"]["updated"]
    assert one == two != back
    assert back == back_too == quick["alike"]["greedy"][0]
    assert same, "nothing is compiled anew"


def test_streams_from_asyncio(quick):
    want = tokens_of(quick["alike"]["greedy"][0])
    assert quick["alike"]["served"] == [want[0][:2], *want[1:]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("devices", r"ValueError: data_parallel_size=9: .* need 9, .* has 8 .*: expected 1 to 8"),
        ("both", r"ValueError: data_parallel_size=3: .* of 4 .* need 12, .*: expected 1 to 2"),
        ("tensor", r"ValueError: tensor_parallel_size=16: "),
        ("size", r"ValueError: data_parallel_size=0: expected an integer of at least 1"),
        ("log", r"ValueError: event_log='events.jsonl' with data_parallel_size=2: "),
        ("queue", r"QueueFull: 4 sequences do not fit in the queue: 0 of 3 wait already"),
        ("more", r"QueueFull: 2 sequences do not fit in the queue: 2 of 3 wait already"),
        ("idle", "True"),
    ],
)
def test_what_does_not_work_is_refused(quick, name, message):
    assert re.search(message, quick["errors"][name]), quick["errors"][name]


@pytest.mark.slow
def test_replicas_of_several_devices(tmp_path):
    found = child(tmp_path, "both", file=__file__)["both"]
    for name in ("greedy", "sampled", "penalised"):
        one, two = found[name]
        assert two == one, name
    assert min(found["dispatches"]) > 0
    one, two, back, back_too, same = found["updated"]
    assert one == two != back == back_too
    assert same


@pytest.mark.slow
def test_functions_penalties_and_warm_up(tmp_path):
    found = child(tmp_path, "inside", file=__file__)["inside"]
    one, two = found["inside"]
    assert one == two
    assert len(one[0]) == 3, one[1]
    assert len(one[1]) == 1
    assert "FunctionFault" in one[1][0] or SITE in one[1][0]
    for name in ("penalised", "scores"):
        assert found[name][0] == found[name][1], name
    assert found["functional"] == found["first"]
    assert min(found["dispatches"]) > 0
    assert found["idle"]
    programs, unequal, same, compiled = found["warm"]
    assert programs == compiled > 0
    assert not unequal
    assert same


@pytest.mark.slow
def test_speculation_changes_no_token(tmp_path):
    found = child(tmp_path, "speculated", file=__file__)["speculated"]
    for name in ("lookup", "draft"):
        assert found[name] == found["none"], name
        assert min(found[f"{name} steps"]) > 0, name


if __name__ == "__main__":
    run_parts(Path(sys.argv[1]), sys.argv[2:], PARTS)
