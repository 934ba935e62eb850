"""Engines that `bench.compare` puts beside each other: what each must do, and which there are.

An adapter is a module with `load(checkpoint, options, **how) -> Engine`. It runs in a process of
its own (`bench.engines.worker`), in the interpreter that has its package. Plain data and no
framework here: every one of those interpreters reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

RAGGED = "ragged"  # prompts, or outputs, of different lengths in one call
ARRIVALS = "arrivals"  # requests that come while others run
QUANTISED = "quantised"  # checkpoints in compressed-tensors' format
SPECULATIVE = "speculative"  # guesses tokens, with a draft model or by looking back
ALL = frozenset({RAGGED, ARRIVALS, QUANTISED, SPECULATIVE})


class Request(NamedTuple):
    """One prompt of token ids. `max_tokens`: so many are made, whatever they are. `due`: seconds
    after the call's beginning at which it arrives. `room`: tokens for which a static cache is made
    at least, so that calls of several lengths can share one."""

    prompt: list[int]
    max_tokens: int
    due: float = 0.0
    room: int = 0


class Output(NamedTuple):
    """What a request got: its tokens, and when each came, in seconds from the call's beginning."""

    tokens: list[int]
    times: list[float]


class Memory(NamedTuple):
    """Bytes, None where the engine does not say: once the weights are loaded, at most so far, and
    of keys and values of one token. On a GPU those of the device, elsewhere of the process."""

    loaded: int | None = None
    peak: int | None = None
    token: int | None = None


@dataclass(frozen=True)
class Options:
    """What all engines of a session are given alike.

    Attributes:
        dtype: of weights and activations: `bfloat16`, `float16` or `float32`.
        max_num_seqs: requests that may run at once.
        max_model_len: tokens of the longest, output included.
        memory_share: of the GPU's memory that the process may take.
        temperature: 0 is greedy.
        prefix_caching: prompts may share what they begin with.
        warm_up: whether sizes of steps vary, so that all are to be compiled before.
        speculative: None, `lookup`, or the directory of a draft model.
        guesses: tokens guessed at a time.
        extra: arguments of the engine's own, over those that the adapter gives.
    """

    dtype: str = "bfloat16"
    max_num_seqs: int = 256
    max_model_len: int = 2048
    memory_share: float = 0.9
    temperature: float = 0.0
    prefix_caching: bool = False
    warm_up: bool = False
    speculative: str | None = None
    guesses: int = 4
    extra: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A model, loaded. Made by an adapter's `load`."""

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        """Runs all requests to their end; outputs in their order."""
        ...

    def memory(self) -> Memory:
        """See `Memory`."""
        ...

    def programs(self) -> int:
        """Programs compiled so far: a call that adds one is not warm. 0 where it does not say."""
        ...


@dataclass(frozen=True)
class Adapter:
    """Where an engine is found.

    Attributes:
        module: with `load`.
        packages: that must be installed; their versions are part of the result, and torch's.
        can: of RAGGED, ARRIVALS, QUANTISED, SPECULATIVE.
        torch: runs under `BENCH_TORCH_PYTHON`, where that names another interpreter.
        how: arguments of `load` beside the checkpoint and the options.
    """

    module: str
    packages: tuple[str, ...]
    can: frozenset[str] = frozenset()
    torch: bool = True
    how: dict[str, Any] = field(default_factory=dict)


HF = ("torch", "transformers")
ENGINES: dict[str, Adapter] = {
    "jaxinfer": Adapter("bench.engines.jaxinfer", ("jax",), ALL, torch=False),
    "torch-compile": Adapter("bench.engines.torch_compile", ("torch", "safetensors")),
    "hf-static": Adapter("bench.engines.hf", HF, how={"static": True}),
    "hf-eager": Adapter("bench.engines.hf", HF, how={"static": False}),
    "hf-continuous": Adapter("bench.engines.hf_continuous", HF, frozenset({RAGGED, ARRIVALS})),
    "vllm": Adapter("bench.engines.vllm_async", ("vllm",), ALL),
    "sglang": Adapter("bench.engines.sglang_offline", ("sglang",), ALL),
}


def check(request: Request, output: Output) -> None:
    """Raises ValueError unless the output has the tokens that were asked for, each with a time."""
    wanted, tokens, times = request.max_tokens, len(output.tokens), len(output.times)
    if not tokens == times == wanted:
        raise ValueError(f"{tokens} tokens and {times} times came, {wanted} were asked for")
    if any(b < a for a, b in zip(output.times, output.times[1:], strict=False)):
        raise ValueError("the times of tokens go back")
    if output.times[0] < request.due:
        raise ValueError(f"a token came at {output.times[0]} s, its request at {request.due} s")
