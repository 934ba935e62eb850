"""The file of `generate --out`: a header, and a line for each prompt that is done.

A run that was ended in any way leaves whole lines, and at most one that is cut off. Files are never
changed but by whole lines at their end, or by a new file under the same name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import typer

from jaxinfer.cli.output import note, record

HEADER_BYTES = 1 << 20  # longer first lines are none of ours
# What a header says for people, or for the run that goes on: results may differ from it.
NOT_COMPARED = {"model", "device", "run_seed"}


@dataclass
class Results:
    """An open file of results.

    Attributes:
        header: as it stands in the file.
        done: a byte for each prompt, 1 where its line is written.
        refused: of these, the prompts that were refused.
    """

    header: dict[str, Any]
    done: bytearray
    refused: int
    _file: BinaryIO

    def add(self, fields: dict[str, Any]) -> None:
        """Appends a record, which is in the file when this returns."""
        self._file.write(_line(fields))
        self._file.flush()
        self._note(fields)

    def _note(self, fields: dict[str, Any]) -> None:
        self.done[fields["index"]] = 1
        self.refused += fields["type"] == "error"


def results_path(out: str) -> Path:
    """Where results go.

    Raises:
        typer.BadParameter: no file can be there.
    """
    path = Path(out).expanduser().resolve()  # a link stays a link when the file is replaced
    if not path.parent.is_dir():
        raise _bad(f"{out}: expected a file in a folder that exists")
    if path.exists() and not path.is_file():
        raise _bad(f"{out}: expected a file, or nothing there yet")
    return path


def check_header(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The header of a file of results; None where there is none yet.

    Args:
        asked: what the header must say, as far as it is known.

    Raises:
        typer.BadParameter: the file is something else, or its results answer something else.
    """
    if not path.exists() or not path.stat().st_size:
        return None
    with path.open("rb") as file:
        header = _parsed(file.readline(HEADER_BYTES))
    if header is None or header.get("type") != "run" or type(header.get("run_seed")) is not int:
        raise _bad(f"{path}: this is not a file of results, and is left as it is")
    wanted = json.loads(json.dumps(record("run", **asked)))
    if different := differences(header, wanted):
        raise _bad(
            f"{path}: it holds the results of another run, and is left as it is; {different}. "
            "Ask for the same again, or name another file"
        )
    return header


@contextmanager
def open_results(path: Path, header: dict[str, Any], count: int) -> Iterator[Results]:
    """Opens a file of results, begun with `header` if it is new, for the rest of `count` prompts.

    Raises:
        typer.BadParameter: see `check_header`; or another run writes to it now. Nothing has been
            changed.
    """
    file = _locked(path)
    try:
        found = check_header(path, header)
        if found is None:
            found = json.loads(json.dumps(record("run", **header)))
            file = _replaced(path, file, found)
            results = Results(found, bytearray(count), 0, file)
        else:
            results = Results(found, bytearray(count), 0, file)
            whole = _read_lines(path, results)
            if whole < path.stat().st_size:
                results._file = file = _replaced(path, file, whole)
        yield results
    finally:
        with file:
            file.flush()
            os.fsync(file.fileno())


def _read_lines(path: Path, results: Results) -> int:
    """Notes what is done. Returns the bytes of whole lines: the last may have been cut off."""
    whole = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            if number == 1:
                continue
            fields = _parsed(line)
            index = fields and fields.get("index")
            if (
                fields is None
                or fields.get("type") not in ("completion", "error")
                or type(index) is not int
                or not 0 <= index < len(results.done)
            ):
                raise _bad(f"{path}, line {number}: not a result of this run; left as it is")
            if not results.done[index]:
                results._note(fields)
    return whole


def _locked(path: Path) -> BinaryIO:
    """Opens a file for adding to it, which nobody else may do meanwhile."""
    file = path.open("ab")
    # Between opening and locking, another run may have put a new file in its place.
    if _lock(file) and os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()
    raise _bad(f"{path}: another run is writing to it")


def _lock(file: BinaryIO) -> bool:
    """Locks a file until it is closed; False if another process has locked it."""
    import fcntl  # not on every system that has a command line

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        note(f"{file.name} cannot be locked ({error}): let no other run write to it")
    return True


def _replaced(path: Path, old: BinaryIO, content: dict[str, Any] | int) -> BinaryIO:
    """A new file in place of `old`: one record, or so many bytes of the old one. Open and locked.

    The name stands for one or the other at any time, and for a whole one.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    file = temporary.open("wb")
    try:
        _lock(file)
        if isinstance(content, int):
            with path.open("rb") as source:
                _copy(source, file, content)
        else:
            file.write(_line(content))
        file.flush()
        os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        temporary.rename(path)
    except BaseException:
        file.close()
        temporary.unlink(missing_ok=True)
        raise
    old.close()
    return file


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size and (piece := source.read(min(size, 1 << 20))):
        target.write(piece)
        size -= len(piece)


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, allow_nan=False).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole line's object; None where it is anything else."""
    try:
        fields = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """Where `found` is not as wanted, in words; what is not wanted is not looked at."""
    words = []
    for name, value in wanted.items():
        there = found.get(name)
        if name in NOT_COMPARED or there == value:
            continue
        if isinstance(value, dict) and isinstance(there, dict):
            words.append(differences(there, value, f"{prefix}{name}."))
        else:
            words.append(f"{prefix}{name} was {json.dumps(there)}, now {json.dumps(value)}")
    return "; ".join(words)


def _bad(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="--out")
