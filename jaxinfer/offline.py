"""More requests than are to be held at once: results one by one, as they finish."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from jaxinfer.errors import InvalidRequest
from jaxinfer.llm import LLM, Prompt
from jaxinfer.requests import Request, finish, refused
from jaxinfer.types import MAX_SEED, RequestOutput, SamplingParams

WINDOW = 4096  # sequences: many times what runs at once, and little memory

Watch = Callable[[list[Request]], bool]


@dataclass(frozen=True)
class Job:
    """A prompt to complete; `index` is the caller's name for it."""

    index: int
    prompt: Prompt
    params: SamplingParams | None = None


def seed_of(run_seed: int, index: int) -> int:
    """A seed for one request of a run, whatever has run before it."""
    digest = hashlib.sha256(f"{run_seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8]) % MAX_SEED


def as_completed(
    llm: LLM, jobs: Iterable[Job], *, window: int = WINDOW, watch: Watch | None = None
) -> Iterator[tuple[int, RequestOutput]]:
    """Completes prompts, yielding the index and the result of each when it finishes.

    `jobs` is read as there is room: it may be long, or without end. A request that is refused, or
    that fails alone, comes with its `error`. Where a turn of the engine breaks off, what it had
    finished is yielded before the error is raised. Closing the iterator gives up what is under way.

    Args:
        llm: what runs them; it may serve others beside.
        jobs: in the order in which they begin.
        window: sequences (a request has `n`) under way at most, waiting ones included, and never
            more than `max_waiting`; one request is always let in. A few times `max_num_seqs` keeps
            the engine's rows full.
        watch: asked before each turn of the engine, with the requests under way; False ends it
            all. What has finished by then has been yielded.

    Raises:
        ValueError: `window` is not at least 1.
        QueueFull: from the iterator; the queue is full of others.
    """
    if window < 1:
        raise ValueError(f"window={window!r}: expected an integer of at least 1")
    intake = _Intake(llm, iter(jobs), min(window, llm.engine.limits.max_waiting))
    return _as_completed(llm, intake, watch)


def _as_completed(
    llm: LLM, intake: _Intake, watch: Watch | None
) -> Iterator[tuple[int, RequestOutput]]:
    under_way: list[tuple[int, Request]] = []
    try:
        while True:
            new, refusals = intake.take(sum(request.unfinished for _, request in under_way))
            under_way += new
            llm.submit([request for _, request in new])
            yield from refusals
            under_way, ended = _sorted_out(under_way)  # some may have been answered at once
            yield from _results(llm, ended)
            if not (under_way or new or refusals):
                return
            if not under_way:
                continue
            if watch is not None and not watch([request for _, request in under_way]):
                return
            broken = _turn(llm)
            under_way, ended = _sorted_out(under_way)
            if broken is not None:
                yield from _results(llm, [(i, r) for i, r in ended if not r.failed])
                raise broken
            yield from _results(llm, ended)
    finally:
        llm.cancel([request for _, request in under_way])


def _turn(llm: LLM) -> BaseException | None:
    """One turn of the engine, and what broke it off."""
    try:
        llm.pump()
    except BaseException as error:
        return error
    return None


def _sorted_out(
    requests: list[tuple[int, Request]],
) -> tuple[list[tuple[int, Request]], list[tuple[int, Request]]]:
    """Those still under way, and those that have ended."""
    ended = [(i, r) for i, r in requests if r.finished or r.failed]
    if not ended:
        return requests, []
    return [(i, r) for i, r in requests if not (r.finished or r.failed)], ended


def _results(llm: LLM, ended: list[tuple[int, Request]]) -> Iterator[tuple[int, RequestOutput]]:
    for index, request in ended:
        if request.failed is None:
            yield index, finish(request, llm.tokenizer)
        else:
            yield (
                index,
                RequestOutput(
                    request_id=request.id,
                    prompt=request.prompt,
                    prompt_token_ids=request.prompt_ids,
                    outputs=(),
                    seed=request.seed,
                    error=request.failed,
                ),
            )


class _Intake:
    """Takes jobs as there is room for them."""

    def __init__(self, llm: LLM, jobs: Iterator[Job], window: int) -> None:
        self._llm, self._jobs, self._window = llm, jobs, window
        self._held: tuple[int, Request | RequestOutput] | None = (
            None  # checked, and too large for what was left
        )

    def take(self, used: int) -> tuple[list[tuple[int, Request]], list[tuple[int, RequestOutput]]]:
        """New requests beside `used` sequences, and those refused; nothing at the end of the jobs.

        No more than the window's number of either.
        """
        taken: list[tuple[int, Request]] = []
        refusals: list[tuple[int, RequestOutput]] = []
        while used + len(refusals) < self._window:
            found, self._held = self._held or self._next(), None
            if found is None:
                break
            index, request = found
            if isinstance(request, RequestOutput):
                refusals.append((index, request))
                continue
            if used and used + len(request.samples) > self._window:
                self._held = index, request
                break
            taken.append((index, request))
            used += len(request.samples)
        return taken, refusals

    def _next(self) -> tuple[int, Request | RequestOutput] | None:
        job = next(self._jobs, None)
        if job is None:
            return None
        try:
            request = self._llm.prepare(job.prompt, job.params)
        except InvalidRequest as error:
            # `prepare` does not know which of many requests it checks
            named = InvalidRequest(error.message, index=job.index, field=error.field)
            return job.index, refused(job.prompt, named, str(job.index))
        request.deltas = None  # nobody reads before the end
        return job.index, request
