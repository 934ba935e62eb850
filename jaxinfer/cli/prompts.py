"""Where prompts come from: the command line, files, stdin, and whoever types."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import typer

from jaxinfer.cli.output import note

Prompt = str | list[int]


class Numbered(NamedTuple):
    """A prompt, and the line of the file that it stands in; None where there is no file."""

    line: int | None
    prompt: Prompt


# Prompts that can be gone through again and again. What a file holds is not kept in memory.
Source = Callable[[], Iterator[Numbered]]


def read_prompts(texts: list[str] | None, file: str | None, token_ids: str | None) -> list[Prompt]:
    """The prompts, from whichever of three places they were given in."""
    prompts = [prompt for _, prompt in prompt_source(texts, file, token_ids)()]
    if not prompts:
        raise typer.BadParameter(f"{file}: no prompts in it")
    return prompts


def prompt_source(texts: list[str] | None, file: str | None, token_ids: str | None) -> Source:
    """The prompts, as `read_prompts`; a file is read anew each time, and its errors come then."""
    if sum(map(bool, (texts, file, token_ids))) != 1:
        raise typer.BadParameter("give either text, --file or --token-ids")
    if texts:
        given = [_read(text).removesuffix("\n") if text == "-" else text for text in texts]
        return lambda: (Numbered(None, text) for text in given)
    if token_ids:
        try:
            ids = [int(i) for i in token_ids.split(",")]
        except ValueError:
            raise typer.BadParameter(
                f"--token-ids {token_ids!r}: expected integers separated by commas"
            ) from None
        return lambda: iter([Numbered(None, ids)])
    assert file
    if Path(file).is_file():
        return lambda: _parse(file, _lines(file))
    content = _read(file)  # of stdin or a pipe, which can be read once only
    return lambda: _parse(file, io.StringIO(content))


@dataclass(frozen=True)
class Extent:
    """How many prompts there are, and a digest of them and their places."""

    count: int
    digest: str


def measure(source: Source) -> Extent:
    """Goes through all prompts, whose errors are found by it.

    Raises:
        typer.BadParameter: a prompt cannot be read, or there are none.
    """
    digest, count = hashlib.sha256(), 0
    for item in source():
        digest.update(digest_line(item))
        count += 1
    if not count:
        raise typer.BadParameter("there are no prompts")
    return Extent(count, digest.hexdigest())


def digest_line(item: Numbered) -> bytes:
    """What of a prompt goes into the digest."""
    return json.dumps(item).encode() + b"\n"


def _parse(file: str, lines: Iterable[str]) -> Iterator[Numbered]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Numbered(number, _parse_line(line, f"{file}, line {number}"))


def _lines(file: str) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8") as opened:
            yield from opened
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {file}: {error}") from error


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {file}: {error}") from error


def _parse_line(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise typer.BadParameter(f"{where}: not JSON: {error}") from error
    match record:
        case {"prompt": str() as prompt, **rest} if not rest:
            return prompt
        case {"token_ids": list() as prompt, **rest} if not rest:
            return prompt
    raise typer.BadParameter(
        f'{where}: expected {{"prompt": "text"}} or {{"token_ids": [1, 2]}}, nothing else'
    )


def typed_lines() -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()  # without a prompt of its own, which would go to stdout
        except EOFError:
            note("")
            return
        if line.strip():
            yield line
