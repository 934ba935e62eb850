"""vLLM, through its `AsyncLLM`, as its own server runs it. Not run by us: see `bench/anchors`.

Ids in, ids out: nothing is tokenised or turned to text. Written against vLLM 0.26.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from bench.engines import Engine, Memory, Options, Output, Request
from bench.engines.streaming import serve


def load(checkpoint: Path, options: Options) -> Engine:
    """Its defaults, but for sizes, memory and the prefix cache."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    arguments: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": options.dtype,
        "skip_tokenizer_init": True,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "gpu_memory_utilization": options.memory_share,
        "enable_prefix_caching": options.prefix_caching,
        "speculative_config": _speculative(options),
        "disable_log_stats": True,
        **options.extra,
    }
    loop = asyncio.new_event_loop()

    async def start() -> Any:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    return _Vllm(loop.run_until_complete(start()), loop, options.temperature)


def _speculative(options: Options) -> dict[str, Any] | None:
    if options.speculative is None:
        return None
    if options.speculative == "lookup":
        return {"method": "ngram", "num_speculative_tokens": options.guesses,
                "prompt_lookup_max": 4}  # fmt: skip
    return {"model": options.speculative, "num_speculative_tokens": options.guesses}


class _Vllm:
    def __init__(self, llm: Any, loop: asyncio.AbstractEventLoop, temperature: float) -> None:
        self.llm, self.loop, self.temperature = llm, loop, temperature
        self.calls = itertools.count()

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        call = next(self.calls)

        async def pieces(request: Request, number: int) -> AsyncIterator[Sequence[int]]:
            from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]
            from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
                RequestOutputKind,
            )

            params = SamplingParams(
                temperature=self.temperature, max_tokens=request.max_tokens, ignore_eos=True,
                seed=number if self.temperature else None, detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            prompt = TokensPrompt(prompt_token_ids=request.prompt)
            async for found in self.llm.generate(prompt, params, f"{call}-{number}"):
                yield found.outputs[0].token_ids

        return self.loop.run_until_complete(serve(pieces, requests))

    def memory(self) -> Memory:
        """Its engine is another process, which does not say."""
        return Memory()

    def programs(self) -> int:
        return 0
