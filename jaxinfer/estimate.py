"""What a model needs on given GPUs, how fast it would be there, and what its tokens would cost.

`placement` has the memory, `roofline` the time; docs/sizing.md says where the constants come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxinfer.cache import page_bytes
from jaxinfer.config import ModelConfig
from jaxinfer.models.weights import count_params
from jaxinfer.placement import (
    Memory,
    Setting,
    check_setting,
    decode_time,
    hop_time,
    largest_batch,
    memory_of,
    nearest,
    stage_step,
)
from jaxinfer.roofline import (
    StepTime,
    all_reduce_bytes,
    count_sizes,
    prefill_steps,
    shard,
    step_time,
)


@dataclass(frozen=True)
class Estimate:
    """The answer. Where it does not fit, the speeds are those that it would have if it did.

    Attributes:
        parameters: of the model, tied ones once.
        weight_bytes: of one copy of the model, over all its GPUs.
        kv_bytes_per_token, kv_bytes_per_sequence: the same, of a token and of `context` tokens.
        memory: of the fullest GPU.
        max_batch: most sequences that fit, over all copies; 0: not one.
        nearest: changes that make it fit, each alone; none where it fits.
        decode_ms: of a step: the time between two tokens of a sequence.
        decode_tok_s: tokens a second, of all sequences.
        decode_parts: where a step's time goes in one stage.
        decode_bubble: share of it in which stages idle, where the batch is smaller than `pp`.
        prefill_ms: to the first token of one prompt that meets no queue.
        prefill_tok_s: prompt tokens a second while nothing decodes and every stage is busy.
        prefill_bubble: share of one prompt's time in which a stage has nothing to do.
        communication_bytes: that one GPU sends in a decode step.
        communication_ms: of the decode step.
        price_per_gpu_hour: as given.
        cost_per_million_output, cost_per_million_input: of a million tokens made, or read, at
            these speeds; in the price's currency. None without a price.
    """

    setting: Setting
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    memory: Memory
    max_batch: int
    nearest: tuple[str, ...]
    decode_ms: float
    decode_tok_s: float
    decode_parts: StepTime
    decode_bubble: float
    prefill_ms: float
    prefill_tok_s: float
    prefill_bubble: float
    communication_bytes: float
    communication_ms: float
    price_per_gpu_hour: float | None
    cost_per_million_output: float | None
    cost_per_million_input: float | None


def estimate(config: ModelConfig, setting: Setting, *, price: float | None = None) -> Estimate:
    """Memory, speed and cost of a setting; `price`: of one GPU for an hour.

    Raises:
        ValueError: a price below 0; else see `placement.check_setting`.
    """
    check_setting(config, setting)
    if price is not None and not 0 <= price < math.inf:
        raise ValueError(f"price={price}: expected a number of at least 0")
    s, memory, step = setting, memory_of(config, setting), stage_step(config, setting)
    decode, parts = decode_time(config, s)
    first, busy, bubble = prefill_time(config, s)
    made, read = s.batch / decode, s.dp * s.prompt_tokens / busy
    sent = 2 * step.layers * all_reduce_bytes(step.message_bytes, s.tp)
    return Estimate(
        setting=s,
        parameters=count_params(config),
        weight_bytes=round(count_sizes(config).bytes(s.stored)),
        kv_bytes_per_token=page_bytes(config, 1, s.kv_name),
        kv_bytes_per_sequence=page_bytes(config, s.context, s.kv_name),
        memory=memory,
        max_batch=largest_batch(config, s),
        nearest=() if memory.fits else tuple(nearest(config, s)),
        decode_ms=1e3 * decode,
        decode_tok_s=made,
        decode_parts=parts,
        decode_bubble=max(0.0, 1 - s.rows / s.pp),
        prefill_ms=1e3 * first,
        prefill_tok_s=read,
        prefill_bubble=bubble,
        communication_bytes=sent + (step.message_bytes if s.pp > 1 else 0.0),
        communication_ms=1e3 * s.pp * (parts.communication + hop_time(step, s)),
        price_per_gpu_hour=price,
        cost_per_million_output=_cost(price, s.gpus, made),
        cost_per_million_input=_cost(price, s.gpus, read),
    )


def prefill_time(config: ModelConfig, setting: Setting) -> tuple[float, float, float]:
    """Of one prompt: seconds to its first token, seconds that it takes each stage, and the bubble.

    Its chunks follow each other through the stages, which are alike: all of them take one stage's
    time, and the longest of them that of every other stage.
    """
    s = setting
    steps = prefill_steps(shard(config, s.tp, s.pp), s.stored, s.prompt_tokens)
    each = [
        step_time(step, s.gpu, s.stored, kv_dtype=s.kv_name, tp=s.tp).total + hop_time(step, s)
        for step in steps
    ]
    busy = sum(each)
    whole = busy + (s.pp - 1) * max(each)
    return whole, busy, 1 - busy / whole


def _cost(price: float | None, gpus: int, tokens_per_s: float) -> float | None:
    """Of a million tokens."""
    return None if price is None else price * gpus / 3600 / tokens_per_s * 1e6
