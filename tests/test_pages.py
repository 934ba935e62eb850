"""The page pool: grants and releases against a set, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.pages import allocate, create, pages_for, release


@given(
    num_pages=st.integers(2, 12),
    operations=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=30),
)
def test_pool_is_a_set_of_free_pages(num_pages, operations):
    """Grants are disjoint, never page 0, lowest first; nothing is lost; inputs are unchanged."""
    pool, free, granted = create(num_pages), set(range(1, num_pages)), []
    for take, amount in operations:
        before = pool.free.copy()
        if take and amount <= len(free):
            after, pages = allocate(pool, amount)
            assert pages.dtype == np.int32
            assert pages.tolist() == sorted(free)[:amount]
            free -= set(pages.tolist())
            granted.append(pages)
        elif granted:
            pages = granted.pop(amount % len(granted))
            after = release(pool, pages)
            free |= set(pages.tolist())
        else:
            continue
        assert not after.free.flags.writeable
        np.testing.assert_array_equal(pool.free, before)
        pool = after
        assert pool.available == len(free)
        assert set(np.flatnonzero(pool.free).tolist()) == free


def test_create_needs_two_pages():
    with pytest.raises(ValueError, match=r"num_pages=1: expected at least 2"):
        create(1)


def test_allocate_more_than_is_free():
    pool, _ = allocate(create(4), 2)
    with pytest.raises(ValueError, match="2 pages wanted, 1 free"):
        allocate(pool, 2)


@pytest.mark.parametrize("pages", [[0], [4], [-1], [1, 4]])
def test_release_out_of_range(pages):
    pool, _ = allocate(create(4), 3)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        release(pool, np.array(pages, np.int32))


@pytest.mark.parametrize("pages", [[3], [1, 3], [1, 1]])
def test_release_twice(pages):
    pool, _ = allocate(create(4), 2)
    with pytest.raises(ValueError, match="free already"):
        release(pool, np.array(pages, np.int32))


def test_release_nothing():
    pool = create(3)
    assert release(pool, np.empty(0, np.int32)).available == pool.available == 2


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_pages_for(tokens, pages):
    assert pages_for(tokens, 8) == pages
