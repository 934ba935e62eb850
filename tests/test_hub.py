"""Which directory a model's name means. Nothing here touches the network."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import constants

from jaxinfer.errors import CheckpointError
from jaxinfer.hub import ALLOW_PATTERNS, IGNORE_PATTERNS, resolve_model

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty Hub cache, in offline mode."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_a_directory_is_itself(tmp_path, no_hub):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_relative_directory_wins_over_a_hub_id(tmp_path, monkeypatch, no_hub):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model").resolve() == tmp_path / "org" / "model"


@pytest.mark.parametrize(
    "name", ["/no/such", "./no", "../no", "~/no-such", "~nobody/x", "a/b/c", ""]
)
def test_a_path_that_is_not_there_fails_without_the_hub(name, no_hub):
    with pytest.raises(CheckpointError, match=r"does not exist.*a directory.*Hub id.*'demo'"):
        resolve_model(name)


def test_a_file_is_not_a_model(tmp_path, no_hub):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="is a file, not a directory"):
        resolve_model(path)


def test_a_gguf_file(tmp_path, no_hub):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").touch()
    assert resolve_model(tmp_path / "model.gguf") == tmp_path / "model.gguf"


def test_revision_of_a_directory_is_refused(tmp_path, no_hub):
    with pytest.raises(CheckpointError, match="revision 'main'"):
        resolve_model(tmp_path, revision="main")


@pytest.mark.parametrize(("name", "folder"), [("demo", "target"), ("demo-draft", "draft")])
def test_demo_models_are_found_in_the_package(name, folder, tmp_path, monkeypatch, no_hub):
    (tmp_path / folder).mkdir()
    monkeypatch.setattr("jaxinfer.hub.DEMO_MODELS", {name: tmp_path / folder})
    assert resolve_model(name) == tmp_path / folder


def test_a_missing_demo_model_says_what_is_missing(tmp_path, monkeypatch, no_hub):
    monkeypatch.setattr("jaxinfer.hub.DEMO_MODELS", {"demo": tmp_path / "gone"})
    with pytest.raises(CheckpointError, match="gone; reinstall"):
        resolve_model("demo")


def test_a_cached_hub_id_resolves_offline(offline):
    repo = offline / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    snapshot = repo / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert resolve_model("org/name").samefile(snapshot)
    assert resolve_model("org/name", revision=SHA).samefile(snapshot)


def test_an_uncached_hub_id_offline_says_what_was_tried(offline):
    with pytest.raises(
        CheckpointError, match=r"'org/name'.*the Hub at revision 'v1' failed.*'demo'"
    ):
        resolve_model("org/name", revision="v1")


def test_a_malformed_hub_id_is_refused(offline):
    with pytest.raises(CheckpointError, match=r"'a b'.*Repo id must"):
        resolve_model("a b")


def test_only_data_is_downloaded():
    wanted = huggingface_hub.utils.filter_repo_objects(
        [
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer.model",
            "merges.txt",
            "chat_template.jinja",
            "pytorch_model.bin",
            "modeling.py",
            "consolidated.safetensors",
            "original/params.json",
            "onnx/model.onnx",
        ],
        allow_patterns=ALLOW_PATTERNS,
        ignore_patterns=IGNORE_PATTERNS,
    )
    assert list(wanted) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
