"""Loading a model to measure it: with room for a batch of a context, and no more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxinfer.cli.model import ModelOptions, choose_dtype
from jaxinfer.cli.options import Dtype, KvCacheDtype
from jaxinfer.hub import resolve_model
from jaxinfer.known_models import HF_CONFIGS, RECIPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxinfer.config import ModelConfig
    from jaxinfer.llm import LLM


@dataclass(frozen=True)
class MeasureOptions:
    """What the command line says.

    Attributes:
        context: tokens that each sequence comes to hold; prompt: tokens of the one that is read.
            None until `settled`.
        random: weights are drawn, and the layers' matrices rounded to this (a key of
            `known_models.RECIPES`, or `auto`: not at all); the model may then be one of
            `known_models.HF_CONFIGS`. None: weights are read.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "auto"
    kv_dtype: KvCacheDtype = "auto"
    gpu_memory_utilization: float = 0.9
    batch: int = 1
    context: int | None = None
    prompt: int | None = None
    random: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in memory. `dtype`: of activations; `kv_dtype`: of pages; `first`: what the function
    gave that was called before the weights were there."""

    llm: LLM
    dtype: Any
    kv_dtype: str
    first: Any


def settled(options: MeasureOptions, context: int) -> tuple[ModelConfig, MeasureOptions]:
    """The config of what is to be loaded, and the options with nothing left open. `context`: where
    the user named none, and the model has so many positions.

    Raises:
        ValueError: a shape without weights, or a batch or context that makes no sense.
        CheckpointError, UnsupportedModel: there is no such model, or it cannot be read.
    """
    from jaxinfer.cli.estimating import read_model
    from jaxinfer.hardware import GPUS
    from jaxinfer.loading import model_config
    from jaxinfer.memory import DEFAULT_BATCHED_TOKENS
    from jaxinfer.placement import Setting, check_setting
    from jaxinfer.profiling.engine_times import LEAST_CONTEXT
    from jaxinfer.quant.make import Recipe
    from jaxinfer.quantise import check_columns

    o = options
    if o.random is not None:
        accepted = ("auto", *RECIPES)
        if o.random not in accepted:
            raise ValueError(f"precision={o.random!r}: expected one of {', '.join(accepted)}")
        config = read_model(o.model)
        if o.random != "auto":
            check_columns(config, Recipe(**RECIPES[o.random]))
    elif o.model.lower() in HF_CONFIGS:
        raise ValueError(
            f"{o.model} is a shape without weights: give a directory, a .gguf file or demo"
        )
    else:
        config = model_config(resolve_model(o.model, o.revision))
    context = min(context, config.max_position) if o.context is None else o.context
    # What is checked does not depend on the GPU.
    any_gpu = Setting(GPUS["h100"], kv_dtype=o.kv_dtype, batch=o.batch, context=context)
    check_setting(config, replace(any_gpu, prompt=o.prompt))
    if context < LEAST_CONTEXT:
        raise ValueError(f"context={context}: expected at least {LEAST_CONTEXT}")
    # A token follows the prompt.
    prompt = min(context - 1, DEFAULT_BATCHED_TOKENS) if o.prompt is None else o.prompt
    if prompt == context:
        raise ValueError(f"prompt={prompt}: expected at most {context - 1}: a token follows it")
    return config, replace(o, context=context, prompt=prompt)


def load_measured(
    options: MeasureOptions, config: ModelConfig, first: Callable[[str], Any] = lambda _: None
) -> Loaded:
    """Starts JAX and loads the model, of the config and options that `settled` gave.

    Args:
        first: called with the dtype of activations before anything is loaded, while the device's
            memory is free; but once it is known that the model will fit.

    Raises:
        CapacityError: weights or pages do not fit.
        CheckpointError, UnsupportedModel: see `LLM`.
    """
    o = options
    assert o.context is not None, "settled"
    chosen = ModelOptions(
        o.model, o.revision, o.dtype, o.context, o.gpu_memory_utilization, o.kv_dtype
    )
    dtype = choose_dtype(chosen)
    import jax.numpy as jnp

    from jaxinfer.backend import prepare_backend
    from jaxinfer.cache import page_bytes, resolve_kv_dtype
    from jaxinfer.config import EngineOptions
    from jaxinfer.llm import LLM
    from jaxinfer.loading import open_source, weight_bytes
    from jaxinfer.memory import plan
    from jaxinfer.pages import pages_for
    from jaxinfer.profiling.weights import DENSE, random_params
    from jaxinfer.roofline import PRECISIONS, count_sizes

    kv_dtype, size = resolve_kv_dtype(o.kv_dtype, dtype).name, EngineOptions.page_size
    pages = o.batch * pages_for(o.context, size) + 1
    wanted: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": o.context,
        "max_num_seqs": o.batch,
        "gpu_memory_utilization": o.gpu_memory_utilization,
        "kv_cache_dtype": o.kv_dtype,
        "kv_cache_bytes": pages * page_bytes(config, size, kv_dtype),
        "prefix_caching": False,
    }
    engine = EngineOptions(**wanted)
    if o.random is None:
        source = open_source(resolve_model(o.model, o.revision))
        expected = weight_bytes(source, config, jnp.dtype(dtype))
    else:
        stored = PRECISIONS[DENSE[dtype] if o.random == "auto" else o.random]
        expected = round(count_sizes(config).bytes(replace(stored, dtype=dtype)))
    prepare_backend(engine)
    plan(config, engine, loaded=False, weights=expected)
    found = first(dtype)
    if o.random is None:
        llm = LLM(o.model, revision=o.revision, **wanted)
    else:
        llm = LLM.from_params(random_params(config, o.random, dtype), config, **wanted)
    return Loaded(llm, dtype, kv_dtype, found)
