"""Fields of AsyncEngineArgs, some of many."""

from dataclasses import dataclass
from typing import Any


@dataclass
class AsyncEngineArgs:
    model: str
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool | None = None
    enforce_eager: bool = False
    speculative_config: dict[str, Any] | None = None
    disable_log_stats: bool = False
    enable_log_requests: bool = False
