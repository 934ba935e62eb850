"""How the device's memory is divided, decided before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.buckets import MOST_CHUNKS
from jaxinfer.cache import page_bytes
from jaxinfer.config import ModelConfig
from jaxinfer.errors import CapacityError
from jaxinfer.models.weights import count_params
from jaxinfer.pages import pages_for

GIB = 1 << 30
CPU_CACHE_BYTES = 1 * GIB  # on a CPU there is no pool to fill: a modest default
SPARE_BYTES = GIB // 4  # what libraries keep for themselves: workspaces, graphs
# Arrays of a sampled step that are as large as its logits, in float32: logits, scaled ones, keys,
# masses and noise.
LOGIT_ARRAYS = 5


@dataclass(frozen=True)
class MemoryPlan:
    """Where the memory goes, in bytes; `limit` is None where the device does not say.

    Attributes:
        weights: the parameters that lie on the device.
        host_weights: those on the host, which every step copies to the device; see `offload`.
        cache: the KV pages, `num_pages` of `page_size` tokens, the trash page included.
        steps: kept free for the compiled steps' own needs.
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


def step_bytes(config: ModelConfig, *, rows: int, tokens: int, dtype: Any) -> int:
    """Temporary memory of the hungriest compiled step, estimated from above.

    `LLM.warm_up` holds it against what the compiled programs say.

    Args:
        config: the model.
        rows: whose logits are computed, at most: those that decode, and prompts that end.
        tokens: of one step, at most.
        dtype: of the activations.
    """
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    heads = config.num_heads + 2 * config.num_kv_heads
    width = 4 * E + 4 * F + 3 * heads * D  # residuals and norms, the MLP, attention's in and out
    activations = tokens * width * np.dtype(dtype).itemsize
    return SPARE_BYTES + LOGIT_ARRAYS * 4 * rows * config.vocab_size + activations


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
    guessed_rows: int = 0,
    host_weights: int = 0,
    buffers: int = 0,
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
        guessed_rows: rows of logits of a step that guesses, at most.
        host_weights, buffers: bytes of weights on the host, and of what steps need for them.

    Raises:
        CapacityError: the weights do not fit, not even one page is left, or a sequence of
            `max_model_len` tokens needs more pages than there are.
    """
    if weights is None:
        weights = count_params(config) * np.dtype(dtype).itemsize
    rows = max(max_num_seqs + MOST_CHUNKS, guessed_rows)
    steps = 0
    if limit is not None:
        steps = step_bytes(config, rows=rows, tokens=max_num_batched_tokens, dtype=dtype) + buffers
    one = page_bytes(config, page_size, dtype if kv_dtype is None else kv_dtype) + page_extra
    longest = config.max_position if max_model_len is None else max_model_len
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
    )


def device_memory(device: Any) -> tuple[int | None, int]:
    """Bytes that may be used on the device (None where it does not say), and bytes in use."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
