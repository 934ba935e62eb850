"""Temporaries of steps: the formula beside what XLA allocated, and what an engine keeps free."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.estimate_check import errors
from jaxinfer.cli.checking import Check, Item, memory_items, shape_of
from jaxinfer.config import ModelConfig
from jaxinfer.hardware import GPUS
from jaxinfer.known_models import HF_CONFIGS
from jaxinfer.models.families import parse_config
from jaxinfer.placement import Setting, memory_of
from jaxinfer.roofline import shard
from jaxinfer.runner import SCORE_BLOCK, StepKey
from jaxinfer.sampling import SUMMED_AT_ONCE
from jaxinfer.sizing import most_step_bytes
from jaxinfer.temporaries import MASSES, SCORE_ROWS, SUMS, StepShape, hungriest, step_bytes
from tests.pallas_kernels.aot import run_with_plugin

ROOT = Path(__file__).parents[1]
# Fields of `step_aot.Case`, and `temp`: bytes that XLA allocated (JAX 0.11.2).
RECORDED: list[dict[str, Any]] = json.loads((ROOT / "tests/temporaries.json").read_text())
# (model, precision) → weights, KV cache and temporaries on an H200: batch 1, context 2048.
MEASURED = {
    ("llama-3.2-1b", "bf16"): (2471628800, 68157440, 118137216),
    ("llama-3.1-8b", "bf16"): (16060522496, 272629760, 194306560),
    ("llama-3.2-1b", "int4"): (1028722688, 68157440, 109732224),
    ("llama-3.1-8b", "int4"): (5706096640, 272629760, 194273792),
}
KEY = StepKey(rows=8, tokens=2048, chunks=32, pages=64, page_size=32)  # of the hungriest step there


@cache
def config_of(name: str) -> ModelConfig:
    return parse_config(HF_CONFIGS[name])


def shape(case: dict[str, Any]) -> StepShape:
    names = ("rows", "random", "truncated", "top", "score", "guesses", "penalties")
    given = {name: case[name] for name in names if name in case}
    tokens = case.get("tokens", 0)
    longest = case.get("context", 2048)
    return StepShape(tokens=tokens, chunks=32 if tokens else 0, max_kv=longest, **given)


def how(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "dtype": case.get("dtype", "bfloat16"), "kv_dtype": case.get("kv_dtype"),
        "hopper": "arch" not in case, "gathered": case.get("devices", 0) if "arch" in case else 0,
    }  # fmt: skip


def predicted(case: dict[str, Any]) -> int:
    dense = case.get("precision", "bf16") == "bf16"
    part = shard(config_of(case["model"]), case.get("devices", 1), 1)
    return step_bytes(part, shape(case), dense=dense, **how(case))


def name_of(case: dict[str, Any]) -> str:
    return " ".join(str(v) if k == "model" else f"{k}={v}" for k, v in case.items() if k != "temp")


def gap_of(case: dict[str, Any]) -> float:
    """Share that XLA leaves free between arrays: with four devices 16 MB, a residual stream."""
    return {4: 0.15, 8: 0.03}.get(case.get("devices", 1), 0.01) if case.get("tokens") else 0.01


@pytest.mark.parametrize("case", RECORDED, ids=name_of)
def test_the_formula_is_what_xla_allocates(case: dict[str, Any]):
    # What it leaves out is small: page tables, work lists of attention, tokens.
    assert -gap_of(case) < predicted(case) / case["temp"] - 1 < 0.10


@pytest.mark.parametrize("case", RECORDED, ids=name_of)
def test_what_an_engine_keeps_free_is_enough(case: dict[str, Any]):
    rows, k = case["rows"], case.get("guesses", 0)
    most, margin = most_step_bytes(
        config_of(case["model"]), rows=rows, tokens=max(case.get("tokens", 0), 2 * rows),
        max_kv=case.get("context", 2048), guessing=(rows if k else 0, k), **how(case),
    )  # fmt: skip
    assert most > 0.99 * case["temp"]
    assert most + margin > case["temp"] + (1 << 28)


def test_terms_are_named_and_add_up():
    model, reading = config_of("llama-3.1-8b"), shape({"rows": 8, "tokens": 2048})
    found = hungriest(model, reading, dtype="bfloat16")
    E, F, D, T = 4096, 14336, 128, 2048
    assert found.name == "activation"
    assert found.terms == {
        "residual stream": 2 * T * E, "rotations": 4 * T * D, "gate_up": 4 * T * F,
        "neurons": 2 * T * F,
    }  # fmt: skip
    assert found.bytes == found.activations == sum(found.terms.values())
    rows = hungriest(model, shape({"rows": 256}), dtype="bfloat16")
    assert (rows.name, rows.activations) == ("logits", rows.terms["hidden"])


def test_sizes_are_those_of_what_is_computed():
    from pallas_kernels.threshold_mosaic import Config

    assert (SCORE_BLOCK, Config().granule) == (SCORE_ROWS, MASSES)
    V = config_of("llama-3.1-8b").vocab_size
    assert 1 << (V - 1).bit_length() == SUMS * SUMMED_AT_ONCE


def test_partial_results_of_other_gpus_are_bounded():
    """XLA allocated 88163880 bytes for an A100."""
    model, long = config_of("llama-3.1-8b"), shape({"rows": 256, "context": 1 << 15})
    ampere, hopper = (step_bytes(model, long, dtype="bfloat16", hopper=x) for x in (False, True))
    assert 88163880 < ampere < hopper


# -- `estimate --check` ---------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "precision"), MEASURED)
@pytest.mark.parametrize("drawn", [False, True])
def test_a_check_predicts_what_was_measured(
    model: str, precision: str, drawn: bool, monkeypatch: pytest.MonkeyPatch
):
    weights, cache, temporaries = MEASURED[model, precision]
    monkeypatch.setattr("jaxinfer.parallel.device_bytes", lambda params: weights)
    compiler = SimpleNamespace(keys=[(KEY, False)], step_bytes=temporaries)
    llm: Any = SimpleNamespace(
        params=None, engine=SimpleNamespace(compiler=compiler, cache_bytes=cache),
        memory_plan=SimpleNamespace(num_pages=65, page_size=32),
    )  # fmt: skip
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: {"peak_bytes_in_use": 1 << 40})
    setting = Setting(GPUS["h200"], precision, context=2048, prompt=2047)
    made = memory_items(config_of(model), setting, llm, gpu, known=True, drawn=drawn)
    items = {item.what: item for item in made}
    assert items["KV cache"].error == 0
    for name in ("weights", "temporaries of compiled steps", "memory, of these"):
        assert abs(items[name].error) < 0.003, name
    assert ("peak" in items) != drawn  # of weights that were drawn it is that of drawing


def test_a_key_is_predicted_as_the_step_that_it_compiles():
    want = StepShape(8, 2048, 32, 2048, penalties=True)
    assert shape_of(KEY, True) == want
    memory = memory_of(config_of("llama-3.2-1b"), Setting(GPUS["h100"], context=2048), [want])
    assert memory.steps == step_bytes(config_of("llama-3.2-1b"), want, dtype="bfloat16")


def test_only_what_was_predicted_has_an_error():
    def found(*items: Item) -> Check:
        return Check("m", "d", "bf16", "bfloat16", 1, 64, 32, None, None, items)

    memory, step = Item("memory, of these", "B", 99, 100), Item("decode step", "ms", None, 2.0)
    (only,) = errors("s", found(memory, step))
    assert (only.name, only.value) == ("s.memory_error", 0.01)
    assert not list(errors("s", found(Item("memory, of these", "B", None, 100), step)))


# -- the compiler ---------------------------------------------------------------------------------

CASES = [
    {"model": "llama-3.2-1b", "rows": 8, "tokens": 2048, "layers": 16},
    {"model": "llama-3.2-1b", "rows": 64, "top": 20},
    {"model": "llama-3.1-8b", "precision": "int4", "rows": 8, "tokens": 2048, "context": 2048},
    {"model": "llama-3.1-8b", "rows": 256, "context": 32768},
    {"model": "llama-3.1-8b", "rows": 8, "tokens": 2048, "devices": 4},
    {"model": "llama-3.1-8b", "rows": 8, "arch": "sm80"},
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA plugin is for Linux")
def test_steps_compiled_now_take_what_was_recorded(tmp_path: Path):
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    said = run_with_plugin("tests.step_aot", str(tmp_path / "cases.json"))
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == len(CASES)
    recorded = {name_of(case): case["temp"] for case in RECORDED}
    for case in found:
        assert case["temp"] == pytest.approx(recorded[name_of(case)], rel=0.01)
        assert predicted(case) == pytest.approx(case["temp"], rel=gap_of(case))
