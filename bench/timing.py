"""How a decode step is timed, the same for every engine, and the bytes that it must move.

A step takes (t(LONG tokens) − t(SHORT tokens)) / (LONG − SHORT), each the whole call from the
prompt on: prefill, start and end of a call cancel. The median over repeats is reported, each on a
new random prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench import shapes
from bench.record import Record

SHORT, LONG = 33, 289
REPEATS = 5
WIDTH = 2  # bytes of a bfloat16


def prefix(engine: str, shape: str, batch: int, context: int) -> str:
    """Of the records of one measurement: `decode.8b.b1.ctx1024`."""
    return f"{engine}.{shapes.short(shape)}.b{batch}.ctx{context}"


def bytes_per_step(shape: str, batch: int, context: int) -> int:
    """Fewest bytes that one decode step of a shape must move through device memory.

    Args:
        shape: of `bench.shapes`, of the Llama kind.
        batch: sequences.
        context: tokens that each holds, on average over the steps timed.
    """
    return config_bytes(shapes.hf_config(shape), shapes.weight_bytes(shape), batch, context)


def config_bytes(
    config: Mapping[str, Any], weight_bytes: float, batch: int, context: int, width: int = WIDTH
) -> int:
    """The same of an HF config.

    Every weight is read once, of an untied embedding only the batch's rows; each sequence's keys
    and values are read once and the new token's are written. `weight_bytes`: of one weight of the
    layers' matrices; `width`: of everything else.
    """
    s = _sizes(config)
    others = (2 * s.L + 1) * s.E + s.V * s.E  # norms, output projection
    kv = 2 * s.L * s.K * s.D * batch * (context + 1)
    return round(weight_bytes * s.matrices) + width * (others + kv + batch * s.E)


def config_flops(config: Mapping[str, Any], tokens: int, logits: int, pairs: int) -> int:
    """Of one forward: products of `tokens`, of `logits` rows with the output projection, and
    attention of `pairs` of a token and one that it sees, in each layer."""
    s = _sizes(config)
    return 2 * (tokens * s.matrices + logits * s.V * s.E) + 4 * s.L * s.H * s.D * pairs


def kv_bytes(config: Mapping[str, Any], width: int = WIDTH) -> int:
    """Keys and values of one token."""
    s = _sizes(config)
    return 2 * s.L * s.K * s.D * width


class _Sizes(NamedTuple):
    E: int
    H: int
    K: int
    D: int
    L: int
    V: int
    matrices: int


def _sizes(c: Mapping[str, Any]) -> _Sizes:
    E, H = c["hidden_size"], c["num_attention_heads"]
    K, L = c["num_key_value_heads"], c["num_hidden_layers"]
    D = c.get("head_dim") or E // H
    matrices = L * ((2 * H + 2 * K) * D * E + 3 * E * c["intermediate_size"])
    return _Sizes(E, H, K, D, L, c["vocab_size"], matrices)


def step_ms(
    pairs: Sequence[tuple[float, float]], short: int = SHORT, long: int = LONG
) -> list[float]:
    """Milliseconds of a step from pairs (t(short), t(long)) in seconds."""
    return [1000 * (b - a) / (long - short) for a, b in pairs]


def step_records(
    engine: str,
    shape: str,
    batch: int,
    context: int,
    pairs: Sequence[tuple[float, float]],
    detail: dict[str, Any],
) -> list[Record]:
    """`.ms_per_step` and `.tok_s` (of the batch) from pairs (t(SHORT), t(LONG)) in seconds."""
    steps = step_ms(pairs)
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
