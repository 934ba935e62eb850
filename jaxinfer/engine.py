"""The loop: schedule → run → observe. The only mutable code beside the API on top of it."""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer import batcher, eventlog, sampling, warmup
from jaxinfer.batch import Plan, SeqState, init_penalties, init_state
from jaxinfer.buckets import make_buckets
from jaxinfer.cache import PagedCache
from jaxinfer.config import BatcherConfig, ModelConfig
from jaxinfer.controller import Costs
from jaxinfer.distributed import Link
from jaxinfer.drafting import Drafter, init_drafting, of_stage
from jaxinfer.errors import JaxinferError
from jaxinfer.guesser import Guesser, catch_up_key, catch_up_plan
from jaxinfer.hooked import LOGITS, HookTables
from jaxinfer.hooks import Bound
from jaxinfer.metrics import Metrics
from jaxinfer.models.decoder import Params
from jaxinfer.observe import (
    DISPATCHES_AHEAD,
    InFlight,
    Update,
    faults,
    sequences_of,
    start_of,
    taken,
)
from jaxinfer.packing import Packed, flatten, send
from jaxinfer.page_copies import PageCopies
from jaxinfer.pages import page_keys, pages_for
from jaxinfer.parallel import device_bytes, new_cache, replicate, sizes, stage_config
from jaxinfer.plans import (
    Kind,
    SequenceSpec,
    make_plan,
    padded_tokens,
    step_key,
    together,
    top_bucket,
)
from jaxinfer.runner import Sampled, StepCompiler, StepKey
from jaxinfer.state import (
    EngineState,
    Live,
    check_fits,
    describe,
    keep_running,
    put_pages,
    with_host,
)
from jaxinfer.types import SamplingParams
from jaxinfer.warmup import WarmUp

# How many later sequences a step of priority lets pass at most: nobody waits for ever.
PRIORITY_ARRIVALS = 1000


class Engine:
    """Runs sequences to their end.

    Args:
        params: the model's weights, on the device, or some on the host: see `offload`.
        config: the model.
        limits: sizes; the cache is made to fit them.
        dtype: of the KV cache.
        invariant: see `runner.StepCompiler`.
        event_log: an open file to which the scheduler's events go; see `eventlog`.
        clock: seconds, for `metrics`, and for what guesses are worth.
        drafter: what guesses tokens, `limits.max_guesses` at most; None: nothing does.
        draft: weights of the drafter's model, if it has one.
        costs: see `controller`; with a drafter.
        mesh: devices over which `params` and `draft` are split (`parallel.lay_out`), or the one
            that they lie on; None: the default device.
        link: to the other processes whose devices are in `mesh`, each with an engine made alike;
            they do what this one tells them (`following.follow`). None: there are none.
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
        clock: Callable[[], float] = time.perf_counter,
        drafter: Drafter | None = None,
        draft: Params | None = None,
        costs: Costs | None = None,
        mesh: Mesh | None = None,
        link: Link | None = None,
    ) -> None:
        self._log, self._clock, self._link = event_log, clock, link
        self.config, self.limits = config, limits
        self._params, self._dtype, self._mesh = params, dtype, mesh
        platform = next(iter(jax.tree.leaves(params)[0].devices())).platform
        self._invariant = invariant
        self._buckets = make_buckets(limits, gpu=platform == "gpu")
        self._table_width = pages_for(limits.max_model_len, limits.page_size)
        self.compiler = StepCompiler(
            stage_config(config, mesh), invariant=invariant, platform=platform,
            drafter=of_stage(drafter, config, mesh), mesh=mesh,
            # A collective would wait for a process that still compiles, and not for ever.
            compiled=(lambda: None) if link is None else link.meet,
        )  # fmt: skip
        self._drafter, self._draft = drafter, draft
        self._guesser = None
        if drafter is not None:
            assert costs is not None, "what guesses are worth depends on what they cost"
            self._guesser = Guesser(drafter, limits, self._buckets, costs)
        self.metrics = Metrics(clock, limits.page_size)
        self._weights = b""  # what stands for them in the keys of pages
        self._warmed: tuple[SamplingParams, ...] = ()
        self._variants: tuple[Kind, ...] = ()  # of what was warmed up
        self._ids = itertools.count()
        self._cache = self._new_cache()
        self._copies = PageCopies(self._cache)
        self._hooks = HookTables(
            limits.max_num_seqs, self.compiler.forget, self.compiler.everywhere
        )
        self._clear()

    def _new_cache(self) -> PagedCache:
        limits, drafter = self.limits, self._drafter
        return new_cache(
            self.config, limits.num_pages, limits.page_size, self._dtype, mesh=self._mesh,
            with_tokens=drafter is not None and drafter.reads_text,
        )  # fmt: skip

    def _with_draft(self, seq: SeqState) -> SeqState:
        """Rows of which a draft model has read nothing."""
        if self._drafter is None:
            return seq
        drafting = init_drafting(self._drafter, self.limits, self._dtype, self._mesh)
        return seq._replace(draft=drafting)

    def _clear(self) -> None:
        if self._log is not None:
            eventlog.write_header(self._log, self.limits)
        self._batcher = batcher.create_state(self.limits)
        self._events: list[batcher.Event] = []
        self._live: dict[int, SequenceSpec] = {}
        self._kinds: dict[int, Kind] = {}
        self._outputs: dict[int, list[int]] = {}
        self._scored: dict[int, int] = {}  # prompt tokens whose scores were given out
        self._captured: dict[int, int] = {}  # tokens whose activations were given out
        self._preempted: set[int] = set()
        self._cached: dict[int, int] = {}  # from a sequence's first chunk to its last
        self._in_flight: deque[InFlight] = deque()
        empty = init_state(self.limits.max_num_seqs, self._table_width)
        self._seq = self._with_draft(replicate(empty, self._mesh))
        self._copies.clear()
        if self._guesser is not None:
            self._guesser.reset()
        if any(p.penalised for p in self._warmed):  # programs differ in it
            self.count_penalties()
        self.metrics.reset()

    # -- requests ---------------------------------------------------------------------------

    def submit(
        self, sequences: Iterable[SequenceSpec], ids: Iterable[int] | None = None
    ) -> list[int]:
        """Queues sequences; returns their ids. The caller has validated them.

        `ids`: those that they are to have, each larger than any before; None: the next ones.
        """
        if self._link is not None:
            self._link.check_leads()
        sequences = list(sequences)
        used = {bound.hook for s in self._live.values() for bound in _hooks(s)}
        self._hooks.add((bound.hook for s in sequences for bound in _hooks(s)), used)
        numbers = self._ids if ids is None else ids
        new = {i: sequence for sequence, i in zip(sequences, numbers, strict=False)}
        self._live |= new
        self._kinds |= {i: Kind.of(s.params) for i, s in new.items()}
        self._outputs |= {i: [] for i in new}
        self._scored |= {i: s.score_from for i, s in new.items() if s.score is not None}
        self.metrics.submit({i: len(s.prompt) for i, s in new.items()})
        self._queue(new)
        return list(new)

    def _queue(self, ids: Iterable[int]) -> None:
        """Has live sequences wait, with what they have said so far."""
        ids, hashed = list(ids), {}
        for i in ids:
            # Samples of a request have one prompt.
            spec = self._live[i]
            what = (id(spec.prompt), id(spec.inside), self._whole(spec), *self._outputs[i])
            hashed[i] = hashed[what] = hashed[what] if what in hashed else self._keys(i)
        specs = [self._live[i] for i in ids]
        ranks = [i + PRIORITY_ARRIVALS * s.priority for i, s in zip(ids, specs, strict=True)]
        self._events.append(
            batcher.Submit(
                np.array(ids, np.int64),
                np.array([len(self._tokens(i)) for i in ids], np.int64),
                np.array([s.limit for s in specs], np.int64),
                np.array(ranks, np.int64),
                batcher.objects([hashed[i] for i in ids]),
            )
        )

    def _tokens(self, sequence: int) -> np.ndarray:
        """All that is known of a sequence: its prompt, and what was sampled."""
        prompt, outputs = self._live[sequence].prompt, self._outputs[sequence]
        return np.concatenate([prompt, np.array(outputs, np.int32)]) if outputs else prompt

    @staticmethod
    def _whole(spec: SequenceSpec) -> bool:
        """Whether it is computed whole: it is scored, its activations are wanted, or the device
        must see its tokens for a penalty."""
        captures = spec.inside is not None and bool(spec.inside.capture)
        return captures or spec.score is not None or spec.params.penalised

    def _keys(self, sequence: int) -> np.ndarray:
        """Of the pages of its tokens; none where it is computed whole."""
        spec, tokens = self._live[sequence], self._tokens(sequence)
        return self._page_keys(spec, tokens[: spec.score_from] if self._whole(spec) else tokens)

    def _page_keys(self, spec: SequenceSpec, tokens: np.ndarray) -> np.ndarray:
        """Of the pages that `tokens` fill; none where nothing is to be shared."""
        limits = self.limits
        shared = tokens if limits.prefix_caching else tokens[:0]
        return page_keys(shared, limits.page_size, self._salt(spec))

    def _salt(self, spec: SequenceSpec) -> bytes:
        """Of what its keys and values depend on beside its tokens."""
        if spec.inside is None or spec.inside.change is None:
            return self._weights
        return spec.inside.change.salt(self._hooks.number(spec.inside.change.hook), self._weights)

    def cancel(self, sequence: int, *, complete: bool = False) -> None:
        """Gives a sequence up; unknown or finished ones are left alone.

        `complete`: it has all that was wanted of it, as when a stop string was found.
        """
        if self._live.pop(sequence, None) is not None:
            self._forget(sequence)
            self._events.append(batcher.Cancel(sequence))
            (self.metrics.finish if complete else self.metrics.cancel)(sequence)

    def _forget(self, sequence: int) -> None:
        del self._outputs[sequence], self._kinds[sequence]
        self._scored.pop(sequence, None)
        self._captured.pop(sequence, None)
        self._cached.pop(sequence, None)
        self._preempted.discard(sequence)
        if self._guesser is not None:
            self._guesser.forget(sequence)

    def reset(self) -> None:
        """Forgets every sequence, after a failure or an interrupt in the middle of a step."""
        self._tell("reset")
        # The old caches may have been donated, or hold what a failed computation left.
        for leaf in jax.tree.leaves((self._cache, self._seq.draft)):
            leaf.delete()
        self._clear()
        self._cache = self._new_cache()

    @property
    def params(self) -> Params:
        """The model's weights. They are not to be donated to anything."""
        return self._params

    @property
    def cache_bytes(self) -> int:
        """What the KV cache takes of each device."""
        return device_bytes(self._cache)

    def update_params(self, params: Params) -> None:
        """Takes other weights, of the same shapes: nothing is compiled anew. Pages that are in the
        cache are not found any more.

        Arrays on the device are taken as they are: do not donate them to anything afterwards.
        Others are transferred, one after the other, each into the place of the one that it
        replaces.

        Raises:
            JaxinferError: something runs.
        """
        if self._live:
            raise JaxinferError(f"{len(self._live)} sequences run: update an engine that is idle")
        self._settle()
        old, tree = jax.tree.flatten(self._params)
        new = tree.flatten_up_to(params)
        self._params = {}
        for i, leaf in enumerate(new):
            sharding, old[i] = old[i].sharding, None
            new[i] = _placed(leaf, sharding)
        self._params = jax.tree.unflatten(tree, new)
        self._weights = secrets.token_bytes(16)

    # -- to go on later ---------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Dispatches whose results have not been read."""
        return len(self._in_flight)

    def snapshot(self, *, pages: bool) -> EngineState:
        """The engine as plain data, a copy of its own; the engine can go on.

        Args:
            pages: with the KV cache's pages in use. Without, what runs is computed anew later.

        Raises:
            JaxinferError: something is in flight. `read` it first, so that its
                updates reach whoever waits for them.
        """
        if self._in_flight:
            raise JaxinferError(
                f"{len(self._in_flight)} dispatches are in flight: read them by "
                "Engine.read before a snapshot"
            )
        hooked = [i for i, spec in self._live.items() if spec.inside is not None]
        if hooked:
            raise JaxinferError(
                f"sequences {hooked} have functions of their own or capture activations, which "
                "cannot be written: let them finish first"
            )
        next_id = next(self._ids)
        self._ids = itertools.count(next_id)
        live = tuple(
            Live(i, spec, tuple(self._outputs[i]), self._scored.get(i), self._cached.get(i))
            for i, spec in self._live.items()
        )
        running = None
        if pages:
            # What a draft has read, it can read again.
            seq = self._seq._replace(draft=None)
            running = keep_running(self._batcher, self._events, seq, self._cache)
        return EngineState(self._described(), self.limits, next_id, live, running)

    def restore(self, state: EngineState) -> None:
        """Goes on from a snapshot, of this engine or another. Sequences keep their ids.

        Raises:
            JaxinferError, CapacityError: something runs already; the state does not fit this
                engine (see `state.check_fits`), or it speculates otherwise; or the state has pages,
                and there is an event log.
        """
        if self._live:
            raise JaxinferError(f"restore an engine that is idle: {len(self._live)} sequences run")
        if state.running is not None and self._log is not None:
            raise JaxinferError(
                "an event log begins with an empty scheduler: restore a state with pages into an "
                "engine without one"
            )
        check_fits(state, self._described(), self.limits)
        running = state.running
        if running is not None and (running.pages.tokens is None) != (self._cache.tokens is None):
            raise JaxinferError(
                "only one of the saved pages and this engine's has the text beside them: restore a "
                "state without pages, or into an engine that speculates in the same way"
            )
        self._settle()
        self._ids = itertools.count(max(state.next_id, next(self._ids)))
        self._live = {live.id: live.spec for live in state.live}
        self._kinds = {i: Kind.of(spec.params) for i, spec in self._live.items()}
        self._outputs = {live.id: list(live.outputs) for live in state.live}
        self._scored = {live.id: live.scored for live in state.live if live.scored is not None}
        self.metrics.submit({i: len(spec.prompt) for i, spec in self._live.items()})
        if state.running is None:
            if self._live:
                self._queue(self._live)
            return
        try:
            self._cached = {live.id: live.cached for live in state.live if live.cached is not None}
            self._batcher = with_host(state.running.scheduler, self.limits.host_slots)
            self._copies.clear()
            self._events = list(state.running.events)
            copy = partial(jnp.array, device=self.compiler.everywhere)
            self._seq = jax.tree.map(copy, state.running.seq)._replace(draft=self._seq.draft)
            if self._guesser is not None:
                self._guesser.restored({i: len(self._tokens(i)) for i in self._live})
            self._cache = put_pages(state.running, self._cache)
        except BaseException:
            self.reset()
            raise

    def _settle(self) -> None:
        """Reads what was computed in vain; nothing is live."""
        while not self.idle:
            self.step()

    def _described(self) -> dict[str, Any]:
        return describe(
            self._params, self.config, kv_dtype=self._dtype, invariant=self._invariant,
            parallel=sizes(self._mesh),
        )  # fmt: skip

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

    def warm_up(self, params: Sequence[SamplingParams]) -> WarmUp:
        """Compiles all that requests with such parameters may need, and runs it once.

        Args:
            params: one for each kind of request; see `warmup.variants`.

        Raises:
            JaxinferError: something runs already.
        """
        if self._live:
            raise JaxinferError("warm up an engine before it runs anything, or when it is idle")
        self._settle()
        began, before = time.perf_counter(), self.compiler.count
        if any(p.penalised for p in params):
            self.count_penalties()
        keys = warmup.step_keys(
            params, limits=self.limits, buckets=self._buckets, invariant=self._invariant,
            guesses=() if self._guesser is None else self._guesser.choices,
        )  # fmt: skip
        behind: dict[StepKey, Plan] = {}
        if self._draft is not None:
            sizes = itertools.product(self._buckets.tokens, self._buckets.pages)
            behind = dict(self._catching_up([], tokens, pages) for tokens, pages in sizes)
        self.compile([*keys, *behind])
        found = warmup.probed(
            keys, warmup.probe(self.limits, self.config.vocab_size), self.limits,
            run=self._dispatch, cache=lambda: self._cache,
        )  # fmt: skip
        for key, plan in behind.items():
            self._dispatch(key, plan)
        if self.limits.host_slots:
            self._cache = self._copies.warm_up(self._cache)
        self._warmed = (*self._warmed, *params)
        self._variants = warmup.variants(self._warmed)
        self.reset()
        unequal = [key for key, bits in found.items() if bits != found[keys[0]]]
        return WarmUp(
            self.compiler.count - before, time.perf_counter() - began, self.compiler.step_bytes,
            tuple(unequal) if self._invariant else (),
        )  # fmt: skip

    def compile(self, keys: Sequence[StepKey]) -> None:
        """Compiles steps; see `StepCompiler.compile_all`."""
        self._tell("compile", keys=[asdict(key) for key in keys])
        self.compiler.compile_all(
            keys, self.some_plan, self._params, self._cache, self._seq, draft=self._draft
        )

    def some_plan(self, key: StepKey) -> Plan:
        """A plan in the shapes of a key."""
        if key.catch_up:
            return catch_up_plan((), key, self.limits)
        probe = warmup.probe(self.limits, self.config.vocab_size)
        return warmup.probe_plan(probe, key, self.limits)

    def count_penalties(self) -> None:
        """Has the state count tokens from now on, if it does not."""
        if self._seq.penalties is None:
            M, V = self.limits.max_num_seqs, self.config.vocab_size
            none = replicate(init_penalties(M, V), self._mesh)
            self._seq = self._seq._replace(penalties=none)

    # -- the loop ---------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Keeps the device busy and reads its oldest results.

        They may be none: a chunk of a prompt, or a sequence given up meanwhile.
        """
        self.fill()
        return self.read()

    def fill(self) -> None:
        """Begins as much as the device is to have before it; waits for nothing."""
        while len(self._in_flight) < DISPATCHES_AHEAD:
            self._say_guesses()
            action = self._schedule()
            if action is None:
                break
            self._in_flight.append(self._run(action))
            key = self._in_flight[-1].key
            self.metrics.dispatch(action, self._batcher, padded_tokens(key))

    @property
    def ready(self) -> bool:
        """Whether there are results that `read` need not wait for."""
        if not self._in_flight:
            return False
        tokens = self._in_flight[0].sampled.tokens
        return tokens.is_ready()  # pyright: ignore[reportAttributeAccessIssue]

    def read(self) -> list[Update]:
        """As `step`, but nothing new is begun."""
        if not self._in_flight:
            return []
        late = self.ready
        return self._observe(self._in_flight.popleft(), late=late)

    def _say_guesses(self) -> None:
        if self._guesser is not None:
            wanted = self._guesser.wanted(self._batcher, self._live)
            if wanted != self._batcher.guesses:
                self._events.append(batcher.Guess(wanted))

    def _schedule(self) -> batcher.Run | None:
        events, self._events = tuple(self._events), []
        self._batcher, actions = batcher.step(self._batcher, events, self.limits)
        if self._log is not None and (events or actions):
            eventlog.write_step(self._log, events, actions)
        run = None
        for action in actions:
            match action:
                case batcher.Run():
                    run = action
                case batcher.Move():
                    self._cache = self._copies.move(action, self._cache)
                    self.metrics.move(len(action.stores), len(action.loads))
                case batcher.Preempt():
                    self._preempted.add(action.id)
                    self.metrics.preempt(action.id)
                case batcher.Refuse():
                    raise AssertionError("the API checks the queue before it submits")
        self._return_preempted()
        return run

    def _return_preempted(self) -> None:
        """Those of which no results are on their way may wait again."""
        if not self._preempted:
            return
        on_the_way = {i for done in self._in_flight for i in sequences_of(done.action)}
        for sequence in sorted(self._preempted - on_the_way):
            self._preempted.remove(sequence)
            tokens = len(self._live[sequence].prompt) + len(self._outputs[sequence])
            self._events.append(batcher.Return(sequence, tokens, self._keys(sequence)))

    def _run(self, action: batcher.Run) -> InFlight:
        reading = [chunk.id for chunk in action.chunks]
        specs = {i: self._live[i] for i in reading}
        if any(s.params.penalised for s in specs.values()):
            self.count_penalties()
        kind = together(self._kinds[i] for i in sequences_of(action) if i in self._kinds)
        scores = [s.score for s in specs.values() if s.score is not None]
        inside = {
            i: s for i in sequences_of(action) if (s := self._live.get(i)) and s.inside is not None
        }
        key = step_key(
            action,
            warmup.covering(self._variants, kind),
            top_bucket(max(scores, default=None)),
            [s.inside for s in inside.values() if s.inside is not None],
            limits=self.limits, buckets=self._buckets, invariant=self._invariant,
        )  # fmt: skip
        for chunk in action.chunks:
            if chunk.first:
                self._hooks.note(chunk.row, _hooks(specs[chunk.id]))
        known = {i: self._tokens(i) for i in reading}
        guessed, under_way = np.zeros(len(action.ids), bool), bool(self._in_flight)
        if self._guesser is not None:
            guessed = self._guesser.guessed(action, self._live)
            if action.guesses:
                rows, sizes = self._guesser.behind(action, self._live)
                for tokens in sizes:
                    self._dispatch(*self._catching_up(rows, tokens, key.pages))
                under_way = under_way and not sizes
            self._guesser.dispatched(action, guessed)
        plan = make_plan(
            action, key, inside | specs, known, table_width=self._table_width, guessed=guessed
        )
        return InFlight(action, key, self._dispatch(key, plan), guessed, under_way)

    def _catching_up(self, rows: Sequence[int], tokens: int, pages: int) -> tuple[StepKey, Plan]:
        """A dispatch in which the draft reads so many tokens of some rows."""
        limits = self.limits
        key = catch_up_key(
            tokens, pages, buckets=self._buckets, limits=limits, invariant=self._invariant
        )
        return key, catch_up_plan(rows, key, limits)

    def _dispatch(self, key: StepKey, plan: Plan) -> Sampled:
        flat = flatten(plan)
        if self._link is not None:
            self._tell("run", flat.words.tobytes(), key=asdict(key))
        sampled = self.run(key, flat)
        for leaf in jax.tree.leaves(sampled):
            leaf.copy_to_host_async()
        return sampled

    def run(self, key: StepKey, plan: Packed) -> Sampled:
        """Has the device run a step; `plan` is on the host (`packing.flatten`)."""
        self._cache, self._seq, sampled = self.compiler.run(
            key, self._params, self._cache, self._seq, send(plan, self.compiler.everywhere),
            self._hooks.tables(key.hooks), self._draft,
        )  # fmt: skip
        return sampled

    def _tell(self, name: str, payload: bytes = b"", **told: Any) -> None:
        """The other processes, if there are any and this is their controller."""
        if self._link is not None and self._link.leads:
            penalised = self._seq.penalties is not None
            self._link.send(name, payload, penalised=penalised, **told)

    # -- results ----------------------------------------------------------------------------

    def _observe(self, done: InFlight, *, late: bool) -> list[Update]:
        tokens, rows = np.asarray(done.sampled.tokens), done.key.rows
        following = tokens[:, rows : rows + len(done.action.chunks)]
        attempted = done.sampled.attempted
        if attempted is not None:
            attempted = np.asarray(attempted)[:, : len(done.action.ids)]
        self.metrics.observe(tokens[:, : len(done.action.ids)], following, attempted)
        columns = tokens.T.tolist()
        if self._guesser is not None:
            self._guesser.observed(done, now=self._clock(), late=late)
        updates = self._fail(done)
        for place, sequence in enumerate(done.action.ids.tolist()):
            if sequence in self._live and columns[place][0] >= 0:  # neither given up nor ended
                at = len(self._live[sequence].prompt) + len(self._outputs[sequence]) - 1
                update = self._update(sequence, columns[place], place, done.sampled)
                count = len(update.tokens)
                seen = self._seen(sequence, at, count, done, np.s_[:count, place])
                updates.append(update._replace(activations=seen))
        for place, chunk in enumerate(done.action.chunks, done.key.rows):
            if chunk.id in self._live:
                updates += self._read(chunk, columns[place], place, done)
        finished = [u.id for u in updates if u.finished and u.fault is None]
        if finished:
            known = [self._page_keys(self._live[i], self._tokens(i)[:-1]) for i in finished]
            keys = batcher.objects(known)
            self._events.append(batcher.Finished(np.array(finished, np.int64), keys))
        for sequence in finished:
            del self._live[sequence]
            self._forget(sequence)
            self.metrics.finish(sequence)
        if done.action.guesses:
            self._tell_progress(done.action.ids.tolist())
        self._return_preempted()
        return updates

    def _tell_progress(self, ids: Sequence[int]) -> None:
        """How many tokens sequences have come to have, where the scheduler can but guess."""
        going = [i for i in ids if i in self._live]
        if not going:
            return
        known = np.array([len(self._live[i].prompt) + len(self._outputs[i]) for i in going])
        limits = np.array([self._live[i].limit for i in going])
        least, most = known.copy(), known.copy()
        for done in self._in_flight:
            on_the_way = np.isin(going, done.action.ids)
            least += on_the_way * done.action.steps
            most += on_the_way * done.action.steps * (done.action.guesses + 1)
        bounds = (np.minimum(x, limits) for x in (least, most))
        self._events.append(batcher.Progress(np.array(going, np.int64), *bounds))

    def _read(
        self, chunk: batcher.Prefill, column: list[int], place: int, done: InFlight
    ) -> list[Update]:
        """News of a chunk: scores of its tokens, and the token after the last of them."""
        scores = self._scores(chunk, done)
        if chunk.first:
            again = bool(self._outputs[chunk.id])
            self._cached[chunk.id] = 0 if again else chunk.start
        count = chunk.stop - chunk.start
        at = start_of(done.action, chunk)
        seen = self._seen(chunk.id, chunk.start, count, done, np.s_[0, at : at + count])
        if not chunk.last:
            update = Update(chunk.id, [], None, scores, False, activations=seen)
            return [update] if scores is not None or seen is not None else []
        update = self._update(chunk.id, column, place, done.sampled)
        cached = self._cached.pop(chunk.id)
        return [update._replace(scores=scores, cached=cached, activations=seen)]

    def _seen(
        self, id: int, start: int, count: int, done: InFlight, where: Any
    ) -> dict[str, np.ndarray] | None:
        """A sequence's activations from position `start` on, which lie at `where`; what was given
        out before a preemption is left out."""
        inside = self._live[id].inside
        if inside is None or not inside.capture:
            return None
        new = max(0, self._captured.get(id, 0) - start)
        self._captured[id] = max(start + count, self._captured.get(id, 0))
        # Copies: a view would keep all of the step in memory.
        captured = done.sampled.captured
        return {site: np.asarray(captured[site])[where][new:].copy() for site in inside.capture}

    def _fail(self, done: InFlight) -> list[Update]:
        """Ends the sequences whose functions went wrong, and those that would have found the same
        if they did not share pages."""
        updates = []
        for fault in faults(done):
            if fault.sequence not in self._live:
                continue
            alike = [fault.sequence] if fault.site == LOGITS else self._alike(*fault[:2])
            for i in alike:
                self.cancel(i)
                updates.append(Update(i, [], None, None, True, fault=fault.site))
        return updates

    def _alike(self, sequence: int, position: int) -> list[int]:
        """Live sequences that go through an intervention as this one does up to `position`, itself
        among them; what they wrote is not found again."""
        spec, tokens = self._live[sequence], self._tokens(sequence)
        new = position >= len(tokens)  # nobody shares what the host has not read yet
        if new or spec.inside is None or spec.inside.change is None:
            return [sequence]
        salt, tokens = self._salt(spec), tokens[: position + 1]
        found = [
            i for i, other in self._live.items()
            if other.inside is not None and other.inside.change is not None
            and self._salt(other) == salt
            and np.array_equal(self._tokens(i)[: position + 1], tokens)
        ]  # fmt: skip
        self._hooks.renumber(spec.inside.change.hook)
        return found

    def _scores(self, chunk: batcher.Prefill, done: InFlight) -> sampling.Logprobs | None:
        """Of the chunk's prompt tokens; those that were given out before a preemption are not given
        out again, and what follows the prompt's last token is no part of it."""
        spec = self._live[chunk.id]
        if spec.score is None:
            return None
        before, last = self._scored[chunk.id], len(spec.prompt) - 1
        begin, end = max(before, chunk.start), min(chunk.stop, last)
        if begin >= end and before:
            return None
        self._scored[chunk.id] = max(before, end)
        at = start_of(done.action, chunk) - chunk.start
        return taken(done.sampled.scores, slice(at + begin, at + max(begin, end)), spec.score)

    def _update(self, id: int, column: list[int], place: int, sampled: Sampled) -> Update:
        """Notes the tokens of a sequence, those of column `place`."""
        spec = self._live[id]
        there = [i for i, token in enumerate(column) if token >= 0]
        tokens, logprobs = [column[i] for i in there], None
        if spec.params.logprobs is not None and tokens:
            logprobs = taken(sampled.logprobs, (there, place), spec.params.logprobs)
        self._outputs[id] += tokens
        self.metrics.give(id, len(tokens))
        ended = len(spec.prompt) + len(self._outputs[id]) >= spec.limit
        stopped = bool(tokens) and tokens[-1] in spec.stop_ids
        return Update(id, tokens, logprobs, None, ended or stopped)


def _placed(leaf: Any, sharding: Any) -> jax.Array:
    """An array of the device as it is, or a copy of one of the host, whose owner may change it."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    return jax.block_until_ready(jax.device_put(np.array(leaf), sharding))


def _hooks(spec: SequenceSpec) -> list[Bound]:
    return [] if spec.inside is None else spec.inside.hooks
