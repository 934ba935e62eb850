"""Several engines as one: replicas of a model, each on its own devices, behind one queue (ADR 013).

One thread drives them all. It never waits for one of them while another has results to be read or
room for more: what each has begun keeps its devices busy meanwhile.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxinfer import router
from jaxinfer.config import BatcherConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import JaxinferError
from jaxinfer.metrics import Together
from jaxinfer.models.decoder import Params
from jaxinfer.observe import Update
from jaxinfer.pages import numbers, page_keys
from jaxinfer.plans import SequenceSpec
from jaxinfer.runner import StepCompiler
from jaxinfer.state import EngineState, Live, check_fits
from jaxinfer.types import SamplingParams
from jaxinfer.warmup import WarmUp

# Between two looks for results. A device has a dispatch more to run when one has ended.
LOOK_S = 5e-5


class Replicas:
    """What `LLM` needs of an `Engine`, of several that are alike. See there for each method.

    A sequence runs on one replica, and its tokens are those that any other would give it.

    Args:
        engines: of the same weights and limits, idle.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)
        self._router = self._new_router()
        self._ids = itertools.count()
        self._where: dict[int, tuple[int, int]] = {}  # replica, and what `router.ended` is told
        self._last = -1  # whose results were read last

    def _new_router(self) -> router.RouterState:
        return router.create(len(self.engines), self.limits.num_pages + self.limits.host_slots)

    @property
    def limits(self) -> BatcherConfig:
        """Of each replica; but `max_waiting` is for all together."""
        return self.engines[0].limits

    @property
    def compiler(self) -> StepCompiler:
        """Of the first replica; the others have compiled what they needed."""
        return self.engines[0].compiler

    @property
    def params(self) -> Params:
        """The weights of the first replica."""
        return self.engines[0].params

    @property
    def cache_bytes(self) -> int:
        return self.engines[0].cache_bytes

    @property
    def metrics(self) -> Together:
        return Together([engine.metrics for engine in self.engines])

    @property
    def in_flight(self) -> int:
        return sum(engine.in_flight for engine in self.engines)

    @property
    def waiting(self) -> int:
        return sum(engine.waiting for engine in self.engines)

    # -- requests ---------------------------------------------------------------------------

    def submit(self, sequences: Iterable[SequenceSpec]) -> list[int]:
        sequences = list(sequences)
        ids = list(itertools.islice(self._ids, len(sequences)))
        for engine, share in zip(self.engines, self._routed(ids, sequences), strict=True):
            if share:
                engine.submit([sequences[at] for at in share], [ids[at] for at in share])
        return ids

    def _routed(self, ids: Sequence[int], specs: Sequence[SequenceSpec]) -> list[list[int]]:
        """For each replica, which of these sequences, by their places, it has been given."""
        shares: list[list[int]] = [[] for _ in self.engines]
        size = self.limits.page_size if self.limits.prefix_caching else None
        for some in _requests(specs):
            prompt = specs[some[0]].prompt
            keys = [] if size is None else numbers(page_keys(prompt, size))
            # The prompt is computed once.
            tokens = [specs[at].limit - len(prompt) * (at > some[0]) for at in some]
            self._router, replica = router.route(self._router, router.Request(sum(tokens), keys))
            self._where |= {ids[at]: (replica, n) for at, n in zip(some, tokens, strict=True)}
            shares[replica] += some
        return shares

    def cancel(self, sequence: int, *, complete: bool = False) -> None:
        if sequence in self._where:
            self.engines[self._end(sequence)].cancel(sequence, complete=complete)

    def _end(self, sequence: int) -> int:
        """Notes that a sequence has ended; returns its replica."""
        replica, tokens = self._where.pop(sequence)
        self._router = router.ended(self._router, replica, tokens)
        return replica

    def reset(self) -> None:
        for engine in self.engines:
            engine.reset()
        self._where.clear()
        self._router = self._new_router()

    def update_params(self, params: Params) -> None:
        self._check_idle("update")
        first, *others = self.engines
        first.update_params(params)
        for engine in others:  # from device to device
            engine.update_params(first.params)
        self._router = router.forget(self._router)

    def _check_idle(self, what: str) -> None:
        if self._where:
            raise JaxinferError(f"{len(self._where)} sequences run: {what} engines that are idle")

    # -- to go on later ---------------------------------------------------------------------

    def snapshot(self, *, pages: bool) -> EngineState:
        """As `Engine.snapshot`, without pages: a state for any number of replicas, or an engine.

        Raises:
            JaxinferError: `pages`; or as there.
        """
        if pages:
            raise JaxinferError(
                f"data_parallel_size={len(self.engines)}: pages of several replicas are not kept: "
                "expected pages=False"
            )
        states = [engine.snapshot(pages=False) for engine in self.engines]
        next_id = next(self._ids)
        self._ids = itertools.count(next_id)
        live = sorted((one for state in states for one in state.live), key=lambda one: one.id)
        return states[0]._replace(next_id=next_id, live=tuple(live))

    def restore(self, state: EngineState) -> None:
        """As `Engine.restore`, of a state without pages, of however many replicas.

        Raises:
            JaxinferError: the state has pages; or as there.
        """
        self._check_idle("restore")
        if state.running is not None:
            raise JaxinferError(
                f"data_parallel_size={len(self.engines)}: the saved state has the pages of one "
                "engine: expected one saved with pages=False, or data_parallel_size=1"
            )
        check_fits(state, state.model, self.limits)  # all of it; each engine looks at the model
        live = state.live
        shares = self._routed([one.id for one in live], [one.spec for one in live])
        try:
            for engine, share in zip(self.engines, shares, strict=True):
                mine: list[Live] = [live[at] for at in share]
                engine.restore(state._replace(live=tuple(mine)))
        except BaseException:
            self.reset()
            raise
        self._ids = itertools.count(max(state.next_id, next(self._ids)))

    def warm_up(self, params: Sequence[SamplingParams]) -> WarmUp:
        """As `Engine.warm_up`, of all replicas at the same time: each compiles for its devices."""
        self._check_idle("warm up")
        began = time.perf_counter()
        with ThreadPoolExecutor(len(self.engines)) as pool:
            done = list(pool.map(lambda engine: engine.warm_up(params), self.engines))
        self._router = router.forget(self._router)
        return WarmUp(
            sum(one.programs for one in done),
            time.perf_counter() - began,
            max(one.step_bytes for one in done),
            tuple(key for one in done for key in one.unequal),
        )

    # -- the loop ---------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Keeps all devices busy, and reads the oldest results of one replica that has some."""
        for engine in self.engines:
            engine.fill()
        return self.read()

    def read(self) -> list[Update]:
        """As `step`, but nothing new is begun."""
        place = self._ready()
        if place is None:
            return []
        self._last = place
        updates = self.engines[place].read()
        for update in updates:
            if update.finished:
                self._end(update.id)
        return updates

    def _ready(self) -> int | None:
        """The replica whose turn it is, of those with results; waits for them. None: nothing is
        under way."""
        count = len(self.engines)
        turns = [(self._last + 1 + i) % count for i in range(count)]
        busy = [place for place in turns if self.engines[place].in_flight]
        while len(busy) > 1:
            for place in busy:
                if self.engines[place].ready:
                    return place
            time.sleep(LOOK_S)
        return busy[0] if busy else None


def _requests(specs: Sequence[SequenceSpec]) -> Iterator[list[int]]:
    """Places of the samples of each request, which are numbered and come one after the other."""
    some: list[int] = []
    for at, spec in enumerate(specs):
        last = specs[some[-1]] if some else spec
        if some and (spec.sample <= last.sample or not np.array_equal(spec.prompt, last.prompt)):
            yield some
            some = []
        some.append(at)
    if some:
        yield some
