"""From the command line's options to a loaded model, or to a description of one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from jaxinfer.cli.options import Dtype, KvCacheDtype
from jaxinfer.cli.output import note
from jaxinfer.errors import CapacityError, CheckpointError, JaxinferError
from jaxinfer.hub import ALLOW_PATTERNS, resolve_model

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

PACKAGES = ("jaxinfer", "jax", "jaxlib", "numpy", "transformers")  # that `info` tells of
DIGEST_BYTES = 1 << 20  # of either end of a file


@dataclass(frozen=True)
class ModelOptions:
    """What the user said about the model; see the options of the same names."""

    model: str
    revision: str | None
    dtype: Dtype
    max_model_len: int | None
    gpu_memory_utilization: float
    kv_cache_dtype: KvCacheDtype
    event_log: str | None = None
    speculative: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    device_weight_bytes: int | None = None
    kv_host_bytes: int = 0


def open_llm(
    options: ModelOptions, dtype: Literal["float32", "bfloat16", "float16"] | None = None
) -> LLM:
    """Finds the model, starts JAX and loads it; `dtype`: where `choose_dtype` was called before."""
    directory = resolve_model(options.model, options.revision)
    dtype = dtype or choose_dtype(options)
    from jaxinfer.llm import LLM

    try:
        return LLM(
            directory,
            dtype=dtype,
            max_model_len=options.max_model_len,
            gpu_memory_utilization=options.gpu_memory_utilization,
            kv_cache_dtype=options.kv_cache_dtype,
            event_log=options.event_log,
            speculative=options.speculative,
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
            data_parallel_size=options.data_parallel_size,
            device_weight_bytes=options.device_weight_bytes,
            kv_host_bytes=options.kv_host_bytes,
        )
    except ValueError as error:
        if isinstance(error, JaxinferError):
            raise
        raise typer.BadParameter(str(error)) from error


def follows(options: ModelOptions) -> bool:
    """Where a model is to be shared and jax's variables, or a cluster, tell of several processes:
    joins them, and in all but the first does as the first does, to its end. Returns whether it did.
    """
    if options.tensor_parallel_size * options.pipeline_parallel_size == 1:
        return False
    from jaxinfer import distributed

    if not distributed.start() or distributed.leads():
        return False
    with open_llm(options) as llm:
        return llm.follow()


def choose_dtype(options: ModelOptions) -> Literal["float32", "bfloat16", "float16"]:
    """Starts JAX, and settles `auto` by the device that it found."""
    # JAX reads this once, when it starts. This process is ours, so it may be set.
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(options.gpu_memory_utilization)
    import jax

    from jaxinfer.backend import allow_pinned

    if options.device_weight_bytes is not None or options.kv_host_bytes:
        allow_pinned()
    device = jax.devices()[0]
    if options.dtype == "auto":
        dtype = "bfloat16" if device.platform == "gpu" else "float32"
    else:
        dtype = options.dtype
    note(f"{options.model}: {dtype} on {device.device_kind}")
    return dtype


def model_digest(directory: Path) -> str:
    """Of the files that make up a model: their names, sizes, beginnings and ends.

    Whole weights would take minutes to read; training or converting them changes their ends.
    """
    digest = hashlib.sha256()
    for path in sorted({p for pattern in ALLOW_PATTERNS for p in directory.glob(pattern)}):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size}\n".encode())
            for place in (0, max(0, size - DIGEST_BYTES)):
                file.seek(place)
                digest.update(file.read(DIGEST_BYTES))
    return digest.hexdigest()


def describe_sites(model: str, revision: str | None) -> dict[str, Any]:
    """Where a model's activations can be read and changed; starts nothing."""
    from jaxinfer.loading import model_config
    from jaxinfer.models import sites

    config = model_config(resolve_model(model, revision))
    found = {
        name: {"width": width, "what": what}
        for name, (width, what) in sites.describe(config).items()
    }
    return {"model": model, "num_layers": config.num_layers, "sites": found}


def describe(options: ModelOptions) -> dict[str, Any]:
    """The model, the memory it needs, and what it would run on."""
    directory = resolve_model(options.model, options.revision)
    dtype = choose_dtype(options)
    import jax

    from jaxinfer.cache import page_bytes, resolve_kv_dtype
    from jaxinfer.config import EngineOptions
    from jaxinfer.loading import model_config, open_source, weight_bytes
    from jaxinfer.memory import plan
    from jaxinfer.models.weights import count_params

    source = open_source(directory)
    config = model_config(source)
    chosen = EngineOptions(
        dtype=dtype, max_model_len=options.max_model_len, kv_cache_dtype=options.kv_cache_dtype
    )
    kv_dtype = resolve_kv_dtype(options.kv_cache_dtype, dtype)
    try:
        memory: dict[str, Any] = asdict(
            plan(config, chosen, loaded=False, weights=weight_bytes(source, config, dtype))
        )
    except (CapacityError, CheckpointError) as error:
        memory = {"error": str(error)}
    architecture = {key: value for key, value in asdict(config).items() if key != "layers"}
    return {
        "model": options.model,
        "directory": str(directory),
        "dtype": dtype,
        "kv_cache_dtype": kv_dtype.name,
        "config": architecture
        | {
            "num_layers": config.num_layers,
            "windows": sorted({layer.window for layer in config.layers if layer.window}),
            "rope": sorted({layer.rope.kind for layer in config.layers if layer.rope}),
        },
        "parameters": count_params(config),
        "kv_bytes_per_token": page_bytes(config, 1, kv_dtype),
        "memory": memory,
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
