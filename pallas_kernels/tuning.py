"""Tuned configs of the attention kernels: data that `bench.tune_attention` found, read once.

`tuning.json` is `{"version": 1, "entries": [...]}`, each with `arch`, `kind`, `head_dim`, `group`,
`kv_bits`, `config`, and the `us` it took on `device`. `kind` is `decode` (the rows of a KV head's
new tokens fit one tile) or `prefill`; `kv_bits` are those of a page's numbers. A config changes no
bit of a result.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("tuning.json")
VERSION = 1
KEY = ("arch", "kind", "head_dim", "group", "kv_bits")


def tuned(arch: str, kind: str, head_dim: int, group: int, kv_bits: int) -> dict[str, Any] | None:
    """Fields of the backend's `Config`; None where nothing was tuned."""
    entry = entries().get((arch, kind, head_dim, group, kv_bits))
    return None if entry is None else entry["config"]


@functools.cache
def entries(path: Path = PATH) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Entries by key; none where there is no file.

    Raises:
        ValueError: another version.
    """
    if not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data["version"] != VERSION:
        raise ValueError(f"{path}: version {data['version']}, expected {VERSION}")
    return {tuple(entry[name] for name in KEY): entry for entry in data["entries"]}
