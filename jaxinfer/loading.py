"""From options and a directory to weights on the device: what happens before an engine starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.backend import (
    PINNED,
    allow_pinned,
    default_cache_directory,
    pinnable_bytes,
    reserve_memory,
    use_compilation_cache,
)
from jaxinfer.buckets import MOST_GUESSING, max_chunks
from jaxinfer.cache import page_bytes, resolve_kv_dtype
from jaxinfer.config import BatcherConfig, EngineOptions, ModelConfig
from jaxinfer.distributed import Link
from jaxinfer.drafting import Drafter
from jaxinfer.errors import CapacityError, CheckpointError, JaxinferError
from jaxinfer.models.decoder import Params
from jaxinfer.models.weights import abstract_params, declare
from jaxinfer.offload import Split, host_places, split
from jaxinfer.page_copies import STAGED
from jaxinfer.parallel import declared_on, device_share, replica_meshes, said
from jaxinfer.placement import can_split, check_stages, degrees
from jaxinfer.progress import loading_bar
from jaxinfer.quant import Parts, QuantisedMatrix
from jaxinfer.roofline import LAYER_S, shard
from jaxinfer.sharding import shardings
from jaxinfer.sizing import MemoryPlan, device_memory, plan_memory
from jaxinfer.state import differences
from pallas_kernels.device import capability
from pallas_kernels.scaled_matmul import has_kernel

if TYPE_CHECKING:
    from checkpoints.gguf.reader import Gguf
    from jaxinfer.tokenizer import Tokenizer

    Source = Path | Gguf  # where a model lies: a directory, or an opened GGUF file

QUANTISED = (QuantisedMatrix, Parts)
DEFAULT_BATCHED_TOKENS = 2048
# A dispatch takes the host up to some 3 ms; it should keep the device busy for longer than that.
DISPATCH_S, MOST_STEPS, GPU_BYTES_PER_S = 0.008, 16, 3e12
LINK_BYTES_PER_S = 5e10  # from the host's memory
# Stages stand idle at the beginning and the end of each dispatch: a fifth of the time, with these.
STAGED_STEPS = 4
# Options that processes need not agree about: paths of each machine.
OWN_OPTIONS = ("event_log", "compilation_cache")
# What is not done over several processes, and what it must be there.
ONE_PROCESS = {"data_parallel_size": 1, "device_weight_bytes": None, "kv_host_bytes": 0}


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


def prepare_backend(options: EngineOptions) -> None:
    """What an LLM does to the JAX of this process, before its first computation."""
    reserve_memory(options.gpu_memory_utilization)
    if options.device_weight_bytes is not None or options.kv_host_bytes:
        allow_pinned()
    if options.compilation_cache != "":
        chosen = options.compilation_cache
        use_compilation_cache(default_cache_directory() if chosen is None else Path(chosen))


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


def check_degrees(config: ModelConfig, options: EngineOptions, name: str) -> None:
    """Raises ValueError unless as many devices and stages as `options` say can share the model,
    which the message calls `name`; it says which degrees work."""
    size, stages = options.tensor_parallel_size, options.pipeline_parallel_size
    if size > 1 and not can_split(config, size):
        raise ValueError(
            f"tensor_parallel_size={size}: {name} has {config.num_heads} heads, "
            f"{config.num_kv_heads} KV heads, {config.intermediate_size} columns in the MLP and "
            f"{config.vocab_size} tokens, which must be shared out evenly; what works: "
            f"{', '.join(map(str, degrees(config)))}"
        )
    check_stages(config, size, stages, f"pipeline_parallel_size={stages}: {name}")


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
        meshes: see `make_meshes`.
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
        buffers=buffers + (STAGED * one if far else 0),
        shards=options.tensor_parallel_size,
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


def is_gguf(path: Path) -> bool:
    """Whether a model is one GGUF file instead of a directory."""
    return path.suffix == ".gguf"


def open_source(source: Source) -> Source:
    """A directory as it is; a GGUF file with its header read, once for all that wants it.

    Raises:
        CheckpointError: see `checkpoints.gguf.open_gguf`.
    """
    from checkpoints.gguf import open_gguf

    return open_gguf(source) if isinstance(source, Path) and is_gguf(source) else source


def model_config(source: Source) -> ModelConfig:
    """The config of a model.

    Raises:
        CheckpointError, UnsupportedModel: see `models.families.read_config`, `checkpoints.gguf`.
    """
    from checkpoints import gguf
    from jaxinfer.models.families import read_config

    source = open_source(source)
    return read_config(source) if isinstance(source, Path) else gguf.read_config(source)


def model_tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer of a model; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    from checkpoints import gguf
    from jaxinfer.tokenizer import gguf_tokenizer, load_tokenizer

    source = open_source(source)
    if isinstance(source, Path):
        return load_tokenizer(source)
    fields = gguf.tokenizer_fields(source)
    return None if fields is None else gguf_tokenizer(source.path, fields)


def load_weights(
    source: Source,
    config: ModelConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    layers: Sequence[int] = (),
) -> Params:
    """Weights from disk, each part to its device, with a progress bar where someone can see it.

    `layers`: of which the matrices are to lie on the host; see `offload`.

    Raises:
        CheckpointError: see `checkpoints.load_params` and `checkpoints.gguf.load_gguf`; or a model
            that Orbax wrote is to be split.
    """
    from checkpoints import load_params
    from checkpoints.gguf import load_gguf
    from checkpoints.model_store import is_saved_model, restore_model

    source = open_source(source)
    weights = declared_on(config, mesh)
    places = None if mesh is None else shardings(weights, mesh)
    if layers:
        places = host_places(weights, places, layers)
    if not isinstance(source, Path):
        with loading_bar(source.path.name) as progress:
            return load_gguf(
                source, weights, dtype=dtype, head_dim=config.head_dim, shardings=places,
                progress=progress,
            )  # fmt: skip
    if is_saved_model(source):
        if mesh is not None:
            raise CheckpointError(
                f"{source}: a model that jaxinfer saved has its matrices fused for one device: "
                f"{said(mesh)} needs safetensors or GGUF"
            )
        return restore_model(source, weights, dtype=dtype)
    # What a checkpoint may hold beside the weights: constants, and the tied matrix once more.
    extra = [r".*rotary_emb\.inv_freq"]
    if config.tie_embeddings:
        extra.append(r"lm_head\.weight")
    with loading_bar(source.name) as progress:
        return load_params(
            source, weights, dtype=dtype, shardings=places, allowed_extra=extra, progress=progress
        )


def weight_bytes(source: Source, config: ModelConfig, dtype: Any, mesh: Mesh | None = None) -> int:
    """What the weights of a model will take of each device, before they are read: exact where all
    are dense.

    Raises:
        CheckpointError, UnsupportedModel: see `checkpoints.load_params`.
    """
    from checkpoints.model_store import is_saved_model, saved_bytes

    source = open_source(source)
    if isinstance(source, Path) and is_saved_model(source):
        return saved_bytes(source)
    return round(sum(jax.tree.leaves(_sizes(source, config, dtype))) * device_share(config, mesh))


def _sizes(source: Source, config: ModelConfig, dtype: Any) -> Any:
    """Bytes of each weight, split among no devices."""
    from checkpoints import gguf
    from checkpoints.load import stored_sizes

    if isinstance(source, Path):
        return stored_sizes(source, declare(config), dtype)
    return gguf.stored_sizes(source, declare(config), dtype)


def split_stored(
    source: Source, config: ModelConfig, options: EngineOptions, mesh: Mesh | None
) -> Split:
    """Where the weights of a model on disk are to lie.

    Raises:
        CheckpointError, UnsupportedModel, CapacityError: see `weight_bytes`, `split_given`; or
            jaxinfer saved the model and some of it should lie on the host.
    """
    from checkpoints.model_store import is_saved_model

    dtype, source = jnp.dtype(options.dtype), open_source(source)
    if options.device_weight_bytes is None:
        return Split((), weight_bytes(source, config, dtype, mesh), 0, 0)
    if isinstance(source, Path) and is_saved_model(source):
        raise CheckpointError(
            f"{source}: a model that jaxinfer saved is read onto the device as a whole: "
            "device_weight_bytes needs safetensors or GGUF"
        )
    return _split(_sizes(source, config, dtype), config, options.device_weight_bytes, mesh)


def split_given(
    params: Params, config: ModelConfig, options: EngineOptions, mesh: Mesh | None
) -> Split:
    """Where weights that are in memory, whole, are to lie.

    Raises:
        CapacityError: `device_weight_bytes` is too small, or the host's memory is.
    """

    def size(_: Any, matrix: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(matrix))

    sizes = jax.tree.map(size, declare(config), params)
    budget = options.device_weight_bytes
    if budget is None:
        return Split((), sum(jax.tree.leaves(sizes)), 0, 0)
    return _split(sizes, config, budget, mesh)


def _split(sizes: Any, config: ModelConfig, budget: int, mesh: Mesh | None) -> Split:
    share = device_share(config, mesh)
    found = split(declare(config), jax.tree.map(lambda size: round(size * share), sizes), budget)
    wanted = found.host * (1 if mesh is None else mesh.size)
    if wanted > (most := pinnable_bytes()):
        raise CapacityError(
            f"device_weight_bytes={budget} leaves {wanted} bytes to the host's memory: {most} may "
            f"be taken ({PINNED} decides, in GB, before JAX starts)"
        )
    return found


def check_params(
    params: Params, config: ModelConfig, dtype: Any, like: Params | None = None
) -> None:
    """Raises CheckpointError unless `params` is the tree that `config` declares, in `dtype`.

    Matrices may be quantised. With `like`, they are so in the way that those of `like` are.
    """
    if like is None:
        want = _described(abstract_params(config, dtype))
        have = _described(params, _is_quantised)
    else:
        want, have = _described(like), _described(params)
    problems = [
        f"{name}: {have.get(name, 'missing')}, expected {want.get(name, 'nothing there')}"
        for name in sorted(want.keys() | have.keys())
        if want.get(name) != have.get(name) and not _stands_for(have.get(name), want.get(name))
    ]
    if problems:
        raise CheckpointError(
            f"params are not those of this config with dtype={str(dtype)!r}:\n  "
            + "\n  ".join(problems)
        )


def check_dense(params: Any, mesh: Mesh) -> None:
    """Raises CheckpointError if a matrix is quantised, which is not laid out anew in memory."""
    found = jax.tree.leaves_with_path(params, is_leaf=_is_quantised)
    names = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} ({_describe(leaf)})"
        for path, leaf in found
        if _is_quantised(leaf)
    ]
    if names:
        raise CheckpointError(
            f"{said(mesh)} with quantised matrices in memory, such as {names[0]}: "
            "expected dense ones; quantised models are split when they are read from disk"
        )


def has_quantised(params: Any) -> bool:
    """Whether some matrix is."""
    return any(map(_is_quantised, jax.tree.leaves(params, is_leaf=_is_quantised)))


def _is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, QUANTISED)


def _described(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _describe(leaf)
        for path, leaf in jax.tree.flatten_with_path(tree, is_leaf)[0]
    }


def _describe(leaf: Any) -> str:
    if isinstance(leaf, QUANTISED):
        return f"quantised{list(leaf.shape)}"
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}{list(leaf.shape)}"


def _stands_for(have: str | None, want: str | None) -> bool:
    """Whether a quantised matrix is of the shape of the dense one that is expected."""
    if have is None or want is None or not have.startswith("quantised["):
        return False
    return have.removeprefix("quantised") == want[want.index("[") :]
