"""The persistent map against a dict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.persistent import table, updated

KEYS = st.integers(0, 5) | st.integers(2**127, 2**127 + 600)


@given(steps=st.lists(st.dictionaries(KEYS, st.none() | st.integers(), max_size=8), max_size=12))
def test_it_is_a_dict_that_keeps_its_past(steps):
    found, want, past = table(), {}, []
    for step in steps:
        past.append((found, want))
        changes = {key: x for key, x in step.items() if x is not None or key in want}
        found = updated(found, changes)
        want = {key: x for key, x in (want | changes).items() if x is not None}
        assert all(found.find(key) == want.get(key) for key in step)
    for old, then in [*past, (found, want)]:
        assert dict(old.items()) == then
        assert dict(table(old.items()).items()) == then


def test_what_is_not_there_cannot_be_taken_out():
    with pytest.raises(KeyError):
        updated(table([(1, 2)]), {258: None})
