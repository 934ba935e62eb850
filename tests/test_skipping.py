"""Layers that a model does without when it guesses for itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.skipping import choose_layers
from tests.conftest import TinyModel, small_llm

TEXT = np.arange(2 * 16, dtype=np.int32).reshape(2, 16)


def deeper(tiny: TinyModel) -> tuple[Any, Any]:
    """Six layers, of which 1, 2 and 4 add hardly anything, 4 least of all."""
    first, second = tiny.params["layers"]

    def quiet(by: float) -> Any:
        return second | {name: by * second[name] for name in ("o", "down")}

    layers = [first, quiet(0.02), quiet(0.01), second, quiet(0.0), first]
    config = replace(tiny.config, layers=tiny.config.layers * 3)
    return tiny.params | {"layers": layers}, config


def test_layers_that_do_least_are_left_out(tiny: TinyModel) -> None:
    params, config = deeper(tiny)
    told: list[tuple[int, int]] = []
    found = choose_layers(params, config, TEXT, 3, progress=lambda *at: told.append(at))
    assert found == (1, 2, 4)
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("count", [0, 2, -1])
def test_some_layer_must_stay(tiny: TinyModel, count: int) -> None:
    with pytest.raises(ValueError, match=f"count={count}"):
        choose_layers(tiny.params, tiny.config, TEXT, count)


def test_no_text(tiny: TinyModel) -> None:
    with pytest.raises(ValueError, match=r"tokens \(1, 1\)"):
        choose_layers(tiny.params, tiny.config, TEXT[:1, :1], 1)


def test_an_engine_chooses_by_a_text(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "text.py"
    path.write_text("import os\n\nfor name in os.listdir():\n    print(name)\n" * 40)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    with small_llm(tiny, max_steps=1) as plain:
        want = plain.generate([[3, 4, 5]], params)[0].outputs[0].token_ids
    how = f"skip,count=1,text={path},adapt=false"
    with small_llm(tiny, speculative=how, max_steps=1) as llm:
        assert llm.generate([[3, 4, 5]], params)[0].outputs[0].token_ids == want
        assert any(step.guesses for step in llm.metrics.steps)


def test_a_text_that_is_too_short(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("too little")
    with pytest.raises(ValueError, match="expected 256 at least"):
        small_llm(tiny, speculative=f"skip,count=1,text={path}")


def test_a_text_that_is_not_there(tiny: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        small_llm(tiny, speculative=f"skip,count=1,text={tmp_path / 'nowhere'}")
