"""Users' functions in a compiled step: whom each is for, what it changes, and where it went wrong.

Letters: T tokens and S = R + Q sequences of one step, M rows of state, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from jaxinfer.batch import Batch, Plan
from jaxinfer.hooks import Bound, Hook, Rows, Where, changed_sites
from jaxinfer.models.sites import Change

NO_FAULT = np.int32(2**30)
KEPT_HOOKS = 16  # with their programs
# Of what an intervention makes. From there on nothing overflows in float32 or bfloat16, so that no
# NaN is written to a page, which outlives its sequence.
LARGEST = 1e15
LOGITS = "logits"  # where a fault is found that no site has


class Owners(NamedTuple):
    """Which of a step's hooks each of its tokens, or sequences, is for.

    Attributes:
        change, logits: int32; place among the hooks, -1: none.
        row: int32; row of state.
    """

    change: Array
    logits: Array
    row: Array


class Hooked(NamedTuple):
    """A step and its hooks.

    Attributes:
        tables: of each hook; see `table`.
        slots: int32 [T]; the sequence of each token, -1: of padding.
        sequences, tokens: whom the hooks are for, [S] and [T].
        positions: int32 [T].
        bad: filled while the forward is traced: by site, the tokens of which something is beyond
            `LARGEST`, bool [T].
    """

    hooks: tuple[Hook, ...]
    tables: Sequence[Any]
    slots: Array
    sequences: Owners
    tokens: Owners
    positions: Array
    bad: dict[str, Array]


def table(hook: Hook, rows: int, place: Sharding | None = None) -> tuple[Array, ...]:
    """Room for the `aux` of every row of state: [M, …] each, zeros; on `place`."""
    return tuple(jnp.zeros((rows, *shape), kind, device=place) for shape, kind in hook.leaves)


@partial(jax.jit, donate_argnums=0)
def noted(table: tuple[Array, ...], row: Array, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """The table, which is donated, with one request's arrays in a row."""
    return tuple(x.at[row].set(y) for x, y in zip(table, arrays, strict=True))


class HookTables:
    """The hooks of an engine and their tables: part of its loop, and mutable as that is.

    Args:
        rows: of state.
        forget: called with a hook that is let go of.
        place: where the tables lie; None: on the default device.
    """

    def __init__(
        self, rows: int, forget: Callable[[Hook], None], place: Sharding | None = None
    ) -> None:
        self._rows, self._forget, self._place = rows, forget, place
        self._numbers = itertools.count(1)
        self._known: dict[Hook, tuple[int, tuple[Array, ...]]] = {}

    def add(self, hooks: Iterable[Hook], used: Collection[Hook]) -> None:
        """Makes room for hooks. Of more than `KEPT_HOOKS` those added longest ago are let go of,
        but for `used` ones."""
        for hook in (new := dict.fromkeys(hooks)):
            found = self._known.pop(hook, None)
            self._known[hook] = found or (next(self._numbers), table(hook, self._rows, self._place))
        old = [hook for hook in self._known if hook not in used and hook not in new]
        for hook in old[: max(0, len(self._known) - KEPT_HOOKS)]:
            del self._known[hook]
            self._forget(hook)

    def number(self, hook: Hook) -> int:
        """Of a hook, unlike that of any other."""
        return self._known[hook][0]

    def renumber(self, hook: Hook) -> None:
        """Gives it a number that no page was written under."""
        self._known[hook] = (next(self._numbers), self._known[hook][1])

    def note(self, row: int, bounds: Iterable[Bound]) -> None:
        """Writes the `aux` of a request that gets a row."""
        for bound in bounds:
            number, found = self._known[bound.hook]
            if bound.arrays:
                found = noted(found, np.int32(row), bound.arrays)
            self._known[bound.hook] = (number, found)

    def tables(self, hooks: Iterable[Hook]) -> tuple[Any, ...]:
        """Of each hook."""
        return tuple(self._known[hook][1] for hook in hooks)


def hook_up(hooks: tuple[Hook, ...], tables: Sequence[Any], plan: Plan, batch: Batch) -> Hooked:
    """The hooks of one step; `plan.hooked` says whom they are for."""
    row, slots = jnp.asarray(plan.rows), jnp.arange(len(batch.tokens))
    slots = jnp.where(slots < plan.count, slots, -1)
    if plan.chunks is not None:
        owner = jnp.asarray(plan.chunks.owner)
        slots = jnp.where(owner >= 0, len(row) + owner, slots)
        row = jnp.concatenate([row, plan.chunks.row])
    sequences = Owners(plan.hooked[0], plan.hooked[1], row)
    change, logits, row = jax.tree.map(lambda x: x[slots], sequences)
    theirs = slots >= 0
    tokens = Owners(jnp.where(theirs, change, -1), jnp.where(theirs, logits, -1), row)
    return Hooked(hooks, tables, slots, sequences, tokens, batch.positions, {})


def changes(hooked: Hooked) -> Change:
    """What the forward is to do at each site. It notes in `hooked.bad` what is not fit, which
    stays as it was."""

    def at(site: str, x: Array) -> Array:
        # A fusion with what comes before or after could round otherwise than without the hook.
        x, fault = jax.lax.optimization_barrier(x), jnp.zeros(len(x), bool)
        for place, hook in enumerate(hooked.hooks):
            if hook.of_logits or site not in hook.sites:
                continue
            mine = hooked.tokens.change == place
            made = hook.fn(Where(site, hooked.positions), x, _aux(hooked, place, hooked.tokens.row))
            fit = jnp.all(jnp.abs(made) <= LARGEST, axis=-1)  # NaN is not
            fault |= mine & ~fit
            x = jnp.where((mine & fit)[:, None], made, x)
        hooked.bad[site] = fault
        return jax.lax.optimization_barrier(x)

    return {site: partial(at, site) for site in changed_sites(hooked.hooks)}


def change_logits(hooked: Hooked, logits: Array, rows: Rows) -> tuple[Array, Array]:
    """Logits [S, V] as the hooks make them, float32 if any is of logits; and of which sequences
    with a hook nothing can be sampled: bool [S]."""
    sequences = hooked.sequences
    if any(hook.of_logits for hook in hooked.hooks):
        logits = logits.astype(jnp.float32)
    for place, hook in enumerate(hooked.hooks):
        if hook.of_logits:
            own = {site: rows.activations[site] for site in hook.sites}
            aux = _aux(hooked, place, sequences.row)
            made = hook.fn(logits, rows._replace(activations=own), aux)
            logits = jnp.where((sequences.logits == place)[:, None], made, logits)
    theirs = (sequences.change >= 0) | (sequences.logits >= 0)
    highest = jnp.max(logits, axis=-1)  # NaN if any is
    return logits, theirs & (jnp.isnan(highest) | (highest == -jnp.inf))


def faults(hooked: Hooked, unfit: Array, done: Array, length: Array) -> Array:
    """Where it went wrong first: int32 [2, S]: the place among `fault_sites`, and the position of
    the token; NO_FAULT twice where all is well.

    Args:
        hooked: after the forward.
        unfit: bool [S]; no token can be sampled.
        done: bool [S]; sequences that ran in this step.
        length: int32 [S]; of each, with this step.
    """
    count, none = len(unfit), jnp.full(len(hooked.positions), NO_FAULT)
    sites, site = changed_sites(hooked.hooks), none
    for place in reversed(range(len(sites))):
        site = jnp.where(hooked.bad[sites[place]], place, site)
    to = jnp.where(hooked.slots >= 0, hooked.slots, count)
    at = jnp.where(site < NO_FAULT, hooked.positions, none)
    first = jnp.full(count, NO_FAULT).at[to].min(at, mode="drop")
    same = (at < NO_FAULT) & (at == first[jnp.minimum(to, count - 1)])
    where = jnp.full(count, NO_FAULT).at[to].min(jnp.where(same, site, none), mode="drop")
    found = jnp.stack([where, first])
    last = jnp.stack([jnp.full(count, len(sites)), length - 1])
    found = jnp.where((where == NO_FAULT) & unfit, last, found)
    return jnp.where(done, found, NO_FAULT)


def fault_sites(hooks: Sequence[Hook]) -> tuple[str, ...]:
    """What the first number of a fault stands for."""
    return (*changed_sites(hooks), LOGITS)


def _aux(hooked: Hooked, place: int, row: Array) -> Any:
    leaves = [x[row] for x in hooked.tables[place]]
    return jax.tree.unflatten(hooked.hooks[place].tree, leaves)
