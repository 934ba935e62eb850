"""What an engine may take of memory, and the limits that follow: from options, before and after the
weights are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.backend import PINNED, pinnable_bytes
from jaxinfer.buckets import MOST_GUESSING, max_chunks
from jaxinfer.cache import page_bytes, resolve_kv_dtype
from jaxinfer.config import BatcherConfig, EngineOptions, ModelConfig
from jaxinfer.distributed import Link
from jaxinfer.drafting import Drafter
from jaxinfer.errors import CapacityError
from jaxinfer.models.weights import declare
from jaxinfer.offload import Split, split
from jaxinfer.page_copies import STAGED
from jaxinfer.parallel import device_share
from jaxinfer.roofline import LAYER_S, shard
from jaxinfer.sizing import MemoryPlan, device_memory, plan_memory
from pallas_kernels.device import capability
from pallas_kernels.exchange import connectable, memory_bytes
from pallas_kernels.scaled_matmul import has_kernel

DEFAULT_BATCHED_TOKENS = 2048
# A dispatch takes the host up to some 3 ms; it should keep the device busy for longer than that.
DISPATCH_S, MOST_STEPS, GPU_BYTES_PER_S = 0.008, 16, 3e12
LINK_BYTES_PER_S = 5e10  # from the host's memory
# Stages stand idle at the beginning and the end of each dispatch: a fifth of the time, with these.
STAGED_STEPS = 4


def plan(
    config: ModelConfig,
    options: EngineOptions,
    *,
    loaded: bool,
    weights: int,
    host_weights: int = 0,
    buffers: int = 0,
    drafter: Drafter | None = None,
    meshes: Sequence[Mesh | None] = (None,),
    link: Link | None = None,
) -> MemoryPlan:
    """Divides the memory of the default device, or of each of several.

    Args:
        config: the model.
        options: what the user chose; `kv_cache_bytes` are those of one device.
        loaded: the weights are in it already.
        weights: their bytes on one device, those of a draft model included.
        host_weights, buffers: see `offload.Split`.
        drafter: what guesses tokens.
        meshes: see `starting.make_meshes`.
        link: to other processes, which plan at the same time.

    Raises:
        ValueError: `max_model_len` beyond what the model was made for.
        CapacityError: see `sizing.plan_memory`; or `kv_host_bytes` has no room for a page, or the
            host's memory has none for it.
    """
    if options.max_model_len is not None and options.max_model_len > config.max_position:
        raise ValueError(
            f"max_model_len={options.max_model_len}: this model was made for sequences of up to "
            f"{config.max_position} tokens"
        )
    named = [device for mesh in meshes if mesh is not None for device in mesh.local_devices]
    memories = [device_memory(device) for device in named or [jax.devices()[0]]]
    devices = len(memories)  # of this process
    if link is not None:
        memories = [each for process in link.gather(memories) for each in process]
    limits, used = zip(*memories, strict=True)
    limit, in_use = None if None in limits else min(limits), max(used)
    dtype = jnp.dtype(options.dtype)
    peers, size = _peer_bytes(meshes), options.tensor_parallel_size
    one, far = _host_pages(config, options, drafter, host_weights, devices)
    found = plan_memory(
        _local(config, options),
        dtype=dtype,
        kv_dtype=resolve_kv_dtype(options.kv_cache_dtype, dtype),
        page_size=options.page_size,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        kv_cache_bytes=options.kv_cache_bytes,
        limit=limit,
        in_use=max(0, in_use - weights) if loaded else in_use,
        max_num_batched_tokens=batched_tokens(options),
        weights=weights,
        host_weights=host_weights,
        buffers=buffers + (STAGED * one if far else 0) + peers,
        gathered=0 if peers or size == 1 else size,
        hopper=has_kernel(capability()),
        **_guessing(drafter, options),
    )
    return replace(found, host_cache=one * far, host_pages=far)


def _host_pages(
    config: ModelConfig,
    options: EngineOptions,
    drafter: Drafter | None,
    host_weights: int,
    devices: int,
) -> tuple[int, int]:
    """Bytes that a page takes of the host for each device, and how many pages it is to keep.

    Raises:
        CapacityError: `kv_host_bytes` is less than a page, or more than the host has.
    """
    kv_dtype = resolve_kv_dtype(options.kv_cache_dtype, options.dtype)
    one = page_bytes(_local(config, options), options.page_size, kv_dtype)
    if drafter is not None and drafter.reads_text:
        one += 4 * options.page_size
    budget = options.kv_host_bytes
    if 0 < budget < one:
        raise CapacityError(
            f"kv_host_bytes={budget}: a page of {options.page_size} tokens takes {one} bytes: "
            "expected at least as much, or 0"
        )
    wanted = devices * (budget + host_weights)
    if budget and wanted > (most := pinnable_bytes()):
        raise CapacityError(
            f"kv_host_bytes={budget} for each of {devices} device(s), beside {host_weights} bytes "
            f"of weights: {most} of the host's memory may be taken ({PINNED} decides, in GB, "
            "before JAX starts)"
        )
    return one, budget // one


def _peer_bytes(meshes: Sequence[Mesh | None]) -> int:
    """Of each device, for exchanges of partial results; see `pallas_kernels.exchange`."""
    connected = [mesh for mesh in meshes if mesh is not None and connectable(mesh)]
    return max(map(memory_bytes, connected), default=0)


def _local(config: ModelConfig, options: EngineOptions) -> ModelConfig:
    """What one device computes and keeps, but for logits: log-probabilities gather them."""
    size, count = options.tensor_parallel_size, options.pipeline_parallel_size
    return replace(shard(config, size, count), vocab_size=config.vocab_size)


def _guessing(drafter: Drafter | None, options: EngineOptions) -> dict[str, Any]:
    """What `plan_memory` is told of a drafter."""
    if drafter is None:
        return {}
    extra = 4 * options.page_size if drafter.reads_text else 0
    if drafter.model is not None:
        kv_dtype = resolve_kv_dtype(options.kv_cache_dtype, options.dtype)
        extra += page_bytes(_local(drafter.model, options), options.page_size, kv_dtype)
    rows = min(options.max_num_seqs, MOST_GUESSING)
    return {"page_extra": extra, "guessing": (rows, drafter.how.tokens)}


def batched_tokens(options: EngineOptions) -> int:
    """Most tokens of one step: what is asked for, or the default."""
    if options.max_num_batched_tokens is not None:
        return options.max_num_batched_tokens
    return max(DEFAULT_BATCHED_TOKENS, 2 * options.max_num_seqs)


def batcher_config(
    config: ModelConfig, options: EngineOptions, memory: MemoryPlan, drafter: Drafter | None = None
) -> BatcherConfig:
    """The scheduler's limits, with what the options leave open."""
    gpu = jax.devices()[0].platform == "gpu"
    steps = options.max_steps
    if steps is None:
        # How many decode steps of one row keep the device busy for this long.
        least = read_bytes(memory) / GPU_BYTES_PER_S + config.num_layers * LAYER_S
        steps = max(1, min(MOST_STEPS, int(DISPATCH_S / least))) if gpu else 1
        if options.pipeline_parallel_size > 1:
            steps = STAGED_STEPS
    return BatcherConfig(
        num_pages=memory.num_pages,
        page_size=memory.page_size,
        max_num_seqs=options.max_num_seqs,
        max_model_len=memory.max_model_len,
        max_num_batched_tokens=batched_tokens(options),
        max_chunks=max_chunks(options.policy, gpu=gpu),
        max_steps=steps,
        max_waiting=options.max_waiting,
        policy=options.policy,
        prefix_caching=options.prefix_caching,
        max_guesses=0 if drafter is None else drafter.how.tokens,
        host_slots=memory.host_pages,
    )


def read_bytes(memory: MemoryPlan) -> float:
    """Of weights, for a step: those that come from the host count as what the device could read
    meanwhile."""
    return memory.weights + memory.host_weights * GPU_BYTES_PER_S / LINK_BYTES_PER_S


def split_within(sizes: Any, config: ModelConfig, budget: int, mesh: Mesh | None) -> Split:
    """Where weights are to lie that may take `budget` bytes of each device.

    Args:
        sizes: bytes of each weight of `models.weights.declare`, split among no devices.
        config: the model.
        budget: `device_weight_bytes`.
        mesh: devices that share the model.

    Raises:
        CapacityError: the budget is too small, or the host's memory is.
    """
    share = device_share(config, mesh)
    found = split(declare(config), jax.tree.map(lambda size: round(size * share), sizes), budget)
    wanted = found.host * (1 if mesh is None else mesh.size)
    if wanted > (most := pinnable_bytes()):
        raise CapacityError(
            f"device_weight_bytes={budget} leaves {wanted} bytes to the host's memory: {most} may "
            f"be taken ({PINNED} decides, in GB, before JAX starts)"
        )
    return found


def check_steps(memory: MemoryPlan, step_bytes: int) -> None:
    """Raises CapacityError if compiled steps need more than was planned for them."""
    if memory.limit is not None and step_bytes > memory.steps:
        raise CapacityError(
            f"a step needs {step_bytes} bytes beside weights and cache, {memory.steps} "
            "were kept free: lower max_num_batched_tokens, max_num_seqs or kv_cache_bytes"
        )
