"""Random histories of the scheduler against a simulated device, and every refusal.

The device knows what the scheduler must not: how long each sequence really gets. It executes
actions in order, several of them before the host reads the first one's results, and it remembers
whose token every slot of every page holds, so that a page granted too early is seen when read.
Where tokens are guessed it writes all guesses that it may, and how many of them hold only it knows.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.batcher import (
    NO_SEQUENCE,
    Cancel,
    Finished,
    Guess,
    Move,
    Preempt,
    Progress,
    Refuse,
    Return,
    Run,
    Submit,
    create_state,
    idle,
    objects,
    step,
)
from jaxinfer.config import BatcherConfig
from jaxinfer.pages import check, page_keys

PLENTY = 1000  # of room in the queue: nothing is refused


def submit(*sequences, keys=None, ranks=None):
    """Of (id, prompt, limit); prompts share nothing, unless `keys` say so."""
    columns = zip(*sequences, strict=True)
    found = objects(keys or [np.empty((0, 2), np.uint64)] * len(sequences))
    ranks = np.zeros(len(sequences), np.int64) if ranks is None else np.array(ranks)
    return Submit(*(np.array(column, np.int64) for column in columns), ranks, found)


def content(shared, sequence, position):
    """What stands for a token: prompts begin alike where they are of one family, as far as that
    goes. `shared[sequence]`: (family, tokens)."""
    family, tokens = shared[sequence]
    return family * 100 + position if position < tokens else (sequence + 10) * 100 + position


def arrays(value):
    """All arrays in nested tuples."""
    if isinstance(value, np.ndarray):
        return [value, *(a for a in value if isinstance(a, np.ndarray) and value.dtype == object)]
    return [a for item in value for a in arrays(item)] if isinstance(value, tuple) else []


def plain(value):
    """Nested tuples with lists for arrays, to be compared."""
    if isinstance(value, np.ndarray):
        return [plain(x) for x in value] if value.dtype == object else value.tolist()
    return (type(value).__name__, *map(plain, value)) if isinstance(value, tuple) else value


def finished(*ids, keys=None):
    found = objects(keys or [np.empty((0, 2), np.uint64)] * len(ids))
    return Finished(np.array(ids, np.int64), found)


def progress(*sequences):
    """Of (id, least, most)."""
    return Progress(*(np.array(column, np.int64) for column in zip(*sequences, strict=True)))


def ids_of(action):
    """Sequences of which an action brings results."""
    return action.ids.tolist() + [chunk.id for chunk in action.chunks]


WRONG = -1  # a guess that does not hold, in place of a token


class Device:
    """Executes actions. `ends[id]`: the tokens that sequence has when it really ends; `limits[id]`:
    the most that it may have. `shared`: of `content`. `luck`: how many guesses hold, by turns."""

    def __init__(self, config, ends, limits, shared, luck):
        M = config.max_num_seqs
        self.config, self.ends, self.limits, self.shared = config, ends, limits, shared
        self.luck = itertools.cycle(luck)
        self.owner, self.length, self.active = [None] * M, [0] * M, [False] * M
        self.pages = [np.empty(0, int)] * M
        self.slots, self.far = {}, {}  # of the device; and whole pages, by slots of the host

    def move(self, action):
        """What is stored is what the dispatches before have left; it is all there before loads."""
        places = range(self.config.page_size)
        assert len(set(action.stores[:, 1].tolist())) == len(action.stores)
        for page, slot in action.stores.tolist():
            assert 0 <= slot < self.config.host_slots
            self.far[slot] = [self.slots[page, at] for at in places]
        for slot, page in action.loads.tolist():
            self.slots |= {(page, at): token for at, token in enumerate(self.far[slot])}

    def run(self, action):
        """Tokens that the action produces, by sequence. All is written before anything is read."""
        for row in np.flatnonzero(action.released):
            self.active[row] = False
        decoding = [r for r in range(len(self.active)) if self.active[r]]
        assert set(decoding) <= set(action.rows.tolist())
        for row, sequence in zip(action.rows, action.ids, strict=True):
            assert self.owner[row] == sequence
        self._grant(action)
        for chunk in action.chunks:
            self._begin(chunk)
        made = {}
        for turn in range(action.steps):
            held = {row: self._guessed(row, action) for row in decoding if self.active[row]}
            reads = [(c.row, p) for c in action.chunks for p in range(c.start, c.stop)]
            reads += [(r, self.length[r] + i) for r, n in held.items() for i in range(n + 1)]
            assert turn == 0 or not action.chunks
            for row, position in reads:
                self._write(row, position)
            for row, position in reads:
                self._read(row, position)
            for row, right in held.items():
                for _ in range(right + 1):
                    self._said(row, action, made)
        for chunk in action.chunks:
            self.length[chunk.row] = chunk.stop
            if chunk.last and chunk.stop < chunk.limit:
                made[chunk.id] = 1
                self.active[chunk.row] = chunk.stop + 1 < self.ends[chunk.id]
        return made

    def _begin(self, c):
        assert not self.active[c.row]
        if c.first:
            self.owner[c.row], self.pages[c.row] = c.id, c.pages
        assert self.owner[c.row] == c.id
        assert self.pages[c.row].tolist() == c.pages.tolist()

    def _grant(self, a):
        for row, (column, pages) in enumerate(zip(a.columns, a.pages, strict=True)):
            new = pages[pages > 0]
            if len(new):
                assert row in a.rows
                assert len(self.pages[row]) == column
                self.pages[row] = np.concatenate([self.pages[row], new])

    def _guessed(self, row, action):
        """Fills all the places that guesses may have; says how many of them hold."""
        total = self.length[row] + 1
        room = min(action.guesses, self.limits[self.owner[row]] - total - 1)
        for i in range(room):
            self._write(row, total + i, WRONG)
        return min(next(self.luck), room) if room else 0

    def _said(self, row, action, made):
        if not self.active[row]:
            return
        self.length[row] += 1
        total = self.length[row] + 1
        assert total <= action.tokens
        owner = self.owner[row]
        made[owner] = made.get(owner, 0) + 1
        self.active[row] = total < self.ends[owner]

    def _write(self, row, position, token=None):
        pages, size = self.pages[row], self.config.page_size
        if token is None:
            token = content(self.shared, self.owner[row], position)
        self.slots[pages[position // size], position % size] = token

    def _read(self, row, position):
        """All up to a position, as attention does."""
        pages, size = self.pages[row], self.config.page_size
        for p in range(position + 1):
            token = content(self.shared, self.owner[row], p)
            assert self.slots[pages[p // size], p % size] == token


class Host:
    """The engine's loop without jax, and the invariants after every step."""

    def __init__(self, config, luck):
        self.config, self.state = config, create_state(config)
        self.ends, self.totals = {}, {}  # of the sequences not yet ended
        self.shared, self.ranks, self.saved = {}, {}, 0
        # Guesses from the beginning: a history changes that now and then.
        self.events = [Guess(config.max_guesses)] if config.max_guesses else []
        self.in_flight, self.history = deque(), []
        self.known, self.refused, self.ended, self.cancelled = 0, set(), set(), set()
        self.read, self.decoded = {}, set()  # id -> prompt tokens prefilled; ids ever decoded
        self.prompts, self.limits = {}, {}  # what a sequence has to read, and may become
        self.device = Device(config, self.ends, self.limits, self.shared, luck)
        self.needed = {}  # id -> the most pages that it has needed in its row
        self.to_release, self.unseen, self.preempted = set(), set(), set()
        self.again, self.any_row = set(), 0
        self.moved = [0, 0]  # pages, to the host and back

    def submit(self, sequences):
        rows, keys, ranks = [], [], []
        for prompt, output, part, family, tokens, rank in sequences:
            prompt = min(prompt, self.most)
            limit = min(prompt + output, self.most)
            self.prompts[self.known], self.limits[self.known] = prompt, limit
            self.totals[self.known] = prompt
            self.ends[self.known] = min(limit, prompt + 1 + int(part * (limit - prompt)))
            rows.append((self.known, prompt, limit))
            self.shared[self.known] = (family, tokens)
            self.ranks[self.known] = rank
            ranks.append(rank)
            keys.append(self.keys(self.known, prompt))
            self.unseen.add(self.known)
            self.known += 1
        self.events.append(submit(*rows, keys=keys, ranks=ranks))

    def place(self, sequence):
        return self.ranks[sequence], sequence

    def keys(self, sequence, tokens):
        ids = [content(self.shared, sequence, p) for p in range(tokens)]
        return page_keys(np.array(ids, int), self.config.page_size)

    @property
    def most(self):
        return min(self.config.max_model_len, (self.config.num_pages - 1) * self.config.page_size)

    def cancel(self, which):
        refusable = set() if self.config.max_waiting == PLENTY else self.unseen
        mine = sorted(set(self.totals) - refusable)
        if mine:
            sequence = mine[which % len(mine)]
            del self.totals[sequence]
            self.preempted.discard(sequence)
            self.cancelled.add(sequence)
            self.events.append(Cancel(sequence))

    def guess(self, tokens):
        self.events.append(Guess(tokens % (self.config.max_guesses + 1)))

    def schedule(self):
        """One step of the scheduler; whether it found work."""
        before, events = self.state, tuple(self.events)
        copy = plain(before)
        self.events, self.unseen = [], set()
        rows = {int(s): r for r, s in enumerate(before.rows.id) if s != NO_SEQUENCE}
        self.to_release |= {rows[e.id] for e in events if isinstance(e, Cancel) and e.id in rows}
        self.state, actions = step(before, events, self.config)
        assert plain(before) == copy
        assert not any(a.flags.writeable for a in arrays((self.state, actions)))
        self.history.append((events, plain(actions)))
        self.check_state(before, actions)
        if self.state.guesses:
            self.check_nobody_goes_for_guesses(before, events, actions)
        for action in actions:
            if isinstance(action, Refuse):
                assert action.id in self.totals or action.id in self.cancelled
                self.totals.pop(action.id, None)
                self.refused.add(action.id)
            elif isinstance(action, Preempt):
                self.preempt(action.id, rows)
            elif isinstance(action, Move):
                assert len(action.stores) or len(action.loads)
                self.device.move(action)
                self.moved = [self.moved[0] + len(action.stores), self.moved[1] + len(action.loads)]
            else:
                self.check_action(action)
                self.in_flight.append((action, self.device.run(action)))
        self.check_bounds()
        self.return_preempted()
        return bool(actions)

    def preempt(self, sequence, rows):
        """The last in order of those that ran, never the only one."""
        running = [int(s) for s in self.state.rows.id if s != NO_SEQUENCE]
        assert running
        assert self.place(sequence) > max(map(self.place, running))
        self.preempted.add(sequence)
        self.again.add(sequence)
        self.decoded.discard(sequence)
        if sequence in rows:
            self.to_release.add(rows[sequence])
        else:  # admitted in the same step: whichever row it was
            self.any_row += 1

    def return_preempted(self):
        """Those of which nothing is on its way wait again, with what they have become."""
        on_the_way = {i for a, _ in self.in_flight for i in ids_of(a)}
        for sequence in sorted(self.preempted - on_the_way):
            self.preempted.remove(sequence)
            tokens = self.prompts[sequence] = self.totals[sequence]
            self.read.pop(sequence, None)
            self.events.append(Return(sequence, tokens, self.keys(sequence, tokens)))

    def observe(self):
        if self.in_flight:
            action, made = self.in_flight.popleft()
            done = []
            for sequence in list(self.totals):
                self.totals[sequence] += made.get(sequence, 0)
                complete = self.read.get(sequence) == self.prompts[sequence]
                still_queued = any(c.id == sequence for a, _ in self.in_flight for c in a.chunks)
                if complete and not still_queued and self.totals[sequence] == self.ends[sequence]:
                    done.append(sequence)
                    del self.totals[sequence]
                    self.preempted.discard(sequence)
            self.ended |= set(done)
            if done:
                keys = [self.keys(i, self.ends[i] - 1) for i in done]
                self.events.append(finished(*done, keys=keys))
            if action.guesses:
                self.tell_progress(action.ids.tolist())
            self.return_preempted()

    def tell_progress(self, ids):
        """As the engine does, of those that go on."""
        going, least, most = [i for i in ids if i in self.totals], [], []
        for i in going:
            runs = [a for a, _ in self.in_flight if i in a.ids]
            known, limit = self.totals[i], self.limits[i]
            least.append(min(limit, known + sum(a.steps for a in runs)))
            most.append(min(limit, known + sum(a.steps * (a.guesses + 1) for a in runs)))
        if going:
            self.events.append(progress(*zip(going, least, most, strict=True)))

    def check_nobody_goes_for_guesses(self, before, events, actions):
        _, plainly = step(before, (*events, Guess(0)), self.config)
        gone, without = ([a for a in x if isinstance(a, Preempt)] for x in (actions, plainly))
        assert gone == without

    def check_bounds(self):
        """All that was dispatched has run: the scheduler's bounds of it hold."""
        rows, device = self.state.rows, self.device
        for row in np.flatnonzero((rows.id != NO_SEQUENCE) & (rows.prefilled == rows.prompt)):
            room = rows.limit[row] - rows.prompt[row]
            if room:
                made = device.length[row] + 1 - rows.prompt[row]
                assert rows.least[row] <= rows.scheduled[row] <= room
                assert made <= rows.scheduled[row]
                assert made >= rows.least[row] or not device.active[row]

    def check_state(self, before, actions):
        state, config = self.state, self.config
        granted = [pages.tolist() for pages in state.pages]
        assert state.rows.held.tolist() == [len(pages) for pages in granted]
        flat = [page for pages in granted for page in pages]
        free = np.flatnonzero(state.pool.holders == 0).tolist()
        assert sorted({*flat, *free}) == list(range(1, config.num_pages))
        check(state.pool, [np.array(pages, int) for pages in granted])
        rows = state.rows
        for row, pages in enumerate(granted):
            tokens = rows.prompt[row] + max(0, rows.scheduled[row] - 1)
            needed = -(-tokens // config.page_size) if rows.id[row] >= 0 else 0
            # Those granted for guesses that did not hold are there for the tokens that follow.
            assert len(pages) == max(needed, self.needed.get(rows.id[row], 0))
        held = zip(rows.id.tolist(), rows.held.tolist(), strict=True)
        self.needed = {i: count for i, count in held if i != NO_SEQUENCE}
        running = [int(s) for s in rows.id if s != NO_SEQUENCE]
        waiting = state.waiting.ids.tolist()
        if config.policy == "makespan":
            outputs = (state.waiting.limits - state.waiting.prompts).tolist()
            assert outputs == sorted(outputs, reverse=True)
        else:
            assert waiting == sorted(waiting, key=self.place)
        assert all(s not in self.read for s in waiting)
        new = set(running) - set(before.rows.id.tolist())
        if config.policy != "makespan" and new and waiting:
            # Nobody is overtaken: who waits longest is whoever ranks and arrivals let pass.
            assert max(map(self.place, new)) < min(map(self.place, waiting))
        if config.policy == "static":
            assert not (new and set(running) - new)
        elif config.policy == "continuous" and waiting and len(running) < config.max_num_seqs:
            # The head was not admitted: no tokens are left for it, or no pages.
            runs = [a for a in actions if isinstance(a, Run)]
            taken = sum(len(a.rows) + sum(c.stop - c.start for c in a.chunks) for a in runs)
            preempted = any(isinstance(a, Preempt) for a in actions)
            shared = any(c.first and c.start for a in runs for c in a.chunks)
            wanted = -(-state.waiting.prompts[0] // config.page_size)
            assert (
                taken == config.max_num_batched_tokens
                or preempted
                or shared  # afterwards pages were given back
                or any(len(a.chunks) == config.max_chunks for a in runs)
                or wanted + len(running) > state.pool.available
            )

    def check_action(self, action):
        config = self.config
        released = set(np.flatnonzero(action.released).tolist())
        assert released >= self.to_release
        assert len(released - self.to_release) <= self.any_row
        self.to_release, self.any_row = set(), 0
        ids = action.ids.tolist()
        assert len(set(ids)) == len(ids) == len(action.rows)
        assert all(self.read[i] == self.prompts[i] for i in ids)
        assert 1 <= action.steps <= config.max_steps
        assert action.tokens <= config.max_model_len
        taken = len(ids) + sum(c.stop - c.start for c in action.chunks)
        assert 1 <= taken <= config.max_num_batched_tokens
        assert len(action.chunks) <= config.max_chunks
        if action.chunks or len(self.state.waiting.ids):
            assert action.steps == 1
        assert action.guesses in (0, self.state.guesses)
        assert not (action.chunks and action.guesses)
        self.decoded |= set(ids)
        for chunk in action.chunks:
            self.check_chunk(chunk)
        unread = [
            int(i) for i, p in zip(self.state.rows.id, self.state.rows.prompt, strict=True)
            if i != NO_SEQUENCE and self.read.get(int(i), 0) < p
        ]  # fmt: skip
        if unread and len(action.chunks) < config.max_chunks and config.policy != "makespan":
            assert taken == config.max_num_batched_tokens

    def check_chunk(self, chunk):
        assert chunk.first == (chunk.id not in self.read)
        if chunk.first:
            self.saved += chunk.start
            self.read[chunk.id] = chunk.start
            assert chunk.start % self.config.page_size == 0
            if chunk.id not in self.again:  # else its own pages may be found
                assert chunk.start <= self.shared[chunk.id][1]
        assert chunk.start == self.read[chunk.id]
        assert chunk.start < chunk.stop
        assert chunk.last == (chunk.stop == self.prompts[chunk.id])
        assert chunk.limit == self.limits[chunk.id]
        assert (chunk.pages > 0).all()
        self.read[chunk.id] = chunk.stop

    def turn(self):
        for _ in range(3):
            self.schedule()
            self.observe()

    def drain(self):
        """To the end, two dispatches ahead, as the engine."""
        for _ in range(10_000):
            while len(self.in_flight) < 2 and self.schedule():
                pass
            if not self.in_flight and not self.events:
                break
            self.observe()
        assert idle(self.state)
        assert self.state.pool.available == self.config.num_pages - 1
        assert not self.totals
        assert self.ended | self.refused | self.cancelled == set(range(self.known))
        assert not self.ended & (self.refused | self.cancelled)

    def replay(self):
        state = create_state(self.config)
        for events, wanted in self.history:
            state, actions = step(state, events, self.config)
            assert plain(actions) == wanted


configs = st.builds(
    BatcherConfig,
    num_pages=st.integers(2, 12),
    page_size=st.integers(1, 4),
    max_num_seqs=st.integers(1, 4),
    max_model_len=st.integers(1, 24),
    max_num_batched_tokens=st.integers(5, 12),
    max_chunks=st.integers(1, 3),
    max_steps=st.integers(1, 6),
    max_waiting=st.sampled_from([1, 3, PLENTY]),
    policy=st.sampled_from(["continuous", "static", "makespan"]),
    max_guesses=st.sampled_from([0, 1, 2, 5]),
    host_slots=st.sampled_from([0, 1, 4, 20]),
)


def submissions(prompt, output, parts, lengths, most):
    """Lists of (prompt tokens, output tokens at most, which part of them there really is, which
    prompts begin like this one, for how many tokens, rank)."""
    return st.lists(
        st.tuples(
            prompt,
            output,
            st.sampled_from(parts),
            st.integers(0, 1),
            st.sampled_from(lengths),
            st.sampled_from([0, 0, 3]),
        ),
        min_size=1,
        max_size=most,
    )


sequences = submissions(st.integers(1, 12), st.integers(0, 12), [0.0, 0.5, 0.9], [0, 5, 12], most=5)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), sequences),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("guess"), st.integers(0, 5)),
        st.tuples(st.just("schedule")),
        st.tuples(st.just("schedule")),
        st.tuples(st.just("observe")),
    ),
    max_size=25,
)


luck = st.lists(st.integers(0, 5), min_size=1, max_size=5)


def live(config, operations, luck):
    host = Host(config, luck)
    for name, *arguments in operations:
        getattr(host, name)(*arguments)
    host.drain()
    host.replay()


@settings(max_examples=max(settings().max_examples, 500))
@given(config=configs, operations=operations, luck=luck)
def test_any_history(config, operations, luck):
    live(config, operations, luck)


# Long outputs, few tokens a dispatch: many of them, each begun before it is known what guesses
# brought before; and others that come, so that pages run out.
guessing = st.builds(
    BatcherConfig,
    num_pages=st.integers(6, 24),
    page_size=st.integers(1, 4),
    max_num_seqs=st.integers(1, 3),
    max_model_len=st.just(48),
    max_num_batched_tokens=st.integers(5, 12),
    max_steps=st.integers(1, 2),
    max_waiting=st.just(PLENTY),
    policy=st.sampled_from(["continuous", "makespan"]),
    max_guesses=st.integers(1, 4),
    host_slots=st.sampled_from([0, 3]),
)
talkative = submissions(st.integers(1, 4), st.integers(8, 40), [0.5, 1.0], [0, 5], most=3)
turns = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), talkative),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("guess"), st.integers(1, 4)),
        *[st.tuples(st.just("schedule"))] * 3,
        *[st.tuples(st.just("observe"))] * 3,
    ),
    max_size=12,
)


@settings(max_examples=max(settings().max_examples, 150))
@given(config=guessing, first=talkative, operations=turns, luck=luck)
def test_any_history_of_guesses(config, first, operations, luck):
    live(config, [("submit", first), *operations], luck)


# Pages for a prompt or two, and prompts that begin like those before the last: so they leave the
# device, and come back.
leaving = st.builds(
    BatcherConfig,
    num_pages=st.integers(6, 14),
    page_size=st.sampled_from([1, 2]),
    max_num_seqs=st.integers(1, 3),
    max_model_len=st.just(16),
    max_num_batched_tokens=st.integers(5, 12),
    max_chunks=st.integers(1, 3),
    max_steps=st.just(2),
    max_waiting=st.just(PLENTY),
    policy=st.sampled_from(["continuous", "makespan"]),
    max_guesses=st.sampled_from([0, 0, 2]),
    host_slots=st.sampled_from([1, 3, 8, 40]),
)
long = submissions(st.integers(4, 12), st.integers(1, 4), [0.0, 1.0], [5, 8, 12], most=3)
visits = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), long),
        st.tuples(st.just("submit"), long),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("turn")),
    ),
    min_size=4,
    max_size=12,
)


@settings(max_examples=max(settings().max_examples, 100))
@given(config=leaving, operations=visits, luck=luck)
def test_any_history_of_pages_that_leave(config, operations, luck):
    live(config, operations, luck)


@pytest.mark.slow
@settings(max_examples=3000)
@given(config=leaving, operations=visits, luck=luck)
def test_many_histories_of_pages_that_leave(config, operations, luck):
    live(config, operations, luck)


@pytest.mark.slow
@settings(max_examples=1000)
@given(config=guessing, first=talkative, operations=turns, luck=luck)
def test_many_histories_of_guesses(config, first, operations, luck):
    live(config, [("submit", first), *operations], luck)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(config=configs, operations=operations, luck=luck)
def test_many_histories(config, operations, luck):
    live(config, operations, luck)


CONFIG = BatcherConfig(
    num_pages=9,
    page_size=4,
    max_num_seqs=4,
    max_model_len=16,
    max_num_batched_tokens=5,
    max_steps=8,
)


TIGHT = BatcherConfig(
    num_pages=6,
    page_size=4,
    max_num_seqs=2,
    max_model_len=16,
    max_num_batched_tokens=8,
    max_steps=4,
)


def actions_of(config, *events):
    state, found = create_state(config), []
    while events:
        state, actions = step(state, events[0], config)
        found.append(actions)
        events = events[1:]
    return state, found


def test_a_prompt_in_chunks_then_decode():
    _, found = actions_of(CONFIG, (submit((7, 6, 9)),), (), (), ())
    [first], [second], [decode], nothing = found
    [chunk] = first.chunks
    assert (chunk.id, chunk.row, chunk.start, chunk.stop, chunk.last) == (7, 0, 0, 5, False)
    assert chunk.pages.tolist() == [1, 2]
    assert (first.steps, first.rows.tolist(), first.tokens) == (1, [], 5)
    [chunk] = second.chunks
    assert (chunk.start, chunk.stop, chunk.last, chunk.limit) == (5, 6, True, 9)
    # The prompt's last chunk gave the first token.
    assert (decode.steps, decode.rows.tolist(), decode.ids.tolist()) == (2, [0], [7])
    assert (decode.tokens, decode.chunks) == (9, ())
    assert not decode.pages.any()  # the last token needs no slot
    assert nothing == ()


def test_one_step_decodes_and_reads_from_several_prompts():
    state, found = actions_of(CONFIG, (submit((0, 2, 9)),), (submit((1, 3, 9), (2, 4, 9)),), ())
    second, third = found[1][0], found[2][0]
    assert second.ids.tolist() == [0]
    assert [(c.id, c.start, c.stop, c.last) for c in second.chunks] == [
        (1, 0, 3, True),
        (2, 0, 1, False),
    ]
    assert third.ids.tolist() == [0, 1]
    assert [(c.id, c.start, c.stop, c.last) for c in third.chunks] == [(2, 1, 4, True)]
    state, [fourth] = step(state, (), CONFIG)
    assert (fourth.ids.tolist(), fourth.steps, fourth.chunks) == ([0, 1, 2], 4, ())


def test_one_decode_step_at_a_time_while_somebody_waits():
    config = TIGHT
    state, found = actions_of(config, (submit((0, 2, 12), (1, 2, 12), (2, 2, 12)),), ())
    assert [c.id for c in found[0][0].chunks] == [0, 1]
    assert (found[1][0].steps, found[1][0].ids.tolist()) == (1, [0, 1])
    state, [alone] = step(state, (Cancel(2),), config)
    assert alone.steps == 4


def test_the_youngest_is_preempted_and_waits_again_before_those_that_came_later():
    state, _ = actions_of(TIGHT, (submit((0, 4, 16), (1, 4, 16)),))
    state, [first] = step(state, (), TIGHT)  # both decode: five pages are enough for 8 tokens each
    assert np.count_nonzero(first.pages, axis=1).tolist() == [1, 1]
    state, [preempt, decode] = step(state, (submit((2, 4, 16)),), TIGHT)
    assert preempt == Preempt(1)
    assert decode.ids.tolist() == [0]
    assert decode.released.tolist() == [False, True]
    assert state.parked.tolist() == [[1, 16, 0]]
    assert state.waiting.ids.tolist() == [2]
    state, _ = step(state, (Return(1, 9, page_keys(np.arange(9), 4)),), TIGHT)
    assert state.waiting.ids.tolist() == [1, 2]
    assert state.waiting.prompts.tolist() == [9, 4]
    state, [again] = step(state, (finished(0),), TIGHT)
    assert [(c.id, c.start, c.stop, c.limit) for c in again.chunks] == [(1, 0, 8, 16)]


@pytest.mark.parametrize("event", [Return(0, 4, None), Return(7, 4, None), Return(1, 16, None)])
def test_what_was_not_preempted_cannot_return(event):
    state, _ = actions_of(TIGHT, (submit((0, 4, 16), (1, 4, 16)),), (), ())
    assert state.parked.tolist() == [[1, 16, 0]]
    with pytest.raises(ValueError, match="sequence"):
        step(state, (event,), TIGHT)


def test_a_prefix_is_shared_while_the_first_prompt_with_it_is_still_read():
    prompt = np.arange(10)
    keys = [page_keys(np.append(prompt, last), 4) for last in (1, 2)]
    state, found = actions_of(CONFIG, (submit((0, 11, 12), (1, 11, 12), keys=keys),), *[()] * 2)
    chunks = [[(c.id, c.start, c.stop, c.first, c.last) for c in a.chunks] for [a] in found]
    assert chunks == [
        [(0, 0, 5, True, False)], [(0, 5, 10, False, False)],
        [(0, 10, 11, False, True), (1, 8, 11, True, True)],
    ]  # fmt: skip
    assert state.pages[0][:2].tolist() == state.pages[1][:2].tolist()
    assert state.pages[0][2] != state.pages[1][2]
    assert state.pool.holders[state.pages[0]].tolist() == [2, 2, 1]


def test_what_a_prompt_begins_with_is_held_before_its_other_pages_are_granted():
    """All six pages are remembered, those of the first prompt for the longest time."""
    config = BatcherConfig(7, 4, 2, 16, max_num_batched_tokens=16)
    keys = [page_keys(np.arange(12) + i, 4) for i in (0, 100)]
    state, _ = actions_of(config, (submit((0, 12, 13), keys=keys[:1]),))
    state, _ = step(state, (finished(0, keys=keys[:1]), submit((1, 12, 13), keys=keys[1:])), config)
    again = (finished(1, keys=keys[1:]), submit((2, 12, 13), keys=keys[:1]))
    state, [action] = step(state, again, config)
    assert [(c.id, c.start, c.stop) for c in action.chunks] == [(2, 8, 12)]
    assert state.pool.available == 3


def test_a_prefix_is_shared_within_one_step():
    config = BatcherConfig(
        num_pages=9, page_size=4, max_num_seqs=4, max_model_len=16, max_num_batched_tokens=16
    )
    keys = [page_keys(np.append(np.arange(8), last), 4) for last in (1, 2)]
    _, [[action]] = actions_of(config, (submit((0, 9, 12), (1, 9, 12), keys=keys),))
    assert [(c.id, c.start, c.stop) for c in action.chunks] == [(0, 0, 9), (1, 8, 9)]


def test_a_prefix_is_remembered_after_its_sequence_has_ended():
    keys = [page_keys(np.arange(8), 4)]
    state, _ = actions_of(CONFIG, (submit((0, 8, 8), keys=keys),), ())
    state, actions = step(state, (finished(0),), CONFIG)
    assert actions == ()
    # The last token is computed all the same: half of what is known is of use.
    state, [again] = step(state, (submit((1, 8, 9), keys=keys),), CONFIG)
    assert [(c.start, c.stop, c.first, c.last) for c in again.chunks] == [(4, 8, True, True)]


def test_a_smaller_rank_comes_first_and_is_preempted_last():
    state, found = actions_of(TIGHT, (submit((0, 4, 16), (1, 4, 16), ranks=[5, 5]),))
    assert [c.id for c in found[0][0].chunks] == [0, 1]
    state, [_] = step(state, (submit((2, 4, 16), (3, 4, 16), ranks=[0, 1]),), TIGHT)
    assert state.waiting.ids.tolist() == [2, 3]
    state, _ = step(state, (finished(0, 1),), TIGHT)
    state, [decode] = step(state, (), TIGHT)
    assert decode.ids.tolist() == [2, 3]
    state, [preempt, _] = step(state, (submit((4, 4, 16), ranks=[4]),), TIGHT)
    assert preempt == Preempt(3)
    state, _ = step(state, (Return(3, 9, page_keys(np.arange(9), 4)),), TIGHT)
    assert state.waiting.ids.tolist() == [3, 4]


def test_what_a_sequence_has_said_is_remembered_too():
    said = np.arange(12)
    _, found = actions_of(
        CONFIG,
        (submit((0, 5, 13), keys=[page_keys(said[:5], 4)]),), (), (),
        (finished(0, keys=[page_keys(said, 4)]), submit((1, 14, 16), keys=[page_keys(said, 4)])),
    )  # fmt: skip
    [again] = found[-1]
    assert [(c.id, c.start, c.stop, c.last) for c in again.chunks] == [(1, 12, 14, True)]


def test_a_large_head_of_the_queue_is_not_overtaken():
    sequences = submit((0, 12, 16), (1, 12, 12), (2, 12, 16), (3, 1, 1))
    state, _ = actions_of(CONFIG, (sequences,), *[()] * 6)
    assert state.rows.id.tolist() == [0, 1, NO_SEQUENCE, NO_SEQUENCE]
    assert state.waiting.ids.tolist() == [2, 3]


def test_makespan_begins_with_the_longest_and_reads_no_sooner_than_it_must():
    config = BatcherConfig(
        num_pages=99, page_size=64, max_num_seqs=9, max_model_len=600, policy="makespan"
    )
    sequences = submit((0, 300, 310), (1, 64, 164), (2, 64, 84), (3, 64, 564))
    state, [[first]] = actions_of(config, (sequences,))
    # Nothing decodes yet: all that there is may be read.
    assert [c.id for c in first.chunks] == [3, 1, 2, 0]
    late = submit((4, 300, 400), (5, 300, 310))
    state, [second] = step(state, (late,), config)
    # 500 steps remain, time enough for 600 tokens: as many as fill up what is compiled.
    assert second.ids.tolist() == [3, 1, 2, 0]
    assert [(c.id, c.start, c.stop) for c in second.chunks] == [(4, 0, 60)]
    assert state.waiting.ids.tolist() == [5]


def test_static_policy_admits_a_whole_batch_at_a_time():
    config = BatcherConfig(
        num_pages=9, page_size=4, max_num_seqs=4, max_model_len=16, policy="static"
    )
    batch = submit((0, 2, 8), (1, 2, 8))
    state, _ = actions_of(config, (batch,), (), (), (submit((2, 2, 8)),))
    assert state.waiting.ids.tolist() == [2]
    state, _ = step(state, (finished(0),), config)
    assert state.waiting.ids.tolist() == [2]
    state, [action] = step(state, (finished(1),), config)
    assert [c.id for c in action.chunks] == [2]


def test_cancelled_row_is_released_before_it_is_used_again():
    state, _ = actions_of(CONFIG, (submit((0, 2, 8)),), ())
    state, actions = step(state, (Cancel(0),), CONFIG)
    assert actions == ()
    state, [prefill] = step(state, (submit((1, 2, 8)),), CONFIG)
    assert [c.row for c in prefill.chunks] == [0]
    assert prefill.released.tolist() == [True, False, False, False]
    _, [decode] = step(state, (), CONFIG)
    assert not decode.released.any()


def test_cancelled_while_waiting():
    state, _ = actions_of(CONFIG, (submit(*((i, 2, 16) for i in range(3))),), (Cancel(2),))
    assert state.rows.id.tolist() == [0, 1, NO_SEQUENCE, NO_SEQUENCE]
    assert not len(state.waiting.ids)
    assert not state.released.any()


def test_full_queue_refuses_the_rest_by_name():
    config = BatcherConfig(
        num_pages=9, page_size=4, max_num_seqs=1, max_model_len=16, max_waiting=2
    )
    state, [actions, again] = actions_of(
        config,
        (submit((0, 1, 2), (1, 1, 2), (2, 1, 2), (3, 1, 2)),),
        (submit((4, 1, 2), (5, 1, 2)),),
    )
    refused = [a for a in (*actions, *again) if isinstance(a, Refuse)]
    assert [a.id for a in refused] == [2, 3, 5]
    assert refused[0].reason == "the queue is full: 2 sequences wait already"
    assert state.waiting.ids.tolist() == [1, 4]


@pytest.mark.parametrize("event", [Cancel(3), finished(0, 3)])
def test_unknown_sequence(event):
    state, _ = actions_of(CONFIG, (submit((0, 2, 8)),))
    copy = plain(state)
    with pytest.raises(ValueError, match="sequence 3 is neither waiting nor running nor preempt"):
        step(state, (event,), CONFIG)
    assert plain(state) == copy


@pytest.mark.parametrize("bad", [(1, 0, 4), (1, 5, 4), (1, 4, 17)])
def test_submission_out_of_bounds(bad):
    with pytest.raises(ValueError, match="1 <= prompt <= limit <= 16 tokens"):
        step(create_state(CONFIG), (submit((0, 1, 2), bad),), CONFIG)


def test_submission_larger_than_the_pool():
    small = BatcherConfig(num_pages=3, page_size=4, max_num_seqs=4, max_model_len=16)
    with pytest.raises(ValueError, match="limit <= 8 tokens"):
        step(create_state(small), (submit((0, 1, 9)),), small)


def test_rows_are_given_out_in_order():
    _, found = actions_of(CONFIG, (submit((5, 1, 2), (6, 1, 2), (7, 1, 2)),), (), ())
    rows = [(c.id, c.row) for actions in found for a in actions for c in a.chunks]
    assert rows == [(5, 0), (6, 1), (7, 2)]


GUESSES = BatcherConfig(
    num_pages=17,
    page_size=4,
    max_num_seqs=2,
    max_model_len=32,
    max_num_batched_tokens=8,
    max_steps=4,
    max_guesses=3,
)


def test_guesses_are_room_for_tokens_until_it_is_known_what_became_of_them():
    state, found = actions_of(GUESSES, (submit((0, 4, 32)), Guess(3)), (), ())
    [read], [first], [second] = found
    assert (len(read.chunks), read.guesses) == (1, 0)
    # 4 + 1 tokens; 2 steps, each of which may bring 4. The last token needs no place yet.
    assert (first.steps, first.guesses, first.tokens) == (2, 3, 13)
    assert (first.columns.tolist(), np.count_nonzero(first.pages, axis=1).tolist()) == (
        [1, 0],
        [2, 0],
    )
    assert (second.tokens, state.rows.held.tolist()) == (21, [5, 0])
    # The first brought a token a step, the second is on its way: 7 + 2 to 7 + 8 tokens.
    state, [third] = step(state, (progress((0, 9, 15)),), GUESSES)
    assert (third.guesses, third.tokens, state.rows.held.tolist()) == (3, 23, [6, 0])
    assert (state.rows.least[0], state.rows.scheduled[0]) == (11 - 4, 23 - 4)


def test_progress_of_who_has_left_says_nothing():
    state, _ = actions_of(GUESSES, (submit((0, 4, 32), (1, 4, 32)), Guess(3)), (), (Cancel(0),))
    before = state.rows
    state, _ = step(state, (progress((0, 9, 15)), Guess(0)), GUESSES)
    assert state.rows.scheduled[0] == before.scheduled[0]
    assert state.rows.scheduled[1] == before.scheduled[1] + GUESSES.max_steps


def test_steps_with_guesses_end_when_all_could():
    _, found = actions_of(GUESSES, (submit((0, 4, 8)), Guess(3)), (), ())
    [_], [run], [again] = found
    assert (run.steps, run.guesses, run.tokens) == (1, 3, 8)  # 3 tokens are left
    assert (again.steps, again.tokens) == (1, 8)  # if the guesses did not hold


def test_nothing_is_guessed_while_somebody_is_read_or_may_be_admitted():
    state, _ = actions_of(GUESSES, (submit((0, 4, 32)), Guess(3)), ())
    state, [beside] = step(state, (submit((1, 12, 32)),), GUESSES)
    assert (beside.guesses, len(beside.chunks)) == (0, 1)
    state, [rest] = step(state, (), GUESSES)
    assert (rest.guesses, [c.last for c in rest.chunks]) == (0, [True])
    state, [both] = step(state, (), GUESSES)
    assert (both.guesses, both.ids.tolist()) == (3, [0, 1])


def test_guesses_go_on_while_somebody_waits_for_a_row():
    waiting = submit((0, 1, 32), (1, 1, 32), (2, 1, 32))
    _, found = actions_of(GUESSES, (waiting, Guess(3)), ())
    [_], [run] = found
    assert (run.steps, run.guesses, run.ids.tolist()) == (1, 3, [0, 1])


def test_without_pages_for_guesses_nothing_is_guessed():
    config = replace(GUESSES, num_pages=6, max_num_batched_tokens=16, max_steps=1)
    both = submit((0, 5, 16), (1, 5, 16))
    _, found = actions_of(config, (both, Guess(3)), *[()] * 5)
    # Five pages: two for 8 tokens and the newest of each; of one more both would need one to guess.
    runs = [run for actions in found for run in actions if isinstance(run, Run)]
    assert [run.guesses for run in runs] == [0, 0, 0, 0, 0, 3]
    assert [run.tokens for run in runs] == [5, 7, 8, 9, 10, 14]
    gone = [[a for a in actions if isinstance(a, Preempt)] for actions in found]
    assert gone == [[], [], [], [], [Preempt(1)], []]  # as without guesses: a page each is wanted


@pytest.mark.parametrize("tokens", [-1, 4])
def test_more_guesses_than_there_are(tokens):
    state, _ = actions_of(GUESSES, (submit((0, 4, 32)),))
    with pytest.raises(ValueError, match=rf"Guess\(tokens={tokens}\): expected 0 to 3"):
        step(state, (Guess(tokens),), GUESSES)
