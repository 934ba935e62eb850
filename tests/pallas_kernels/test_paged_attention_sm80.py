"""The Ampere attention kernel in the GPU interpreter: tiny shapes, splits of 64 tokens.

What the interpreter lacks has stand-ins, see `Config.interpret`: `mma` itself and cp.async are for
the ahead-of-time compile test (`cases_sm80`) and for the checks on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention_sm80 as sm80
from pallas_kernels.attention_common import SPLIT, Partial, fold, kv_tile, power_of_two, row_tiles
from tests.pallas_kernels.attention_problems import (
    Item,
    Options,
    make_call,
    make_world,
    relative_errors,
    truth,
)

CONFIG = sm80.Config(arch="sm90", interpret=True, split=64)
SMALL = Options(K=1, G=4, D=64, page_size=32)


def attend(call, config=CONFIG):
    o = call.options
    run = partial(
        sm80.attend, max_query=call.max_query, scale=o.scale or o.D**-0.5, window=o.window,
        softcap=o.softcap, config=config,
    )  # fmt: skip
    return np.asarray(jax.jit(run)(**call.arrays))


DECODE = (Item(0, 150, 1), Item(1, 64, 1), Item(2, 1, 1))
MIXED = (Item(0, 150, 40), Item(1, 64, 1), Item(2, 1, 1), Item(1, 65, 65))


@pytest.mark.parametrize(
    ("options", "items"),
    [
        (SMALL, DECODE),
        (replace(SMALL, G=1, dtype="float16"), MIXED),
        (replace(SMALL, G=5, K=2, page_size=64), DECODE),
        (replace(SMALL, G=7, window=20, D=128), MIXED),
        (replace(SMALL, G=8, page_size=128, softcap=5.0, sinks=True), MIXED),
        (replace(SMALL, G=16, window=70, sinks=True, scale=0.3), DECODE),
        (replace(SMALL, G=32, D=256), DECODE),
        (replace(SMALL, G=2, kv="int8"), MIXED),
        (replace(SMALL, kv="int8", per_head=True, dtype="float16", softcap=20.0), DECODE),
        (replace(SMALL, kv="float8_e4m3fn", D=128, window=20), DECODE),
        (replace(SMALL, kv="float8_e4m3fn", dtype="float16", per_head=True, K=2), MIXED),
    ],
    ids=lambda x: str(x) if isinstance(x, Options) else "decode" if x is DECODE else "mixed",
)
def test_numerics(options, items):
    """Pages are permuted; every slot that must not be read holds NaN, rows of nobody too."""
    world = make_world(options, [150, 65, 1])
    call = make_call(world, items, columns=2, spare_rows=3)
    out = attend(call)
    whole, _ = relative_errors(out[: call.used_rows], truth(world, items))
    assert whole <= options.tolerance
    assert not out[call.used_rows :].any()


@pytest.mark.parametrize(
    "options",
    [
        replace(SMALL, G=5, sinks=True),
        replace(SMALL, window=90, kv="int8"),
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_everywhere(options):
    """Whole prompt and chunk, whose splits run in order; verification and decode, in parallel."""
    length = 140
    world = make_world(options, [length, 90])
    whole = attend(make_call(world, [Item(0, length, length)]))

    def same(out, new, end=length):
        assert np.array_equal(out[:new].view(np.int16), whole[end - new : end].view(np.int16))

    same(attend(make_call(world, [Item(0, length, 50), Item(1, 90, 7)], seed=2)), 50)
    few = make_call(world, [Item(0, 101, 3), Item(1, 90, 1), Item(0, length, 1)], columns=3, seed=3)
    out = attend(few, replace(CONFIG, stages=2))
    same(out, 3, end=101)
    same(out[4:], 1)


def test_splits_run_in_parallel_for_few_rows_alone():
    splits = partial(sm80._parallel_splits, 128 << 10, 16, tile_bytes=1 << 10, config=sm80.Config())
    assert splits(None, 4) == 128
    assert splits(None, 65) == 1
    assert splits(1024, 4) == 3
    assert splits(None, 4, config=sm80.Config(scratch_bytes=127 << 10)) == 1


def test_tiles_hold_every_token_once():
    starts = jnp.array([0, 5, 5, 6, 23], jnp.int32)
    lengths = jnp.array([9, 40, 1, 17], jnp.int32)
    tiles = row_tiles(starts, lengths, T=25, tile_tokens=4, max_query=17)
    held = [
        (int(s), int(p) + i, int(t) + i)
        for s, t, n, p in zip(*tiles[:4], strict=True)
        for i in range(int(n))
    ]
    assert held == [
        (s, int(lengths[s] - starts[s + 1] + t), t)
        for s in range(4)
        for t in range(int(starts[s]), int(starts[s + 1]))
    ]
    assert tiles.owned.tolist() == [True] * 23 + [False] * 2
    at = np.asarray(tiles.token)[tiles.token_tile] + np.asarray(tiles.token_offset)
    assert at[:23].tolist() == list(range(23))


def test_folding_is_exact_and_ignores_what_is_empty():
    assert not any(SPLIT % kv_tile(D) for D in (64, 128, 256))
    exponents = jnp.array([0.0, -1.0, -126.0, -127.0, -1e30])
    assert power_of_two(exponents).tolist() == [1.0, 0.5, 2.0**-126, 0.0, 0.0]
    some = Partial(jnp.array([3.0]), jnp.array([1.5]), jnp.array([[0.3, -7.0]]))
    nothing = Partial(jnp.array([-(2.0**30)]), jnp.zeros(1), jnp.zeros((1, 2)))
    for folded in (fold(some, nothing), fold(nothing, some)):
        assert all(np.array_equal(a, b) for a, b in zip(folded, some, strict=True))
