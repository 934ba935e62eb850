"""What an engine did and how long it took, as data: a record a dispatch, a record a sequence.

All times are seconds of the engine's clock, whose zero means nothing. `Metrics` is what the engine
writes to; it keeps the newest records of each kind. `summary` makes figures of any records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxinfer.batcher import NO_SEQUENCE, BatcherState, Run

KEPT = 16_384  # records of each kind, some 600 bytes each
KEPT_GAPS = 131_072  # times between tokens


class StepRecord(NamedTuple):
    """One dispatch.

    Attributes:
        number: of the dispatch, from 0 on.
        dispatched_s: when it had been queued on the device.
        observed_s: when its results had been read.
        steps: decode steps that were wanted of it.
        guesses: tokens guessed for each row in each step.
        attempted, held: guesses up to and including the first of each step that did not hold; those
            that did.
        rows: sequences that decode in it.
        read: prompt tokens; what is computed anew after a preemption included.
        sampled: output tokens that came of it.
        padded_tokens: tokens that its program computes.
        wasted: those of them that were nobody's: neither of a prompt nor of a row that still ran.
        waiting: sequences in the queue, when it was scheduled.
        running: sequences that have a row.
        pages_held, pages_total: pages that somebody holds, of all that can be held.
        kv_tokens: tokens in the cache once it has run; what two rows share counts for both.
        kv_slots: tokens for which the rows' pages have room; counted as `kv_tokens`.
        preempted: sequences preempted since the dispatch before.
        stored, loaded: pages copied to the host's memory, and from there, before it.
        idle_s: how long nothing was queued on the device, as far as the host knows: since the
            results of the last dispatch were read, if none was under way; else 0. Time without any
            request counts as well. 0 for the first.
    """

    number: int
    dispatched_s: float
    observed_s: float
    steps: int
    guesses: int
    attempted: int
    held: int
    rows: int
    read: int
    sampled: int
    padded_tokens: int
    wasted: int
    waiting: int
    running: int
    pages_held: int
    pages_total: int
    kv_tokens: int
    kv_slots: int
    preempted: int
    stored: int
    loaded: int
    idle_s: float


class RequestRecord(NamedTuple):
    """One sequence that has ended; a request has as many as it has samples.

    Attributes:
        id: the engine's number of the sequence.
        arrived_s: when it was submitted.
        admitted_s: when its first chunk was dispatched; None: never.
        first_token_s: when its first token was read; None: it had none.
        finished_s: when its last token was read, or it was given up.
        prompt_tokens, output_tokens: of the prompt; sampled. Tokens after a stop string in the same
            dispatch count.
        cached_tokens: tokens of the prompt found in the cache.
        preemptions: how many times it was preempted.
        cancelled: it was given up before it had all that was wanted of it.
    """

    id: int
    arrived_s: float
    admitted_s: float | None
    first_token_s: float | None
    finished_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    cancelled: bool

    @property
    def queue_s(self) -> float | None:
        """From its arrival to its first chunk."""
        return None if self.admitted_s is None else self.admitted_s - self.arrived_s

    @property
    def ttft_s(self) -> float | None:
        """From its arrival to its first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """A token after the first, on average; None where there is no second."""
        if self.first_token_s is None or self.output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """From its arrival to its end."""
        return self.finished_s - self.arrived_s


class Percentiles(NamedTuple):
    """Half, and 99 of 100, of the values are no larger; interpolated between neighbours."""

    p50: float
    p99: float


class Summary(NamedTuple):
    """Figures of some records; None where there is nothing to make them of.

    Attributes:
        requests, cancelled: sequences that ended; those of them that were given up. Of the latter,
            only the time in the queue and to the first token counts below.
        seconds: from the first dispatch to the last results.
        output_tokens_per_s: of all sequences, in that time.
        queue_s, ttft_s, tpot_s, e2e_s: see `RequestRecord`.
        itl_s: between two times that a sequence had news. Tokens of one dispatch come together.
        prefix_hit_share: of prompt tokens, those found in the cache.
        preemptions: in all.
        loaded_pages: pages that were copied from the host's memory, instead of being computed.
        padding_waste_share: of computed tokens, those that were nobody's.
        kv_waste_share: of the room in granted pages, what held no token.
        device_idle_share: of `seconds`, with nothing queued; a lower bound (`StepRecord.idle_s`).
        mean_rows: sequences that decode in a step, on average.
        acceptance: of attempted guesses, those that held.
    """

    requests: int
    cancelled: int
    seconds: float
    output_tokens_per_s: float | None
    queue_s: Percentiles | None
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    itl_s: Percentiles | None
    e2e_s: Percentiles | None
    prefix_hit_share: float | None
    preemptions: int
    loaded_pages: int
    padding_waste_share: float | None
    kv_waste_share: float | None
    device_idle_share: float | None
    mean_rows: float | None
    acceptance: float | None


def summary(
    steps: Sequence[StepRecord],
    requests: Sequence[RequestRecord],
    gaps: Iterable[float] = (),
    *,
    engines: int = 1,
) -> Summary:
    """Figures of these records, steps in order; `gaps`: the seconds that `itl_s` is made of;
    `engines`: whose devices they are of."""
    first = min((s.dispatched_s for s in steps), default=0.0)
    seconds = max((s.observed_s for s in steps), default=0.0) - first
    admitted = [r for r in requests if r.admitted_s is not None]
    whole = [r for r in requests if not r.cancelled]
    slots = sum(s.kv_slots for s in steps)
    return Summary(
        requests=len(requests),
        cancelled=len(requests) - len(whole),
        seconds=seconds,
        output_tokens_per_s=_share(sum(s.sampled for s in steps), seconds),
        queue_s=_percentiles(r.queue_s for r in requests),
        ttft_s=_percentiles(r.ttft_s for r in requests),
        tpot_s=_percentiles(r.tpot_s for r in whole),
        itl_s=_percentiles(gaps),
        e2e_s=_percentiles(r.e2e_s for r in whole),
        prefix_hit_share=_share(
            sum(r.cached_tokens for r in admitted), sum(r.prompt_tokens for r in admitted)
        ),
        preemptions=sum(s.preempted for s in steps),
        loaded_pages=sum(s.loaded for s in steps),
        padding_waste_share=_share(
            sum(s.wasted for s in steps), sum(s.padded_tokens for s in steps)
        ),
        kv_waste_share=_share(slots - sum(s.kv_tokens for s in steps), slots),
        # What came before the first dispatch is not in `seconds`.
        device_idle_share=_share(sum(s.idle_s for s in steps[1:]), seconds * engines),
        mean_rows=_share(sum(s.rows * s.steps for s in steps), sum(s.steps for s in steps)),
        acceptance=_share(sum(s.held for s in steps), sum(s.attempted for s in steps)),
    )


def kv_tokens(state: BatcherState) -> int:
    """Tokens in the KV cache of the sequences that run.

    A token counts once the step that computes it was dispatched; the newest of a sequence is not in
    the cache before the step after.
    """
    rows = state.rows  # nothing is `scheduled` before the prompt is read
    held = rows.prefilled + np.maximum(rows.scheduled - 1, 0)
    return int(held[rows.id != NO_SEQUENCE].sum())


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percentiles(values: Iterable[float | None]) -> Percentiles | None:
    found = [value for value in values if value is not None]
    return Percentiles(*np.percentile(found, [50, 99]).tolist()) if found else None


@dataclass(slots=True)
class _Live:
    """What is known of a sequence so far; see `RequestRecord`."""

    arrived_s: float
    prompt_tokens: int
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


class Metrics:
    """What the engine tells, kept. Part of the engine: its methods but `summary` are its own.

    Args:
        clock: seconds.
        page_size: tokens a page.
        kept, kept_gaps: how many of the newest records of each kind, and times between tokens.

    Attributes:
        steps, requests: records, oldest first.
        gaps: seconds between two times that a sequence had news, of all sequences.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        page_size: int,
        *,
        kept: int = KEPT,
        kept_gaps: int = KEPT_GAPS,
    ) -> None:
        self._clock, self._page_size = clock, page_size
        self.steps: deque[StepRecord] = deque(maxlen=kept)
        self.requests: deque[RequestRecord] = deque(maxlen=kept)
        self.gaps: deque[float] = deque(maxlen=kept_gaps)
        self._live: dict[int, _Live] = {}
        self._under_way: deque[StepRecord] = deque()  # dispatched, not observed yet
        self._number = self._preempted = self._stored = self._loaded = 0
        self._observed_s: float | None = None  # when results were read last

    def summary(self) -> Summary:
        """Figures of what is kept. May be asked from another thread."""
        return summary(tuple(self.steps), tuple(self.requests), tuple(self.gaps))

    def submit(self, prompts: Mapping[int, int]) -> None:
        """Sequences arrived: ids and prompt lengths."""
        now = self._clock()
        self._live |= {i: _Live(now, tokens) for i, tokens in prompts.items()}

    def dispatch(self, action: Run, state: BatcherState, padded_tokens: int) -> None:
        """An action was queued on the device; `state`: the scheduler's, after it."""
        now, idle_s, read = self._clock(), 0.0, 0
        if not self._under_way and self._observed_s is not None:
            idle_s = now - self._observed_s
        for chunk in action.chunks:
            read += chunk.stop - chunk.start
            if chunk.first:
                self._admit(self._live[chunk.id], chunk.start, now)
        total = len(state.pool.holders) - 1
        self._under_way.append(
            StepRecord(
                number=self._number,
                dispatched_s=now,
                observed_s=now,
                steps=action.steps,
                guesses=action.guesses,
                attempted=0,
                held=0,
                rows=len(action.ids),
                read=read,
                sampled=0,
                padded_tokens=padded_tokens,
                wasted=padded_tokens - read,
                waiting=len(state.waiting.ids),
                running=int(np.count_nonzero(state.rows.id != NO_SEQUENCE)),
                pages_held=total - state.pool.available,
                pages_total=total,
                kv_tokens=kv_tokens(state),
                kv_slots=int(state.rows.held.sum()) * self._page_size,
                preempted=self._preempted,
                stored=self._stored,
                loaded=self._loaded,
                idle_s=idle_s,
            )
        )
        self._number += 1
        self._preempted = self._stored = self._loaded = 0

    @staticmethod
    def _admit(live: _Live, cached: int, now: float) -> None:
        if live.admitted_s is None:
            live.admitted_s = now
        if not live.output_tokens:  # what it finds of its own after a preemption was no gift
            live.cached_tokens = cached

    def observe(
        self, decoded: np.ndarray, following: np.ndarray, attempted: np.ndarray | None = None
    ) -> None:
        """The oldest dispatch's results were read: tokens of its rows, int32 [K, n], and those that
        follow its chunks [K, m]; negative ones are none.

        With k guesses a step brings k + 1 rows of tokens; `attempted` [K, n] are its guesses."""
        self._observed_s = now = self._clock()
        step, tokens = self._under_way.popleft(), int(np.count_nonzero(decoded >= 0))
        if attempted is not None:
            # Of the tokens of a step, the first was no guess.
            own = int(np.count_nonzero(decoded[:: step.guesses + 1] >= 0))
            step = step._replace(attempted=int(attempted.sum()), held=tokens - own)
        self.steps.append(
            step._replace(
                observed_s=now,
                sampled=tokens + (int(np.count_nonzero(following >= 0)) if following.size else 0),
                wasted=step.wasted - tokens,
            )
        )

    def give(self, sequence: int, tokens: int) -> None:
        """A sequence got so many tokens, of the results read last."""
        if not tokens:
            return
        live, now = self._live[sequence], self._observed_s
        assert now is not None
        if live.first_token_s is None:
            live.first_token_s = now
        else:
            self.gaps.append(now - live.last_token_s)
        live.last_token_s = now
        live.output_tokens += tokens

    def preempt(self, sequence: int) -> None:
        self._live[sequence].preemptions += 1
        self._preempted += 1

    def move(self, stored: int, loaded: int) -> None:
        """Pages are copied before the next dispatch."""
        self._stored, self._loaded = stored, loaded

    def finish(self, sequence: int) -> None:
        """A sequence ended with the results read last."""
        assert self._observed_s is not None
        self._end(sequence, self._observed_s, cancelled=False)

    def cancel(self, sequence: int) -> None:
        self._end(sequence, self._clock(), cancelled=True)

    def reset(self) -> None:
        """The engine forgets everything: what was under way is given up, records stay."""
        for sequence in list(self._live):
            self.cancel(sequence)
        self._under_way.clear()
        self._preempted = self._stored = self._loaded = 0

    def _end(self, sequence: int, now: float, *, cancelled: bool) -> None:
        live = self._live.pop(sequence)
        self.requests.append(
            RequestRecord(
                id=sequence,
                arrived_s=live.arrived_s,
                admitted_s=live.admitted_s,
                first_token_s=live.first_token_s,
                finished_s=now,
                prompt_tokens=live.prompt_tokens,
                output_tokens=live.output_tokens,
                cached_tokens=live.cached_tokens,
                preemptions=live.preemptions,
                cancelled=cancelled,
            )
        )


class Together:
    """The metrics of several engines, to be read as those of one.

    Args:
        parts: of each.
    """

    def __init__(self, parts: Sequence[Metrics]) -> None:
        self._parts = tuple(parts)

    @property
    def steps(self) -> Sequence[StepRecord]:
        """Records, in the order in which they were read; `number` counts those of one engine."""
        return sorted((s for m in self._parts for s in tuple(m.steps)), key=lambda s: s.observed_s)

    @property
    def requests(self) -> Sequence[RequestRecord]:
        """Records, oldest first."""
        found = (r for m in self._parts for r in tuple(m.requests))
        return sorted(found, key=lambda r: r.finished_s)

    @property
    def gaps(self) -> Sequence[float]:
        """See `Metrics`."""
        return [gap for m in self._parts for gap in tuple(m.gaps)]

    def summary(self) -> Summary:
        """As `Metrics.summary`: tokens of all engines in the seconds of all, the rest of each
        dispatch or sequence; `device_idle_share` on average."""
        return summary(self.steps, self.requests, self.gaps, engines=len(self._parts))
