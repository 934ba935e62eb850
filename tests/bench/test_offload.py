"""One whole run of `bench.offload` on a tiny shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import offload


@pytest.mark.slow
def test_every_figure_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--shape", "tiny@6", "--gigabytes", "0.00052", "--copied", "1e6", "--batch", "1"]
    monkeypatch.setattr(sys, "argv", ["offload", *words, "--out", str(tmp_path)])
    offload.main()
    (path,) = tmp_path.glob("*-offload.json")
    found = {r["name"]: r for r in json.loads(path.read_text())["records"]}
    names = ("ms_per_step", "tok_s", "share_of_link")
    assert found.keys() == {"offload.link.bytes_per_s", *(f"offload.tiny@6.b1.{n}" for n in names)}
    assert found["offload.tiny@6.b1.ms_per_step"]["detail"]["streamed_bytes"] > 0
