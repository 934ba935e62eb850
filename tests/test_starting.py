"""Every LLM starts in one way: what can be refused is, before any weights are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jaxinfer import CapacityError, CheckpointError
from jaxinfer.config import EngineOptions
from jaxinfer.sources import Source, given, stored
from jaxinfer.speculative import parse
from jaxinfer.starting import start
from tests.conftest import TinyModel

PLAIN = EngineOptions(dtype="float32")


def source(kind: str, tiny: TinyModel, draft: Any = None) -> Source:
    """One whose weights are not to be read."""
    if kind == "stored":
        found = stored("demo", None)
    else:
        how = PLAIN if draft is None else replace(PLAIN, speculative=parse("draft"))
        found = given(tiny.params, tiny.config, how, tokenizer=tiny.tokenizer, draft=draft)
    return found._replace(load=lambda *_: pytest.fail("weights are read"))


@pytest.mark.parametrize("kind", ["stored", "given"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tensor_parallel_size": 7}, ValueError, "tensor_parallel_size=7: this model has"),
        ({"pipeline_parallel_size": 7}, ValueError, "pipeline_parallel_size=7: this model"),
        ({"data_parallel_size": 999}, ValueError, "data_parallel_size=999: replicas of 1"),
        (
            {"pipeline_parallel_size": 2, "device_weight_bytes": 1},
            ValueError,
            "device_weight_bytes=1: stages would read",
        ),
        ({"device_weight_bytes": 1}, CapacityError, "device_weight_bytes=1: this model needs"),
        ({"speculative": parse("skip=99")}, ValueError, r"skip=\(99,\).*this model has layers"),
        ({"speculative": parse("draft")}, ValueError, "needs a model"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused_first(
    tiny: TinyModel, kind: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        start(source(kind, tiny), replace(PLAIN, **options), None)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_model_len": 1 << 30}, ValueError, "max_model_len=1073741824: this model was made"),
        ({"kv_cache_bytes": 1}, CapacityError, "no memory for one page"),
        ({"kv_host_bytes": 1}, CapacityError, "kv_host_bytes=1: a page of"),
    ],
)
def test_memory_is_planned_before_a_checkpoint_is_read(
    tiny: TinyModel, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        start(source("stored", tiny), replace(PLAIN, **options), None)


def test_a_draft_in_memory_is_checked_before_weights_are_placed(tiny: TinyModel) -> None:
    options = replace(PLAIN, speculative=parse("draft"))
    broken = {**tiny.params, "final_norm": tiny.params["final_norm"][:-1]}
    with pytest.raises(CheckpointError, match="final_norm"):
        start(source("given", tiny, (broken, tiny.config)), options, None)
