"""An LLM to measure: a shape with random weights, or the demo target; and whether it is warm."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import parts, shapes

if TYPE_CHECKING:
    from jaxinfer.config import ModelConfig
    from jaxinfer.llm import LLM

# The weights are made before the LLM, which could have reserved the memory itself.
ENV = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
# What is measured, by what each step must be able to do: see `warm_up`.
GREEDY, SAMPLED, LOGPROBS = "greedy", "sampled", "logprobs"
MOST_RUNS = 3


@dataclass(frozen=True)
class Model:
    """Weights in memory. `name`: what it is called in the names of records."""

    name: str
    params: Any
    config: ModelConfig
    dtype: str


def load(name: str) -> Model:
    """`demo`, or a shape with random weights; bfloat16, on a CPU float32."""
    for variable, value in ENV.items():  # in time, if nothing has run on the GPU yet
        os.environ.setdefault(variable, value)
    import jax
    import jax.numpy as jnp

    from jaxinfer.hub import resolve_model
    from jaxinfer.loading import load_weights
    from jaxinfer.models.families import read_config

    parts.check_platform(jax.default_backend())
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name == "demo":
        directory = resolve_model(name)
        config = read_config(directory)
        return Model(name, load_weights(directory, config, jnp.dtype(dtype)), config, dtype)
    config = shapes.model_config(name)
    return Model(shapes.short(name), shapes.init_params(name, jnp.dtype(dtype)), config, dtype)


def start(model: Model, options: dict[str, Any]) -> LLM:
    """An LLM over the model's weights; several may follow one another, each closed by `close`."""
    from jaxinfer import LLM

    return LLM.from_params(model.params, model.config, dtype=model.dtype, **options)


def close(llm: LLM) -> None:
    """Closes it, and sees to it that its memory is free for the next."""
    llm.close()
    gc.collect()


def warm_up(llm: LLM, kinds: Sequence[str]) -> None:
    """Compiles ahead of time what requests of these kinds need.

    Args:
        llm: what is to be measured.
        kinds: of GREEDY, SAMPLED (with truncation), LOGPROBS.
    """
    from jaxinfer import SamplingParams

    made = {
        GREEDY: SamplingParams(temperature=0),
        SAMPLED: SamplingParams(top_k=50, top_p=0.9),
        LOGPROBS: SamplingParams(top_p=0.9, logprobs=0),
    }
    done = llm.warm_up([made[kind] for kind in kinds])
    print(
        f"warm-up: {done.programs} programs, {done.seconds:.1f} s, "
        f"steps {done.step_bytes / 1e9:.2f} GB, {len(done.unequal)} unequal",
        flush=True,
    )


def until_warm[T](llm: LLM, run: Callable[[int], T]) -> tuple[T, dict[str, int]]:
    """Calls `run(0)`, `run(1)`, … until one of them compiles nothing, at most MOST_RUNS.

    Returns:
        What the last one returned, and how many calls there were and what the last one compiled.
    """
    for i in range(MOST_RUNS):
        before = llm.engine.compiler.count
        found = run(i)
        compiled = llm.engine.compiler.count - before
        if not compiled or i == MOST_RUNS - 1:
            return found, {"runs": i + 1, "compiled_in_last_run": compiled}
    raise AssertionError("unreachable")
