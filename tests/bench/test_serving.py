"""What clients see, from the times at which tokens came; and when requests come."""

from __future__ import annotations

import math
import statistics

import pytest

from bench import serving, workloads
from bench.serving import Stream, stream


def test_gaps_between_tokens_are_those_that_a_client_sees() -> None:
    seen = stream(1.0, [1.5, 1.5, 2.5, 4.5, 4.5, 4.5])
    assert seen == Stream(due=1.0, times=(1.5, 2.5, 4.5), counts=(2, 1, 3))
    assert seen.ttft == 0.5
    assert seen.e2el == 3.5
    assert seen.itl == [0.0, 1.0, 2.0, 0.0, 0.0]
    assert seen.tpot == 3.0 / 5
    assert stream(0.0, [1.0]).tpot is None
    assert serving.itl_quantiles([seen])[-1] == 2000
    assert serving.itl_quantiles([stream(0.0, [1.0])]) == []


def test_goodput_counts_requests_within_every_limit() -> None:
    seen = [stream(0.0, [0.1, 0.2]), stream(0.0, [0.3, 0.35]), stream(0.0, [0.1, 0.9]),
            stream(0.0, [0.1])]  # fmt: skip
    limits = serving.parse_limits(["ttft:250", "tpot:100.5"])
    assert serving.goodput(seen, limits, 2.0) == 1.0  # the first and the last
    assert serving.goodput(seen, {}, 2.0) == 2.0


@pytest.mark.parametrize("word", ["itl:5", "ttft", "ttft:", "ttft:0", "ttft:x", "tpot:inf"])
def test_another_limit_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="expected one of ttft, tpot, e2el"):
        serving.parse_limits([word])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    times = workloads.gamma_arrivals(20_000, 16, burstiness)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 16, rel=0.04)
    # the coefficient of variation of a gamma distribution
    variation = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_an_infinite_rate_is_all_at_once_and_none_is_refused() -> None:
    assert workloads.gamma_arrivals(3, math.inf, 1.0) == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="expected both above 0"):
        workloads.gamma_arrivals(3, 0.0, 1.0)
