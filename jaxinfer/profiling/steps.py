"""The engine's programs alone: one step over and over, without scheduler and requests.

Sequences do not have to be read first: their pages are filled with random numbers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import batcher
from jaxinfer.batch import MIN_ROWS, SeqState, init_state
from jaxinfer.buckets import Buckets
from jaxinfer.cache import PagedCache, init_cache
from jaxinfer.config import BatcherConfig, ModelConfig
from jaxinfer.models.decoder import Params
from jaxinfer.packing import Packed, pack, unpack
from jaxinfer.pages import pages_for
from jaxinfer.plans import Kind, SequenceSpec, make_plan, step_key
from jaxinfer.roofline import Shape, chunk_shape, decode_shape
from jaxinfer.runner import StepKey, run_step
from jaxinfer.types import SamplingParams

TIMED_STEPS, REPEATS = 32, 5
# CUDA graphs hide which instruction a kernel is of.
WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
GREEDY = Kind()


class Task(NamedTuple):
    """A step to run.

    Attributes:
        key, plan: of the program.
        seq: where it begins.
        dispatches: of `key.steps` steps each, that can follow one another.
        shape: of a step as it is computed; `wanted`: without padding. `rows`: of both.
    """

    name: str
    key: StepKey
    plan: Packed
    seq: SeqState
    dispatches: int
    shape: Shape
    wanted: Shape
    rows: tuple[int, int]

    @property
    def steps(self) -> int:
        return self.dispatches * self.key.steps


def decode_task(
    config: ModelConfig, limits: BatcherConfig, buckets: Buckets, *, batch: int, context: int
) -> Task:  # fmt: skip
    """Greedy tokens for `batch` sequences that come to hold `context`."""
    M, width = limits.max_num_seqs, pages_for(limits.max_model_len, limits.page_size)
    rows = np.arange(batch)
    action = _action(limits, steps=limits.max_steps, rows=rows, tokens=context)
    key = step_key(action, GREEDY, None, limits=limits, buckets=buckets, invariant=True)
    most = min(TIMED_STEPS, context - 1) // key.steps
    dispatches = max(1, most)
    lengths = jnp.where(jnp.arange(M) < batch, context - dispatches * key.steps, 0)
    pages = 1 + jnp.arange(M * width, dtype=jnp.int32).reshape(1, M, width)
    seq = init_state(M, width)._replace(
        tokens=jax.random.randint(jax.random.key(0), (M,), 0, config.vocab_size, jnp.int32),
        lengths=lengths.astype(jnp.int32),
        limits=jnp.full(M, context + 2, jnp.int32),
        active=jnp.arange(M) < batch,
        page_table=pages,
    )
    plan = make_plan(action, key, {}, {}, table_width=width)
    mean = context - dispatches * key.steps // 2
    one = decode_shape(config, batch, mean)
    computed = max(key.rows, MIN_ROWS)
    return Task(
        "decode", key, pack(plan), seq, dispatches,
        one._replace(rows=computed, logits=computed), one._replace(rows=batch, logits=batch),
        (computed, batch),
    )  # fmt: skip


def prefill_task(
    config: ModelConfig, limits: BatcherConfig, buckets: Buckets, *, prompt: int
) -> Task:
    """Reads a prompt of `prompt` tokens in one chunk, and samples the token after it."""
    width = pages_for(limits.max_model_len, limits.page_size)
    pages = 1 + np.arange(pages_for(prompt, limits.page_size), dtype=np.int32)
    longest = limits.max_model_len
    chunk = batcher.Prefill(0, 0, 0, prompt, True, True, longest, pages)
    action = _action(limits, steps=1, rows=np.arange(0), tokens=prompt + 1, chunks=(chunk,))
    key = step_key(action, GREEDY, None, limits=limits, buckets=buckets, invariant=True)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, prompt).astype(np.int32)
    spec = SequenceSpec(tokens, SamplingParams(temperature=0), longest, seed=0)
    plan = make_plan(action, key, {0: spec}, {0: tokens}, table_width=width)
    one = chunk_shape(config, 0, prompt)
    logits = pages_for(key.rows + key.chunks, MIN_ROWS) * MIN_ROWS
    return Task(
        "prefill", key, pack(plan), init_state(limits.max_num_seqs, width), REPEATS,
        one._replace(rows=key.tokens, logits=logits), one._replace(rows=prompt, logits=1),
        (key.tokens, prompt),
    )  # fmt: skip


def _action(
    limits: BatcherConfig, *, steps: int, rows: np.ndarray, tokens: int,
    chunks: tuple[batcher.Prefill, ...] = (),
) -> batcher.Run:  # fmt: skip
    """A dispatch that is granted no pages: the rows have them."""
    M, W = limits.max_num_seqs, batcher.granted_columns(limits)
    return batcher.Run(
        steps=steps, guesses=0, rows=rows, ids=rows, tokens=tokens,
        columns=np.zeros(M, np.int32), pages=np.zeros((M, W), np.int32),
        chunks=chunks, released=np.zeros(M, bool),
    )  # fmt: skip


def random_cache(config: ModelConfig, num_pages: int, page_size: int, kv_dtype: Any) -> PagedCache:
    """Pages of random numbers: on zeros a GPU runs faster."""

    @partial(jax.jit, static_argnums=(1, 2))
    def drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape).astype(dtype)

    pools = jax.eval_shape(partial(init_cache, config, num_pages, page_size, kv_dtype))
    leaves, tree = jax.tree.flatten(pools)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    made = [drawn(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, made)


def compile_step(
    task: Task, params: Params, cache: PagedCache, config: ModelConfig, options: dict[str, Any],
    *, named: bool = False,
) -> Any:  # fmt: skip
    """The task's program, compiled with these options of XLA's; `named`: its text is to be read,
    for the scopes of this source."""

    def step(params: Params, cache: PagedCache, seq: SeqState, plan: Packed) -> Any:
        return run_step(params, cache, seq, unpack(plan), config=config, key=task.key)

    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(params, cache, task.seq, task.plan)
    with _own_scopes() if named else nullcontext():
        return lowered.compile(compiler_options=options or None)


@contextmanager
def _own_scopes() -> Iterator[None]:
    """A program from JAX's cache on disk may bear the scopes of other sources, which are no part of
    its key unless one says so."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def run(program: Any, task: Task, params: Params, cache: PagedCache, seq: SeqState) -> PagedCache:
    """All of a task, once, from `seq` on (`begin`), which is donated as `cache` is."""
    for _ in range(task.dispatches):
        cache, seq, _ = program(params, cache, seq, task.plan)
    jax.block_until_ready(seq)
    return cache


def begin(task: Task) -> SeqState:
    """A copy of where it begins."""
    return jax.block_until_ready(jax.tree.map(jnp.copy, task.seq))


def step_seconds(
    program: Any, task: Task, params: Params, cache: PagedCache
) -> tuple[PagedCache, float]:
    """Of one step, the median over repeats; `cache` is donated."""
    times = []
    for _ in range(1 + REPEATS):
        seq = begin(task)
        began = time.perf_counter()
        cache = run(program, task, params, cache, seq)
        times.append((time.perf_counter() - began) / task.steps)
    return cache, statistics.median(times[1:])
