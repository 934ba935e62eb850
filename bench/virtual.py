"""The scheduler on a clock of its own: `Engine`'s loop, with a formula in place of the device.

Two dispatches are in flight: the device runs one while the host reads the one before, which takes
the host no time. Results come when a dispatch ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench import workloads
from bench.costs import CostModel
from jaxinfer import batcher
from jaxinfer.buckets import make_buckets
from jaxinfer.config import BatcherConfig
from jaxinfer.engine import DISPATCHES_AHEAD
from jaxinfer.metrics import kv_tokens
from jaxinfer.pages import page_keys
from jaxinfer.plans import Kind, padded_tokens, step_key

QUEUE = 4096  # see `simulate`


@dataclass(frozen=True)
class Load:
    """Requests in order of arrival.

    Attributes:
        name: in the names of records.
        due: float64 [n], seconds.
        prompts, outputs: int64 [n], tokens of each.
        prefix: tokens that all prompts begin with, part of `prompts`.
    """

    name: str
    due: np.ndarray
    prompts: np.ndarray
    outputs: np.ndarray
    prefix: int = 0


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Attributes:
        seconds: from the first arrival's clock, 0, to the last result.
        steps: of the device; `dispatches`, of which a few may have several steps.
        ttft: float64 [n], seconds from when a request was due to its first token.
        itl: float32 [output tokens - n], seconds between tokens; those of one dispatch after the
            first follow after nothing.
        waste: slots of granted pages that hold no token, over slots; the mean of the dispatches.
        padding: tokens computed for nothing, over tokens computed.
    """

    seconds: float
    steps: int
    dispatches: int
    output_tokens: int
    ttft: np.ndarray
    itl: np.ndarray
    waste: float
    preemptions: int
    padding: float


def make_load(requests: int, *, rate: float | None = None, prefix: int = 0) -> Load:
    """The lognormal list, `requests` of it; all at once, or `rate` a second.

    Raises:
        ValueError: fewer requests than one, no positive rate, or a negative prefix.
    """
    if requests < 1 or prefix < 0 or (rate is not None and not rate > 0):
        raise ValueError(
            f"requests={requests}, rate={rate}, prefix={prefix}: expected at least 1 request, a "
            "rate above 0 or None, and a prefix of at least 0 tokens"
        )
    prompts, outputs = (np.resize(np.array(x, np.int64), requests) for x in workloads.lengths())
    due, name = np.zeros(requests), "lognormal"
    if rate is not None:
        seconds = 2 * requests / rate + 100 / rate  # more than enough
        due, name = np.array(workloads.arrivals(rate, seconds)[:requests]), f"{rate:g}rps"
    name += f".prefix{prefix}" if prefix else ""
    return Load(name, due, prompts + prefix, outputs, prefix)


def simulate(load: Load, config: BatcherConfig, cost: CostModel, *, queue: int = QUEUE) -> Result:
    """Runs all requests to their end.

    Args:
        load: what is asked for.
        config: of the scheduler.
        cost: of the device's steps.
        queue: the most that the scheduler is shown as waiting; others are submitted as room
            appears, half a queue at a time. In order of arrival it makes no difference; `makespan`
            sorts no more than these.

    Raises:
        ValueError: a queue of less than one, or a request that never fits; see `batcher.step`.
    """
    if queue < 1:
        raise ValueError(f"queue={queue}: expected at least 1")
    return _Loop(load, config, cost, min(queue, config.max_waiting)).run()


class _Dispatch(NamedTuple):
    action: batcher.Run
    end: float


class _Loop:
    """`Engine`'s loop without the tokens: schedule, run, observe. All arrays are by request."""

    def __init__(self, load: Load, config: BatcherConfig, cost: CostModel, queue: int) -> None:
        self.load, self.config, self.cost, self.queue = load, config, cost, queue
        self.buckets = make_buckets(config, gpu=True)
        self.state = batcher.create_state(config)
        self.events: list[batcher.Event] = []
        self.in_flight: deque[_Dispatch] = deque()
        self.preempted: set[int] = set()
        n = len(load.due)
        self.sent, self.produced = 0, np.zeros(n, np.int64)
        self.first, self.newest = np.full(n, np.nan), np.zeros(n)
        self.now = self.busy_until = 0.0
        shared = np.arange(load.prefix if config.prefix_caching else 0, dtype=np.int32)
        self.keys = page_keys(shared, config.page_size)
        self.none = self.keys[:0]
        self.gaps: list[np.ndarray] = []
        self.together = self.steps = self.dispatches = self.preemptions = 0
        self.waste = 0.0
        self.computed = self.padded = 0

    def run(self) -> Result:
        n = len(self.load.due)
        while True:
            while len(self.in_flight) < DISPATCHES_AHEAD and self._dispatch():
                pass
            if self.in_flight:
                self._observe(self.in_flight.popleft())
            elif self.sent < n and batcher.idle(self.state):
                self.now = max(self.now, float(self.load.due[self.sent]))
            elif not self.events:
                break
        if self.sent < n or not batcher.idle(self.state):
            raise RuntimeError(f"the scheduler stands still at {self.now} s: {self.state.rows}")
        return Result(
            seconds=self.now,
            steps=self.steps,
            dispatches=self.dispatches,
            output_tokens=int(self.produced.sum()),
            ttft=self.first - self.load.due,
            itl=np.concatenate([*self.gaps, np.zeros(self.together, np.float32)]),
            waste=self.waste / self.dispatches,
            preemptions=self.preemptions,
            padding=1 - self.computed / self.padded,
        )

    def _submit(self) -> None:
        """Those that are due, as many as the queue has room for."""
        due = int(np.searchsorted(self.load.due, self.now, side="right")) - self.sent
        waiting = len(self.state.waiting.ids)
        count = min(due, self.queue - waiting)
        if count <= 0 or (count < due and waiting > self.queue // 2):
            return
        ids = np.arange(self.sent, self.sent + count)
        prompts = self.load.prompts[ids]
        keys = batcher.objects([self.keys] * count)
        submit = batcher.Submit(ids, prompts, prompts + self.load.outputs[ids], ids.copy(), keys)
        self.events.append(submit)
        self.sent += count

    def _dispatch(self) -> bool:
        """Lets the scheduler decide; whether it had anything to do."""
        self._submit()
        events, self.events = tuple(self.events), []
        self.state, actions = batcher.step(self.state, events, self.config)
        run = None
        for action in actions:
            match action:
                case batcher.Run():
                    run = action
                case batcher.Preempt():
                    self.preempted.add(action.id)
                    self.preemptions += 1
                case batcher.Refuse():
                    raise AssertionError("the queue is never overfilled")
        self._return_preempted()
        if run is None:
            return False
        self.busy_until = max(self.busy_until, self.now) + self._seconds(run)
        self.in_flight.append(_Dispatch(run, self.busy_until))
        self._count()
        return True

    def _seconds(self, run: batcher.Run) -> float:
        key = step_key(run, Kind(), None, limits=self.config, buckets=self.buckets, invariant=True)
        rows = self.state.rows
        # What this step samples is not in the cache yet; what the one before did is.
        held = int((rows.prompt + rows.scheduled)[run.rows].sum()) - len(run.rows)
        held -= len(run.rows) * (run.steps - 1) / 2  # in the middle of its steps
        tokens = key.tokens or key.rows
        self.steps += run.steps
        self.padded += padded_tokens(key)
        read = sum(chunk.stop - chunk.start for chunk in run.chunks)
        self.computed += run.steps * len(run.rows) + read
        step = self.cost.step_ms(tokens=tokens, held=held, rows=key.rows + key.chunks)
        return run.steps * step / 1000

    def _count(self) -> None:
        """Notes the waste; as `inside.waste`."""
        slots = int(self.state.rows.held.sum()) * self.config.page_size
        self.dispatches += 1
        self.waste += 1 - kv_tokens(self.state) / slots

    def _observe(self, done: _Dispatch) -> None:
        """The host reads what a dispatch brought, when it ends."""
        self.now = done.end
        run = done.action
        before = self.produced[run.ids]
        brought = np.minimum(run.steps, self.load.outputs[run.ids] - before)
        if (brought < 1).any():
            raise AssertionError("a sequence decodes that has ended")
        self.together += int(brought.sum()) - len(brought)
        read = np.array([chunk.id for chunk in run.chunks if chunk.last], np.int64)
        ids = np.concatenate([run.ids, read])
        self.produced[run.ids] += brought
        self.produced[read] += 1
        begun = np.isnan(self.first[ids])
        self.first[ids[begun]] = self.now
        self.gaps.append((self.now - self.newest[ids[~begun]]).astype(np.float32))
        self.newest[ids] = self.now
        ended = ids[self.produced[ids] == self.load.outputs[ids]]
        if len(ended):
            keys = batcher.objects([self.none] * len(ended))
            self.events.append(batcher.Finished(ended, keys))
            self.preempted.difference_update(ended.tolist())
        self._return_preempted()

    def _return_preempted(self) -> None:
        """Those of which no results are on their way wait again."""
        if not self.preempted:
            return
        on_the_way = {c.id for done in self.in_flight for c in done.action.chunks}
        on_the_way.update(*(done.action.ids.tolist() for done in self.in_flight))
        for sequence in sorted(self.preempted - on_the_way):
            self.preempted.remove(sequence)
            tokens = int(self.load.prompts[sequence] + self.produced[sequence])
            self.events.append(batcher.Return(sequence, tokens, self.keys))
