"""`AsyncLLM`: many requests at once from asyncio, over one engine."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

from jaxinfer.errors import JaxinferError
from jaxinfer.hooks import Intervention
from jaxinfer.llm import LLM, LogitsFns, Prompt
from jaxinfer.requests import Request
from jaxinfer.types import Delta, SamplingParams

if TYPE_CHECKING:
    from jaxinfer.models.decoder import Params

logger = logging.getLogger(__name__)

MAX_UNREAD = 64  # Deltas kept for a slow reader; later ones are added to the last
CLOSED = "this AsyncLLM is closed"
UPDATED = "given up: the weights are updated"


@dataclass
class _Reader:
    """One request and who reads it. Only `loop` touches `unread`, `ended` and `error`."""

    request: Request
    loop: asyncio.AbstractEventLoop
    unread: deque[Delta] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    error: BaseException | None = None

    def feed(self, deltas: list[Delta], ended: bool, error: BaseException | None) -> None:
        for delta in deltas:
            last = self.unread[-1] if self.unread else None
            if last is not None and len(self.unread) >= MAX_UNREAD and last.index == delta.index:
                delta = _joined(self.unread.pop(), delta)
            self.unread.append(delta)
        self.ended |= ended
        self.error = self.error or error
        self.news.set()


def _joined(a: Delta, b: Delta) -> Delta:
    return replace(b, text=a.text + b.text, token_ids=a.token_ids + b.token_ids)


class AsyncLLM:
    """Serves requests as they come, all batched together.

    A thread of its own runs the engine. The `LLM` belongs to it from then on: do not use it beside.

        async with AsyncLLM(llm) as server:
            async for delta in server.generate("def f(", SamplingParams(max_tokens=32)):
                print(delta.text, end="")

    Args:
        llm: what runs the requests; closed by `close`.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._readers: dict[str, _Reader] = {}  # by request id; the thread's own
        self._todo: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        # The thread's own: what is to be done once nothing runs, and who waits for it.
        self._updates: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._held: list[_Reader] = []
        self._refusing = self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._work, name="jaxinfer-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        capture: Sequence[str] = (),
        intervene: Intervention | None = None,
        logits_fn: LogitsFns | None = None,
    ) -> AsyncGenerator[Delta]:
        """Completes one prompt, yielding what is new as it comes; the last Delta has the result.

        The request is checked at once, and begins when it is first read. Closing the iterator, or
        cancelling the task that reads it, cancels the request. A reader that falls behind finds
        several steps' tokens in one Delta. See `LLM.generate`.

        Raises:
            InvalidRequest: at once. QueueFull, JaxinferError: from the iterator.
        """
        if self._refusing:
            raise JaxinferError(CLOSED)
        request = self._llm.prepare(
            prompt, params,
            priority=priority, capture=capture, intervene=intervene, logits_fn=logits_fn,
        )  # fmt: skip
        return self._read(request)

    async def update_params(
        self,
        params: Params,
        *,
        version: int | str | None = None,
        in_flight: Literal["drain", "abort"] = "drain",
    ) -> None:
        """Takes other weights: see `LLM.update_params`.

        Requests that come meanwhile wait, and are served by the new ones.

        Raises:
            CheckpointError, ValueError: nothing has changed.
            JaxinferError: this AsyncLLM is closed, or the update broke off and the LLM is.
        """
        done: Future[None] = Future()
        update = partial(self._llm.update_params, params, version=version, in_flight=in_flight)
        if self._refusing or not self._post(partial(self._updates.append, (update, done))):
            raise JaxinferError(CLOSED)
        if in_flight == "abort":
            self._post(partial(self._abort, UPDATED))
        await asyncio.wrap_future(done)

    async def close(self, *, drain: bool = False) -> None:
        """Ends the thread and closes the LLM; new requests are refused from now on.

        Args:
            drain: let running requests finish first; otherwise their readers get a JaxinferError.
        """
        self._refusing = True
        self._post(partial(self._stop, drain))
        await asyncio.to_thread(self._thread.join)
        self._llm.close()

    async def _read(self, request: Request) -> AsyncGenerator[Delta]:
        reader = _Reader(request, asyncio.get_running_loop())
        if not self._post(partial(self._begin, reader)):
            raise JaxinferError(CLOSED)
        try:
            while True:
                while reader.unread:
                    yield reader.unread.popleft()
                if reader.error is not None:
                    raise reader.error
                if reader.ended:
                    return
                reader.news.clear()
                await reader.news.wait()
        finally:
            self._post(partial(self._end, reader))

    def _post(self, task: Callable[[], None]) -> bool:
        """Has the thread run a task before its next turn; False if it has ended."""
        with self._changed:
            if not self._ended:
                self._todo.append(task)
                self._changed.notify()
            return not self._ended

    # -- in the thread ----------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._todo or self._readers or self._updates or self._stopping):
                    self._changed.wait()
                if self._stopping and not (self._todo or self._readers or self._updates):
                    self._ended = True
                    return
                todo = list(self._todo)
                self._todo.clear()
            for task in todo:
                task()
            if self._readers:
                self._turn()
            if self._updates and not self._readers:
                self._update()

    def _update(self) -> None:
        """Does what waited until nothing runs; then those begin who came meanwhile."""
        while self._updates:
            update, done = self._updates.popleft()
            try:
                update()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)
        held, self._held = self._held, []
        for reader in held:
            self._begin(reader)

    def _begin(self, reader: _Reader) -> None:
        if self._updates and not self._stopping:
            self._held.append(reader)
            return
        self._readers[reader.request.id] = reader
        try:
            if self._stopping:
                raise JaxinferError(CLOSED)
            self._llm.submit([reader.request])
        except JaxinferError as error:
            self._tell(reader, error)
            return
        if reader.request.finished:  # its answer was kept; it need not wait for others' steps
            self._tell(reader, None)

    def _end(self, reader: _Reader) -> None:
        """Nobody reads it any more."""
        self._held = [other for other in self._held if other is not reader]
        if self._readers.pop(reader.request.id, None) is not None:
            self._llm.cancel([reader.request])

    def _stop(self, drain: bool) -> None:
        self._stopping = True
        if not drain:
            self._abort(CLOSED)

    def _abort(self, why: str) -> None:
        for reader in list(self._readers.values()):
            self._llm.cancel([reader.request])
            self._tell(reader, JaxinferError(why))

    def _turn(self) -> None:
        """One turn of the engine. What breaks it fails the requests that were in it, no others."""
        try:
            self._llm.pump()
        except Exception:
            logger.exception("a step failed, and with it the requests that were running")
        for reader in list(self._readers.values()):
            self._tell(reader, reader.request.failed)

    def _tell(self, reader: _Reader, error: BaseException | None) -> None:
        request = reader.request
        assert request.deltas is not None
        deltas = list(request.deltas)
        request.deltas.clear()
        ended = request.finished or error is not None
        if ended:
            del self._readers[request.id]
        if deltas or ended:
            try:
                reader.loop.call_soon_threadsafe(reader.feed, deltas, ended, error)
            except RuntimeError:  # its loop is closed
                self._end(reader)
