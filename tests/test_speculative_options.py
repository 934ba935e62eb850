"""What users say of speculation: every form of it, and every refusal, before weights are read."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxinfer import LLM
from jaxinfer.config import MOST_GUESSES, EngineOptions, LayerConfig, ModelConfig, Speculative
from jaxinfer.drafting import Drafter
from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.loading import model_config
from jaxinfer.models.weights import count_params, tree_bytes
from jaxinfer.speculative import costs, load_draft, parse, prepare
from tests.conftest import TinyModel, small_llm

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
TARGET = model_config(DEMO / "target")
OPTIONS = EngineOptions(max_model_len=256)
LOOKUP = Speculative("lookup")


def shaped(**fields: Any) -> ModelConfig:
    """A small config of the demo's vocabulary."""
    sizes: dict[str, Any] = {
        "family": "llama", "vocab_size": TARGET.vocab_size, "hidden_size": 32,
        "intermediate_size": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        "layers": (LayerConfig(),) * 3, "max_position": 256,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **fields})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lookup", LOOKUP),
        (" lookup ", LOOKUP),
        ("lookup,tokens=8,longest=4", Speculative("lookup", tokens=8, longest=4)),
        ("lookup, tokens = 8 , shortest=2", Speculative("lookup", tokens=8, shortest=2)),
        ("draft", Speculative("draft")),
        ("draft=some/model", Speculative("draft", draft="some/model")),
        ("draft=/a=b,tokens=6", Speculative("draft", draft="/a=b", tokens=6)),
        ("draft=x,rule=rejection", Speculative("draft", draft="x", rule="rejection")),
        ("skip=4", Speculative("skip", skip=(4,))),
        ("skip=2-4+7", Speculative("skip", skip=(2, 3, 4, 7))),
        ("skip,skip=1+3", Speculative("skip", skip=(1, 3))),
        ("lookup,adapt=false", Speculative("lookup", adapt=False)),
        ("lookup,adapt=True", LOOKUP),
        ("lookup,forced=0.5", Speculative("lookup", forced=0.5)),
        ({"method": "lookup"}, LOOKUP),
        ({"method": "draft", "draft": "x", "tokens": 2}, Speculative("draft", "x", 2)),
        ({"method": "skip", "skip": [1, 2]}, Speculative("skip", skip=(1, 2))),
        (Speculative("skip", skip=(3,)), Speculative("skip", skip=(3,))),
    ],
)
def test_what_users_say(given: Any, meant: Speculative) -> None:
    assert parse(given) == meant


def test_a_dictionary_is_left_as_it_is() -> None:
    given = {"method": "skip", "skip": [1, 2]}
    parse(given)
    assert given == {"method": "skip", "skip": [1, 2]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nonsense", "method 'nonsense': expected 'draft=MODEL', 'lookup' or 'skip=LAYERS'"),
        ("", "method ''"),
        ("tokens=4", "method 'tokens'"),
        ({}, "method None"),
        ({"method": ["lookup"]}, "method"),
        (4, "speculative=4: expected 'draft=MODEL'"),
        (True, "speculative=True"),
        ("lookup,width=3", r"\['width'\]: expected some of \['method', 'draft', 'tokens'"),
        ({"method": "lookup", "b": 1, "a": 2}, r"\['a', 'b'\]"),
        ("lookup=3", r"\['lookup'\]"),
        ("lookup,tokens=four", "tokens='four' cannot be read"),
        ("lookup,tokens", "tokens='' cannot be read"),
        ("lookup,tokens=2.5", "tokens='2.5' cannot be read"),
        ("lookup,longest=x", "longest='x' cannot be read"),
        ("lookup,shortest=x", "shortest='x' cannot be read"),
        ("lookup,adapt=no", "adapt='no' cannot be read"),
        ("lookup,forced=often", "forced='often' cannot be read"),
        ("skip=a", "skip='a' cannot be read"),
        ("skip=", "skip='' cannot be read"),
        ("skip=2-", "skip='2-' cannot be read"),
        ("skip=-2", "skip='-2' cannot be read"),
        ("skip=2+", r"skip='2\+' cannot be read"),
        ("lookup,tokens=0", f"tokens=0: expected an integer from 1 to {MOST_GUESSES}"),
        ("lookup,tokens=17", "tokens=17"),
        ("lookup,tokens=-1", "tokens=-1"),
        ("lookup,longest=17", "longest=17"),
        ("lookup,shortest=0", "shortest=0"),
        ("lookup,shortest=4", "shortest=4: expected at most longest=3"),
        ({"method": "lookup", "tokens": "4"}, "tokens='4'"),
        ({"method": "lookup", "tokens": True}, "tokens=True"),
        ({"method": "lookup", "tokens": 2.0}, r"tokens=2\.0"),
        ({"method": "lookup", "rule": "greedy"}, "rule='greedy': expected one of"),
        ("lookup,draft=x", "draft='x' with method='lookup'"),
        ("skip=2,draft=x", "draft='x' with method='skip'"),
        ("lookup,skip=2", r"skip=\(2,\), .* with method='lookup'"),
        ("draft=x,skip=2-3", r"skip=\(2, 3\), .* with method='draft'"),
        ("skip", r"skip=\(\), .* with method='skip'"),
        ("skip=4-2", r"skip=\(\), .* with method='skip'"),
        ("skip,count=2", "count=2, text=None"),
        ("skip,text=x", "count=None, text='x'"),
        ("lookup,count=2,text=x", "count=2, text='x' with method='lookup'"),
        ("skip=2,count=2,text=x", "count=2, text='x' with method='skip'"),
        ("lookup,tokens=4,tokens=6", "'tokens' is given twice"),
        ("draft=x,draft=y", "'draft' is given twice"),
        ("lookup,method=draft", "'method' is given twice"),
        ("lookup,forced=2", r"forced=2\.0: expected from 0 to 1"),
        ("lookup,forced=nan", "forced=nan"),
        ({"method": "lookup", "forced": "0.5"}, "forced='0.5'"),
        ({"method": "lookup", "adapt": "false"}, "adapt='false': expected True or False"),
        ({"method": "skip", "skip": 3}, "skip=3: expected numbers of layers"),
        ({"method": "skip", "skip": "3"}, "skip='3'"),
        ({"method": "skip", "skip": ["3"]}, r"skip=\('3',\)"),
        ({"method": "skip", "skip": [-1]}, r"skip=\(-1,\)"),
    ],
)
def test_what_cannot_be_meant(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(given)


@pytest.mark.parametrize("method", ["nonsense", None])
def test_a_method_that_there_is_not(method: Any) -> None:
    with pytest.raises(ValueError, match=f"method={method!r}: expected one of"):
        Speculative(method)


# -- for a model -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lookup", "skip=1-6"])
def test_what_needs_no_other_model(how: str) -> None:
    found = prepare(parse(how), TARGET, OPTIONS)
    assert (found.drafter.how, found.drafter.model) == (parse(how), None)
    assert (found.source, found.bytes) == (None, 0)
    assert load_draft(found, OPTIONS) is None


@pytest.mark.parametrize("layers", ["8", "1-8", "0+9"])
def test_layers_that_the_model_has_not(layers: str) -> None:
    with pytest.raises(ValueError, match="this model has layers 0 to 7"):
        prepare(parse(f"skip={layers}"), TARGET, OPTIONS)


def test_a_layer_must_stay() -> None:
    with pytest.raises(ValueError, match="at least one must stay"):
        prepare(parse("skip=0-7"), TARGET, OPTIONS)
    prepare(parse("skip=0-6+3"), TARGET, OPTIONS)


@pytest.mark.parametrize("how", ["lookup", "skip=3", f"draft={DEMO / 'draft'}"])
def test_more_guesses_than_there_is_room_for(how: str) -> None:
    for longest, room in ((8, 6), (6, 4)):
        options = EngineOptions(max_model_len=longest)
        prepare(parse(f"{how},tokens={room}"), TARGET, options)
        with pytest.raises(ValueError, match=f"tokens={room + 1}: .* room for {room} guesses"):
            prepare(parse(f"{how},tokens={room + 1}"), TARGET, options)


def test_forced_acceptance_is_said_to_be_no_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepare(parse("lookup"), TARGET, OPTIONS)
        assert not caplog.records
        prepare(parse("lookup,forced=0.25"), TARGET, OPTIONS)
    assert "forced=0.25: the text will be nobody's" in caplog.text


# -- draft models ------------------------------------------------------------------------------


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """The demo's draft without its weights: whoever wants to read them says so."""
    directory = tmp_path / "draft"
    shutil.copytree(DEMO / "draft", directory)
    (directory / "model.safetensors").unlink()
    return directory


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["demo-draft", str(DEMO / "draft")])
def test_a_draft_on_disk(name: str) -> None:
    found = prepare(Speculative("draft", draft=name), TARGET, EngineOptions(dtype="float32"))
    assert found.drafter.model == model_config(DEMO / "draft")
    params = load_draft(found, EngineOptions(dtype="float32"))
    assert params is not None
    assert found.bytes == tree_bytes(params)


def test_a_draft_of_another_vocabulary(draft: Path) -> None:
    edit(draft, vocab_size=4095)
    words = rf"the draft '{draft}' has a vocabulary of 4095 tokens, the model one of 4096"
    with pytest.raises(ValueError, match=words):
        prepare(Speculative("draft", draft=str(draft)), TARGET, OPTIONS)


def test_a_draft_of_too_short_a_context(draft: Path) -> None:
    edit(draft, max_position_embeddings=255)
    with pytest.raises(ValueError, match="up to 255 tokens, these may have 256: set max_model_len"):
        prepare(Speculative("draft", draft=str(draft)), TARGET, OPTIONS)
    with pytest.raises(ValueError, match="up to 255 tokens, these may have 2048"):
        prepare(Speculative("draft", draft=str(draft)), TARGET, EngineOptions())
    edit(draft, max_position_embeddings=256)
    prepare(Speculative("draft", draft=str(draft)), TARGET, OPTIONS)


def test_a_draft_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        prepare(Speculative("draft", draft=str(tmp_path / "none")), TARGET, OPTIONS)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        prepare(Speculative("draft", draft=str(tmp_path)), TARGET, OPTIONS)


def test_a_draft_that_is_not_supported(draft: Path) -> None:
    edit(draft, architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        prepare(Speculative("draft", draft=str(draft)), TARGET, OPTIONS)


def test_no_draft() -> None:
    with pytest.raises(ValueError, match="method 'draft' needs a model: draft=MODEL"):
        prepare(Speculative("draft"), TARGET, OPTIONS)


@pytest.mark.parametrize("bad", [b"", b"\xff" * 64])
def test_weights_of_a_draft_that_cannot_be_read(draft: Path, bad: bytes) -> None:
    weights = draft / "model.safetensors"
    shutil.copy(DEMO / "draft" / "model.safetensors", weights)
    found = prepare(Speculative("draft", draft=str(draft)), TARGET, OPTIONS)
    weights.write_bytes(bad)
    with pytest.raises(CheckpointError, match=r"the draft: .*model\.safetensors"):
        load_draft(found, OPTIONS)


def test_a_draft_in_memory() -> None:
    how, config = Speculative("draft"), shaped()
    assert prepare(how, TARGET, OPTIONS, given=({}, config)).drafter.model is config
    with pytest.raises(ValueError, match="the draft given has a vocabulary of 10 tokens"):
        prepare(how, TARGET, OPTIONS, given=({}, shaped(vocab_size=10)))
    with pytest.raises(ValueError, match="the draft given was made for sequences of up to 100"):
        prepare(how, TARGET, OPTIONS, given=({}, shaped(max_position=100)))


# -- an LLM ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [("nonsense", "method 'nonsense'"), ("lookup,tokens=0", "tokens=0"), (3, "speculative=3")],
)
def test_an_llm_refuses_before_it_looks_for_the_model(how: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LLM("/there/is/none", speculative=how)
    with pytest.raises(ValueError, match=words):
        LLM("demo", speculative=how)


def test_an_llm_refuses_before_it_reads_weights(
    draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("jaxinfer.sources.load_weights", unwanted)
    edit(draft, vocab_size=10)
    for how, words in (
        (f"draft={draft}", "a vocabulary of 10 tokens"),
        ("skip=0-7", "at least one must stay"),
        ("lookup,tokens=16", "room for 10 guesses"),
    ):
        with pytest.raises(ValueError, match=words):
            LLM("demo", speculative=how, max_model_len=12)
    edit(draft, vocab_size=TARGET.vocab_size)
    with pytest.raises(CheckpointError, match=r"the draft: .*safetensors"):
        LLM("demo", speculative=f"draft={draft}")


def test_an_llm_of_weights_in_memory_refuses_too(tiny: TinyModel) -> None:
    for how, words in (("nonsense", "method 'nonsense'"), ("skip=2", "layers 0 to 1")):
        with pytest.raises(ValueError, match=words):
            small_llm(tiny, speculative=how)


# -- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True])
def test_costs_are_those_of_what_guesses(gpu: bool) -> None:
    config, other = shaped(), shaped(layers=(LayerConfig(),), hidden_size=16)
    of = {
        name: costs(config, drafter, weight_bytes=9000, draft_bytes=bytes_, gpu=gpu)
        for name, drafter, bytes_ in (
            ("lookup", Drafter(LOOKUP), 0),
            ("draft", Drafter(Speculative("draft"), other), 700),
            ("skip", Drafter(Speculative("skip", skip=(0, 2))), 0),
        )
    }
    for found in of.values():
        assert (found.weight_bytes, found.token_flops) == (9000, 2 * count_params(config))
        assert found.launch_s == 3 * of["draft"].draft_launch_s > 0
    look, draft, skip = of.values()
    assert (look.draft_bytes, look.draft_flops, look.draft_launch_s) == (0, 0, 0)
    assert (draft.draft_bytes, draft.draft_flops) == (700, 2 * count_params(other))
    one = shaped(layers=(LayerConfig(),))
    assert skip.draft_flops == 2 * count_params(one)
    assert skip.draft_bytes == int(9000 * count_params(one) / count_params(config))
    assert skip.draft_launch_s == draft.draft_launch_s
