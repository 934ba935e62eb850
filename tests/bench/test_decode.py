"""One whole run of `bench.decode` on the tiny shape, without the PyTorch parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import decode, parts
from bench.record import Run


def test_random_prompts_are_fresh_and_varied() -> None:
    first, again, other = (decode.random_prompts(s, 2, 50, 512) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert all(len(set(prompt)) > 30 for prompt in first)


@pytest.mark.slow
def test_cold_and_warm_start_and_decode(tmp_path: Path) -> None:
    run = Run("2026-01-01T00:00:00+00:00", {"kind": "cpu"}, {}, "cmd")
    todo = decode.make_parts(["tiny"], [1], [32], str(tmp_path / "cache"))
    run = parts.run_parts(todo, run, tmp_path / "run.json")
    found = {r.name: r for r in run.records}
    assert set(found) == {
        "start.tiny.cold_s",
        "decode.tiny.b1.ctx32.ms_per_step",
        "decode.tiny.b1.ctx32.tok_s",
        "start.tiny.warm_s",
    }
    cold = found["start.tiny.cold_s"]
    stages = [value for name, value in cold.detail.items() if name.endswith("_s")]
    assert cold.value == pytest.approx(sum(stages), abs=0.01)
