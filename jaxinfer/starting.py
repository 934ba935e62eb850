"""From options and the source of a model to an engine: the one way that every `LLM` starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple, TextIO

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.backend import prepare_backend
from jaxinfer.cache import resolve_kv_dtype
from jaxinfer.config import EngineOptions, ModelConfig
from jaxinfer.distributed import Link
from jaxinfer.drafting import Drafter
from jaxinfer.engine import Engine
from jaxinfer.errors import JaxinferError
from jaxinfer.in_memory import place, updatable
from jaxinfer.memory import batcher_config, plan, read_bytes
from jaxinfer.models.decoder import Params
from jaxinfer.offload import lies
from jaxinfer.parallel import copy_to, device_bytes, reading_mesh, replica_meshes
from jaxinfer.placement import check_degrees
from jaxinfer.quant import pack_params
from jaxinfer.replicas import Replicas
from jaxinfer.sizing import MemoryPlan
from jaxinfer.sources import Source
from jaxinfer.speculative import Draft, costs, load_draft, prepare, settled
from jaxinfer.state import differences

if TYPE_CHECKING:
    from jaxinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Options that processes need not agree about: paths of each machine.
OWN_OPTIONS = ("event_log", "compilation_cache")
# What is not done over several processes, and what it must be there.
ONE_PROCESS = {"data_parallel_size": 1, "device_weight_bytes": None, "kv_host_bytes": 0}


@dataclass(frozen=True)
class Started:
    """An engine that is ready, and what its requests are checked and updated by.

    Attributes:
        engine: or those of all replicas as one.
        config: of the model.
        memory: what each device's is divided into, now that the weights are there.
        tokenizer: None: the model has none.
        mesh: devices that share each layer or hold some of them, of the first replica; None: one
            has all.
        updatable: the shapes of weights that may take the place of these; None: none may.
        event_log: an open file, to be closed after the engine; None: nothing is written.
    """

    engine: Engine | Replicas
    config: ModelConfig
    memory: MemoryPlan
    tokenizer: Tokenizer | None
    mesh: Mesh | None
    updatable: Params | None
    event_log: TextIO | None


class Loaded(NamedTuple):
    """Weights where they are to lie, and what else was read.

    Attributes:
        replicas: of each, the weights of the model and of the one that guesses, packed; None for
            the latter where there is none.
        drafter: what guesses; None: nothing does.
        tokenizer, updatable: see `Started`.
    """

    replicas: list[tuple[Params, Params | None]]
    drafter: Drafter | None
    tokenizer: Tokenizer | None
    updatable: Params | None


def start(source: Source, options: EngineOptions, link: Link | None) -> Started:
    """Reads a model and makes its engine, one for each replica.

    What can be refused is refused before any weights are read, and JAX starts with what the options
    say of its memory.

    Args:
        source: of the model; see `sources`.
        options: of the user.
        link: to the other processes that share the model, all of which do this; None: there are
            none.

    Raises:
        UnsupportedModel, CheckpointError, CapacityError: of the model, or of one that guesses.
        ValueError: an option that does not go with the model, the devices or the processes.
        JaxinferError: the processes do not agree.
    """
    agree(link, source.config, options)
    prepare_backend(options)
    meshes = make_meshes(source.config, options)
    loaded = _load(source, options, meshes, link)
    params, draft = loaded.replicas[0]
    split = lies(params)
    memory = plan(
        source.config, options, loaded=True, weights=split.device + device_bytes(draft),
        drafter=loaded.drafter, host_weights=split.host, buffers=split.buffers, meshes=meshes,
        link=link,
    )  # fmt: skip
    devices = sum(mesh.size for mesh in meshes if mesh is not None)
    logger.info("%s%s", f"each of {devices} devices: " if devices else "", memory)
    follows = link is not None and not link.leads
    log = None if follows else options.event_log
    event_log = open(log, "w") if log else None  # noqa: SIM115
    engine = partial(
        _engine, config=source.config, options=options, drafter=loaded.drafter, memory=memory,
        event_log=event_log, link=link,
    )  # fmt: skip
    engines = [engine(*own, mesh) for own, mesh in zip(loaded.replicas, meshes, strict=True)]
    if link is not None:
        link.meet()  # a collective would not wait for ever for one that still reads
    return Started(
        engines[0] if len(engines) == 1 else Replicas(engines),
        source.config, memory, loaded.tokenizer, reading_mesh(meshes), loaded.updatable, event_log,
    )  # fmt: skip


def _load(
    source: Source, options: EngineOptions, meshes: Sequence[Mesh | None], link: Link | None
) -> Loaded:
    """Checks all that can be known before, and then reads the weights."""
    config, dtype, mesh = source.config, jnp.dtype(options.dtype), reading_mesh(meshes)
    how, draft = options.speculative, None
    if how is not None:
        draft = prepare(how, config, options, given=source.draft, mesh=mesh)
    split = source.split(options, mesh)
    if not source.in_memory:  # else who knows what they take of the device already
        plan(
            config, options, loaded=False, weights=split.device + (draft.bytes if draft else 0),
            drafter=draft and draft.drafter, host_weights=split.host, buffers=split.buffers,
            meshes=meshes, link=link,
        )  # fmt: skip
    tokenizer = source.tokenizer()
    # The smaller one first: if it cannot be read, nothing else is.
    guessing = None if draft is None else _load_draft(source, draft, options, mesh)
    params = source.load(dtype, mesh, split.layers)
    if draft is not None:
        draft = settled(draft, params, config, tokenizer)
    like = updatable(params, config, dtype, mesh)
    params = pack_params(params, dtype, consume=not source.in_memory, mesh=mesh)
    replicas = [copy_to((params, guessing), each) for each in meshes]
    return Loaded(replicas, draft and draft.drafter, tokenizer, like)


def _load_draft(
    source: Source, draft: Draft, options: EngineOptions, mesh: Mesh | None
) -> Params | None:
    if source.draft is None:
        return load_draft(draft, options, mesh)
    placed = place(*source.draft, mesh)
    return pack_params(placed, jnp.dtype(options.dtype), consume=False, mesh=mesh)


def _engine(
    params: Params,
    draft: Params | None,
    mesh: Mesh | None,
    *,
    config: ModelConfig,
    options: EngineOptions,
    drafter: Drafter | None,
    memory: MemoryPlan,
    event_log: TextIO | None,
    link: Link | None,
) -> Engine:
    """The engine of one replica, on the devices of `mesh`."""
    price = None
    if drafter is not None:
        stages = options.pipeline_parallel_size  # they read theirs one after the other
        draft_bytes = device_bytes(draft)
        price = costs(
            config, drafter, draft_bytes=stages * draft_bytes,
            weight_bytes=stages * (round(read_bytes(memory)) - draft_bytes),
            gpu=jax.devices()[0].platform == "gpu", devices=options.tensor_parallel_size,
        )  # fmt: skip
    return Engine(
        params, config, batcher_config(config, options, memory, drafter),
        dtype=resolve_kv_dtype(options.kv_cache_dtype, options.dtype),
        invariant=options.invariant, event_log=event_log, drafter=drafter, draft=draft,
        costs=price, mesh=mesh, link=link,
    )  # fmt: skip


def agree(link: Link | None, config: ModelConfig, options: EngineOptions) -> None:
    """Refuses processes that would not run the same programs on the same model.

    Raises:
        ValueError: an option that is not for several processes.
        JaxinferError: one differs from the first; names it, and what differs.
    """
    if link is None:
        return
    for name, expected in ONE_PROCESS.items():
        if (value := getattr(options, name)) != expected:
            raise ValueError(f"{name}={value!r}: expected {expected} with {link.count} processes")
    mine = {
        "versions": {name: metadata.version(name) for name in ("jaxinfer", "jax", "jaxlib")},
        "model": asdict(config),
        "options": {k: v for k, v in asdict(options).items() if k not in OWN_OPTIONS},
    }
    first, *others = link.gather(mine)
    problems = [
        text
        for process, other in enumerate(others, 1)
        for text in differences("", first, other, ("process 0", f"process {process}"))
    ]
    if problems:
        link.part()
        raise JaxinferError(
            f"the {link.count} processes do not agree: expected the same command on the same model "
            "and versions\n  " + "\n  ".join(problems)
        )


def make_meshes(config: ModelConfig, options: EngineOptions) -> tuple[Mesh | None, ...]:
    """The devices of each replica, which share the model; see `parallel.replica_meshes`.

    Raises:
        ValueError: there are fewer than asked for, or so many cannot share the model; says which
            degrees work. Or some layers of stages are to lie on the host.
    """
    o = options
    if o.pipeline_parallel_size > 1 and o.device_weight_bytes is not None:
        raise ValueError(
            f"device_weight_bytes={o.device_weight_bytes}: stages would read their layers from the "
            f"host for each part of a step: expected None with pipeline_parallel_size="
            f"{o.pipeline_parallel_size}"
        )
    check_degrees(config, o, "this model")
    return replica_meshes(o.tensor_parallel_size, o.pipeline_parallel_size, o.data_parallel_size)
