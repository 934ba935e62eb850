"""Where prompts come from: the command line, files, stdin, and whoever types."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from jaxinfer.cli.output import note

Prompt = str | list[int]


def read_prompts(texts: list[str] | None, file: str | None, token_ids: str | None) -> list[Prompt]:
    """The prompts, from whichever of three places they were given in."""
    if sum(map(bool, (texts, file, token_ids))) != 1:
        raise typer.BadParameter("give either text, --file or --token-ids")
    if texts:
        return [_read(text).removesuffix("\n") if text == "-" else text for text in texts]
    if token_ids:
        try:
            return [[int(i) for i in token_ids.split(",")]]
        except ValueError:
            raise typer.BadParameter(
                f"--token-ids {token_ids!r}: expected integers separated by commas"
            ) from None
    assert file
    lines = enumerate(_read(file).split("\n"), start=1)
    prompts = [
        _parse_line(line, f"{file}, line {number}") for number, line in lines if line.strip()
    ]
    if not prompts:
        raise typer.BadParameter(f"{file}: no prompts in it")
    return prompts


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
