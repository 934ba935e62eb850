"""HF transformers' continuous batching: its paged cache with torch's own attention (`sdpa`).

No flash-attn, and nothing from the Hub. Sizes are those that transformers chooses itself, in the
share of memory that it is given. Tokens are timed by its manager.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from bench.engines import Engine, Memory, Options, Output, Request
from bench.engines.hf import load_model, token_bytes
from bench.engines.static_batches import allocated, compiled, memory, start

ATTENTION = "paged|sdpa"  # said in full, or it looks for flash-attn
# Of what is left. By itself it takes nine tenths, and then fails in a matrix product.
CACHE_SHARE = 0.6
BLOCK = 32  # tokens of a page, where there is no GPU whose memory it could measure


def load(checkpoint: Path, options: Options) -> Engine:
    """The checkpoint's model under a manager that runs until the process ends."""
    device = start(options)
    model = load_model(checkpoint, options, device)
    model.set_attn_implementation(ATTENTION)
    loaded = allocated(device)
    sizes: dict[str, Any] = {"allow_block_sharing": options.prefix_caching}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        room = options.memory_share * total - loaded
        sizes["max_memory_percent"] = min(0.9, CACHE_SHARE * room / free)
    else:
        blocks = options.max_num_seqs * (options.max_model_len // BLOCK + 1)
        sizes |= {"block_size": BLOCK, "num_blocks": blocks, "max_batch_tokens": 512}
    generation = GenerationConfig(
        do_sample=options.temperature > 0, temperature=options.temperature or 1.0,
        eos_token_id=-1, pad_token_id=0, max_new_tokens=options.max_model_len,
    )  # fmt: skip
    manager = model.init_continuous_batching(
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(**(sizes | options.extra)),
    )
    if not manager.warmed_up and device == "cuda":
        manager.warmup()
    manager.start()
    return _Continuous(model, manager, options, device, loaded)


class _Continuous:
    def __init__(
        self, model: Any, manager: Any, options: Options, device: str, loaded: int
    ) -> None:
        self.model, self.manager, self.device, self.loaded = model, manager, device, loaded
        self.token = token_bytes(model.config, options.dtype)

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        coming = sorted(range(len(requests)), key=lambda i: requests[i].due, reverse=True)
        names: dict[str, int] = {}
        outputs: dict[int, Output] = {}
        began = time.perf_counter()
        while len(outputs) < len(requests):
            now = time.perf_counter() - began
            while coming and requests[coming[-1]].due <= now:
                i = coming.pop()
                name = self.manager.add_request(
                    requests[i].prompt, max_new_tokens=requests[i].max_tokens, eos_token_id=-1,
                    record_timestamps=True,
                )  # fmt: skip
                names[name] = i
            wait = requests[coming[-1]].due - now if coming else 1.0
            result = self.manager.get_result(timeout=min(1.0, max(wait, 1e-4)))
            if result is None:
                if not self.manager.is_running():
                    raise RuntimeError(
                        f"the manager ended after {len(outputs)} of {len(requests)} requests"
                    )
            elif result.error is not None:
                raise RuntimeError(f"{result.request_id}: {result.error}")
            elif result.is_finished():
                times = [t - began for t in result.timestamps]
                outputs[names[result.request_id]] = Output(list(result.generated_tokens), times)
        return [outputs[i] for i in range(len(requests))]

    def memory(self) -> Memory:
        return memory(self.device, self.loaded, self.token)

    def programs(self) -> int:
        return compiled()
