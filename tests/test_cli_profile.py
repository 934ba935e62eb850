"""`jaxinfer profile` from end to end on a CPU; what it prints, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer import cli
from jaxinfer.cli import profiling
from jaxinfer.cli.measuring import MeasureOptions, load_measured, settled
from jaxinfer.profiling import ceilings
from jaxinfer.profiling.report import GROUPS, MATMULS

GOLDEN = Path(__file__).parent / "goldens" / "qwen2"


def run(capsys, *args):
    code = cli.main(["profile", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


# A prompt as long as those that decode: what the engine runs for one, it runs for the other.
SIZES = {"batch": 2, "context": 32, "prompt": 15}
RANDOM = MeasureOptions(str(GOLDEN / "config.json"), random="auto", **SIZES)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(RANDOM, id="random"),
        pytest.param(MeasureOptions("demo", **SIZES), id="demo", marks=pytest.mark.slow),
    ],
)
def found(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings.SIZES, "cpu", (1 << 16, 64))
        return profiling.profile(request.param, 1)


def test_the_time_of_a_step_is_that_of_its_parts(found):
    assert (found.device, found.precision, found.kv_dtype) == ("cpu", "fp32", "float32")
    decode, prefill = found.phases
    assert (decode.rows, decode.rows_wanted) == (8, 2)
    assert (prefill.rows, prefill.rows_wanted) == (16, 15)
    for phase in found.phases:
        ops = {op.name: op for op in phase.ops}
        assert set(ops) == set(GROUPS)
        assert math.isclose(sum(phase.parts.values()), phase.engine_s, rel_tol=1e-9)
        assert phase.parts["padding"] > 0
        assert ops["collectives"].kernels == 0
        # Every layer's products were found, and hardly anything that is no part of the model.
        assert all(ops[name].kernels >= 2 for name in MATMULS if name != "output")
        assert all(ops[name].seconds for name in ("output", "attention", "sampling", "kv_write"))
        assert ops["other"].kernels < 0.25 * sum(op.kernels for op in phase.ops)


def test_what_it_prints(found, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(profiling, "profile", lambda options, degree: found)
    code, out, _ = run(capsys, "demo", "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["version"], record["type"], record["batch"]) == (1, "profile", 2)
    assert [phase["name"] for phase in record["phases"]] == ["decode", "prefill"]
    code, out, _ = run(capsys, "demo")
    assert code == 0
    assert all(word in out for word in (*MATMULS, "8 rows computed, 2 wanted", "host", "copy"))
    assert max(map(len, out.splitlines())) <= 120
    pytest.importorskip("matplotlib")
    starts = {"a.png": b"\x89PNG", "a.html": b"<!doctype html>"}
    for name, start in starts.items():
        assert run(capsys, "demo", "--plot", tmp_path / name)[0] == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    assert (tmp_path / "a.html").read_text().rstrip().endswith("</svg>")
    assert run(capsys, "demo", "--plot", tmp_path / "no" / "a.html")[0] == 4


def test_random_weights_need_no_checkpoint():
    config, chosen = settled(replace(RANDOM, context=40, batch=3, prompt=None), 1024)
    assert chosen.prompt == 39
    loaded = load_measured(chosen, config, lambda dtype: f"called with {dtype}")
    with loaded.llm as llm:
        assert (loaded.dtype, loaded.first) == ("float32", "called with float32")
        assert llm.memory_plan.num_pages == 3 * 2 + 1
    config, _ = settled(MeasureOptions("llama-3.1-8b", random="int4"), 1024)
    assert config.num_layers == 32


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("llama-3.1-8b", 2, "a shape without weights"),
        ("demo --precision int4", 2, "is of --random-weights"),
        ("llama-3.1-8b --random-weights --precision int3", 2, "expected one of auto, int4, int8"),
        ("demo --random-weights --precision int4", 2, "groups of 128 do not divide 320 columns"),
        ("demo --tensor-parallel-size 2", 2, "tensor_parallel_size=2: a profile is of one device"),
        ("demo --batch 0", 2, "batch=0"),
        ("demo --context 5000", 2, "context=5000"),
        ("demo --context 16", 2, "expected at least 32"),
        ("demo --context 64 --prompt 65", 2, "prompt=65"),
        ("demo --context 64 --prompt 64", 2, "at most 63"),
        ("llama-3.1-8b --random-weights --context 4096 --prompt 3000", 2, "at most 2048"),
        ("demo --plot a.gif", 2, ".png, .svg, .html"),
        ("no/such/directory", 3, "does not exist"),
        ("llama-4 --random-weights", 3, "one of llama-3.2-1b"),
    ],
)
def test_refusals(args, code, message, capsys):
    got, out, err = run(capsys, *args.split())
    assert (got, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split())
