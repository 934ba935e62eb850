"""Predicted steps stand beside recorded ones: no more than a tenth apart."""

from __future__ import annotations

import pytest

from bench import estimates, record

FIGURES = estimates.newest(record.read_all())


@pytest.mark.parametrize(
    "compared",
    [*estimates.decode(FIGURES), *estimates.long_runs(), *estimates.others(FIGURES)],
    ids=lambda c: c.what,
)
def test_predicted_is_near_recorded(compared):
    assert abs(compared.error) < 0.10


def test_all_that_is_claimed_is_compared():
    compared = {c.what for c in estimates.decode(FIGURES)}
    claimed = {
        f"decode.{shape}{kind}.b1.ctx1024" for shape in ("8b", "1b") for kind in ("", ".int4")
    }
    assert claimed <= compared
