"""The demo's corpus: the Python files of the CPython standard library, in three named parts.

A file is used when it is UTF-8 without carriage returns or NUL bytes, parses, does not call itself
generated, and differs from every file before it. Files that share much text with a held-out or
validation file, and the tests of those, are left out of training.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Reported on, never trained on, never looked at to choose anything.
HELD_OUT = (
    "asyncio/queues.py", "bisect.py", "calendar.py", "cmd.py", "colorsys.py", "configparser.py",
    "csv.py", "dbm/dumb.py", "email/quoprimime.py", "fileinput.py", "fractions.py", "gettext.py",
    "graphlib.py", "html/parser.py", "http/cookies.py", "imaplib.py", "ipaddress.py",
    "json/decoder.py", "linecache.py", "logging/handlers.py", "mailbox.py", "netrc.py",
    "optparse.py", "plistlib.py", "pprint.py", "runpy.py", "sched.py", "selectors.py", "shlex.py",
    "statistics.py", "string.py", "symtable.py", "tempfile.py", "textwrap.py", "timeit.py",
    "tomllib/_parser.py", "trace.py", "urllib/robotparser.py", "uuid.py", "zipapp.py",
)  # fmt: skip

# Never trained on; the checkpoint with the lowest loss on these is the one that is kept.
VALIDATION = (
    "asyncio/locks.py", "code.py", "compileall.py", "copy.py", "email/header.py", "fnmatch.py",
    "getpass.py", "glob.py", "heapq.py", "http/cookiejar.py", "modulefinder.py", "pstats.py",
    "queue.py", "reprlib.py", "shelve.py", "socketserver.py", "tabnanny.py", "webbrowser.py",
    "xmlrpc/client.py",
)  # fmt: skip

# Tests whose names do not follow from the module's.
OTHER_TESTS = (
    "test/test_asyncio/test_queues.py", "test/test_asyncio/test_locks.py",
    "test/test_dbm_dumb.py", "test/test_http_cookies.py", "test/test_http_cookiejar.py",
    "test/test_htmlparser.py", "test/test_json/", "test/test_logging.py",
    "test/test_robotparser.py", "test/test_tomllib/", "test/test_xmlrpc.py",
    "test/test_email/test_email.py", "test/test_code_module.py",
)  # fmt: skip

# Not the library's own source: installed packages, and what the build wrote on this machine.
NOT_SOURCE = ("site-packages/", "config-", "_sysconfigdata")

GENERATED = re.compile(r"auto-?generated|generated\s+(from|by|automatically)", re.IGNORECASE)
GENERATED_WITHIN = 400  # characters
SHARED_LINE = 24  # a line this long, stripped, that occurs in both files counts as shared
MAX_SHARED = 0.15  # of a training file's such lines


@dataclass(frozen=True)
class Corpus:
    """Files in order of name, as (name, text); and why others were left out, name → reason."""

    train: tuple[tuple[str, str], ...]
    validation: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...]
    left_out: dict[str, str]


def collect(stdlib: Path) -> Corpus:
    """Reads the corpus under `stdlib`.

    Raises:
        FileNotFoundError: a named held-out or validation file is not there or not usable.
    """
    train, kept_back, left_out = [], {}, {}
    seen: set[str] = set()
    for path in sorted(stdlib.rglob("*.py"), key=lambda p: p.relative_to(stdlib).as_posix()):
        name = path.relative_to(stdlib).as_posix()
        if name.startswith(NOT_SOURCE):
            continue
        text, reason = _read(path)
        if not reason and text in seen:
            reason = "the same as an earlier file"
        seen.add(text)
        if reason:
            left_out[name] = reason
        elif name in HELD_OUT or name in VALIDATION:
            kept_back[name] = text
        elif _is_test_of_kept_back(name):
            left_out[name] = "test of a held-out or validation file"
        else:
            train.append((name, text))
    if missing := sorted({*HELD_OUT, *VALIDATION} - kept_back.keys()):
        raise FileNotFoundError(f"not in the standard library at {stdlib}: {', '.join(missing)}")
    shared = set[str]().union(*map(_long_lines, kept_back.values()))
    unlike = []
    for name, text in train:
        lines = _long_lines(text)
        if lines and len(lines & shared) / len(lines) > MAX_SHARED:
            left_out[name] = "shares lines with a held-out or validation file"
        else:
            unlike.append((name, text))
    return Corpus(
        tuple(unlike),
        tuple((n, kept_back[n]) for n in VALIDATION),
        tuple((n, kept_back[n]) for n in HELD_OUT),
        dict(sorted(left_out.items())),
    )


def digest(files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over names and texts, in order."""
    h = hashlib.sha256()
    for name, text in files:
        h.update(f"{name}\0{len(text.encode())}\0".encode())
        h.update(text.encode())
    return h.hexdigest()


def _read(path: Path) -> tuple[str, str]:
    """The text, and why it is unusable ("" where it is not)."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    if "\r" in text or "\0" in text:
        return text, "carriage returns or NUL bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(text)
    except SyntaxError:
        return text, "does not parse"
    if GENERATED.search(text[:GENERATED_WITHIN]) or path.name == "topics.py":
        return text, "generated"
    return text, ""


def _is_test_of_kept_back(name: str) -> bool:
    if name.startswith(OTHER_TESTS):
        return True
    stem = Path(name).stem
    return name.startswith("test/") and any(
        stem == f"test_{m.removesuffix('.py').replace('/', '_')}" for m in (*HELD_OUT, *VALIDATION)
    )


def _long_lines(text: str) -> set[str]:
    return {s for line in text.splitlines() if len(s := line.strip()) >= SHARED_LINE}
