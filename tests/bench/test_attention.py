"""The pure parts of `bench.attention` and `bench.tune_attention`, and one run on a CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import attention, attention_parts, bars, tune_attention
from bench.attention_cases import CASES, Case, Group, qkv_write_bytes, select
from bench.record import Record
from bench.tune_attention import Key

BY_NAME = {case.name: case for case in CASES}


def test_bytes_and_flops() -> None:
    decode = BY_NAME["decode.64x4096"]
    assert decode.kv_bytes == 64 * 4096 * 8 * 128 * 2 * 2
    assert decode.bytes - decode.kv_bytes == 2 * 64 * 32 * 128 * 2
    assert decode.flops == 4 * 64 * 4096 * 32 * 128
    assert BY_NAME["decode.64x4096.int8"].kv_bytes == 64 * 4096 * 8 * 2 * (128 + 4)
    assert BY_NAME["prefill.4x4096"].flops == 4 * 4 * (4096 * 4097 // 2) * 32 * 128
    chunk = BY_NAME["chunk.512at8192"]
    assert chunk.flops == 4 * sum(range(8193, 8705)) * 32 * 128
    mixed = BY_NAME["decode.mixed"]
    assert (mixed.new_tokens, mixed.max_query, len(mixed.lengths())) == (64, 1, 64)
    assert qkv_write_bytes("int8", 64) == 64 * (2 * 8 * (128 * 3 + 4) + 32 * 128 * 4 + 128 * 4)


def test_rotated_inputs_are_far_larger_than_the_cache() -> None:
    assert all(case.sets * case.kv_bytes > 200e6 for case in CASES)


def test_select() -> None:
    assert select(None) == list(CASES)
    assert [c.name for c in select(["decode.16", "chunk"])] == ["decode.16x4096", "chunk.512at8192"]
    assert select(["qkv_write"]) == []
    with pytest.raises(ValueError, match="no case 'deocde'"):
        select(["deocde"])


def test_derived() -> None:
    times = {
        "decode.64x4096": 400.0,
        "decode.64x4096.int8": 200.0,
        "prefill.4x4096": 1000.0,
        "prefill.4x4096.torch_cudnn": 1100.0,
        "prefill.4x4096.jax_cudnn": 1050.0,
    }
    records = [Record(f"attention.{name}.us", us, "us") for name, us in times.items()]
    found = {r.name: r.value for r in attention.derived(records)}
    assert found == {
        "attention.decode.64x4096.int8.speedup": 2.0,
        "attention.prefill.4x4096.over_cudnn": 1.05,
    }
    assert attention.derived(records[:1]) == []


def test_every_bar_is_measured_by_a_case() -> None:
    for bar in bars.load_bars()[0]:
        if bar.name.startswith("attention."):
            stem = bar.name.removeprefix("attention.").rpartition(".")[0]
            assert stem in BY_NAME, bar.name


SMALL = Case("small", (Group(2, 40), Group(1, 70, 9)), kv_heads=2, group=2, head_dim=64)


@pytest.mark.parametrize("kv", ["bf16", "int8", "fp8"])
def test_inputs_and_check(kv: str) -> None:
    case = replace(SMALL, kv=kv)
    arrays = attention_parts.make_inputs(case, 3)
    op = attention_parts.make_op(case, "reference", None)
    out = np.array(op.attend(arrays, op.plan(arrays)))
    assert attention_parts.check(case, arrays, out) < attention_parts.TOLERANCES[kv]
    out[-1] = -out[-1]  # a row of the last sequence, which is always looked at
    with pytest.raises(RuntimeError, match="relative error"):
        attention_parts.check(case, arrays, out)


def test_every_round_of_every_input_is_run() -> None:
    """Each round takes what the one before it returned: none can be left out."""

    def step(arrays: dict[str, Any], more: Any) -> dict[str, Any]:
        return {"q": 2 * arrays["q"] + arrays["x"] + more}

    inputs = [({"q": jnp.float32(i), "x": jnp.float32(1)}, jnp.float32(i)) for i in range(3)]
    want = [float(i) for i in range(3)]
    for _ in range(6):
        want = [2 * q + 1 + i for i, q in enumerate(want)]
    got = jax.jit(partial(attention_parts.run_in_turn, step, rounds=6))(inputs)
    assert [float(own["q"]) for own in got] == want


def test_timing_records() -> None:
    us, tflops = attention_parts.timing_records(SMALL, 1e-6, {}, ".torch_flash")
    assert us.name == "attention.small.torch_flash.us"
    assert us.value == pytest.approx(1)
    assert tflops.value == pytest.approx(SMALL.flops / 1e6)


def test_tuning_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    assert tune_attention.read(path) == {}
    key = Key("sm90", "decode", 128, 4, 16)
    entry = {**vars(key), "config": {"stages": 3}, "us": 1.0, "device": "x"}
    path = tmp_path / "written.json"  # what was read is kept
    tune_attention.write({key: entry}, path)
    assert tune_attention.read(path) == {key: entry}
    path = tmp_path / "newer.json"
    path.write_text('{"version": 2, "entries": []}')
    with pytest.raises(ValueError, match="version 2"):
        tune_attention.read(path)


def test_grids_and_choice() -> None:
    from pallas_kernels import paged_attention_sm80, paged_attention_sm90, tuning

    modules = {"sm90": paged_attention_sm90, "sm80": paged_attention_sm80}
    for key in tune_attention.keys(["sm90", "sm80"]):
        tried = tune_attention.configs(key)
        assert tried
        for config in tried:
            modules[key.arch].Config(**config)
    assert [str(k) for k in tune_attention.keys(["sm90"], ["sm90/decode/d128/g4/8"])] == [
        "sm90/decode/d128/g4/8"
    ]
    for entry in tuning.entries().values():
        modules[entry["arch"]].Config(**entry["config"])
    rows = [({"stages": 2}, 100.5), ({"stages": 3}, 100.0), ({"stages": 4}, 99.9)]
    assert tune_attention.fastest(rows) == ({"stages": 2}, 100.5)
