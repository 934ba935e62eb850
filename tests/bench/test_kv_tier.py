"""One whole run of `bench.kv_tier` on a tiny shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import kv_tier


@pytest.mark.slow
def test_every_figure_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--shape", "tiny", "--tokens", "1024", "--copied", "1e6"]
    monkeypatch.setattr(sys, "argv", ["kv_tier", *words, "--out", str(tmp_path)])
    kv_tier.main()
    (path,) = tmp_path.glob("*-kv_tier.json")
    found = {r["name"]: r for r in json.loads(path.read_text())["records"]}
    kinds = ("miss", "device", "host_storing", "host")
    names = {*(f"ttft_ms.{kind}" for kind in kinds), "share_of_link"}
    assert found.keys() == {f"kv_tier.tiny.1k.{name}" for name in names}
    assert all(len(found[f"kv_tier.tiny.1k.ttft_ms.{kind}"]["detail"]["ms_of_each_repeat"])
               == kv_tier.REPEATS for kind in kinds)  # fmt: skip
