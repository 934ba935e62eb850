"""Figures of the demo pair, read from made-up files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import demo


def test_size_counts_both_models(tmp_path: Path) -> None:
    for role, size in (("target", 5), ("draft", 2)):
        (tmp_path / role).mkdir()
        (tmp_path / role / "model.safetensors").write_bytes(b"x" * size)
    assert demo.size_record(tmp_path).value == 7
    (tmp_path / "draft" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="'draft': 0"):
        demo.size_record(tmp_path)


def test_heldout_is_relative_to_xz(tmp_path: Path) -> None:
    report = {
        "target": {"bits_per_byte": 1.2},
        "draft": {"bits_per_byte": 1.5},
        "xz_bits_per_byte": 1.6,
        "xz_after_training_text_bits_per_byte": 1.4,
        "held_out_bytes": 1000,
    }
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(report))
    found = demo.heldout_record(path)
    assert found.value == pytest.approx(0.75)
    assert found.detail["draft_bits_per_byte"] == 1.5
