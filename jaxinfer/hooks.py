"""Functions of a user's, compiled into the steps of the requests that bring them.

An `Intervention` changes activations, a `LogitsFn` the logits before a token is sampled. A step
serves many requests: a function sees all tokens of the step, but what it makes of those of others
is dropped, so that its requests alone depend on it. What a function needs to know of one request,
`aux`, lies in a table on the device, a row for each running sequence, and is written when the
sequence gets that row.

Letters: T tokens and S sequences of one step, M rows of state, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidRequest
from jaxinfer.models.sites import match, widths
from jaxinfer.sampling import SamplingRows, pack_row
from jaxinfer.types import SamplingParams

ABSTRACT = 8  # tokens with which a function is tried before anything runs


class Where(NamedTuple):
    """The place at which an intervention is called. `positions`: int32 [T], of each token in its
    sequence; 0 is the first of the prompt."""

    site: str
    positions: Array


class Rows(NamedTuple):
    """What a `LogitsFn` is told of the sequences whose next tokens are sampled.

    Attributes:
        sampling: how each is sampled, [S] or [S, …].
        positions: int32 [S]; where each next token will stand.
        tokens: int32 [S]; the tokens before.
        activations: by site, those of the tokens before: [S, width].
    """

    sampling: SamplingRows
    positions: Array
    tokens: Array
    activations: dict[str, Array]


@dataclass(frozen=True)
class Intervention:
    """Changes activations: `fn(where, x, aux) -> x`.

    Attributes:
        fn: jittable and pure; x is [T, width] in the model's dtype, and so is what it returns. Each
            token must depend on that token alone. Define it once: every other function, however
            alike, is compiled anew.
        sites: where it is called; patterns among them. See `models.sites`.
        aux: of one request: a pytree of arrays. `fn` gets it with an axis T before all others: of
            each token its request's. None: nothing.
    """

    fn: Callable[[Where, Array, Any], Array]
    sites: Sequence[str]
    aux: Any = None


@dataclass(frozen=True)
class LogitsFn:
    """Changes logits, before penalties and all that sampling does: `fn(logits, rows, aux)`.

    Attributes:
        fn: jittable and pure; logits are float32 [S, V], `rows` is `Rows`, and what it returns is
            as logits. Minus infinity bans a token. Each row must depend on that row alone.
        aux: as of an `Intervention`, with an axis S.
        sites: whose activations are wanted in `Rows.activations`.
    """

    fn: Callable[[Array, Rows, Any], Array]
    aux: Any = None
    sites: Sequence[str] = ()


@dataclass(frozen=True)
class Chain:
    """Functions of logits, one after the other: `LogitsFn(Chain((a, b)), aux=(aux_a, aux_b))`."""

    fns: tuple[Callable[[Array, Rows, Any], Array], ...]

    def __call__(self, logits: Array, rows: Rows, aux: Sequence[Any]) -> Array:
        for fn, own in zip(self.fns, aux, strict=True):
            logits = fn(logits, rows, own)
        return logits


@dataclass(frozen=True)
class Hook:
    """What is compiled of an `Intervention`, or with `of_logits` of a `LogitsFn`.

    Attributes:
        sites: each by its name.
        tree, leaves: structure of `aux`, and shape and dtype of each of its arrays.
    """

    fn: Callable[..., Array]
    sites: tuple[str, ...]
    of_logits: bool
    tree: Any
    leaves: tuple[tuple[tuple[int, ...], np.dtype], ...]


@dataclass(frozen=True, eq=False)
class Bound:
    """A hook, and the arrays of one request's `aux`."""

    hook: Hook
    arrays: tuple[np.ndarray, ...]

    def salt(self, number: int, weights: bytes) -> bytes:
        """Of the keys of pages, 32 bytes. `number`: of the hook, among those of an engine;
        `weights`: what stands for its weights."""
        digest = hashlib.blake2b(b"%d %s" % (number, weights), digest_size=32)
        for array in self.arrays:
            digest.update(array.tobytes())
        return digest.digest()


class Inside(NamedTuple):
    """What a request wants of the model's inside.

    Attributes:
        capture: sites whose activations it wants, each by its name.
        change: its intervention.
        logits: its function of logits.
    """

    capture: tuple[str, ...] = ()
    change: Bound | None = None
    logits: Bound | None = None

    @property
    def hooks(self) -> list[Bound]:
        return [bound for bound in (self.change, self.logits) if bound is not None]


# -- at the edge ----------------------------------------------------------------------------


def bind(
    capture: Any, intervene: Any, logits_fn: Any, config: ModelConfig, *, index: int = 0
) -> Inside | None:
    """What one request wants of the model's inside, checked but for what its functions return.

    Args:
        capture: patterns of sites.
        intervene: an `Intervention`, or None.
        logits_fn: a `LogitsFn`, a function without `aux`, or None.
        config: the model.
        index: of the request, for the error.

    Raises:
        InvalidRequest: one of them is something else, or names no site.
    """
    sites = _named(capture, config, index, "capture")
    change = None
    if intervene is not None:
        if not isinstance(intervene, Intervention):
            raise InvalidRequest(
                f"{intervene!r} is not an Intervention", index=index, field="intervene"
            )
        change = _bind(intervene, config, False, index, "intervene")
        if not change.hook.sites:
            raise InvalidRequest("it names none", index=index, field="intervene.sites")
    logits = None
    if logits_fn is not None:
        given = logits_fn if isinstance(logits_fn, LogitsFn) else LogitsFn(logits_fn)
        logits = _bind(given, config, True, index, "logits_fn")
    return Inside(sites, change, logits) if sites or change or logits else None


def check(
    hook: Hook, config: ModelConfig, dtype: Any, *, index: int = 0, count: int = ABSTRACT
) -> None:
    """Tries a hook's function on shapes alone, of `count` tokens or sequences.

    Raises:
        InvalidRequest: it fails, or returns what does not stand for what it was given.
    """
    every: Any = widths(config)

    def several(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *shape), dtype)

    ids: Any = several((), jnp.int32)
    aux = jax.tree.unflatten(hook.tree, [several(*leaf) for leaf in hook.leaves])
    if hook.of_logits:
        one = pack_row(SamplingParams(), seed=0, sample=0, stop_ids=(), min_length=0)
        sampling = jax.tree.map(lambda x: several(x.shape, x.dtype), one)
        seen: Any = {site: several((every[site],), dtype) for site in hook.sites}
        logits = several((config.vocab_size,), jnp.float32)
        _try(hook.fn, logits, (logits, Rows(sampling, ids, ids, seen), aux), "logits_fn", index)
        return
    for site in hook.sites:

        def at(positions: Array, x: Array, aux: Any, site: str = site) -> Array:
            return hook.fn(Where(site, positions), x, aux)

        x = several((every[site],), dtype)
        _try(at, x, (ids, x, aux), f"intervene at {site}", index)


def _named(sites: Any, config: ModelConfig, index: int, field: str) -> tuple[str, ...]:
    try:
        return match(sites, config)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, index=index, field=field) from None


def changed_sites(hooks: Iterable[Hook]) -> tuple[str, ...]:
    """Those at which activations are changed; faults are counted by their places here."""
    return tuple(dict.fromkeys(s for hook in hooks if not hook.of_logits for s in hook.sites))


def wanted_sites(hooks: Iterable[Hook]) -> tuple[str, ...]:
    """Those that functions of logits are told of."""
    return tuple(dict.fromkeys(s for hook in hooks if hook.of_logits for s in hook.sites))


def _bind(
    given: Intervention | LogitsFn, config: ModelConfig, of_logits: bool, index: int, field: str
) -> Bound:
    if not callable(given.fn) or getattr(given.fn, "__hash__", None) is None:
        message = f"{given.fn!r} is not a function, or not one that can be hashed"
        raise InvalidRequest(message, index=index, field=f"{field}.fn")
    sites = _named(given.sites, config, index, f"{field}.sites")
    leaves, tree = jax.tree.flatten(given.aux)
    try:
        arrays = tuple(_as_jax(np.asarray(x)) for x in leaves)
    except TypeError as error:
        message = f"{error}: expected a pytree of arrays"
        raise InvalidRequest(message, index=index, field=f"{field}.aux") from None
    kinds = tuple((x.shape, x.dtype) for x in arrays)
    return Bound(Hook(given.fn, sites, of_logits, tree, kinds), arrays)


def _as_jax(x: np.ndarray) -> np.ndarray:
    """In the dtype that JAX would give it: 64 bits become 32."""
    if not (jnp.issubdtype(x.dtype, np.number) or x.dtype == bool):
        raise TypeError(f"{x.dtype} {x.shape}")
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype))


def _try(
    fn: Callable[..., Any], wanted: Any, args: tuple[Any, ...], field: str, index: int
) -> None:
    try:
        found = jax.eval_shape(fn, *args)
    except Exception as error:  # whatever a user's function may raise
        message = f"{type(error).__name__}: {error}"
        raise InvalidRequest(message, index=index, field=field) from error
    want = (wanted.shape, wanted.dtype)
    if (getattr(found, "shape", None), getattr(found, "dtype", None)) != want:
        message = f"it returns {found} where it was given {wanted}: expected the same"
        raise InvalidRequest(message, index=index, field=field)
