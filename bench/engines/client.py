"""An engine's process as the harness sees it: started, asked, ended. See `bench.engines.worker`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from bench import parts
from bench.engines import ENGINES, Memory, Options, Output, Request, check
from bench.engines.worker import encode
from bench.record import ROOT

START_S = 400.0
STEP = 1 << 16  # bytes of an answer read at once


class EngineError(RuntimeError):
    """An engine is missing, failed, or said what it should not have. `tail`: of what it printed."""

    def __init__(self, message: str, tail: str = "") -> None:
        super().__init__(message)
        self.tail = tail


class Missing(EngineError):  # noqa: N818
    """Its package is not installed."""


class NoAnswer(EngineError):  # noqa: N818
    """It took too long, and its process was ended."""


class Reply(NamedTuple):
    """Of one call of `generate`.

    Attributes:
        outputs: of the requests, in order; checked.
        seconds: of the whole call, in the engine's process.
        began: when it began, `time.time()`.
        compiled: programs compiled meanwhile.
    """

    outputs: list[Output]
    seconds: float
    began: float
    compiled: int


class Client:
    """A running engine. A context manager: its process, and all that it started, ends with it."""

    def __init__(
        self, name: str, checkpoint: Path, options: Options, env: Mapping[str, str] | None = None
    ) -> None:
        """Starts the process, and does not wait for it: see `wait`."""
        self.name, self.versions, self._checkpoint = name, {}, checkpoint
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._unread = b""
        words = ["-m", "bench.engines.worker", name, str(checkpoint), encode(options)]
        self.began = time.time()
        self._process = subprocess.Popen(
            [parts.interpreter(torch=ENGINES[name].torch), *words],
            cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip

    def wait(self, timeout_s: float = START_S) -> float:
        """Until the engine is loaded; when that was, `time.time()`.

        Raises:
            Missing, NoAnswer, EngineError.
        """
        answer = self._answer(timeout_s)
        if "missing" in answer:
            raise Missing(answer["missing"])
        self.versions = answer["versions"]
        return answer["ready"]

    def generate(self, requests: Sequence[Request], timeout_s: float) -> Reply:
        """Runs the requests, and checks that each got its tokens.

        Raises:
            EngineError: it failed, took too long, or its outputs are not what was asked for.
        """
        answer = self._ask({"generate": requests}, timeout_s)
        outputs = [Output(*each) for each in answer["outputs"]]
        try:
            for request, output in zip(requests, outputs, strict=True):
                check(request, output)
        except ValueError as error:
            raise EngineError(f"wrong output: {error}") from error
        return Reply(outputs, answer["seconds"], answer["began"], answer["compiled"])

    def memory(self, timeout_s: float) -> Memory:
        """See `bench.engines.Memory`."""
        return Memory(**self._ask({"memory": True}, timeout_s)["memory"])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        parts.end(self._process)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineError("its process has ended", self._tail()) from error
        return self._answer(timeout_s)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pieces, latest = [self._unread], time.monotonic() + timeout_s
        while b"\n" not in pieces[-1]:
            left = latest - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                parts.end(self._process)
                raise NoAnswer(f"no answer after {timeout_s:.0f} s", self._tail())
            if not (piece := os.read(self._process.stdout.fileno(), STEP)):
                raise EngineError("its process has ended", self._tail())
            pieces.append(piece)
        line, _, self._unread = b"".join(pieces).partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(self._published(answer["error"]), self._published(answer["tail"]))
        return answer

    def _tail(self) -> str:
        self._log.seek(0)
        return self._published(self._log.read())[-parts.ERROR_CHARS :]

    def _published(self, text: str) -> str:
        """Results are published: where this machine keeps things is nobody's business."""
        return parts.without_paths(text.replace(str(self._checkpoint), self._checkpoint.name))
