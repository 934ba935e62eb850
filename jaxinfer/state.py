"""An engine in the middle of its work as plain data, to go on from later: pure functions.

What a sequence will say follows from its spec and from what it has said. So the keys and values of
its tokens need not be kept: without them a sequence is computed anew, as after a preemption, and
with the same tokens. With them (`Running`) the engine goes on exactly where it stood.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count, takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import batcher, tier
from jaxinfer.batch import SeqState
from jaxinfer.batcher import BatcherState, Event
from jaxinfer.cache import PagedCache
from jaxinfer.config import BatcherConfig, ModelConfig
from jaxinfer.errors import CapacityError, JaxinferError
from jaxinfer.eventlog import EVENTS
from jaxinfer.pages import PagePool, kept
from jaxinfer.persistent import Table, table
from jaxinfer.plans import SequenceSpec
from jaxinfer.sampling import PenaltyState, SamplingRows
from jaxinfer.types import SamplingParams

NESTED = {"waiting": batcher.Submit, "rows": batcher.Rows, "pool": PagePool}


class Live(NamedTuple):
    """A sequence that has not ended.

    Attributes:
        outputs: what it has said.
        scored: prompt tokens whose scores were given out; None: it is not scored.
        cached: while its prompt is read: how many tokens of it were not computed.
    """

    id: int
    spec: SequenceSpec
    outputs: tuple[int, ...]
    scored: int | None
    cached: int | None


class Running(NamedTuple):
    """What goes on where it stood. All arrays are NumPy's.

    Attributes:
        scheduler: the batcher's state, and `events`, what it is still to be told.
        seq: the device's state of each row.
        page_ids: int32 [n]; pages that a sequence holds, or that a key remembers: the others hold
            nothing that is ever read.
        pages: the cache of those pages alone; scales that are not of pages are whole.
    """

    scheduler: BatcherState
    events: tuple[Event, ...]
    seq: SeqState
    page_ids: np.ndarray
    pages: PagedCache


class EngineState(NamedTuple):
    """An engine of which nothing is in flight.

    Attributes:
        model: what tokens depend on beside the request; of `describe`.
        limits: the engine's.
        next_id: of the sequence that is submitted next.
        live: in the order of their submission.
        running: None: all of them wait, to be computed anew.
    """

    model: dict[str, Any]
    limits: BatcherConfig
    next_id: int
    live: tuple[Live, ...]
    running: Running | None


def describe(
    params: Any,
    config: ModelConfig,
    *,
    kv_dtype: Any,
    invariant: bool,
    parallel: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Any]:
    """What an engine's tokens depend on beside the request: JSON types.

    The weights are named by a digest of each array's name, shape, dtype and a checksum of its bits,
    which the device computes. `parallel`: see `parallel.sizes`.
    """
    sums = [
        (jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape), _checksum(leaf))
        for path, leaf in jax.tree.leaves_with_path(params)
    ]
    text = json.dumps([[*rest, int(value)] for *rest, value in sums])
    # Another degree gives other bits. States of one device were written before it was noted.
    return dict(parallel) | {
        "config": json.loads(json.dumps(asdict(config))),
        "weights": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "kv_dtype": str(jnp.dtype(kv_dtype)),
        "invariant": invariant,
    }


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """uint32, modulo 2**32 and so exact in any order of summing; any one element that changes, and
    most exchanges of two, change it."""
    x = jax.device_put(x, jax.memory.Space.Device)  # weights may lie on the host
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
    bits = x.astype(jnp.uint32).reshape(-1)
    return jnp.sum(bits * (2 * lax.iota(jnp.uint32, bits.size) + 1), dtype=jnp.uint32)


def check_fits(state: EngineState, model: Mapping[str, Any], limits: BatcherConfig) -> None:
    """That an engine of this model (of `describe`) and these limits can go on from a state.

    Raises:
        JaxinferError: another model; or, where pages were kept, other limits. Names what differs.
        CapacityError: a sequence is too long for the limits, or there are too many.
    """
    problems = differences("", state.model, dict(model))
    if state.running is not None:
        saved = replace(state.limits, host_slots=limits.host_slots)  # of which nothing is kept
        problems += differences("limits", asdict(saved), asdict(limits))
    if problems:
        raise JaxinferError("the saved state does not fit this engine:\n  " + "\n  ".join(problems))
    most = min(limits.max_model_len, (limits.num_pages - 1) * limits.page_size)
    long = [f"{live.id} ({live.spec.limit})" for live in state.live if live.spec.limit > most]
    if long:
        raise CapacityError(
            f"sequences (of as many tokens) {', '.join(long)} do not fit: max_model_len and the "
            f"KV cache of this engine allow {most}"
        )
    if state.running is None and len(state.live) > limits.max_waiting:
        raise CapacityError(
            f"{len(state.live)} sequences are to wait; max_waiting={limits.max_waiting} allows less"
        )


def differences(
    path: str, saved: Any, here: Any, names: tuple[str, str] = ("saved", "here")
) -> list[str]:
    """Where two values of JSON types differ, in words; `names`: what each of them is."""
    if isinstance(saved, dict) and isinstance(here, dict):
        fields = sorted(saved.keys() | here.keys())
        pairs = [(f"{path}.{n}".strip("."), saved.get(n), here.get(n)) for n in fields]
    elif isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(saved, here, strict=True))]
    else:
        first, second = names
        return [] if saved == here else [f"{path}: {first} {saved!r}, {second} {here!r}"]
    return [text for name, a, b in pairs for text in differences(name, a, b, names)]


# -- the device's part ---------------------------------------------------------------------------


def keep_running(
    scheduler: BatcherState, events: Sequence[Event], seq: SeqState, cache: PagedCache
) -> Running:
    """Host copies of what an engine needs to go on where it stands."""
    ids, count = kept(scheduler.pool), len(scheduler.pool.holders)

    def pick(x: jax.Array) -> np.ndarray:
        # On the host: the cache may have left the device no room.
        if x.ndim == 1:
            return np.array(x)
        return _by_stage(np.asarray(x), count)[:, ids].reshape(-1, *x.shape[1:])

    pages = jax.tree.map(pick, cache)
    scheduler = with_host(scheduler, 0)  # what is on the host alone is not kept
    return Running(scheduler, tuple(events), jax.tree.map(np.array, seq), ids, pages)


def with_host(scheduler: BatcherState, slots: int) -> BatcherState:
    """The scheduler with so many slots of the host for pages, which hold nothing."""
    host = tier.create(slots) if slots else None
    return scheduler._replace(pool=scheduler.pool._replace(host=host))


def put_pages(running: Running, cache: PagedCache) -> PagedCache:
    """The kept pages on the device, in place of `cache`, which is deleted."""
    ids, count = running.page_ids, len(running.scheduler.pool.holders)

    def put(old: jax.Array, kept: np.ndarray) -> jax.Array:
        # Where it is free to go it stays so: else steps would be other programs, compiled anew.
        shape, dtype, place = old.shape, old.dtype, old.sharding if old.committed else None
        old.delete()
        if len(shape) == 1:
            return jnp.array(kept, device=place)
        whole = np.zeros(shape, dtype)
        _by_stage(whole, count)[:, ids] = _by_stage(kept, len(ids))
        return jnp.array(whole, device=place)

    return jax.tree.map(put, cache, running.pages)


def _by_stage(x: np.ndarray, pages: int) -> np.ndarray:
    """An array of a cache, of so many pages of each stage: a view with an axis of stages."""
    return x.reshape(-1, pages, *x.shape[1:])


# -- to and from plain data ----------------------------------------------------------------------


def to_plain(state: EngineState) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """JSON types, and by name the arrays that are the device's."""
    host: dict[str, Any] = {
        "model": state.model,
        "limits": asdict(state.limits),
        "next_id": state.next_id,
        "live": [live._asdict() | {"spec": _plain_spec(live.spec)} for live in state.live],
        "running": None,
    }
    if state.running is None:
        return host, {}
    running = state.running
    host["running"] = {
        "scheduler": plain(running.scheduler),
        "events": [{"kind": type(e).__name__, "fields": plain(e)} for e in running.events],
    }
    tree = {"seq": running.seq, "page_ids": running.page_ids, "pages": running.pages}
    named = jax.tree.leaves_with_path(tree)
    return host, {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in named}


def from_plain(host: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> EngineState:
    """The state of which `to_plain` made these.

    Raises:
        KeyError, TypeError, ValueError: it made other ones.
    """
    live = [
        Live(**{**x, "spec": _spec(x["spec"]), "outputs": tuple(x["outputs"])})
        for x in host["live"]
    ]
    running = None
    if host["running"] is not None:
        fields = host["running"]
        events = (record(EVENTS[e["kind"]], e["fields"]) for e in fields["events"])
        scheduler = record(BatcherState, fields["scheduler"])
        running = Running(scheduler, tuple(events), *_device_part(arrays))
    limits = BatcherConfig(**host["limits"])
    return EngineState(host["model"], limits, host["next_id"], tuple(live), running)


def _device_part(arrays: Mapping[str, np.ndarray]) -> tuple[SeqState, np.ndarray, PagedCache]:
    def made(kind: Any, path: str, **nested: Any) -> Any:
        rest = [name for name in kind._fields if name not in nested]
        return kind(**nested, **{name: arrays[f"{path}.{name}"] for name in rest})

    def layers(name: str) -> Any:
        names = (f"pages.{name}.{i}" for i in count())
        return tuple(arrays[name] for name in takewhile(arrays.__contains__, names))

    counted = "seq.penalties.prompt" in arrays
    penalties = made(PenaltyState, "seq.penalties") if counted else None
    rows = made(SamplingRows, "seq.rows")
    seq = made(SeqState, "seq", rows=rows, penalties=penalties, draft=None)
    scales = (layers(name) or None for name in ("k_scales", "v_scales"))
    tokens: Any = arrays.get("pages.tokens")
    cache = PagedCache(layers("k"), layers("v"), *scales, tokens=tokens)
    return seq, arrays["page_ids"], cache


def plain(x: Any) -> Any:
    """A NamedTuple of arrays, some of them of arrays, as JSON types; numbers as they are."""
    if isinstance(x, np.ndarray) and x.dtype == object:
        return {"objects": [plain(one) for one in x]}
    if isinstance(x, np.ndarray):
        return {"dtype": str(x.dtype), "shape": list(x.shape), "values": x.ravel().tolist()}
    if isinstance(x, Table):
        return {"entries": sorted(x.items())}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return {name: plain(getattr(x, name)) for name in x._fields}  # pyright: ignore
    return x.item() if isinstance(x, np.generic) else x


def record(kind: Any, fields: Mapping[str, Any]) -> Any:
    """The NamedTuple of a kind that `plain` took apart. Its arrays are read-only."""
    there = [name for name in kind._fields if name in fields]
    return kind(**{name: _value(name, fields[name]) for name in there})


def _value(name: str, x: Any) -> Any:
    if not isinstance(x, dict):
        return x
    if "entries" in x:
        return table(x["entries"])
    if "objects" in x:
        found = batcher.objects([_value("", one) for one in x["objects"]])
    elif "dtype" in x:
        found = np.array(x["values"], np.dtype(x["dtype"])).reshape(x["shape"])
    else:
        return record(NESTED[name], x)
    found.flags.writeable = False
    return found


def plain_params(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters as JSON types, whatever sequences and numbers a caller chose."""
    fields = vars(params) | {
        "stop": list(params.stop_strings),
        "stop_token_ids": [int(i) for i in params.stop_token_ids],
    }
    return {name: plain(value) for name, value in fields.items()}


def read_params(fields: Mapping[str, Any]) -> SamplingParams:
    """The parameters of which `plain_params` made these."""
    lists = {name: tuple(fields[name]) for name in ("stop", "stop_token_ids")}
    return SamplingParams(**{**fields, **lists})


def _plain_spec(spec: SequenceSpec) -> dict[str, Any]:
    fields = {name: plain(value) for name, value in vars(spec).items() if name != "params"}
    return fields | {
        "prompt": spec.prompt.tolist(),
        "params": plain_params(spec.params),
        "stop_ids": [int(i) for i in spec.stop_ids],
    }


def _spec(fields: Mapping[str, Any]) -> SequenceSpec:
    read = {
        "prompt": np.array(fields["prompt"], np.int32),
        "params": read_params(fields["params"]),
        "stop_ids": tuple(fields["stop_ids"]),
    }
    return SequenceSpec(**{**fields, **read})
