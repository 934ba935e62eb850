"""From an `LLM` to the table of its decode and prefill steps."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    from jaxinfer.llm import LLM


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
    gpu = jax.devices()[0].platform == "gpu"
    buckets = make_buckets(limits, gpu=gpu)
    cache = random_cache(config, memory.num_pages, memory.page_size, kv_dtype)
    tasks = (
        decode_task(config, limits, buckets, batch=batch, context=context),
        prefill_task(config, limits, buckets, prompt=prompt),
    )
    name, precision = find_precision(params, dtype)
    phases = []
    for task, engine_s in zip(tasks, (decode_s, prefill_s), strict=True):
        usual = plain = compile_step(task, params, cache, config, options)
        if gpu:
            plain = compile_step(task, params, cache, config, options | WITHOUT_GRAPHS)
        cache, step_s = step_seconds(usual, task, params, cache)
        cache, events = _recorded(plain, task, params, cache)
        text = plain.as_text()
        work, wanted = (
            op_work(config, precision, shape, kv_dtype=kv_dtype)
            for shape in (task.shape, task.wanted)
        )
        phase = make_phase(
            task.name, events, op_paths(text), _module(text),
            steps=task.steps, rows=task.rows, work=work, wanted=wanted, ceilings=ceilings,
            step_s=step_s, engine_s=engine_s,
        )  # fmt: skip
        phases.append(phase)
    device = jax.devices()[0].device_kind
    return Profile(device, name, dtype, kv_dtype, batch, context, prompt, ceilings, tuple(phases))


def _recorded(program: Any, task: Task, params: Any, cache: Any) -> tuple[Any, list[Event]]:
    """The kernels of a task; `cache` is donated."""
    seq = begin(task)
    held = [run(program, task, params, cache, begin(task))]
    events = record_events(lambda: held.append(run(program, task, params, held.pop(), seq)))
    if not events:
        raise JaxinferError("the profiler recorded nothing that ran on the device")
    return held.pop(), events


def _module(program: str) -> str:
    found = re.match(r"HloModule ([\w.\-]+)", program)
    return found[1] if found else ""
