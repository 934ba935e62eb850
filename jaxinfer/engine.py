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

from jaxinfer import batcher, eventlog, warmup
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
from jaxinfer.metrics import Metrics
from jaxinfer.models.decoder import Params
from jaxinfer.observe import (
    DISPATCHES_AHEAD,
    InFlight,
    Update,
    faults,
    sequences_of,
    start_of,
)
from jaxinfer.packing import Packed, flatten, send
from jaxinfer.page_copies import PageCopies
from jaxinfer.pages import page_keys, pages_for
from jaxinfer.parallel import connected, device_bytes, new_cache, replicate, sizes, stage_config
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
from jaxinfer.sequences import (
    Tracked,
    hooks_of,
    take_activations,
    take_scores,
    take_tokens,
    track,
)
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
            drafter=of_stage(drafter, config, mesh), mesh=mesh, peers=connected(mesh),
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
        self._live: dict[int, Tracked] = {}
        self._preempted: set[int] = set()
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
        used = {bound.hook for one in self._live.values() for bound in hooks_of(one.spec)}
        self._hooks.add((bound.hook for spec in sequences for bound in hooks_of(spec)), used)
        numbers = self._ids if ids is None else ids
        new = {i: track(spec) for spec, i in zip(sequences, numbers, strict=False)}
        self._live |= new
        self.metrics.submit({i: len(one.spec.prompt) for i, one in new.items()})
        self._queue(new)
        return list(new)

    def _queue(self, ids: Iterable[int]) -> None:
        """Has live sequences wait, with what they have said so far."""
        ids, hashed = list(ids), {}
        for i in ids:
            # Samples of a request have one prompt.
            one = self._live[i]
            what = (id(one.spec.prompt), id(one.spec.inside), one.whole, *one.outputs)
            hashed[i] = hashed[what] = hashed[what] if what in hashed else self._keys(one)
        some = [self._live[i] for i in ids]
        ranks = [i + PRIORITY_ARRIVALS * x.spec.priority for i, x in zip(ids, some, strict=True)]
        self._events.append(
            batcher.Submit(
                np.array(ids, np.int64),
                np.array([len(one) for one in some], np.int64),
                np.array([one.spec.limit for one in some], np.int64),
                np.array(ranks, np.int64),
                batcher.objects([hashed[i] for i in ids]),
            )
        )

    def _keys(self, one: Tracked) -> np.ndarray:
        """Of the pages of its tokens; none where it is computed whole."""
        tokens = one.tokens
        return self._page_keys(one.spec, tokens[: one.spec.score_from] if one.whole else tokens)

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
        if sequence in self._live:
            self._forget(sequence)
            self._events.append(batcher.Cancel(sequence))
            (self.metrics.finish if complete else self.metrics.cancel)(sequence)

    def _forget(self, sequence: int) -> None:
        del self._live[sequence]
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
        hooked = [i for i, one in self._live.items() if one.spec.inside is not None]
        if hooked:
            raise JaxinferError(
                f"sequences {hooked} have functions of their own or capture activations, which "
                "cannot be written: let them finish first"
            )
        next_id = next(self._ids)
        self._ids = itertools.count(next_id)
        live = tuple(
            Live(i, one.spec, tuple(one.outputs), one.scored, one.cached)
            for i, one in self._live.items()
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
        self._live = {
            one.id: Tracked(one.spec, list(one.outputs), one.scored) for one in state.live
        }
        self.metrics.submit({one.id: len(one.spec.prompt) for one in state.live})
        if state.running is None:
            if self._live:
                self._queue(self._live)
            return
        try:
            for one in state.live:
                self._live[one.id].cached = one.cached
            self._batcher = with_host(state.running.scheduler, self.limits.host_slots)
            self._copies.clear()
            self._events = list(state.running.events)
            copy = partial(jnp.array, device=self.compiler.everywhere)
            self._seq = jax.tree.map(copy, state.running.seq)._replace(draft=self._seq.draft)
            if self._guesser is not None:
                self._guesser.restored({i: len(one) for i, one in self._live.items()})
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
            one = self._live[sequence]
            self._events.append(batcher.Return(sequence, len(one), self._keys(one)))

    def _run(self, action: batcher.Run) -> InFlight:
        live = {i: self._live[i] for i in sequences_of(action) if i in self._live}
        reading = {chunk.id: self._live[chunk.id] for chunk in action.chunks}
        if any(one.spec.params.penalised for one in reading.values()):
            self.count_penalties()
        scores = [s for one in reading.values() if (s := one.spec.score) is not None]
        inside = {i: one.spec for i, one in live.items() if one.spec.inside is not None}
        key = step_key(
            action,
            warmup.covering(self._variants, together(one.kind for one in live.values())),
            top_bucket(max(scores, default=None)),
            [spec.inside for spec in inside.values() if spec.inside is not None],
            limits=self.limits, buckets=self._buckets, invariant=self._invariant,
        )  # fmt: skip
        for chunk in action.chunks:
            if chunk.first:
                self._hooks.note(chunk.row, hooks_of(reading[chunk.id].spec))
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
            action, key, inside | {i: one.spec for i, one in reading.items()},
            {i: one.tokens for i, one in reading.items()},
            table_width=self._table_width, guessed=guessed,
        )  # fmt: skip
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
                one = self._live[sequence]
                at = len(one) - 1
                update = take_tokens(one, sequence, columns[place], place, done.sampled)
                count = len(update.tokens)
                self.metrics.give(sequence, count)
                where = np.s_[:count, place]
                seen = take_activations(one, at, count, done.sampled, where)
                updates.append(update._replace(activations=seen))
        for place, chunk in enumerate(done.action.chunks, done.key.rows):
            if chunk.id in self._live:
                updates += self._read(chunk, columns[place], place, done)
        finished = [u.id for u in updates if u.finished and u.fault is None]
        if finished:
            ended = [self._live[i] for i in finished]
            keys = batcher.objects([self._page_keys(one.spec, one.tokens[:-1]) for one in ended])
            self._events.append(batcher.Finished(np.array(finished, np.int64), keys))
        for sequence in finished:
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
        known = np.array([len(self._live[i]) for i in going])
        limits = np.array([self._live[i].spec.limit for i in going])
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
        one = self._live[chunk.id]
        scores = take_scores(one, chunk, done)
        if chunk.first:
            one.cached = 0 if one.outputs else chunk.start
        count = chunk.stop - chunk.start
        at = start_of(done.action, chunk)
        where = np.s_[0, at : at + count]
        seen = take_activations(one, chunk.start, count, done.sampled, where)
        if not chunk.last:
            update = Update(chunk.id, [], None, scores, False, activations=seen)
            return [update] if scores is not None or seen is not None else []
        update = take_tokens(one, chunk.id, column, place, done.sampled)
        self.metrics.give(chunk.id, len(update.tokens))
        cached, one.cached = one.cached, None
        assert cached is not None, "its first chunk comes first"
        return [update._replace(scores=scores, cached=cached, activations=seen)]

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
        spec, tokens = self._live[sequence].spec, self._live[sequence].tokens
        new = position >= len(tokens)  # nobody shares what the host has not read yet
        if new or spec.inside is None or spec.inside.change is None:
            return [sequence]
        salt, tokens = self._salt(spec), tokens[: position + 1]
        found = [
            i for i, other in self._live.items()
            if other.spec.inside is not None and other.spec.inside.change is not None
            and self._salt(other.spec) == salt
            and np.array_equal(other.tokens[: position + 1], tokens)
        ]  # fmt: skip
        self._hooks.renumber(spec.inside.change.hook)
        return found


def _placed(leaf: Any, sharding: Any) -> jax.Array:
    """An array of the device as it is, or a copy of one of the host, whose owner may change it."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    return jax.block_until_ready(jax.device_put(np.array(leaf), sharding))
