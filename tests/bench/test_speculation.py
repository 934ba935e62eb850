"""`bench.speculation` on a prompt, and its bars."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from bench import bars, speculation


def test_acceptance_of_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "MORE", 9)
    configs, params = speculation.load_pair(jnp.float32)
    prompt = [5, 6, 7, 8] * 4
    acceptance, added = speculation.measure(
        configs, params, [prompt], "lookup", "shared", 0.0, 2, jnp.float32, ()
    )
    detail = acceptance.detail
    assert acceptance.value == pytest.approx(
        detail["taken"] / max(detail["attempted"], 1), abs=1e-4
    )
    assert detail["steps"] + detail["taken"] == 9
    assert added.value == pytest.approx(9 / detail["steps"], abs=1e-4)


def test_every_bar_has_a_case() -> None:
    made = {
        f"speculation.demo.{proposer}.{rule}.t{t:g}.k4.acceptance"
        for proposer, rule, t in speculation.CASES
    }
    asked = {bar.name for bar in bars.load_bars()[0] if bar.name.startswith("speculation.")}
    assert asked
    assert asked <= made
