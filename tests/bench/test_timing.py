"""Shapes, the bytes of a step and the arithmetic of the method."""

from __future__ import annotations

import math

import pytest

from bench import shapes
from bench.timing import LONG, SHORT, bytes_per_step, step_records
from jaxinfer.models.weights import count_params


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400)]
)
def test_shapes_have_the_published_sizes(name: str, parameters: int) -> None:
    config = shapes.model_config(name)
    assert count_params(config) == parameters
    assert config.layers[0].rope is not None
    assert config.layers[0].rope.kind == "llama3"


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown shape 'gpt'; known: llama-3\.1-8b"):
        shapes.hf_config("gpt")


@pytest.mark.parametrize("name", list(shapes.HF_CONFIGS))
def test_bytes_per_step_counts_every_weight_once(name: str) -> None:
    config = shapes.model_config(name)
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    read = count_params(config) - embedding + 3 * config.hidden_size + 3 * (100 + 1) * row
    assert bytes_per_step(name, 3, 100) == 2 * read


def test_step_time_is_the_slope_and_the_median() -> None:
    def pair(ms: float) -> tuple[float, float]:
        return 0.7 + SHORT * ms / 1000, 0.7 + LONG * ms / 1000

    step, rate = step_records("decode", "tiny", 4, 64, [pair(2), pair(9), pair(3)], {"mode": "x"})
    assert step.name == "decode.tiny.b4.ctx64.ms_per_step"
    assert rate.name == "decode.tiny.b4.ctx64.tok_s"
    assert step.value is not None
    assert rate.value is not None
    assert math.isclose(step.value, 3)
    assert math.isclose(rate.value, 4000 / 3)
    assert step.detail["mode"] == "x"
    assert step.detail["bytes_per_step"] == bytes_per_step("tiny", 4, 64 + (SHORT + LONG) // 2)
