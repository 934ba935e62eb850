"""The pure parts of `bench.quant_matmul`, and one case on a CPU, where no kernel is to be seen."""

from __future__ import annotations

import pytest

from bench import bars, quant_matmul
from bench.quant_matmul import ROUNDS, Case, cases, measure, of_kernel
from jaxinfer.profiling.trace import Event


def test_every_bar_has_a_case() -> None:
    made = {f"quant_matmul.{case.name}" for case in cases()}
    asked = [bar.name for bar in bars.load_bars()[0] if bar.name.startswith("quant_matmul.")]
    assert asked
    assert not {name.rpartition(".")[0] for name in asked} - made


def test_a_kernels_time_and_its_gaps() -> None:
    events = [
        Event(0.0, 5000.0, "a"),
        Event(6000.0, 1000.0, "b"),
        Event(8000.0, 5000.0, "a"),
        Event(17000.0, 7000.0, "a"),
    ]
    assert of_kernel(events, "a") == (5.0, 8.5)
    with pytest.raises(RuntimeError, match=r"no kernel 'c' among \['a', 'b'\]"):
        of_kernel(events, "c")


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_a_case(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_matmul, "L2_BYTES", 1)
    kernel = {"int4": "quant_matmul", "fp8": "scaled_matmul"}[kind]
    events = [Event(1000.0 * i, 500.0, kernel) for i in range(3 * ROUNDS)]
    rounding = 0.25 if kind == "fp8" else 0.0
    events += [Event(1000.0 * i + 600, 1000 * rounding, "round_rows") for i in range(3) if rounding]
    monkeypatch.setattr(quant_matmul, "profile", lambda program: (program(), events)[1])
    us, over = measure(Case(kind, 64, 128, 2))
    assert (us.name, us.value) == (f"quant_matmul.{kind}.64x128.t2.us", 0.5)
    assert us.detail["with_gaps_us"] == 1.0
    assert us.detail["rounding_us"] == rounding
    assert us.detail["relative_error"] < 0.05
    assert over.value == pytest.approx(us.detail["bf16_us"] / (0.5 + rounding))


def test_configs_that_are_tried_hold_the_default() -> None:
    from bench.tune_quant_matmul import packed_configs, scaled_configs
    from pallas_kernels.quant_matmul_sm90 import default_config
    from tests.pallas_kernels.quant_problems import packed

    form = packed("int4", 64, 128).format
    for T, N, K in ((1, 28672, 4096), (16, 4096, 14336), (64, 28672, 4096), (512, 6144, 4096)):
        found = list(packed_configs(T, N, K, form, 132))
        assert default_config(T, N, K, form, 132).way in {config.way for config in found}
        assert len(set(found)) == len(found)
    assert len(list(scaled_configs(64, 4096, 4096, "int8", 132))) > 4


def test_the_table_of_a_step() -> None:
    from bench.inside_step import table

    spans = [(0.0, 4000.0, "a"), (5000.0, 1000.0, "b"), (6000.0, 4000.0, "a")]
    events = [Event(*span) for span in spans]
    first, *rows = table(events, 1)
    assert first == "kernels run 90.0 % of the time, 3 a step"
    assert [row.split()[0] for row in rows] == ["a", "b"]
    assert rows[0].split()[1:] == ["2.0", "x", "4.00", "us", "80.0", "%"]
