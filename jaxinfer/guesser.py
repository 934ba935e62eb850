"""The engine's part in speculation, beside the loop: what a draft has not read, when to guess.

Like `metrics.Metrics` it belongs to the engine, and its state changes as the engine's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxinfer import controller
from jaxinfer.batch import Plan
from jaxinfer.batcher import NO_SEQUENCE, BatcherState, Run, granted_columns
from jaxinfer.buckets import Buckets, fit
from jaxinfer.config import BatcherConfig
from jaxinfer.controller import Control, Costs, Load
from jaxinfer.drafting import Drafter
from jaxinfer.observe import DISPATCHES_AHEAD, InFlight
from jaxinfer.runner import StepKey
from jaxinfer.sequences import Tracked


class Guesser:
    """Says how many tokens to guess, and what has to be read for it.

    Args:
        drafter: what guesses.
        limits, buckets: the engine's.
        costs: see `controller.Costs`.
    """

    def __init__(
        self, drafter: Drafter, limits: BatcherConfig, buckets: Buckets, costs: Costs
    ) -> None:
        self.drafter = drafter
        self._limits, self._buckets, self._costs = limits, buckets, costs
        self._control = Control()
        self._observed_s: float | None = None
        self._host_late = 0  # results in a row that were there before anybody looked
        self.reset()

    @property
    def choices(self) -> tuple[int, ...]:
        """Numbers of guesses that there are programs for, ascending: as many as asked for, and half
        of them."""
        how = self.drafter.how
        return (how.tokens,) if not how.adapt or how.tokens == 1 else (how.tokens // 2, how.tokens)

    def reset(self) -> None:
        """Forgets every sequence; what was learned of the machine stays."""
        self._unread: dict[int, int] = {}  # tokens that the draft may not have read yet
        self._control = self._control._replace(sequences={})
        self._observed_s, self._host_late = None, 0

    def forget(self, sequence: int) -> None:
        """A sequence has ended."""
        self._unread.pop(sequence, None)
        self._control = controller.forget(self._control, sequence)

    def restored(self, sequences: Mapping[int, int]) -> None:
        """Sequences go on, of which the draft has read nothing; and how many tokens each has."""
        self._unread = dict(sequences)

    def wanted(self, state: BatcherState, live: Mapping[int, Tracked]) -> int:
        """How many tokens to guess for each row in the next step."""
        rows = state.rows
        decoding = (rows.id != NO_SEQUENCE) & (rows.prefilled == rows.prompt)
        ids = rows.id[decoding].tolist()
        some = [i for i in ids if _speculates(i, live)]
        if not some or len(ids) > self._buckets.guessing[-1]:
            return 0
        if any(i in live and live[i].spec.inside is not None for i in ids):
            return 0  # what it wants of the inside is of one token a step
        if not self.drafter.how.adapt:
            return self.choices[-1]
        sizes = {k: fit(self._buckets.guessing, len(ids)) for k in self.choices}
        load = Load(
            sequences=some,
            others=len(ids) - len(some),
            rows=sizes | {0: fit(self._buckets.rows, len(ids))},
            left=float(np.mean((rows.limit - rows.prompt - rows.least)[decoding])),
            unread=sum(self._unread.get(i, 0) for i in some if self._late(i, self.choices[-1])),
            # What is left of the dispatch in which it ends, and those begun before that is read.
            overrun=(DISPATCHES_AHEAD - 0.5) * self._limits.most_steps(self.choices[-1]),
        )
        found, self._control = controller.choose(self._control, self._costs, load, self.choices)
        return found

    def _late(self, sequence: int, guesses: int) -> bool:
        """Whether the draft has more to read than fits the step that guesses."""
        if self.drafter.model is None:
            return False
        return self._unread.get(sequence, 0) > guesses + 1

    def behind(self, action: Run, live: Mapping[int, Tracked]) -> tuple[list[int], list[int]]:
        """What the draft must read before an action that guesses: rows, and of each of the
        dispatches that it takes how many tokens. They count as read."""
        pairs = zip(action.rows.tolist(), action.ids.tolist(), strict=True)
        late = [
            (row, i) for row, i in pairs if self._late(i, action.guesses) and _speculates(i, live)
        ]
        total = sum(self._unread[i] - 1 for _, i in late)
        self._unread |= {i: 1 for _, i in late}
        most = self._buckets.tokens[-1]
        sizes = [most] * (total // most)
        if total % most:
            sizes.append(fit(self._buckets.tokens, total % most))
        return [row for row, _ in late], sizes

    def guessed(self, action: Run, live: Mapping[int, Tracked]) -> np.ndarray:
        """bool [n]: for which of an action's sequences tokens are guessed."""
        return np.array([_speculates(i, live) for i in action.ids.tolist()], bool)

    def dispatched(self, action: Run, guessed: np.ndarray) -> None:
        """An action is on its way."""
        for chunk in action.chunks:
            if chunk.last:
                self._unread[chunk.id] = chunk.stop + 1
        if self.drafter.model is None:
            return
        for i, yes in zip(action.ids.tolist(), guessed.tolist(), strict=True):
            if i in self._unread:
                read = action.guesses and yes
                self._unread[i] = action.guesses + 1 if read else self._unread[i] + action.steps

    def observed(self, done: InFlight, *, now: float, late: bool) -> None:
        """Results were read, at `now`; `late`: they were there before the host came to read them.

        When it comes late now and then, because it had something else to do, nobody knows when the
        device began with what comes next. When it always comes late, the host sets the pace.
        """
        before, self._observed_s = self._observed_s, now
        known = self._host_late == 0 or self._host_late > DISPATCHES_AHEAD
        self._host_late = self._host_late + 1 if late else 0
        action, key, sampled = done.action, done.key, done.sampled
        steps = key.steps  # of which the program computes all
        if before is not None and known and done.under_way and not action.chunks:
            each = (now - before) / steps
            self._control = controller.timed(self._control, key.rows, action.guesses, each)
        if sampled.attempted is None:
            return
        tokens = np.asarray(sampled.tokens).reshape(steps, key.guesses + 1, key.rows)
        added, attempted = (tokens >= 0).sum(axis=1), np.asarray(sampled.attempted)
        held, tried = np.maximum(added - 1, 0).sum(axis=0), attempted.sum(axis=0)
        ran = (added > 0).any(axis=0)
        found = {
            i: (int(held[place]), int(tried[place]))
            for place, i in enumerate(action.ids.tolist())
            if ran[place] and done.guessed[place] and i in self._unread
        }
        self._control = controller.learned(self._control, found)


def _speculates(sequence: int, live: Mapping[int, Tracked]) -> bool:
    """Whether a sequence still runs and may have guesses."""
    return sequence in live and live[sequence].spec.params.speculate


def catch_up_key(
    tokens: int, pages: int, *, buckets: Buckets, limits: BatcherConfig, invariant: bool
) -> StepKey:
    """The program by which a draft reads so many tokens of sequences that guess."""
    return StepKey(
        rows=buckets.guessing[-1], tokens=tokens, chunks=0, pages=pages,
        page_size=limits.page_size, invariant=invariant, catch_up=True,
    )  # fmt: skip


def catch_up_plan(rows: Sequence[int], key: StepKey, limits: BatcherConfig) -> Plan:
    """The plan of a program of `catch_up_key`: nothing changes but what the draft has read."""
    M = limits.max_num_seqs
    padded = np.full(key.rows, M, np.int32)
    padded[: len(rows)] = rows
    return Plan(
        released=np.zeros(M, bool),
        columns=np.zeros(M, np.int32),
        pages=np.zeros((M, granted_columns(limits)), np.int32),
        rows=padded,
        count=np.int32(len(rows)),
        steps=np.int32(0),
        chunks=None,
    )
