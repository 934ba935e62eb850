"""The pure parts of `bench.quant_matmul`, and one case on a CPU, where no kernel is to be seen."""

from __future__ import annotations

import pytest

from bench import bars, quant_matmul
from bench.quant_matmul import ROUNDS, Case, cases, measure, of_kernel


def test_every_bar_has_a_case() -> None:
    made = {f"quant_matmul.{case.name}" for case in cases()}
    asked = [bar.name for bar in bars.load_bars()[0] if bar.name.startswith("quant_matmul.")]
    assert asked
    assert not {name.rpartition(".")[0] for name in asked} - made


def test_a_kernels_time_and_its_gaps() -> None:
    events = [
        (0.0, 5000.0, "a"),
        (6000.0, 1000.0, "b"),
        (8000.0, 5000.0, "a"),
        (17000.0, 7000.0, "a"),
    ]
    assert of_kernel(events, "a") == (5.0, 8.5)
    with pytest.raises(RuntimeError, match=r"no kernel 'c' among \['a', 'b'\]"):
        of_kernel(events, "c")


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_a_case(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_matmul, "L2_BYTES", 1)
    kernel = {"int4": "quant_matmul", "fp8": "scaled_matmul"}[kind]
    events = [(1000.0 * i, 500.0, kernel) for i in range(3 * ROUNDS)]
    monkeypatch.setattr(quant_matmul, "profile", lambda program: (program(), events)[1])
    us, over = measure(Case(kind, 64, 128, 2))
    assert (us.name, us.value) == (f"quant_matmul.{kind}.64x128.t2.us", 0.5)
    assert us.detail["with_gaps_us"] == 1.0
    assert us.detail["bf16_us"] == 0.5
    assert us.detail["relative_error"] < 0.05
    assert over.value == 1.0
