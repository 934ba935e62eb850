"""How the device's memory is divided, decided before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.buckets import MOST_CHUNKS, MULTIPLE
from jaxinfer.cache import page_bytes
from jaxinfer.config import ModelConfig
from jaxinfer.errors import CapacityError
from jaxinfer.models.weights import count_params
from jaxinfer.pages import pages_for
from jaxinfer.roofline import padded
from jaxinfer.temporaries import StepShape, step_bytes
from jaxinfer.types import MAX_TOP_LOGPROBS

GIB = 1 << 30
CPU_CACHE_BYTES = 1 * GIB  # on a CPU there is no pool to fill: a modest default
# What is kept free beside temporaries. Libraries' own, graphs of kernels, state, plans and outputs
# of two dispatches, what the allocator cannot use, and small arrays that `temporaries` leaves out.
SPARE_BYTES = GIB // 4
# A byte and an int32 for each token of the vocabulary and row: `batch.init_penalties`, which is
# allocated when the first request asks for penalties.
PENALTY_BYTES = 5
# Of a logit, while the likeliest of many are sorted: CUB's second copy of values and tokens, which
# programs that are compiled without a GPU lack.
SORT_BYTES = 8


@dataclass(frozen=True)
class MemoryPlan:
    """Where the memory goes, in bytes; `limit` is None where the device does not say.

    Attributes:
        weights: the parameters that lie on the device.
        host_weights: those on the host, which every step copies to the device; see `offload`.
        cache: the KV pages, `num_pages` of `page_size` tokens, the trash page included.
        steps: kept free for the compiled steps' own needs, and `margin` of it beyond the
            temporaries that the hungriest is expected to need.
        max_model_len: longest sequence, in tokens.
        host_cache: KV pages on the host, `host_pages`; see `tier`.
    """

    limit: int | None
    weights: int
    cache: int
    steps: int
    num_pages: int
    page_size: int
    max_model_len: int
    host_weights: int = 0
    host_cache: int = 0
    host_pages: int = 0
    margin: int = 0

    def __str__(self) -> str:
        limit = "not limited" if self.limit is None else f"{self.limit / GIB:.2f} GiB"
        far = f" and {self.host_weights / GIB:.2f} GiB on the host" if self.host_weights else ""
        second = ""
        if self.host_pages:
            second = f" and {self.host_cache / GIB:.2f} GiB on the host ({self.host_pages} pages)"
        return (
            f"memory {limit}: weights {self.weights / GIB:.2f} GiB{far}, KV cache "
            f"{self.cache / GIB:.2f} GiB ({self.num_pages - 1} pages of {self.page_size} tokens)"
            f"{second}, "
            f"steps {self.steps / GIB:.2f} GiB; sequences of up to {self.max_model_len} tokens"
        )


def most_step_bytes(
    config: ModelConfig,
    *,
    rows: int,
    tokens: int,
    max_kv: int,
    guessing: tuple[int, int] = (0, 0),
    **how: Any,
) -> tuple[int, int]:
    """(Temporaries of the hungriest step that requests of any kind may need, the margin to keep
    free beside them), in bytes.

    `LLM.warm_up` holds their sum against what the compiled programs say.

    Args:
        config: the model, or one device's part of it.
        rows: sequences that run at once, at most.
        tokens: of one step, at most.
        max_kv: tokens of a sequence, at most.
        guessing: rows for which tokens are guessed at most, and how many; 0 of each: none.
        how: see `temporaries.hungriest`.
    """
    rows = padded(rows)
    tokens = pages_for(tokens, MULTIPLE) * MULTIPLE
    any_kind: dict[str, Any] = {"truncated": True, "penalties": True, "top": MAX_TOP_LOGPROBS}
    shapes = [
        StepShape(rows, 0, 0, max_kv, **any_kind),
        StepShape(rows, tokens, MOST_CHUNKS, max_kv, **any_kind, score=MAX_TOP_LOGPROBS),
    ]
    if guessing[1]:
        shapes.append(StepShape(guessing[0], 0, 0, max_kv, **any_kind, guesses=guessing[1]))
    most = max(step_bytes(config, shape, **how) for shape in shapes)
    logits = config.vocab_size * max(shape.logit_rows for shape in shapes)
    return most, SPARE_BYTES + SORT_BYTES * logits + PENALTY_BYTES * rows * config.vocab_size


def plan_memory(
    config: ModelConfig,
    *,
    dtype: Any,
    kv_dtype: Any = None,
    page_size: int,
    max_num_seqs: int,
    max_model_len: int | None,
    kv_cache_bytes: int | None,
    limit: int | None,
    in_use: int = 0,
    max_num_batched_tokens: int = 2048,
    weights: int | None = None,
    page_extra: int = 0,
    guessing: tuple[int, int] = (0, 0),
    host_weights: int = 0,
    buffers: int = 0,
    gathered: int = 0,
    hopper: bool = True,
) -> MemoryPlan:
    """Sizes the KV cache: what is asked for, or what is left, and no more than can be used.

    Args:
        config: the model.
        dtype: of the weights and activations.
        kv_dtype: what the cache's pages hold; None: `dtype`.
        page_size: tokens a page.
        max_num_seqs: sequences that may run at once.
        max_model_len: longest sequence; None: the model's own limit, or what the cache holds.
        kv_cache_bytes: size of the cache; None: what is left of `limit`.
        limit: bytes of device memory that may be used; None: not known (a CPU).
        in_use: bytes of it that are taken already, by others.
        max_num_batched_tokens: most tokens of one step.
        weights: bytes of the weights on the device, a draft's included; None: all of `dtype`.
        page_extra: bytes of a page beside the model's keys and values: a draft's, and the text.
        guessing: see `most_step_bytes`.
        host_weights, buffers: bytes of weights on the host, and of what steps need for them.
        gathered, hopper: see `temporaries.hungriest`.

    Raises:
        CapacityError: the weights do not fit, not even one page is left, or a sequence of
            `max_model_len` tokens needs more pages than there are.
    """
    if weights is None:
        weights = count_params(config) * np.dtype(dtype).itemsize
    one = page_bytes(config, page_size, dtype if kv_dtype is None else kv_dtype) + page_extra
    longest = config.max_position if max_model_len is None else max_model_len
    steps, margin = 0, 0
    if limit is not None:
        # No sequence is longer than what a cache could hold that left nothing to the steps.
        room = limit - in_use - weights if kv_cache_bytes is None else kv_cache_bytes
        held = max(room // one - 1, 1) * page_size
        most, margin = most_step_bytes(
            config, rows=max_num_seqs, tokens=max_num_batched_tokens, max_kv=min(longest, held),
            guessing=guessing, dtype=dtype, kv_dtype=kv_dtype, gathered=gathered, hopper=hopper,
        )  # fmt: skip
        steps = most + margin + buffers
    useful = (max_num_seqs * pages_for(longest, page_size) + 1) * one
    if kv_cache_bytes is None:
        left = CPU_CACHE_BYTES if limit is None else limit - in_use - weights - steps
        budget = min(left, useful)
    else:
        budget = kv_cache_bytes
        if limit is not None and in_use + weights + steps + budget > limit:
            raise CapacityError(
                f"kv_cache_bytes={budget} does not fit: {limit} bytes may be used, {in_use} are "
                f"in use, weights take {weights} and steps {steps}"
            )
    if limit is not None and in_use + weights + steps >= limit:
        raise CapacityError(
            f"the weights do not fit: they take {weights} bytes and steps {steps}, {in_use} are in "
            f"use, {limit} may be used"
        )
    num_pages = budget // one
    if num_pages < 2:
        raise CapacityError(
            f"no memory for one page of {page_size} tokens: a page takes {one} bytes (two are "
            f"needed, one of them for inert tokens), {max(0, budget)} bytes are left beside "
            f"weights of {weights} bytes"
        )
    held = (num_pages - 1) * page_size
    if max_model_len is not None and held < max_model_len:
        raise CapacityError(
            f"max_model_len={max_model_len} needs {pages_for(max_model_len, page_size)} pages of "
            f"{one} bytes, the cache holds {num_pages - 1}: lower max_model_len to {held} or give "
            "the cache more memory"
        )
    return MemoryPlan(
        limit=limit,
        weights=weights,
        cache=num_pages * one,
        steps=steps,
        num_pages=num_pages,
        page_size=page_size,
        max_model_len=min(longest, held),
        host_weights=host_weights,
        margin=margin,
    )


def device_memory(device: Any) -> tuple[int | None, int]:
    """Bytes that may be used on the device (None where it does not say), and bytes in use."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
