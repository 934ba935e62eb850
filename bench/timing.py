"""How a decode step is timed, the same for every engine, and the bytes that it must move.

A step takes (t(LONG tokens) − t(SHORT tokens)) / (LONG − SHORT), each the whole call from the
prompt on: prefill, start and end of a call cancel. The median over repeats is reported, each on a
new random prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench import shapes
from bench.record import Record

SHORT, LONG = 33, 289
REPEATS = 5
WIDTH = 2  # bytes of a bfloat16


def prefix(engine: str, shape: str, batch: int, context: int) -> str:
    """Of the records of one measurement: `decode.8b.b1.ctx1024`."""
    return f"{engine}.{shapes.short(shape)}.b{batch}.ctx{context}"


def bytes_per_step(shape: str, batch: int, context: int) -> int:
    """Fewest bytes that one decode step must move through device memory.

    Every weight is read once, of an untied embedding only the batch's rows; each sequence's keys
    and values are read once and the new token's are written.

    Args:
        shape: of `bench.shapes`, of the Llama kind.
        batch: sequences.
        context: tokens that each holds, on average over the steps timed.
    """
    c = shapes.hf_config(shape)
    E, F, D = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    H, K, L, V = (
        c["num_attention_heads"], c["num_key_value_heads"], c["num_hidden_layers"], c["vocab_size"]
    )  # fmt: skip
    matrices = L * ((2 * H + 2 * K) * D * E + 3 * E * F)
    others = (2 * L + 1) * E + V * E  # norms, output projection
    kv = 2 * L * K * D * batch * (context + 1)
    return round(shapes.weight_bytes(shape) * matrices) + WIDTH * (others + kv + batch * E)


def step_records(
    engine: str,
    shape: str,
    batch: int,
    context: int,
    pairs: Sequence[tuple[float, float]],
    detail: dict[str, Any],
) -> list[Record]:
    """`.ms_per_step` and `.tok_s` (of the batch) from pairs (t(SHORT), t(LONG)) in seconds."""
    steps = [1000 * (long - short) / (LONG - SHORT) for short, long in pairs]
    ms = statistics.median(steps)
    name = prefix(engine, shape, batch, context)
    detail = {
        **detail,
        "prompt": context,
        "tokens": [SHORT, LONG],
        "ms_of_each_repeat": [round(step, 4) for step in steps],
        "bytes_per_step": bytes_per_step(shape, batch, context + (SHORT + LONG) // 2),
    }
    return [
        Record(f"{name}.ms_per_step", ms, "ms", detail),
        Record(f"{name}.tok_s", 1000 * batch / ms, "tok/s", {"ms_per_step": ms}),
    ]
