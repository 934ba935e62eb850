"""Speculation with real models on a CPU: the demo's pair, against the engine without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bench.kv_quality import DEMO
from bench.speculation import load_pair
from jaxinfer import LLM, SamplingParams
from jaxinfer.acceptance import prepare
from jaxinfer.config import Method, Speculative
from jaxinfer.windows import begin
from tests.test_sampling import row, stack

MORE = 24  # tokens
TEXT = (
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n",
    "import numpy as np\n\nfor i in range(10):\n    print(",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n",
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(DEMO / "target"), dtype="float32", max_num_seqs=4, max_model_len=128) as llm:
        yield llm


@pytest.fixture(scope="module")
def pair() -> Any:
    return load_pair(jnp.float32)


@pytest.mark.parametrize(("name", "temperature"), [("draft", 0.8), ("lookup", 0.0), ("skip", 0.0)])
def test_tokens_are_those_of_the_engine(
    llm: LLM, pair: Any, name: Method, temperature: float
) -> None:
    sampling = SamplingParams(temperature=temperature, seed=7, max_tokens=MORE, ignore_eos=True)
    outputs = llm.generate(list(TEXT), sampling)
    prompts = [list(out.prompt_token_ids) for out in outputs]
    limits = [len(p) + MORE for p in prompts]
    rows = stack([row(temperature=temperature, seed=7)] * len(prompts))
    configs, params = pair
    skip = (2, 5) if name == "skip" else ()
    run, configs = prepare(configs, Speculative(name, skip=skip), temperature)
    state = begin(params, configs, prompts, rows, limits, k=3, page_size=16, dtype=jnp.float32)
    made: list[list[int]] = [[] for _ in prompts]
    taken = attempted = 0
    while np.any(np.asarray(state.active)):
        state, accepted = run(state, params)
        added = np.asarray(accepted.added)
        taken += (added - 1).clip(0).sum()
        attempted += np.asarray(accepted.attempted).sum()
        for out, tokens, n in zip(made, np.asarray(accepted.tokens), added, strict=True):
            out += tokens[:n].tolist()
    assert made == [list(out.outputs[0].token_ids) for out in outputs]
    assert taken > 0.2 * attempted > 0
