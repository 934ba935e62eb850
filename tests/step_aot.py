"""Temporary memory of whole steps, compiled for GPUs that are not there.

    python -m tests.step_aot CASES.json

Reads a list of objects with fields of `Case`; prints each with `temp`, in bytes, one a line. Needs
JAX's CUDA plugin on the path; see `tests.pallas_kernels.aot`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.core import artificial_shared_memory_limit
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer import warmup
from jaxinfer.batch import init_penalties, init_state
from jaxinfer.buckets import MOST_CHUNKS
from jaxinfer.cache import init_cache
from jaxinfer.config import BatcherConfig, ModelConfig, Speculative
from jaxinfer.drafting import Drafter
from jaxinfer.known_models import HF_CONFIGS, RECIPES
from jaxinfer.models.families import parse_config
from jaxinfer.models.weights import abstract_params
from jaxinfer.packing import pack
from jaxinfer.pages import pages_for
from jaxinfer.parallel import declared_on
from jaxinfer.quant import QuantisedMatrix
from jaxinfer.quant.make import Recipe
from jaxinfer.quant.packing import pack_matrix
from jaxinfer.quantise import Method, quantise_params
from jaxinfer.runner import StepCompiler, StepKey
from jaxinfer.sharding import shardings
from pallas_kernels.exchange import Peers, table_shape
from tests.pallas_kernels.aot import topology

PAGE = 32


class Case(NamedTuple):
    """A step of `layers` layers of a model on `devices` GPUs; dense on several.

    `context`: tokens that a sequence has at most; `penalties`: whether the state has those; the
    others as of `StepKey` and `Speculative`.
    """

    model: str
    precision: str = "bf16"
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    rows: int = 8
    tokens: int = 0
    steps: int = 1
    random: bool = False
    truncated: bool = False
    top: int | None = None
    score: int | None = None
    guesses: int = 0
    rule: str = "shared"
    penalties: bool = False
    context: int = 2048
    layers: int = 2
    devices: int = 1
    arch: str = "sm90"


def config_of(case: Case) -> ModelConfig:
    whole = parse_config(HF_CONFIGS[case.model])
    return replace(whole, layers=whole.layers[: case.layers])


def weights(case: Case, config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes, as an engine holds them."""
    params = abstract_params(config, jnp.dtype(case.dtype))
    if case.precision in RECIPES:
        method = Method(Recipe(**RECIPES[case.precision]))
        made = jax.eval_shape(lambda params: quantise_params(params, config, method), params)
        packed = partial(jax.tree.map, partial(jax.eval_shape, pack_matrix))
        params = packed(made, is_leaf=lambda x: isinstance(x, QuantisedMatrix))
    if case.devices == 1:
        return placed(params, NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(placed, params, shardings(declared_on(config, mesh), mesh))


def placed(tree: Any, place: NamedSharding) -> Any:
    """The shapes of a tree's arrays, where they are to lie."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def step_key(case: Case) -> StepKey:
    return StepKey(
        rows=case.rows, tokens=case.tokens, chunks=MOST_CHUNKS if case.tokens else 0,
        pages=pages_for(case.context, PAGE), page_size=PAGE, steps=case.steps, random=case.random,
        truncated=case.truncated, top=case.top, score=case.score, guesses=case.guesses,
    )  # fmt: skip


def arguments(case: Case, config: ModelConfig, key: StepKey, mesh: Mesh) -> tuple[Any, ...]:
    rows = case.rows
    limits = BatcherConfig(
        num_pages=rows * key.pages + 1, page_size=PAGE, max_num_seqs=rows,
        max_model_len=case.context, max_num_batched_tokens=max(case.tokens, 2 * rows),
        max_chunks=MOST_CHUNKS,
    )  # fmt: skip
    cache = jax.eval_shape(
        partial(
            init_cache, config, limits.num_pages, PAGE, jnp.dtype(case.kv_dtype),
            with_tokens=case.guesses > 0,
        )
    )  # fmt: skip
    seq = jax.eval_shape(partial(init_state, rows, key.pages))
    if case.penalties:
        seq = seq._replace(
            penalties=jax.eval_shape(partial(init_penalties, rows, config.vocab_size))
        )
    plan = pack(warmup.probe_plan(warmup.probe(limits, config.vocab_size), key, limits))
    whole = NamedSharding(mesh, PartitionSpec())
    heads = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))
    return (
        weights(case, config, mesh), placed(cache, heads if case.devices > 1 else whole),
        placed(seq, whole), placed(plan, whole), (), None,
    )  # fmt: skip


def peers(mesh: Mesh, arch: str) -> Peers | None:
    """As an engine has them."""
    if mesh.size == 1 or arch != "sm90":
        return None
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return Peers(jax.ShapeDtypeStruct(table_shape(mesh), jnp.uint32, sharding=place), None)


def compiled(case: Case) -> Any:
    config, key = config_of(case), step_key(case)
    devices, shared_bytes = topology(case.arch, case.devices)
    mesh = Mesh(np.array(devices), ("tensor",))
    how = Speculative("lookup", tokens=case.guesses or 1, rule=case.rule)  # type: ignore[arg-type]
    compiler = StepCompiler(
        config,
        invariant=True,
        platform="gpu",
        drafter=Drafter(how),
        mesh=mesh,
        peers=peers(mesh, case.arch),
    )
    given = arguments(case, config, key, mesh)
    with jax.default_device(devices[0]), artificial_shared_memory_limit(shared_bytes):
        return compiler._finish(key, compiler._lower(key, *given))


def main(cases: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    jax.devices()  # finds the plugin
    for fields in json.loads(cases.read_text()):
        found = compiled(Case(**fields)).memory_analysis()
        print(json.dumps(fields | {"temp": found.temp_size_in_bytes}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
