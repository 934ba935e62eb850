"""jaxinfer: LLM inference in JAX.

The names below are the public API; they are imported on first use, so that `import jaxinfer` is
cheap and starts nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.async_llm import AsyncLLM
    from jaxinfer.config import ModelConfig
    from jaxinfer.errors import (
        CapacityError,
        CheckpointError,
        FunctionFault,
        InvalidRequest,
        JaxinferError,
        QueueFull,
        UnsupportedModel,
    )
    from jaxinfer.hooks import Chain, Intervention, LogitsFn
    from jaxinfer.llm import LLM
    from jaxinfer.types import (
        CompletionOutput,
        Delta,
        Logprob,
        RequestOutput,
        SamplingParams,
        TokenLogprobs,
    )

__version__ = "0.1.0"

_WHERE = {
    "AsyncLLM": "async_llm",
    "LLM": "llm",
    "ModelConfig": "config",
    **dict.fromkeys(
        (
            "CapacityError",
            "CheckpointError",
            "FunctionFault",
            "InvalidRequest",
            "JaxinferError",
            "QueueFull",
            "UnsupportedModel",
        ),
        "errors",
    ),
    **dict.fromkeys(("Chain", "Intervention", "LogitsFn"), "hooks"),
    **dict.fromkeys(
        (
            "CompletionOutput",
            "Delta",
            "Logprob",
            "RequestOutput",
            "SamplingParams",
            "TokenLogprobs",
        ),
        "types",
    ),
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CapacityError",
    "Chain",
    "CheckpointError",
    "CompletionOutput",
    "Delta",
    "FunctionFault",
    "Intervention",
    "InvalidRequest",
    "JaxinferError",
    "LogitsFn",
    "Logprob",
    "ModelConfig",
    "QueueFull",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprobs",
    "UnsupportedModel",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
