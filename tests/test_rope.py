"""Rotary frequencies against those that transformers computes (`goldens/rope.json`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.config import RopeConfig
from jaxinfer.models.families import parse_config
from jaxinfer.rope import rope_frequencies

CASES = json.loads((Path(__file__).parent / "goldens" / "rope.json").read_text())


def _name(case: dict) -> str:
    c = case["config"]
    scaling = c.get("rope_scaling") or c.get("rope_parameters") or {}
    return f"{scaling.get('rope_type', scaling.get('type', 'default'))}-{c['head_dim']}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_frequencies_match_transformers(case: dict) -> None:
    config = parse_config(case["config"])
    rope = config.layers[0].rope
    assert rope is not None
    frequencies, factor = rope_frequencies(rope, config.head_dim)
    want = np.array(case["frequencies"], np.float32)
    assert frequencies.dtype == np.float32
    assert frequencies.shape == (config.head_dim // 2,)
    np.testing.assert_array_max_ulp(frequencies, want, maxulp=4)
    assert factor == pytest.approx(case["attention_factor"], rel=1e-12)


def test_plain_frequencies_are_a_geometric_series() -> None:
    frequencies, factor = rope_frequencies(RopeConfig(theta=10000.0), 8)
    np.testing.assert_allclose(frequencies, [1, 1e-1, 1e-2, 1e-3], rtol=1e-6)
    assert factor == 1.0


def test_yarn_interpolates_long_wavelengths_and_keeps_short_ones() -> None:
    plain, _ = rope_frequencies(RopeConfig(theta=10000.0), 128)
    rope = RopeConfig(10000.0, "yarn", factor=4.0, original_max_position=4096)
    stretched, _ = rope_frequencies(rope, 128)
    np.testing.assert_array_equal(stretched[:16], plain[:16])
    np.testing.assert_array_equal(stretched[-8:], plain[-8:] / 4)


def test_odd_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim must be even"):
        rope_frequencies(RopeConfig(), 7)
