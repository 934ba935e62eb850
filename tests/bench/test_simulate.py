"""The simulation against runs of the real thing, against sums done by hand, and against itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import costs, record, simulate, workloads
from bench.costs import CostModel, Sample
from bench.virtual import Load, Result, make_load
from bench.virtual import simulate as run
from jaxinfer.config import BatcherConfig

# Every coefficient its own power of ten: the sum says which was counted how often.
PLAIN = CostModel(1.0, 10.0, 0.0, 1e-3, 1e-6)
CONFIG = BatcherConfig(
    num_pages=simulate.KV_TOKENS // 64,
    page_size=64,
    max_num_seqs=1024,
    max_model_len=2304,
    max_num_batched_tokens=2048,
    max_steps=1,
)


def load(due: list[float], prompts: list[int], outputs: list[int], prefix: int = 0) -> Load:
    lengths = (np.array(x, np.int64) for x in (prompts, outputs))
    return Load("some", np.array(due, np.float64), *lengths, prefix)


def same(a: Result, b: Result) -> bool:
    return all(np.array_equal(x, getattr(b, name)) for name, x in vars(a).items())


def test_comes_near_what_was_measured() -> None:
    """8B on one H100: 19.3 s under `continuous`; 17.5 s and 1026 steps under `makespan`."""
    cost, everything = costs.fit(), make_load(1000)
    continuous = run(everything, CONFIG, cost)
    makespan = run(everything, replace(CONFIG, policy="makespan"), cost)
    assert continuous.seconds == pytest.approx(19.3, rel=0.1)
    assert makespan.seconds == pytest.approx(17.5, rel=0.1)
    assert makespan.steps == 1026
    for result in (continuous, makespan):
        assert result.output_tokens == sum(workloads.lengths()[1])
        assert len(result.itl) == result.output_tokens - 1000
        assert (result.ttft > 0).all()
        assert not result.preemptions


def test_by_hand() -> None:
    """A prompt of 10 tokens is read in a step of 64 tokens and 64 rows, with 32 chunks; each of the
    others decodes one of 8 rows."""
    result = run(load([0.0], [10], [3]), CONFIG, PLAIN)
    read = 11 + 96e-6
    assert result.ttft * 1000 == pytest.approx([read])
    assert result.itl * 1000 == pytest.approx([11.011008, 11.012008])  # 11 tokens held, then 12
    assert result.seconds * 1000 == pytest.approx(read + 11.011008 + 11.012008)
    assert result.padding == 1 - 12 / (64 + 8 + 8)
    assert result.waste == pytest.approx(1 - (10 + 11 + 12) / 3 / 64)
    assert (result.steps, result.dispatches, result.output_tokens) == (3, 3, 3)


def test_two_dispatches_are_in_flight() -> None:
    """Who comes while the first runs is read by the third."""
    result = run(load([0.0, 0.001], [10, 10], [5, 1]), CONFIG, PLAIN)
    first, second, third = 11 + 96e-6, 11.011008, 11.012 + 96e-6
    assert result.ttft[1] * 1000 == pytest.approx(first + second + third - 1)


def test_an_idle_device_waits_for_the_next() -> None:
    result = run(load([0.0, 5.0], [10, 10], [2, 2]), CONFIG, PLAIN)
    assert result.ttft[0] == pytest.approx(result.ttft[1])
    assert result.seconds == pytest.approx(5 + result.ttft[0] + result.itl[0])


def test_several_steps_a_dispatch() -> None:
    """Their tokens come together."""
    result = run(load([0.0], [10], [10]), replace(CONFIG, max_steps=4), PLAIN)
    assert (result.steps, result.dispatches) == (10, 4)
    assert sorted(result.itl == 0) == [False] * 3 + [True] * 6
    one = run(load([0.0], [10], [10]), CONFIG, PLAIN)
    assert result.seconds == pytest.approx(one.seconds)


def test_static_runs_batches_to_their_ends() -> None:
    config = replace(CONFIG, policy="static", max_num_seqs=32)
    result = run(make_load(64), config, PLAIN)
    batches = workloads.longest_of_batches(workloads.lengths(64)[1], 32)
    assert batches <= result.steps <= batches + 2 * 16


def test_preempted_ones_end_too() -> None:
    config = replace(CONFIG, num_pages=250, page_size=16, max_model_len=2048)
    result = run(make_load(60), config, PLAIN)
    assert result.preemptions > 0
    assert result.output_tokens == sum(workloads.lengths(60)[1])
    assert len(result.itl) == result.output_tokens - 60
    assert same(result, run(make_load(60), config, PLAIN))


def test_a_short_queue_makes_no_difference_in_order_of_arrival() -> None:
    everything = make_load(120, rate=400)
    config = replace(CONFIG, max_num_seqs=32)
    assert same(run(everything, config, PLAIN), run(everything, config, PLAIN, queue=16))


def test_a_shared_prefix_is_computed_once() -> None:
    due, prompts, outputs = [0.0] * 20, [256 + i for i in range(1, 21)], [4] * 20
    shared = run(load(due, prompts, outputs, prefix=256), CONFIG, costs.fit())
    apart = run(load(due, prompts, outputs), CONFIG, costs.fit())
    assert shared.seconds < apart.seconds / 2


def test_arrivals_follow_the_rate() -> None:
    everything = make_load(1500, rate=16)
    assert len(everything.due) == len(everything.prompts) == 1500
    assert everything.due[-1] == pytest.approx(1500 / 16, rel=0.1)
    assert everything.prompts[1000] == everything.prompts[0]


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"rate": 0.0}, {"prefix": -1}])
def test_loads_out_of_range(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        make_load(**{"requests": 10, **wrong})


def test_fit_finds_the_coefficients_again() -> None:
    true = CostModel(1.5, 6.0, 6.0 / 256, 6e-5, 0.004)
    samples = [
        replace(s, ms=true.step_ms(**s.sizes)) for s in (*costs.SAMPLES, Sample(64, 0, 9, 5000, 0))
    ]
    assert vars(costs.fit(samples)) == pytest.approx(vars(true))


def test_fit_of_the_measured_steps() -> None:
    found = costs.fit()
    assert all(value >= vars(costs.LEAST)[name] for name, value in vars(found).items())
    errors = np.abs(costs.residuals(found))
    assert errors.max() < 0.16
    assert np.median(errors) < 0.06
    with pytest.raises(ValueError, match="3 samples"):
        costs.fit(costs.SAMPLES[:3])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--requests 5 --rate 50 --policy static,makespan --budget 512,2048 --max-num-seqs 600"
    simulate.main([*words.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "left out: makespan, budget 512 with max_num_seqs 600" in printed
    (written,) = record.read_all(tmp_path)
    assert written.device["kind"] == "simulated"
    assert [r.name for r in written.records] == [
        "simulate.50rps.static.seqs32.page64.budget512.out_tok_s",
        "simulate.50rps.static.seqs32.page64.budget2048.out_tok_s",
        "simulate.50rps.static.seqs600.page64.budget2048.out_tok_s",
        "simulate.50rps.makespan.seqs600.page64.budget2048.out_tok_s",
    ]
    for found in written.records:
        assert f"{found.detail['ttft_p99_ms']:.0f}" in printed
        assert found.detail["cost"] == vars(costs.fit())


@pytest.mark.parametrize(
    "words", ["--policy fifo", "--page-size 12", "--kv-tokens 2000", "--queue 0", "--requests 0"]
)
def test_command_line_out_of_range(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulate.main(words.split())
    name, value = words.removeprefix("--").replace("-", "_").split()
    assert f"{name}={value}" in capsys.readouterr().err.replace("'", "")
