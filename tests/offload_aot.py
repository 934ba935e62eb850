"""Compiles whole steps for an H100 that is not there, with weights on the host.

    python -m tests.offload_aot FOLDER CASE...

Writes `CASE.hlo`, the scheduled program, and `CASE.temp`, the bytes of its temporaries. Needs JAX's
CUDA plugin on the path; see `tests.pallas_kernels.aot`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler  # compiling for a topology has no public way to name a memory
from jax.experimental.mosaic.gpu.core import artificial_shared_memory_limit
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import xla_client

from jaxinfer import warmup
from jaxinfer.batch import init_state
from jaxinfer.cache import init_cache
from jaxinfer.config import BatcherConfig, LayerConfig, ModelConfig
from jaxinfer.models.weights import declare
from jaxinfer.offload import host_places, place_of, spread
from jaxinfer.packing import pack, unpack
from jaxinfer.quant import QuantisedMatrix, Scheme
from jaxinfer.quant.packing import pack_matrix
from jaxinfer.runner import INVARIANT_OPTIONS, StepKey, run_step
from tests.pallas_kernels.aot import topology
from tests.step_aot import placed

LAYERS = 4
CONFIG = ModelConfig(
    family="llama", vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_heads=8,
    num_kv_heads=2, head_dim=128, layers=(LayerConfig(),) * LAYERS, max_position=1024,
)  # fmt: skip
LIMITS = BatcherConfig(
    num_pages=64, page_size=32, max_num_seqs=16, max_model_len=1024, max_num_batched_tokens=256,
    max_chunks=2,
)  # fmt: skip


class Case(NamedTuple):
    """`host`: layers there; `steps`, `tokens`: of the `StepKey`; `int4`: packed matrices."""

    host: int
    steps: int = 1
    tokens: int = 0
    int4: bool = False


CASES = {
    "all": Case(LAYERS, steps=2),
    "half": Case(LAYERS // 2, tokens=64),
    "int4": Case(LAYERS, int4=True),
}


def weights(case: Case, place: NamedSharding) -> Any:
    declared = declare(CONFIG)
    places = host_places(declared, jax.tree.map(lambda _: place, declared), spread(case.host, 4))

    def one(weight: Any, place: NamedSharding) -> Any:
        made = jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16)
        if case.int4 and len(weight.shape) > 1 and "vocab" not in weight.axes:
            N, K = weight.shape
            codes = jax.ShapeDtypeStruct((N, K // 2), jnp.uint8)
            scales = jax.ShapeDtypeStruct((N, K // 128), jnp.bfloat16)
            made = jax.eval_shape(pack_matrix, QuantisedMatrix(Scheme(), codes, scales))
        return jax.tree.map(lambda x: placed(x, place_of(place, x)), made)

    return jax.tree.map(one, declared, places)


def arguments(case: Case, key: StepKey, place: NamedSharding) -> tuple[Any, ...]:
    cache = jax.eval_shape(
        partial(init_cache, CONFIG, LIMITS.num_pages, LIMITS.page_size, jnp.bfloat16)
    )
    seq = jax.eval_shape(partial(init_state, LIMITS.max_num_seqs, key.pages))
    plan = pack(warmup.probe_plan(warmup.probe(LIMITS, CONFIG.vocab_size), key, LIMITS))
    return weights(case, place), *(placed(x, place) for x in (cache, seq, plan))


def compiled(case: Case, device: Any, shared_bytes: int) -> Any:
    key = StepKey(
        rows=8, tokens=case.tokens, chunks=2 if case.tokens else 0, pages=32, page_size=32,
        steps=case.steps,
    )  # fmt: skip
    # Devices of a topology know no memories: lowered for a CPU that does, compiled for the GPU.
    place = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec())
    step = jax.jit(
        lambda params, cache, seq, plan: run_step(
            params, cache, seq, unpack(plan), config=CONFIG, key=key
        ),
        donate_argnums=(1, 2),
    )
    given = arguments(case, key, place)
    with jax.default_device(device), artificial_shared_memory_limit(shared_bytes):
        lowered = step.trace(*given).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=1, env_options_overrides=INVARIANT_OPTIONS,
        device_assignment=np.array([[0]]),
    )  # fmt: skip
    devices = xla_client.DeviceList((device,))
    return device.client.compile(lowered, devices, options)


def main(folder: Path, names: list[str]) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    jax.devices()  # finds the plugin
    (device,), shared_bytes = topology("sm90")
    for name in names:
        made = compiled(CASES[name], device, shared_bytes)
        (folder / f"{name}.hlo").write_text(made.hlo_modules()[0].to_string())
        found = made.get_compiled_memory_stats()
        (folder / f"{name}.temp").write_text(str(found.temp_size_in_bytes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
