"""Speculation with real models on a CPU: the demo's pair, against the engine without it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints.demo
from checkpoints import load_params
from jaxinfer import LLM, SamplingParams
from jaxinfer.cache import init_cache
from jaxinfer.models.families import read_config
from jaxinfer.models.weights import declare
from jaxinfer.proposers import History, draft_model, prompt_lookup
from jaxinfer.speculate import Drawing, State, step
from jaxinfer.windows import Pages, model_forward
from tests.test_sampling import row, stack

DEMO = Path(checkpoints.demo.__file__).parent
PAGE, PAGES, WIDTH = 16, 8, 4  # tokens a page, pages a sequence, k + 1
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
def pair() -> dict[str, Any]:
    """Of each model its config and its weights."""
    found = {}
    for name in ("target", "draft"):
        config = read_config(DEMO / name)
        found[name] = config, load_params(DEMO / name, declare(config), dtype=jnp.float32)
    return found


def begin(pair: Any, prompts: list[list[int]], rows: Any, limits: list[int]) -> Any:
    """Prompts read by both models, but for their last tokens; (state, params)."""
    S, lengths = len(prompts), np.array([len(p) for p in prompts], np.int32)
    text = np.zeros((S, lengths.max()), np.int32)
    for i, prompt in enumerate(prompts):
        text[i, : len(prompt)] = prompt
    params = {name: weights for name, (_, weights) in pair.items()}
    # Pages in no order, as a pool hands them out.
    table = 1 + np.random.default_rng(0).permutation(S * PAGES).reshape(1, S, PAGES)
    kept = {}
    for name, (config, _) in pair.items():
        cache = init_cache(config, 1 + S * PAGES, PAGE, jnp.float32)
        pages = Pages(cache, jnp.asarray(table, jnp.int32))
        read = jax.jit(model_forward(name, config))
        _, kept[name] = read(params, pages, jnp.asarray(text), lengths - 1, np.zeros(S, np.int32))
    fresh = np.zeros((S, WIDTH), np.int32)
    fresh[:, 0] = text[np.arange(S), lengths - 1]
    state = State(
        fresh=jnp.asarray(fresh), fresh_count=jnp.ones(S, jnp.int32), lengths=jnp.asarray(lengths),
        limits=jnp.asarray(limits, jnp.int32), active=jnp.ones(S, bool), rows=rows,
        penalties=None, draft=kept["draft"], target=kept["target"],
    )  # fmt: skip
    return state, params, text


@pytest.mark.parametrize(("name", "temperature"), [("draft", 0.8), ("lookup", 0.0)])
def test_tokens_are_those_of_the_engine(llm: LLM, pair: Any, name: str, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=7, max_tokens=MORE, ignore_eos=True)
    outputs = llm.generate(list(TEXT), sampling)
    prompts = [list(out.prompt_token_ids) for out in outputs]
    limits = [len(p) + MORE for p in prompts]
    rows = stack([row(temperature=temperature, seed=7)] * len(prompts))
    state, params, text = begin(pair, prompts, rows, limits)
    proposer = draft_model(model_forward("draft", pair["draft"][0]))
    if name == "lookup":
        history = np.zeros((len(prompts), PAGES * PAGE), np.int32)
        history[:, : text.shape[1]] = text
        state = state._replace(draft=History(jnp.asarray(history)))
        proposer = prompt_lookup()
    run = jax.jit(
        partial(
            step,
            draft=proposer,
            target=model_forward("target", pair["target"][0]),
            drawing=Drawing(truncated=False, random=temperature > 0),
        )
    )
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
