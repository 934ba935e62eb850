"""What goes in and out of the engine: parameters, results, and the plan of one step.

Never imports jax: the batcher and the page pool read these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    from jaxinfer.errors import JaxinferError

# Mesh axes of what is split over devices: `tensor`, or (`stage`, `tensor`); None: one device.
Axis = str | tuple[str, str] | None

MAX_STOP_IDS = 32  # stop tokens checked on the device, the model's own included
MODEL_STOP_IDS = 8  # of MAX_STOP_IDS, kept for the model's own
MAX_TOP_LOGPROBS = 20
MAX_SAMPLES = 256
MAX_SEED = 2**63
MAX_PRIORITY = 1000


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Names and defaults as in vLLM.

    Attributes:
        n: samples to draw for the prompt.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this.
        top_k: keep this many of the likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this times the likeliest.
        repetition_penalty: above 1 discourages tokens of the prompt and of the output
            (Keskar et al. 2019).
        presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output,
            once and per occurrence.
        seed: the same request with the same seed gives the same tokens whatever runs beside it.
            None draws one and returns it in `RequestOutput.seed`.
        max_tokens: tokens to generate at most; None: as many as `max_model_len` leaves.
        min_tokens: no stop token is sampled before this many.
        stop: strings at which generation ends; they are not part of the text.
        stop_token_ids: tokens at which generation ends, beside the model's own.
        ignore_eos: go on after the model's own end-of-sequence tokens.
        logprobs: return the log-probability of each sampled token and of this many of the
            likeliest; None returns none. They are the model's own: before temperature,
            penalties and truncation.
        prompt_logprobs: the same for the tokens of the prompt.
        speculate: False: no tokens are guessed for it, whatever the engine does for others.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    speculate: bool = True

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def penalised(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def truncated(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Logprob:
    """One entry of a position's log-probabilities: natural log, float32; rank 1 is likeliest."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a request. `logprobs[i]` maps token ids to `Logprob` at output position i.

    `activations`, by site: [prompt + output - 1, width] in the model's dtype, of every token but
    the last, which went through the model no more.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    activations: dict[str, np.ndarray] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class RequestOutput:
    """A request's result, with the fields of vLLM's and the seed that repeats it.

    `error` is set, and `outputs` empty, for a request refused under `on_error="return"`, and for
    one whose own function went wrong. `params_version`: of the weights that served it.
    `num_cached_tokens`: prompt tokens, of all samples together, that were found in the cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool = True
    seed: int = 0
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    error: JaxinferError | None = None
    num_cached_tokens: int = 0
    params_version: int | str = 0


@dataclass(frozen=True)
class Delta:
    """What was added to one sample since the last Delta.

    The last Delta of a request carries its `RequestOutput` in `result`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None = None
    result: RequestOutput | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of a given sequence.

    Attributes:
        token_ids: the sequence, N tokens.
        logprobs: float32 [N-1]; entry i is log p(token i+1 | tokens 0..i).
        top_ids: int32 [N-1, top], likeliest first.
        top_logprobs: float32 [N-1, top].
        activations: by site, [N, width] in the model's dtype; None: none were wanted.
        params_version: of the weights.
    """

    token_ids: tuple[int, ...]
    logprobs: np.ndarray
    top_ids: np.ndarray = field(repr=False)
    top_logprobs: np.ndarray = field(repr=False)
    activations: dict[str, np.ndarray] | None = field(default=None, repr=False, compare=False)
    params_version: int | str = 0
