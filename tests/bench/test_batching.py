"""The batching benchmarks: request lists, what is made of results, and a tiny run of all."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from bench import batching, host, measuring, outcome, parts, soak_requests, throughput, workloads
from bench.inside import Preemptions
from bench.record import Record, Run
from bench.soak_requests import Ask
from bench.workloads import FULL, TINY
from jaxinfer.types import CompletionOutput, Logprob, RequestOutput, SamplingParams


def test_the_list_is_the_one_that_others_were_measured_on() -> None:
    prompts, outputs = workloads.lengths()
    assert (sum(prompts), sum(outputs)) == (220_245, 199_374)
    assert workloads.lengths(10) == (prompts[:10], outputs[:10])


def test_ids_are_fresh_and_lengths_are_not() -> None:
    one, other = (workloads.lognormal(FULL, 512, seed) for seed in (1, 2))
    assert [*map(len, one.prompts)] == [*map(len, other.prompts)] == workloads.lengths()[0]
    assert one.tokens == other.tokens
    assert one.prompts != other.prompts
    assert one.first(7).prompts == one.prompts[:7]
    assert workloads.lognormal(FULL, 512, 1) == one
    assert [p.max_tokens for p in one.params] == list(one.tokens)


def test_arrivals_come_at_the_rate() -> None:
    times = workloads.arrivals(16, 1000)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 1000
    assert len(times) == pytest.approx(16_000, rel=0.03)


def test_prompts_share_the_prefix_and_no_more() -> None:
    load = workloads.shared_prefix(FULL, 1 << 17, 0)
    prefixes = {tuple(prompt[: FULL.prefix]) for prompt in load.prompts}
    assert len(prefixes) == 1
    assert len({prompt[FULL.prefix] for prompt in load.prompts}) > 150
    assert {len(prompt) - FULL.prefix for prompt in load.prompts} <= set(range(1, 129))


@pytest.mark.parametrize("scale", [FULL, TINY])
def test_everything_fits_the_models_length(scale: workloads.Scale) -> None:
    load = workloads.lognormal(scale, 512, 0)
    longest = [
        *(len(p) + n for p, n in zip(load.prompts, load.tokens, strict=True)),
        scale.prefix + scale.suffix + scale.prefix_tokens,
        *(context + scale.long for _, context in (scale.steady, scale.sampled)),
        2 * scale.soak_longest,
    ]
    assert max(longest) <= scale.max_model_len


def test_static_batches_take_as_long_as_their_longest() -> None:
    assert workloads.longest_of_batches([1, 5, 2, 2, 9], 2) == 5 + 2 + 9


def test_the_ratio_is_over_static_batches() -> None:
    names = {"": 1000.0, ".first200": 600.0, ".static": 100.0}
    found = [Record(f"throughput.8b{name}.out_tok_s", value) for name, value in names.items()]
    ratios = {r.name: r.value for r in throughput.derived(found)}
    assert ratios == {"throughput.8b.over_static": 10.0}
    assert throughput.derived(found[:1]) == []


def completion(*tokens: int, reason: str = "length", logprob: float | None = None) -> RequestOutput:
    logprobs = None if logprob is None else tuple({t: Logprob(logprob)} for t in tokens)
    one = CompletionOutput(0, "", tokens, logprobs=logprobs, finish_reason=reason)  # type: ignore[arg-type]
    return RequestOutput("0", None, (1,), (one,))


def test_results_differ_by_a_token_and_by_a_bit() -> None:
    one, same, token, bit = (
        outcome.of(completion(*tokens, logprob=x))
        for tokens, x in (((1, 2), -0.5), ((1, 2), -0.5), ((1, 3), -0.5), ((1, 2), -0.5000001))
    )
    assert one == same
    assert one.tokens != token.tokens
    assert one.tokens == bit.tokens
    assert one.bits != bit.bits
    assert len({outcome.digest([x]) for x in (one, same, token, bit)}) == 3


def test_the_soak_knows_a_wrong_result() -> None:
    ask = Ask([1], SamplingParams(max_tokens=3, stop_token_ids=[9], temperature=0))
    right = [completion(1, 2, 3), completion(1, 9, reason="stop"), completion(9, reason="stop")]
    wrong = [
        completion(1, 2), completion(1, 2, 3, 4), completion(1, 9, 3),
        completion(1, 2, reason="stop"), completion(9, 9, reason="stop"), completion(reason="stop"),
        replace(completion(1, 2, 3), finished=False), replace(completion(1, 2, 3), outputs=()),
    ]  # fmt: skip
    assert [soak_requests.wrong(ask, output) for output in right] == [None] * 3
    assert all(soak_requests.wrong(ask, output) for output in wrong)
    again = soak_requests.again(ask, completion(5, 5, 7), random.Random(1))
    assert again.expected in ((5,), (5, 5, 7))
    assert soak_requests.wrong(again, completion(5, 6, 7))


def test_the_soaks_requests_are_of_all_kinds() -> None:
    asks = list(islice(soak_requests.asks(FULL, 1000, 0), 400))
    params = [ask.params for ask in asks]
    assert {p.n for p in params} == {1, 2, 3, 4}
    assert {ask.priority for ask in asks} == {-1, 0, 1}
    assert all(p.n == 1 for p in params if p.temperature == 0)
    for share in (
        [p.temperature == 0 for p in params],
        [p.logprobs is not None for p in params],
        [bool(p.stop_token_ids) for p in params],
        [ask.cancel_after is not None for ask in asks],
    ):
        assert 0.02 < sum(share) / len(share) < 0.8
    heads = [tuple(ask.prompt[:20]) for ask in asks if len(ask.prompt) > 20]
    assert len(set(heads)) < 0.9 * len(heads)


def test_preemptions_are_counted_in_an_event_log() -> None:
    log = Preemptions()
    kinds = [{"kind": kind} for kind in ("Decode", "Preempt", "Preempt")]
    print(json.dumps({"events": [], "actions": kinds}), file=log)
    assert log.count == 2


def test_a_failed_measurement_keeps_what_it_found(tmp_path: Path) -> None:
    def broken() -> Iterator[Record]:
        yield Record("a", 1.0)
        raise ValueError("no such thing")

    def endless() -> Iterator[Record]:
        yield Record("b", 2.0)
        while True:
            pass

    path = tmp_path / "records"
    measuring.guarded(path, "broken", 60, broken())
    measuring.guarded(path, "endless", 0.2, endless())
    found = [Record(**json.loads(line)) for line in path.read_text().splitlines()]
    assert [r.name for r in found] == ["a", "broken.failed", "b", "endless.failed"]
    assert found[1].error == "ValueError: no such thing"
    assert found[3].error == "TimeoutError: took longer than 0.2 s"


def options(*words: str) -> list[parts.Part]:
    args = measuring.parser(batching.MEASUREMENTS).parse_args([*words, "--shape", "tiny"])
    return measuring.make_parts("bench.batching", batching.MEASUREMENTS, args)


def test_measurements_with_other_options_get_a_process_of_their_own() -> None:
    assert [part.name for part in options("--measure", "serve,prefix,static,soak")] == [
        "serve.prefix", "static", "soak",
    ]  # fmt: skip
    assert len(options()) == 3


def test_the_scheduler_is_timed() -> None:
    found = {r.name: r for r in host.records(running=4, waiting=6, times=5)}
    assert set(found) == {"host.batcher.steady_ms", "host.batcher.admission_ms"}
    assert found["host.batcher.admission_ms"].detail["steps"] == 4


@pytest.mark.slow
def test_all_of_it_on_a_tiny_shape(tmp_path: Path) -> None:
    run = Run("2026-01-01T00:00:00+00:00", {"kind": "cpu"}, {}, "cmd")
    todo = options("--seconds", "2", "--repeats", "1")
    run = parts.run_parts(todo, run, tmp_path / "run.json")
    found = {r.name: r.value for r in (*run.records, *throughput.derived(run.records))}
    errors = {r.name: r.error for r in run.records if r.error}
    assert not errors
    assert found.keys() >= {
        "waste.tiny.page8",
        "throughput.tiny.out_tok_s",
        "throughput.tiny.static.out_tok_s",
        "throughput.tiny.over_static",
        "serve.tiny.16rps.ttft_p50_ms",
        "serve.tiny.16rps.ttft_p99_ms",
        "serve.tiny.16rps.itl_p99_ms",
        "serve.tiny.16rps.tpot_p50_ms",
        "prefix.tiny.less_prefill",
        "prefix.tiny.identical",
        "steady.tiny.b4.wall_over_device",
        "sampled.tiny.b4.over_greedy",
        "soak.tiny.requests",
        "soak.tiny.failures",
        "soak.tiny.compiles",
    }
    prefill = found["prefix.tiny.less_prefill"]
    assert prefill is not None
    assert prefill > 2
