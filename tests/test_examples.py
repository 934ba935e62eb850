"""The examples and docs/research.md run, on the demo model, and show what they say."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples import activations, fork, grpo, guidance, logits, steering

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINES = 60
ELSEWHERE = {"lm_eval_local"}  # tests/test_evaluation.py


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_they_are_short_and_say_what_they_show(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < LINES
    assert ast.get_docstring(ast.parse(text))
    assert path.stem in {*globals(), *ELSEWHERE}


def test_the_last_layer_says_what_the_model_says() -> None:
    layers, said = activations.main()
    assert len(layers) == 8
    assert layers[-1][0] == said
    assert layers[0][0] != said


@pytest.mark.slow
def test_a_scale_of_zero_steers_nothing() -> None:
    texts, plain = steering.main(scales=(0.0, 0.6), tokens=12)
    assert texts[0] == plain[: len(texts[0])]
    assert texts[1] != texts[0]


@pytest.mark.slow
def test_banned_tokens_do_not_come() -> None:
    found, banned = logits.main(prompts=("import ", "for i in "), tokens=8)
    assert banned & {token for tokens in found["plain"] for token in tokens}
    for name in ("banned", "both"):
        assert not banned & {token for tokens in found[name] for token in tokens}
    assert found["contrast"] != found["plain"]
    assert found["both"] != found["banned"]


@pytest.mark.slow
def test_guidance_of_scale_one_is_the_prompt_alone() -> None:
    (one, three), plain = guidance.main(scales=(1.0, 3.0), tokens=12)
    assert one == plain[:12]
    assert three != one


@pytest.mark.slow
def test_forks_share_their_prompt() -> None:
    tokens, read, shared = fork.main(count=6)
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    assert shared == read + 5


@pytest.mark.slow
def test_grpo_goes_on_from_new_weights() -> None:
    history = grpo.main(steps=2, group=4, tokens=8)
    assert len(history) == 2
    assert all(error < 1e-3 for _, error in history)  # the second step's: of the new weights


def run_blocks(blocks: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "block", "exec"), names)
    return names


@pytest.mark.slow
def test_the_notebook() -> None:
    cells = json.loads((ROOT / "examples" / "probe.ipynb").read_text())["cells"]
    blocks = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(len(block.splitlines()) for block in blocks) < LINES
    small = [block.replace("range(0, 9000, 900)", "range(0, 2700, 900)") for block in blocks]
    names = run_blocks(small)
    assert small != blocks
    accuracy = names["accuracy"]
    assert max(accuracy.values()) > accuracy["embed"] + 0.1
    names["llm"].close()


@pytest.mark.slow
def test_the_code_of_the_docs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "research.md").read_text(), re.S)
    names = run_blocks(blocks)
    assert len(blocks) >= 9
    assert np.isfinite(names["value"])
