"""SGLang, through its offline `Engine`. Not run by us.

Ids in, ids out: no tokeniser is loaded. A piece holds all ids so far, as is its default.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from bench.engines import Engine, Memory, Options, Output, Request
from bench.engines.streaming import serve


def load(checkpoint: Path, options: Options) -> Engine:
    """Its defaults, but for sizes, memory and the prefix cache."""
    import sglang  # pyright: ignore[reportMissingImports]

    arguments: dict[str, Any] = {
        "model_path": str(checkpoint),
        "dtype": options.dtype,
        "skip_tokenizer_init": True,
        "context_length": options.max_model_len,
        "max_running_requests": options.max_num_seqs,
        "mem_fraction_static": options.memory_share,
        "disable_radix_cache": not options.prefix_caching,
        **_speculative(options),
        **options.extra,
    }
    return _Sglang(sglang.Engine(**arguments), options.temperature)


def _speculative(options: Options) -> dict[str, Any]:
    if options.speculative is None:
        return {}
    given: dict[str, Any] = {"speculative_num_draft_tokens": options.guesses}
    if options.speculative == "lookup":
        return given | {"speculative_algorithm": "NGRAM"}
    return given | {
        "speculative_algorithm": "STANDALONE",
        "speculative_draft_model_path": options.speculative,
        "speculative_num_steps": options.guesses - 1,
        "speculative_eagle_topk": 1,
    }


class _Sglang:
    def __init__(self, engine: Any, temperature: float) -> None:
        self.engine, self.temperature = engine, temperature

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        async def pieces(request: Request, number: int) -> AsyncIterator[Sequence[int]]:
            sampling = {"temperature": self.temperature, "max_new_tokens": request.max_tokens,
                        "ignore_eos": True}  # fmt: skip
            stream = await self.engine.async_generate(
                input_ids=request.prompt, sampling_params=sampling, stream=True
            )
            known = 0
            async for found in stream:
                ids = found["output_ids"]
                yield ids[known:]
                known = len(ids)

        return self.engine.loop.run_until_complete(serve(pieces, requests))

    def memory(self) -> Memory:
        """Its engine is another process, which does not say."""
        return Memory()

    def programs(self) -> int:
        return 0
