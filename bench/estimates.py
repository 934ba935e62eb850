"""What `jaxinfer.estimate` predicts, beside what was recorded on the GPU that it was fitted to.

    python -m bench.estimates

Decode steps are the newest record of each name in `bench/results/`, and the steps of long runs that
`bench.costs` has. Weights are held against what was loaded. Starts no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from bench import costs, record, shapes
from bench.record import Run
from bench.timing import LONG, SHORT
from jaxinfer.estimate import prefill_time
from jaxinfer.hardware import GPUS
from jaxinfer.placement import Setting, decode_time, memory_of
from jaxinfer.roofline import PRECISIONS, decode_step, step_time

DEVICE, GPU = "NVIDIA H100 80GB HBM3", GPUS["h100"]
DECODE = re.compile(r"decode\.(?P<short>\w+?)(\.(?P<kind>\w+))?\.b(?P<batch>\d+)\.ctx(?P<context>\d+)\.ms_per_step")  # fmt: skip # noqa: E501
SHAPES = {shapes.short(name): name for name in shapes.HF_CONFIGS}


@dataclass(frozen=True)
class Compared:
    """One figure, in `unit`."""

    what: str
    predicted: float
    recorded: float
    unit: str

    @property
    def error(self) -> float:
        """Predicted over recorded, less one."""
        return self.predicted / self.recorded - 1


def newest(runs: Iterable[Run]) -> dict[str, float]:
    """The last value of each name on `DEVICE`; `runs`: oldest first."""
    on_device = [run for run in runs if run.device["kind"] == DEVICE]
    return {r.name: r.value for run in on_device for r in run.records if r.value is not None}


def decode(figures: dict[str, float]) -> Iterator[Compared]:
    """Steps that `bench.decode` timed: a sequence holds `context` tokens and, in the mean, half of
    those that were made."""
    for name, value in sorted(figures.items()):
        found = DECODE.fullmatch(name)
        if found is None or found["short"] not in SHAPES:
            continue
        context = int(found["context"]) + (SHORT + LONG) // 2
        setting = Setting(GPU, found["kind"] or "bf16", batch=int(found["batch"]), context=context)
        seconds, _ = decode_time(shapes.model_config(SHAPES[found["short"]]), setting)
        yield Compared(name.removesuffix(".ms_per_step"), 1e3 * seconds, value, "ms")


def long_runs() -> Iterator[Compared]:
    """Decode steps of up to 768 rows, 8B in bfloat16; rows are padded as they were."""
    config, precision = shapes.model_config("llama-3.1-8b"), PRECISIONS["bf16"]
    for s in costs.SAMPLES:
        if s.tokens:
            continue
        step = decode_step(config, precision, rows=s.rows, context=1, kv_dtype="bfloat16")
        step = replace(step, kv_bytes=costs.KV_BYTES * s.decoding * s.context)
        took = step_time(step, GPU, precision, kv_dtype="bfloat16", tp=1).total
        yield Compared(f"decode.8b of {s.decoding} at {s.context:.0f}", 1e3 * took, s.ms, "ms")


def others(figures: dict[str, float]) -> Iterator[Compared]:
    """Prompts of 2048 tokens, 8B in bfloat16, and the weights of 8B in int4."""
    config = shapes.model_config("llama-3.1-8b")
    _, seconds, _ = prefill_time(config, Setting(GPU, context=2048))
    read = figures["logprobs.8b.tok_s"] / figures["logprobs.8b.over_prefill"]
    yield Compared("prefill.8b of 2048", 2048 / seconds, read, "tok/s")
    weights = memory_of(config, Setting(GPU, "int4")).weights / 1e9
    yield Compared("weights.8b.int4", weights, figures["load.8b.int4.weight_bytes"] / 1e9, "GB")


def main() -> None:
    figures = newest(record.read_all())
    print(f"{'':<26} {'predicted':>10} {'recorded':>10} {'':<6} {'error':>6}")
    for c in (*decode(figures), *long_runs(), *others(figures)):
        print(f"{c.what:<26} {c.predicted:>10.5g} {c.recorded:>10.5g} {c.unit:<6} {c.error:>6.1%}")


if __name__ == "__main__":
    main()
