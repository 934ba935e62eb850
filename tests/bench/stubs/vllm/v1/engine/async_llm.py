"""AsyncLLM: made inside a running loop, it keeps to that loop."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from vllm.sampling_params import RequestOutputKind, SamplingParams


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool


class AsyncLLM:
    def __init__(self, args) -> None:
        self.args, self.loop, self.ids = args, asyncio.get_running_loop(), set()

    @classmethod
    def from_engine_args(cls, engine_args, start_engine_loop=True) -> "AsyncLLM":
        return cls(engine_args)

    async def generate(
        self, prompt, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        assert asyncio.get_running_loop() is self.loop
        assert request_id not in self.ids, "a request's id must be new"
        assert sampling_params.output_kind is RequestOutputKind.DELTA
        self.ids.add(request_id)
        ids = prompt["prompt_token_ids"]
        assert len(ids) + sampling_params.max_tokens <= self.args.max_model_len
        if ids[0] == 13:
            raise RuntimeError("a prompt that begins with 13")
        count = sampling_params.max_tokens - (ids[0] == 14)
        for start in range(0, count, 2):  # two tokens come together
            await asyncio.sleep(0.003)
            new = [(sum(ids) + i) % 97 for i in range(start, min(start + 2, count))]
            yield RequestOutput(request_id, [CompletionOutput(0, "", new)], start + 2 >= count)
