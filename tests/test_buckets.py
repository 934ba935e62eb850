"""Shapes of compiled steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.buckets import fit, make_buckets
from jaxinfer.config import BatcherConfig


@given(
    rows=st.integers(1, 2000), budget=st.integers(1, 9000), longest=st.integers(1, 200_000),
    gpu=st.booleans(), policy=st.sampled_from(["continuous", "makespan"]), data=st.data(),
)  # fmt: skip
def test_buckets_hold_what_they_are_for(rows, budget, longest, gpu, policy, data):
    budget += rows
    limits = BatcherConfig(10, 64, rows, longest, max_num_batched_tokens=budget, policy=policy)
    found = make_buckets(limits, gpu=gpu)
    for sizes, most in (
        (found.rows, rows), (found.tokens, budget), (found.pages, -(-longest // 64)),
    ):  # fmt: skip
        assert list(sizes) == sorted(set(sizes))
        n = data.draw(st.integers(1, most))
        size = fit(sizes, n)
        assert size >= n
        assert all(other < n for other in sizes if other < size)
    for tokens in found.tokens:
        assert max(found.mixed_rows(tokens)) == min(tokens, -(-rows // 8) * 8)
    assert all(n % 8 == 0 for n in found.rows)
    assert all(n % 64 == 0 or n <= 64 for n in found.tokens)  # blocks of scored tokens


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="5 does not fit"):
        fit((1, 4), 5)


def test_padding_of_large_decode_steps_is_small():
    """Above 256 rows time grows with them; rows in use are taken as evenly spread."""
    limits = BatcherConfig(10, 64, 1024, 2048, max_num_batched_tokens=2048)
    sizes = make_buckets(limits, gpu=True).rows
    padded = [fit(sizes, n) / n for n in range(256, 1025)]
    assert sum(padded) / len(padded) < 1.11
