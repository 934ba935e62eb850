"""Pytrees of 32-bit numbers and flags, through one array and back."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxinfer.packing import pack, unpack


def test_what_is_packed_comes_out_again():
    tree = {
        "flags": np.array([[True, False], [False, True]]),
        "int": np.array([-1, 2**31 - 1], np.int32),
        "none": None,
        "scalar": np.int32(-7),
        "seeds": np.array([[2**32 - 1, 1]], np.uint32),
        "floats": (np.array([0.1, -0.0, np.inf], np.float32), np.zeros((0, 3), np.float32)),
        "columns": np.arange(6, dtype=np.int32).reshape(2, 3).T,  # not in order in memory
    }
    got = jax.jit(unpack)(pack(tree))
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert (a.shape, a.dtype) == (np.shape(b), b.dtype)
        assert np.asarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def test_a_program_takes_no_other_layout():
    run = jax.jit(unpack).lower(pack([np.zeros(4, np.int32)])).compile()
    with pytest.raises(TypeError):
        run(pack([np.zeros((2, 2), np.int32)]))


@pytest.mark.parametrize("leaf", [np.zeros(2), np.zeros(1, np.int64), np.zeros(3, np.uint8)])
def test_other_types_are_refused(leaf):
    with pytest.raises(ValueError, match=f"{leaf.dtype} .*expected bool, int32, uint32 or float32"):
        pack([leaf])
