"""The wrapped tokenizer says what transformers says, and fails by name."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from jaxinfer.errors import CheckpointError, InvalidRequest
from jaxinfer.tokenizer import load_tokenizer

TEXTS = ["", "def f(x):\n    return x", " a  b ", "你好 🙂 é", "a . b , c", "<s>hello</s>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}<s>assistant:"
    "{% endif %}"
)


def save(directory, bos=False, **config):
    """A byte-level BPE as transformers saves it; with `bos`, its post-processor adds `<s>`."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["def f(x):\n    return x + 1\n"] * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def load(directory):
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(
    ("bos", "config"),
    [
        (False, {}),
        (True, {}),
        (False, {"bos_token": "<s>", "add_bos_token": True}),
        (True, {"bos_token": "<s>", "add_bos_token": False, "clean_up_tokenization_spaces": True}),
    ],
)
def test_ids_and_text_are_those_of_transformers(tmp_path, bos, config):
    save(tmp_path, bos, **config)
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            expected = theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
            assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_are_added_and_skipped(tmp_path):
    tokenizer = load(save(tmp_path, bos=True))
    ids = tokenizer.encode("f")
    assert ids[0] == 0
    assert tokenizer.decode([*ids, 1]) == "f"
    assert tokenizer.decode([*ids, 1], skip_special_tokens=False) == "<s>f</s>"


def test_sizes_and_eos(tmp_path):
    tokenizer = load(save(tmp_path))
    assert tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(str(tmp_path)))
    assert tokenizer.eos_token_id == 1


def test_an_id_past_the_vocabulary_spells_nothing(tmp_path):
    tokenizer = load(save(tmp_path))
    assert tokenizer.decode([*tokenizer.encode("a"), 5000]) == "a"


def test_half_a_surrogate_pair_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        load(save(tmp_path)).encode("a\ud800")


def test_no_files_means_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ['{"version": "1.0", "trunc', '{"added_tokens": 3}'])
def test_a_broken_file_is_named(tmp_path, name, content):
    if name == "tokenizer_config.json" and content.endswith("}"):
        content = "[]"
    (save(tmp_path) / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*{name}"):
        load_tokenizer(tmp_path)


def test_a_config_without_its_vocabulary_is_named(tmp_path):
    (save(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_chat_template_ends_where_the_assistant_begins(tmp_path):
    tokenizer = load(save(tmp_path, bos=True, chat_template=TEMPLATE))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>user: hi<s>assistant:"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "empty"),
        ([{"content": "x"}], "message 0"),
        (["hello"], "message 0"),
        ([{"role": "tool", "content": "x"}], "no tools"),
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(tmp_path, messages, said):
    tokenizer = load(save(tmp_path, chat_template=TEMPLATE))
    with pytest.raises(InvalidRequest, match=said) as caught:
        tokenizer.apply_chat_template(messages)
    assert caught.value.field == "messages"


def test_no_chat_template_is_an_error(tmp_path):
    tokenizer = load(save(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
