"""vLLM's names at the top."""

from typing import TypedDict

from vllm.sampling_params import SamplingParams

__all__ = ["SamplingParams", "TokensPrompt"]


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]
