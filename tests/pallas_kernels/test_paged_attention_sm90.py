"""The Hopper attention kernel in the GPU interpreter, against `reference` in float32.

The interpreter has one block and no semaphores: what is between blocks, and the machine code, are
for the checks on a GPU (`gpu_check`) and for the ahead-of-time compile test (`cases_sm90`). Each
program takes it seconds, so shapes are tiny: one KV head, and splits only where they matter.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest

from pallas_kernels import paged_attention_sm90 as sm90
from pallas_kernels.attention_plan import BUSY
from tests.pallas_kernels.attention_problems import (
    Call,
    Item,
    Options,
    make_call,
    make_world,
    relative_errors,
    truth,
)

SMALL = Options(K=1, G=4, D=64)
TWO = sm90.Config(consumers=2, stages=2, overlap=True)
ONE = sm90.Config(consumers=1, stages=2)
slow = pytest.mark.slow


def attend(call: Call, config: sm90.Config | None = None) -> np.ndarray:
    """The kernel's output on the host, [T, H, D]."""
    o = call.options
    run = partial(
        sm90.attend, max_query=call.max_query, scale=o.scale or o.D**-0.5, window=o.window,
        softcap=o.softcap, config=config, on_gpu=False,
    )  # fmt: skip
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return np.asarray(run(**call.arrays))


DECODE = (Item(0, 130, 1), Item(1, 64, 1), Item(2, 1, 1))
SPLITS = (Item(0, 1090, 1), Item(1, 1024, 1), Item(2, 7, 1))  # two splits; one, full; one
VERIFY = (Item(0, 130, 3), Item(1, 65, 2))
PREFILL = (Item(0, 70, 70), Item(1, 40, 33))
WHOLE = (Item(0, 1100, 40),)  # walks two splits in one unit
NAMES = {
    id(DECODE): "decode", id(SPLITS): "splits", id(VERIFY): "verify", id(PREFILL): "prefill",
    id(WHOLE): "whole",
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "items"),
    [
        (replace(SMALL, K=2), SPLITS),
        (SMALL, PREFILL),
        (SMALL, WHOLE),
        (replace(SMALL, window=50, page_size=32, sinks=True, softcap=5.0), VERIFY),
        (replace(SMALL, kv="int8", G=5, dtype="float16"), DECODE),
        (replace(SMALL, kv="float8_e4m3fn", per_head=True, K=2, page_size=128), VERIFY),
        (replace(SMALL, D=256, page_size=128, G=2), DECODE),
        pytest.param(replace(SMALL, D=128, K=2, G=8, page_size=32), DECODE, marks=slow),
        pytest.param(replace(SMALL, D=256, page_size=32, sinks=True), PREFILL, marks=slow),
        pytest.param(replace(SMALL, D=256, kv="int8"), PREFILL, marks=slow),
        pytest.param(replace(SMALL, window=30, D=128, G=5), PREFILL, marks=slow),
        pytest.param(replace(SMALL, window=90, G=8, sinks=True), SPLITS, marks=slow),
        pytest.param(replace(SMALL, window=90, kv="int8"), WHOLE, marks=slow),
        pytest.param(replace(SMALL, softcap=20.0, sinks=True), WHOLE, marks=slow),
        pytest.param(replace(SMALL, kv="float8_e4m3fn", D=128), PREFILL, marks=slow),
        pytest.param(replace(SMALL, kv="int8", per_head=True, softcap=9.0), SPLITS, marks=slow),
        pytest.param(replace(SMALL, G=1, scale=0.3, dtype="float16"), PREFILL, marks=slow),
        pytest.param(replace(SMALL, G=32), VERIFY, marks=slow),
        pytest.param(replace(SMALL, G=7, K=2), VERIFY, marks=slow),
    ],
    ids=lambda x: str(x) if isinstance(x, Options) else NAMES[id(x)],
)
def test_numerics(options: Options, items: tuple[Item, ...]) -> None:
    """Pages are permuted; every slot that must not be read holds NaN, rows of nobody too."""
    world = make_world(options, [max(i.length for i in items if i.sequence == s)
                                 for s in range(len(items))])  # fmt: skip
    call = make_call(world, items, columns=1, spare_rows=3)
    out = attend(call)
    whole, worst = relative_errors(out[: call.used_rows], truth(world, items))
    assert whole <= options.tolerance
    assert worst <= 10 * options.tolerance
    assert not out[call.used_rows :].any()


@pytest.mark.parametrize(
    ("options", "length"),
    [
        (replace(SMALL, G=5, sinks=True), 90),
        pytest.param(SMALL, 1090, marks=slow),
        pytest.param(replace(SMALL, window=90, kv="int8"), 140, marks=slow),
    ],
    ids=lambda x: str(x),
)
def test_a_row_has_the_same_bits_everywhere(options: Options, length: int) -> None:
    """Decode, in a chunk, in the whole prompt; splits shared or walked; one consumer or two."""
    world = make_world(options, [length, 70])
    new = min(length, 90)
    whole = attend(make_call(world, [Item(0, length, new)]), None if options.kv else TWO)

    def same(rows: np.ndarray, end: int = length) -> None:
        at = new - (length - end)
        want = whole[at - len(rows) : at]
        assert np.array_equal(rows.view(np.int16), want.view(np.int16))

    chunk = make_call(world, [Item(1, 70, 3), Item(0, length, 20)], seed=2)
    same(attend(chunk, ONE)[3:])
    decode = [Item(1, 70, 1), Item(0, length, 1), Item(0, length - 30, 1)]
    out = attend(make_call(world, decode, columns=1, seed=3))
    same(out[1:2])
    same(out[2:], end=length - 30)


@pytest.mark.parametrize("items", [DECODE, SPLITS], ids=lambda x: NAMES[id(x)])
def test_rows_of_nobody_keep_what_they_hold(items: tuple[Item, ...]) -> None:
    """With and without scratch memory, which is what else the kernel writes."""
    world = make_world(SMALL, [item.length for item in items])
    call = make_call(world, items, spare_rows=9)
    into = np.arange(call.arrays["q"].size).reshape(call.arrays["q"].shape).astype(SMALL.dtype)
    out = attend(replace(call, arrays={**call.arrays, "into": into}))
    assert out[: call.used_rows].tobytes() == attend(call)[: call.used_rows].tobytes()
    assert out[call.used_rows :].tobytes() == into[call.used_rows :].tobytes()


@slow
@pytest.mark.parametrize("kv", ["", "int8"])
def test_a_split_has_the_same_bits_shared_out_or_walked(kv: str) -> None:
    world = make_world(replace(SMALL, kv=kv), [1090, 3])
    few = attend(make_call(world, [Item(0, 1090, 1)]))
    rows = BUSY // SMALL.K
    many = attend(make_call(world, [Item(0, 1090, 1), *[Item(1, 3, 1)] * rows], seed=2))
    assert np.array_equal(few.view(np.int16), many[:1].view(np.int16))


@slow
def test_tuning_changes_no_bit() -> None:
    world = make_world(SMALL, [70])
    call = make_call(world, [Item(0, 70, 40)])
    one = attend(call, replace(ONE, stages=1))
    two = attend(call, replace(TWO, overlap=False))
    assert one.tobytes() == two.tobytes()
