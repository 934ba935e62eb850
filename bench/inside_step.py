"""Where a decode step's time goes: kernels by their names, from a profile of the whole engine.

    python -m bench.inside_step --shape llama-3.1-8b@8:int4 --batch 1 --context 1024

Prints ms a step, the share of it that any kernel ran, and for each kernel how often it ran a step,
its median time, and its share. Fewer layers show the same in less time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from bench import parts, shapes
from bench.decode import random_prompts
from jaxinfer.profiling.trace import Event, record_events

SHORT, LONG, PROFILED = 33, 161, 65  # tokens
SHOWN = 24


def profile_steps(generate: Callable[[int], Any], ms: float) -> list[Event]:
    """Kernels of the last steps of a generation."""
    events = record_events(lambda: generate(PROFILED))
    first = events[-1].start_ns - ms * 1e6 * (PROFILED // 2)
    return [event for event in events if event.start_ns >= first]


def table(events: list[Event], steps: int) -> list[str]:
    """A line for each kernel, the one with the most time first."""
    span = events[-1].end_ns - events[0].start_ns
    busy = sum(event.duration_ns for event in events) / span
    lines = [f"kernels run {100 * busy:.1f} % of the time, {len(events) / steps:.0f} a step"]
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_name[event.name[:64]].append(event.duration_ns)
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    for name, times in ranked[:SHOWN]:
        median, share = statistics.median(times) / 1e3, 100 * sum(times) / span
        lines.append(f"{name:<64} {len(times) / steps:7.1f} x {median:8.2f} us {share:5.1f} %")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="kernels of a decode step")
    parser.add_argument("--shape", default="llama-3.1-8b@8:int4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    import jax
    import jax.numpy as jnp

    from jaxinfer import LLM, SamplingParams

    parts.check_platform(jax.default_backend())
    config = shapes.model_config(args.shape)
    llm = LLM.from_params(
        shapes.init_params(args.shape, jnp.bfloat16), config, max_num_seqs=args.batch,
        max_model_len=args.context + LONG, prefix_caching=False,
    )  # fmt: skip
    prompts = random_prompts(0, args.batch, args.context, config.vocab_size)

    def generate(tokens: int) -> float:
        began = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        return time.perf_counter() - began

    generate(LONG)
    short, long = (min(generate(n) for _ in range(3)) for n in (SHORT, LONG))
    ms = 1000 * (long - short) / (LONG - SHORT)
    print(f"{args.shape}, batch {args.batch}, context {args.context}: {ms:.3f} ms a step")
    events = profile_steps(generate, ms)
    print("\n".join(table(events, PROFILED // 2)))


if __name__ == "__main__":
    main()
