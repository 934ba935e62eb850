"""The loop: schedule → run → observe. The only mutable code beside the API on top of it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from jaxinfer import batcher, eventlog, sampling
from jaxinfer.batch import Admission, Chunk, DecodePlan, init_penalties, init_state
from jaxinfer.cache import init_cache
from jaxinfer.config import BatcherConfig, ModelConfig
from jaxinfer.models.decoder import Params
from jaxinfer.pages import page_keys, pages_for
from jaxinfer.runner import Sampled, StepCompiler, StepKey, bucket, chunk_bucket, row_bucket
from jaxinfer.types import MAX_TOP_LOGPROBS, SamplingParams

# The device runs one dispatch while the host reads the one before.
DISPATCHES_AHEAD = 2
FEW_TOP_LOGPROBS = 5
# How many later sequences a step of priority lets pass at most: nobody waits for ever.
PRIORITY_ARRIVALS = 1000


@dataclass(frozen=True)
class Sequence:
    """One sample of one request, as the engine runs it.

    Attributes:
        prompt: int32 [N].
        limit: tokens at which it ends, prompt included; len(prompt) generates nothing.
        priority: a smaller one comes before those that arrived up to PRIORITY_ARRIVALS earlier, for
            each step between them.
        stop_ids: tokens at which it ends, the model's own included.
        score: how many of the likeliest tokens to return after each prompt token; None: no
            prompt log-probabilities at all.
    """

    prompt: np.ndarray
    params: SamplingParams
    limit: int
    seed: int
    sample: int = 0
    priority: int = 0
    stop_ids: tuple[int, ...] = ()
    score: int | None = None


class Update(NamedTuple):
    """What one step brought for a sequence.

    `logprobs` describe `tokens`; `scores` the next prompt tokens, each given what comes before it.
    `cached`, with a sequence's first token: how many tokens of its prompt
    were not computed for it.
    """

    id: int
    tokens: list[int]
    logprobs: sampling.Logprobs | None
    scores: sampling.Logprobs | None
    finished: bool
    cached: int = 0


Run = batcher.Prefill | batcher.Decode


class _InFlight(NamedTuple):
    action: Run
    sampled: Sampled


class Engine:
    """Runs sequences to their end.

    Args:
        params: the model's weights, on the device.
        config: the model.
        limits: sizes; the cache is made to fit them.
        dtype: of the KV cache.
        invariant: see `runner.StepCompiler`.
        event_log: an open file to which the scheduler's events go; see `eventlog`.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        limits: BatcherConfig,
        *,
        dtype: Any,
        invariant: bool = True,
        event_log: TextIO | None = None,
    ) -> None:
        self._log = event_log
        self.config, self.limits = config, limits
        self._params, self._dtype = params, dtype
        platform = jax.tree.leaves(params)[0].devices().pop().platform
        self._invariant = invariant
        # cuDNN's bits differ from those of the kernels that decode and chunks run on.
        self._cudnn = not invariant and platform == "gpu" and np.dtype(dtype).itemsize == 2
        self.compiler = StepCompiler(config, invariant=invariant, platform=platform)
        self._ids = itertools.count()
        self._cache = init_cache(config, limits.num_pages, limits.page_size, dtype)
        self._clear()

    def _clear(self) -> None:
        if self._log is not None:
            eventlog.write_header(self._log, self.limits)
        self._batcher = batcher.create_state(self.limits)
        self._events: list[batcher.Event] = []
        self._live: dict[int, Sequence] = {}
        self._outputs: dict[int, list[int]] = {}
        self._scored: dict[int, int] = {}  # prompt tokens whose scores were given out
        self._preempted: set[int] = set()
        self._cached: dict[int, int] = {}  # from a sequence's first chunk to its last
        self._in_flight: deque[_InFlight] = deque()
        self._seq = init_state(self.limits.max_num_seqs, self._batcher.pages.shape[1])

    # -- requests ---------------------------------------------------------------------------

    def submit(self, sequences: Iterable[Sequence]) -> list[int]:
        """Queues sequences; returns their ids. The caller has validated them."""
        new = {next(self._ids): sequence for sequence in sequences}
        self._live |= new
        self._outputs |= {i: [] for i in new}
        self._scored |= {i: 0 for i, s in new.items() if s.score is not None}
        self._events.append(
            batcher.Submit(
                np.array(list(new), np.int64),
                np.array([len(s.prompt) for s in new.values()], np.int64),
                np.array([s.limit for s in new.values()], np.int64),
                np.array([i + PRIORITY_ARRIVALS * s.priority for i, s in new.items()], np.int64),
                batcher.objects([self._keys(i) for i in new]),
            )
        )
        return list(new)

    def _tokens(self, sequence: int) -> np.ndarray:
        """All that is known of a sequence: its prompt, and what was sampled."""
        outputs = np.array(self._outputs[sequence], np.int32)
        return np.concatenate([self._live[sequence].prompt, outputs])

    def _keys(self, sequence: int) -> np.ndarray:
        """Of the pages of its tokens. One that is scored, or whose tokens the device must see for a
        penalty, is computed whole: no keys."""
        live, tokens = self._live[sequence], self._tokens(sequence)
        whole = live.score is not None or live.params.penalised
        return self._page_keys(tokens[:0] if whole else tokens)

    def _page_keys(self, tokens: np.ndarray) -> np.ndarray:
        """Of the pages that `tokens` fill; none where nothing is to be shared."""
        limits = self.limits
        return page_keys(tokens if limits.prefix_caching else tokens[:0], limits.page_size)

    def cancel(self, sequence: int) -> None:
        """Gives a sequence up; unknown or finished ones are left alone."""
        if self._live.pop(sequence, None) is not None:
            self._forget(sequence)
            self._events.append(batcher.Cancel(sequence))

    def _forget(self, sequence: int) -> None:
        del self._outputs[sequence]
        self._scored.pop(sequence, None)
        self._cached.pop(sequence, None)
        self._preempted.discard(sequence)

    def reset(self) -> None:
        """Forgets every sequence, after a failure or an interrupt in the middle of a step."""
        self._clear()
        # The old cache may have been donated, or hold what a failed computation left.
        for leaf in jax.tree.leaves(self._cache):
            leaf.delete()
        self._cache = init_cache(
            self.config, self.limits.num_pages, self.limits.page_size, self._dtype
        )

    @property
    def waiting(self) -> int:
        """Sequences in the queue, as it will be once the events so far are taken."""
        ids = [self._batcher.waiting.ids]
        ids += [e.ids for e in self._events if isinstance(e, batcher.Submit)]
        cancelled = [e.id for e in self._events if isinstance(e, batcher.Cancel)]
        return sum(len(a) - int(np.isin(a, cancelled).sum()) for a in ids)

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do."""
        return not (self._live or self._events or self._in_flight)

    # -- the loop ---------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Keeps the device busy and reads its oldest results.

        They may be none: a chunk of a prompt, or a sequence given up meanwhile.
        """
        while len(self._in_flight) < DISPATCHES_AHEAD:
            actions = self._schedule()
            if not actions:
                break
            for action in actions:
                self._in_flight.append(_InFlight(action, self._run(action)))
        return self._observe(self._in_flight.popleft()) if self._in_flight else []

    def _schedule(self) -> tuple[Run, ...]:
        events, self._events = tuple(self._events), []
        self._batcher, actions = batcher.step(self._batcher, events, self.limits)
        if self._log is not None and (events or actions):
            eventlog.write_step(self._log, events, actions)
        run = tuple(a for a in actions if isinstance(a, Run))
        preempted = [a.id for a in actions if isinstance(a, batcher.Preempt)]
        self._preempted |= set(preempted)
        known = len(run) + len(preempted)
        assert known == len(actions), "the API checks the queue before it submits"
        self._return_preempted()
        return run

    def _return_preempted(self) -> None:
        """Those of which no results are on their way may wait again."""
        on_the_way = {i for done in self._in_flight for i in _ids(done.action)}
        for sequence in sorted(self._preempted - on_the_way):
            self._preempted.remove(sequence)
            tokens = len(self._live[sequence].prompt) + len(self._outputs[sequence])
            self._events.append(batcher.Return(sequence, tokens, self._keys(sequence)))

    def _run(self, action: Run) -> Sampled:
        prefill = isinstance(action, batcher.Prefill)
        key, plan = self._prefill(action) if prefill else self._decode(action)
        # A plan of NumPy arrays would take jax's slow path, which waits for the device.
        self._cache, self._seq, sampled = self.compiler.run(
            key, self._params, self._cache, self._seq, jax.device_put(plan)
        )
        return sampled

    def _observe(self, done: _InFlight) -> list[Update]:
        if isinstance(done.action, batcher.Prefill):
            updates = self._observe_prefill(done.action, done.sampled)
        else:
            updates = self._observe_decode(done.action, done.sampled)
        finished = [u.id for u in updates if u.finished]
        if finished:
            keys = batcher.objects([self._page_keys(self._tokens(i)[:-1]) for i in finished])
            self._events.append(batcher.Finished(np.array(finished, np.int64), keys))
        for sequence in finished:
            del self._live[sequence]
            self._forget(sequence)
        self._return_preempted()
        return updates

    # -- plans ------------------------------------------------------------------------------

    def _prefill(self, action: batcher.Prefill) -> tuple[StepKey, Chunk]:
        sequence = self._live[action.id]
        if sequence.params.penalised and self._seq.penalties is None:
            M, V = self.limits.max_num_seqs, self.config.vocab_size
            self._seq = self._seq._replace(penalties=init_penalties(M, V))
        count, size = action.stop - action.start, chunk_bucket(action.stop - action.start)
        whole_prompt = action.start == 0 and action.last
        key = StepKey(
            "prefill",
            size,
            self._page_bucket(action.stop),
            self.limits.page_size,
            invariant=self._invariant,
            whole_prompt=whole_prompt and self._cudnn,
            score=_top_bucket(sequence.score),
            **self._sampling([action.id]),
        )
        tokens, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
        known = self._tokens(action.id)
        tokens[:count] = known[action.start : action.stop]
        following = known[action.start + 1 : action.stop + 1]
        targets[: len(following)] = following
        pages = np.zeros(self._batcher.pages.shape[1], np.int32)
        pages[: len(action.pages)] = action.pages
        rows = sampling.pack_row(
            sequence.params,
            seed=sequence.seed,
            sample=sequence.sample,
            stop_ids=sequence.stop_ids,
            min_length=len(sequence.prompt) + sequence.params.min_tokens,
        )
        return key, Chunk(
            tokens=tokens,
            row=np.int32(action.row),
            start=np.int32(action.start),
            count=np.int32(count),
            prompt=np.int32(len(sequence.prompt)),
            first=np.bool_(action.first),
            last=np.bool_(action.last),
            admission=Admission(pages, np.int32(action.limit), rows),
            released=action.released,
            targets=None if key.score is None else targets,
        )

    def _decode(self, action: batcher.Decode) -> tuple[StepKey, DecodePlan]:
        rows = min(row_bucket(action.rows), self.limits.max_num_seqs)
        key = StepKey(
            "decode",
            rows,
            self._page_bucket(action.tokens),
            self.limits.page_size,
            invariant=self._invariant,
            max_steps=self.limits.max_steps,
            **self._sampling(int(i) for i in action.ids if i != batcher.NO_SEQUENCE),
        )
        return key, DecodePlan(
            np.int32(action.steps), action.released, action.columns, action.pages
        )

    def _page_bucket(self, tokens: int) -> int:
        wanted = bucket(pages_for(tokens, self.limits.page_size))
        return min(wanted, self._batcher.pages.shape[1])

    def _sampling(self, ids: Iterable[int]) -> Mapping[str, Any]:
        """The static sampling choices that serve all of these sequences."""
        params = [self._live[i].params for i in ids if i in self._live]
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        return {
            "random": any(p.temperature > 0 for p in params),
            "truncated": any(p.truncated and p.temperature > 0 for p in params),
            "top": _top_bucket(max(wanted)) if wanted else None,
        }

    # -- results ----------------------------------------------------------------------------

    def _observe_prefill(self, action: batcher.Prefill, sampled: Sampled) -> list[Update]:
        sequence = self._live.get(action.id)
        if sequence is None:  # cancelled meanwhile
            return []
        scores = self._scores(action, sequence, sampled)
        if action.first:
            again = bool(self._outputs[action.id])
            self._cached[action.id] = 0 if again else action.start
        if not action.last:
            return [Update(action.id, [], None, scores, False)] if scores is not None else []
        tokens = np.asarray(sampled.tokens)
        update = self._update(action.id, sequence, tokens[:, 0], 0, sampled, scores)
        return [update._replace(cached=self._cached.pop(action.id))]

    def _scores(
        self, action: batcher.Prefill, sequence: Sequence, sampled: Sampled
    ) -> sampling.Logprobs | None:
        """Of the chunk's prompt tokens; those that were given out before a preemption are not given
        out again, and what follows the prompt's last token is no part of it."""
        if sequence.score is None:
            return None
        before, last = self._scored[action.id], len(sequence.prompt) - 1
        begin, end = max(before, action.start), min(action.stop, last)
        if begin >= end and before:
            return None
        self._scored[action.id] = max(before, end)
        rows = slice(begin - action.start, max(begin, end) - action.start)
        return _take(sampled.scores, rows, sequence.score)

    def _observe_decode(self, action: batcher.Decode, sampled: Sampled) -> list[Update]:
        tokens = np.asarray(sampled.tokens)
        updates = []
        for row, sequence in enumerate(action.ids):
            live = self._live.get(int(sequence))
            if live is not None and (tokens[0, row] >= 0):
                updates.append(self._update(int(sequence), live, tokens[:, row], row, sampled))
        return updates

    def _update(
        self,
        id: int,
        sequence: Sequence,
        column: np.ndarray,
        row: int,
        sampled: Sampled,
        scores: sampling.Logprobs | None = None,
    ) -> Update:
        tokens = [int(t) for t in column if t >= 0]
        logprobs = None
        if sequence.params.logprobs is not None and tokens:
            logprobs = _take(
                sampled.logprobs, (slice(0, len(tokens)), row), sequence.params.logprobs
            )
        self._outputs[id] += tokens
        ended = len(sequence.prompt) + len(self._outputs[id]) >= sequence.limit
        stopped = bool(tokens) and tokens[-1] in sequence.stop_ids
        return Update(id, tokens, logprobs, scores, ended or stopped)


def _ids(action: Run) -> list[int]:
    """Sequences of which an action brings results."""
    return [action.id] if isinstance(action, batcher.Prefill) else action.ids.tolist()


def _top_bucket(top: int | None) -> int | None:
    """0, a few, or the most: compiled steps differ in how many log-probabilities they return."""
    if top is None or top == 0:
        return top
    return FEW_TOP_LOGPROBS if top <= FEW_TOP_LOGPROBS else MAX_TOP_LOGPROBS


def _take(logprobs: Any, index: Any, top: int) -> sampling.Logprobs:
    """Host copies of the rows at `index`, `top` of the likeliest each."""
    out = jax.tree.map(lambda x: np.asarray(x)[index], logprobs)
    return out._replace(top_ids=out.top_ids[:, :top], top_logprobs=out.top_logprobs[:, :top])
