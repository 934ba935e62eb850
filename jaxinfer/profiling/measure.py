"""From an `LLM` to the table of its decode and prefill steps."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jaxinfer.buckets import make_buckets
from jaxinfer.errors import JaxinferError
from jaxinfer.profiling.ceilings import Ceilings
from jaxinfer.profiling.engine_times import decode_seconds, prompt_seconds, window
from jaxinfer.profiling.report import Phase, make_phase
from jaxinfer.profiling.steps import (
    WITHOUT_GRAPHS,
    Task,
    begin,
    compile_step,
    decode_task,
    prefill_task,
    random_cache,
    run,
    step_seconds,
)
from jaxinfer.profiling.trace import Event, op_paths, record_events
from jaxinfer.profiling.weights import find_precision
from jaxinfer.roofline import op_work

if TYPE_CHECKING:
    from jaxinfer.cache import PagedCache
    from jaxinfer.config import ModelConfig
    from jaxinfer.llm import LLM
    from jaxinfer.models.decoder import Params


@dataclass(frozen=True)
class Profile:
    """What `profile` found.

    Attributes:
        device: as its driver calls it.
        precision: see `weights.find_precision`. `dtype`: of activations; `kv_dtype`: of pages.
        batch, context: of decode: sequences, and the tokens that each comes to hold.
        prompt: tokens that prefill reads.
    """

    device: str
    precision: str
    dtype: str
    kv_dtype: str
    batch: int
    context: int
    prompt: int
    ceilings: Ceilings
    phases: tuple[Phase, ...]


def profile(
    llm: LLM, ceilings: Ceilings, *, batch: int, context: int, prompt: int, dtype: str,
    kv_dtype: str,
) -> Profile:  # fmt: skip
    """Times the engine, closes it, and looks into its steps.

    Args:
        llm: on one device, idle, invariant, without a prefix cache, of at least `batch` rows of
            `context` tokens, all of which the cache holds. Closed afterwards.
        ceilings: of `dtype`, measured before the weights filled the memory.
        batch, context, prompt, dtype, kv_dtype: see `Profile`.

    Raises:
        JaxinferError: the profiler does not work here.
    """
    decode_s = decode_seconds(llm, batch, window(context))
    prefill_s = prompt_seconds(llm, prompt)
    config, params, memory = llm.config, llm.params, llm.memory_plan
    limits, options = llm.engine.limits, llm.engine.compiler.options
    llm.close()
    gc.collect()  # the cache of pages goes with the engine
    buckets = make_buckets(limits, gpu=jax.devices()[0].platform == "gpu")
    cache = random_cache(config, memory.num_pages, memory.page_size, kv_dtype)
    tasks = (
        decode_task(config, limits, buckets, batch=batch, context=context),
        prefill_task(config, limits, buckets, prompt=prompt),
    )
    name, precision = find_precision(params, dtype)
    phases = []
    for task, engine_s in zip(tasks, (decode_s, prefill_s), strict=True):
        cache, seen = _look(task, params, cache, config, options)
        work, wanted = (
            op_work(config, precision, shape, kv_dtype=kv_dtype)
            for shape in (task.shape, task.wanted)
        )
        phase = make_phase(
            task.name, seen.events, op_paths(seen.program),
            steps=task.steps, rows=task.rows, work=work, wanted=wanted, ceilings=ceilings,
            step_s=seen.step_s, engine_s=engine_s,
        )  # fmt: skip
        phases.append(phase)
    device = jax.devices()[0].device_kind
    return Profile(device, name, dtype, kv_dtype, batch, context, prompt, ceilings, tuple(phases))


class _Seen(NamedTuple):
    """Of a task: its kernels, the text of the program that they are of, and the seconds of a step
    of the usual one."""

    events: list[Event]
    program: str
    step_s: float


def _look(
    task: Task, params: Params, cache: PagedCache, config: ModelConfig, options: dict[str, Any]
) -> tuple[PagedCache, _Seen]:
    """Runs a task, and records it; `cache` is donated. `options`: of the usual program."""
    graphs = jax.devices()[0].platform == "gpu"
    plain = compile_step(
        task, params, cache, config, options | (WITHOUT_GRAPHS if graphs else {}), named=True
    )
    usual = compile_step(task, params, cache, config, options) if graphs else plain
    cache, step_s = step_seconds(usual, task, params, cache)
    held, seq = [run(plain, task, params, cache, begin(task))], begin(task)
    events = record_events(lambda: held.append(run(plain, task, params, held.pop(), seq)))
    if not events:
        raise JaxinferError("the profiler recorded nothing that ran on the device")
    return held.pop(), _Seen(events, plain.as_text(), step_s)
