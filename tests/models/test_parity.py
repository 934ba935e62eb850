"""Every family and variant against logits and greedy tokens that PyTorch computed (goldens)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints.load import load_params
from jaxinfer import LLM, RequestOutput, SamplingParams, models
from jaxinfer.config import ModelConfig
from jaxinfer.models.families import read_config
from jaxinfer.models.weights import declare

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = sorted(p.parent.name for p in GOLDENS.glob("*/golden.safetensors"))
TOLERANCE = 2e-5  # of the largest |logit|
RESID_PROMPT = 2
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


@dataclass(frozen=True)
class Golden:
    """See `make_goldens.py`; `sequences[i]` is `prompts[i]` and 32 greedy tokens."""

    directory: Path
    config: ModelConfig
    prompts: list[list[int]]
    sequences: list[list[int]]
    arrays: dict[str, np.ndarray]


@cache
def golden(name: str) -> Golden:
    arrays = load_file(GOLDENS / name / "golden.safetensors")
    lengths = arrays["prompt_lengths"].tolist()
    rows = list(zip(arrays["tokens"].tolist(), lengths, strict=True))
    return Golden(
        GOLDENS / name,
        read_config(GOLDENS / name),
        [row[:n] for row, n in rows],
        [row[: n + 32] for row, n in rows],
        arrays,
    )


@cache
def applied(name: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 logits [B, T, V] and residuals [L, B, T, E] of all sequences, padded together."""
    g = golden(name)
    params = load_params(g.directory, declare(g.config), dtype=jnp.float32)
    logits, found = models.apply(
        params, g.config, jnp.asarray(g.arrays["tokens"]), capture=("layers.*.resid",)
    )
    return np.asarray(logits), np.stack(list(found.values()))


def test_all_variants_have_goldens() -> None:
    assert len(NAMES) == 16


@pytest.mark.parametrize("name", NAMES)
def test_apply_logits(name: str) -> None:
    arrays = golden(name).arrays
    prompt, position = arrays["logit_rows"].T
    logits = applied(name)[0][prompt, position]
    error = np.abs(logits - arrays["logits"]).max() / np.abs(arrays["logits"]).max()
    assert error < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_apply_residuals_after_each_layer(name: str) -> None:
    want = golden(name).arrays["resid"]
    got = applied(name)[1][:, RESID_PROMPT, : want.shape[1]]
    error = np.abs(got - want).max(axis=(1, 2)) / np.abs(want).max(axis=(1, 2))
    assert error.max() < TOLERANCE


def _check_logprobs(g: Golden, got: list[np.ndarray]) -> None:
    # Twice the logits' tolerance: log p is a logit less a log-sum-exp that errs as much.
    tolerance = 2 * TOLERANCE * float(np.abs(g.arrays["logits"]).max())
    for scores, want, sequence in zip(got, g.arrays["logprobs"], g.sequences, strict=True):
        assert scores.shape == (len(sequence) - 1,)
        np.testing.assert_allclose(scores, want[: len(sequence) - 1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_apply_logprobs_and_greedy_tokens(name: str) -> None:
    g = golden(name)
    logprobs = np.asarray(jax.nn.log_softmax(applied(name)[0]))
    got = []
    for row, prompt, sequence in zip(logprobs, g.prompts, g.sequences, strict=True):
        row = row[: len(sequence) - 1]
        assert row[len(prompt) - 1 :].argmax(-1).tolist() == sequence[len(prompt) :]
        got.append(np.take_along_axis(row, np.array(sequence[1:])[:, None], 1)[:, 0])
    _check_logprobs(g, got)


def _llm(g: Golden, page_size: int, max_num_batched_tokens: int, max_num_seqs: int) -> LLM:
    return LLM(
        g.directory,
        dtype="float32",
        page_size=page_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        kv_cache_bytes=16 << 20,
    )


def _check_greedy(g: Golden, outputs: list[RequestOutput]) -> None:
    assert [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs] == g.sequences


# The forward without an engine is held to every golden above.
ENGINE = ("llama-gqa-llama3rope-tied", "mistral-window", "qwen2-mixed-window", "qwen3-tied-bias")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ENGINE else pytest.mark.slow) for n in NAMES],
)
def test_llm(name: str) -> None:
    """Greedy tokens and log-probabilities; prompts of 1 to 90 tokens, in chunks of 16."""
    g = golden(name)
    with _llm(g, page_size=64, max_num_batched_tokens=16, max_num_seqs=8) as llm:
        _check_greedy(g, llm.generate(g.prompts, GREEDY))
        _check_logprobs(g, [score.logprobs for score in llm.logprobs(g.sequences)])


def test_llm_each_prompt_alone() -> None:
    g = golden("qwen2-mixed-window")
    with _llm(g, page_size=64, max_num_batched_tokens=64, max_num_seqs=8) as llm:
        _check_greedy(g, [llm.generate([prompt], GREEDY)[0] for prompt in g.prompts])


# (page_size, max_num_batched_tokens, max_num_seqs): each value twice.
QUICK = [(8, 16, 8), (64, 2048, 1)]
LONG = [(8, 2048, 2), (16, 16, 1), (16, 64, 2), (64, 64, 8)]
LONG = [pytest.param(*arrangement, marks=pytest.mark.slow) for arrangement in LONG]
# The window makes attention depend on where pages and chunks end: that variant is always run.
OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "mistral-window"]


@pytest.mark.parametrize(("page_size", "max_num_batched_tokens", "max_num_seqs"), [*QUICK, *LONG])
@pytest.mark.parametrize("name", ["mistral-window", *OTHERS])
def test_llm_arrangements(
    name: str, page_size: int, max_num_batched_tokens: int, max_num_seqs: int
) -> None:
    g = golden(name)
    with _llm(g, page_size, max_num_batched_tokens, max_num_seqs) as llm:
        _check_greedy(g, llm.generate(g.prompts, GREEDY))
