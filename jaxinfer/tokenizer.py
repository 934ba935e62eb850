"""Text to token ids and back: what the engine needs of a Hugging Face tokenizer.

Every call goes to transformers, which takes about a second to import; `load_tokenizer` imports it
when it is called.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. `backend` is the transformers object, for what is not wrapped here."""

    backend: PreTrainedTokenizerBase
    _decode: Callable[..., str]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may have more rows."""
        return len(self.backend)

    @property
    def eos_token_id(self) -> int | None:
        return self.backend.eos_token_id  # type: ignore[return-value]

    @property
    def has_chat_template(self) -> bool:
        return self.backend.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer adds (BOS).

        Raises:
            InvalidRequest: `text` holds half of a surrogate pair, which no encoding can represent.
        """
        try:
            # The length is checked by the engine, against the model's own limit.
            return list(self.backend(text, verbose=False)["input_ids"])  # type: ignore[arg-type]
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest("not valid Unicode; give text that encodes as UTF-8") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, as the tokens spell it (no clean-up of spaces).

        Ids that the tokenizer does not know spell nothing. Bytes that are not UTF-8 become U+FFFD.
        """
        return self._decode(token_ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins.

        Args:
            messages: `{"role": ..., "content": ...}`, oldest first.

        Raises:
            InvalidRequest: there is no chat template, or it refuses these messages.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "this model's tokenizer has no chat template; use generate with a plain prompt",
                field="messages",
            )
        _check_messages(messages)
        from jinja2 import TemplateError

        try:
            ids = self.backend.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, return_dict=False
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        return list(ids)  # type: ignore[arg-type]


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer in `directory`; None when it holds no tokenizer files.

    Code that comes with a model is never run.

    Raises:
        CheckpointError: there are tokenizer files and they cannot be read.
    """
    directory = Path(directory)
    present = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not present:
        return None
    auto_tokenizer = _import_auto_tokenizer()
    try:
        backend = auto_tokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    # Whatever a broken file makes transformers and tokenizers raise: the latter's errors are
    # plain Exceptions.
    except Exception as error:
        culprit = _first_broken_json(directory, present) or ", ".join(present)
        raise CheckpointError(
            f"{directory}: cannot load the tokenizer from {culprit}: {_first_line(error)}"
        ) from error
    return Tokenizer(backend, _decoder(backend))


def gguf_tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file describes, built by transformers.

    Args:
        path: of the file, for messages.
        fields: `checkpoints.gguf.tokenizer_fields` of it.

    Raises:
        CheckpointError: it is of a kind that transformers does not build, or contradicts itself.
    """
    _import_auto_tokenizer()
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    kept = {
        name: fields[key]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if key in fields
    }
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    try:
        backend, _ = convert_gguf_tokenizer(str(fields.get("architecture")), kept)
        named = {
            f"{name}_token": fields["ggml.tokens"][fields[f"ggml.{key}_token_id"]]
            for name, key in special.items()
            if f"ggml.{key}_token_id" in fields
        }
        # Sentencepiece vocabularies have a BOS unless they say otherwise, as in llama.cpp.
        add_bos = fields.get("ggml.add_bos_token", fields.get("ggml.model") == "llama")
        if add_bos and "bos_token" in named:
            _add_bos(backend, named["bos_token"], fields["ggml.bos_token_id"])
        found = PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=fields.get("chat_template"), **named
        )
    # What is wrong in a stranger's file makes transformers raise whatever it does.
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot build its tokenizer: {_first_line(error)}"
        ) from error
    return Tokenizer(found, _decoder(found))


def _add_bos(backend: Any, token: str, token_id: int) -> None:
    """Has a `tokenizers.Tokenizer` begin every text with BOS."""
    from tokenizers.processors import Sequence as Several
    from tokenizers.processors import TemplateProcessing

    begin = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )
    before = backend.post_processor
    byte_level = before is not None and "ByteLevel" in type(before).__name__
    backend.post_processor = Several([before, begin]) if byte_level else begin


def _decoder(backend: PreTrainedTokenizerBase) -> Callable[..., str]:
    """The cheapest decode that gives transformers' text: this runs once a generated token."""
    if backend.is_fast:
        return backend.backend_tokenizer.decode  # type: ignore[attr-defined]

    def decode(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = backend.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    return decode


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise InvalidRequest("empty; give at least one message", field="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(
                f"message {i} is {message!r}; give a dict with 'role' and 'content'",
                field="messages",
            )


def _import_auto_tokenizer() -> Any:
    """`transformers.AutoTokenizer`, without the note that PyTorch is missing: nothing needs it."""

    def wanted(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(wanted)
    try:
        from transformers import AutoTokenizer
    finally:
        logger.removeFilter(wanted)
    return AutoTokenizer


def _first_broken_json(directory: Path, names: Sequence[str]) -> str | None:
    for name in names:
        if name.endswith(".json"):
            try:
                json.loads((directory / name).read_bytes())
            except ValueError:
                return name
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
