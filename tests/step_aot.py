"""Temporary memory of whole steps, compiled for an H100 that is not there.

    python -m tests.step_aot CASES.json

Reads a list of objects with the fields of `Case`; prints each with `temp`, in bytes, one a line.
Needs JAX's CUDA plugin on the path; see `tests.pallas_kernels.aot`.
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
from jax.experimental import topologies
from jax.experimental.mosaic.gpu.core import artificial_shared_memory_limit
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer import sampling, warmup
from jaxinfer.batch import init_state
from jaxinfer.buckets import MOST_CHUNKS
from jaxinfer.cache import init_cache
from jaxinfer.config import BatcherConfig, ModelConfig, Speculative
from jaxinfer.drafting import Drafter
from jaxinfer.known_models import HF_CONFIGS, RECIPES
from jaxinfer.models.families import parse_config
from jaxinfer.models.weights import abstract_params
from jaxinfer.packing import pack, unpack
from jaxinfer.pages import pages_for
from jaxinfer.plans import SequenceSpec, make_plan
from jaxinfer.quant import QuantisedMatrix
from jaxinfer.quant.make import Recipe
from jaxinfer.quant.packing import pack_matrix
from jaxinfer.quantise import Method, quantise_params
from jaxinfer.runner import INVARIANT_OPTIONS, StepKey, run_step
from tests.pallas_kernels.aot import SPECS, TARGETS

PAGE = 32


class Case(NamedTuple):
    """A step of `layers` layers of a model: fields as of `StepKey`, `seqs` rows of state, `context`
    tokens a sequence at most, `penalties`: whether the state has those."""

    model: str
    precision: str = "bf16"
    rows: int = 8
    tokens: int = 0
    steps: int = 1
    random: bool = False
    truncated: bool = False
    top: int | None = None
    score: int | None = None
    context: int = 2048
    layers: int = 2
    seqs: int | None = None
    penalties: bool = False
    kv_dtype: str = "bfloat16"
    chunks: int = MOST_CHUNKS
    dtype: str = "bfloat16"
    guesses: int = 0
    rule: str = "shared"


def config_of(case: Case) -> ModelConfig:
    whole = parse_config(HF_CONFIGS[case.model])
    return replace(whole, layers=whole.layers[: case.layers])


def weights(config: ModelConfig, precision: str, dtype: str = "bfloat16") -> Any:
    params = abstract_params(config, jnp.dtype(dtype))
    if precision not in RECIPES:
        return params
    method = Method(Recipe(**RECIPES[precision]))
    made = jax.eval_shape(lambda x: quantise_params(x, config, method), params)
    whole = lambda x: isinstance(x, QuantisedMatrix)  # noqa: E731
    return jax.tree.map(
        lambda x: jax.eval_shape(pack_matrix, x) if whole(x) else x, made, is_leaf=whole
    )


def step_key(case: Case) -> StepKey:
    return StepKey(
        rows=case.rows, tokens=case.tokens, chunks=case.chunks if case.tokens else 0,
        pages=pages_for(case.context, PAGE), page_size=PAGE, steps=case.steps, random=case.random,
        truncated=case.truncated, top=case.top, score=case.score, guesses=case.guesses,
    )  # fmt: skip


def arguments(case: Case, config: ModelConfig, key: StepKey) -> tuple[Any, ...]:
    seqs = max(case.seqs or case.rows, 2)
    limits = BatcherConfig(
        num_pages=seqs * key.pages + 1, page_size=PAGE, max_num_seqs=seqs,
        max_model_len=case.context, max_num_batched_tokens=max(case.tokens, 2 * seqs),
        max_chunks=case.chunks,
    )  # fmt: skip
    cache = jax.eval_shape(
        partial(
            init_cache,
            config,
            limits.num_pages,
            PAGE,
            jnp.dtype(case.kv_dtype),
            with_tokens=bool(case.guesses),
        )
    )
    seq = jax.eval_shape(partial(init_state, seqs, key.pages))
    if case.penalties:
        shape = (seqs, config.vocab_size)
        seq = seq._replace(
            penalties=sampling.PenaltyState(
                jax.ShapeDtypeStruct(shape, jnp.bool_), jax.ShapeDtypeStruct(shape, jnp.int32)
            )
        )
    probe = warmup.probe(limits, config.vocab_size)
    known = {0: probe.tokens, 1: probe.others}
    specs = {i: SequenceSpec(x, warmup.GREEDY, case.context, seed=0) for i, x in known.items()}
    action = warmup.probing(probe, key, limits)
    plan = pack(make_plan(action, key, specs, known, table_width=key.pages))
    return weights(config, case.precision, case.dtype), cache, seq, plan


def compiled(case: Case, device: Any) -> Any:
    config, key = config_of(case), step_key(case)
    place = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    given = arguments(case, config, key)
    how = Speculative("lookup", tokens=case.guesses or 1, rule=case.rule)
    step = jax.jit(
        lambda params, cache, seq, plan: run_step(
            params, cache, seq, unpack(plan), config=config, key=key, drafter=Drafter(how)
        ),
        donate_argnums=(1, 2), in_shardings=place, out_shardings=place,
    )  # fmt: skip
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    with jax.default_device(device), artificial_shared_memory_limit(232448):
        return step.lower(*given).compile(compiler_options=INVARIANT_OPTIONS)


def main(cases: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    jax.devices()  # finds the plugin
    spec = (TARGETS / SPECS["sm90"][0]).read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=spec, topology="1x1x1")
    for fields in json.loads(cases.read_text()):
        made = compiled(Case(**fields), topology.devices[0])
        if len(sys.argv) > 2:
            Path(sys.argv[2]).write_text(made.as_text())
        found = made.memory_analysis()
        print(json.dumps(fields | {"temp": found.temp_size_in_bytes}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
