"""Frozen descriptions of a model and of an engine. Data only: no jax, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Policy = Literal["continuous", "static", "makespan"]
Method = Literal["draft", "lookup", "skip"]
Rule = Literal["shared", "rejection"]
MOST_GUESSES = 16


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequencies and how they are stretched for long context.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: `default` (Su et al. 2021), `linear` (Chen et al. 2023), `llama3` (Llama 3.1),
            `yarn` (Peng et al. 2023).
        factor: how many times longer than `original_max_position` the context may be.
        low_freq_factor, high_freq_factor: `llama3` only; bounds of the interpolated band.
        beta_fast, beta_slow: `yarn` only; rotations over the original context beyond which a
            dimension is extrapolated, and under which it is interpolated.
        attention_factor: `yarn` only; what cos and sin are multiplied by.
        truncate: `yarn` only; whether the band's bounds are rounded to whole dimensions.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer.

    Attributes:
        window: a token attends to itself and the `window - 1` tokens before it; None: to all.
        rope: None for a layer without position embedding.
    """

    window: int | None = None
    rope: RopeConfig | None = RopeConfig()


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Families differ in these values alone (ADR 002).

    Attributes:
        family: the row of `models.families.FAMILIES` that the config came from.
        layers: one entry a layer, in order.
        qkv_bias, o_bias, mlp_bias: whether those projections add a bias.
        qk_norm: RMSNorm over each head's queries and keys, before RoPE (Qwen3).
        norm_plus_one: norms scale by 1 + weight (Gemma).
        post_norms: a norm of what attention and MLP add, before it is added (Gemma 2 and 3).
        embed_scale: what embeddings are multiplied by, rounded to their dtype.
        attention_scale: of scores; None: 1 / sqrt(head_dim).
        attention_softcap, logit_softcap: scores and logits are c * tanh(x / c) (Gemma 2).
        tie_embeddings: the output projection is the embedding matrix.
        max_position: the longest sequence that the model was made for, in tokens.
        eos_token_ids: generation stops at any of these.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_position: int
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class BatcherConfig:
    """Limits that the batcher keeps. Sizes in tokens, pages and rows.

    Attributes:
        num_pages: pages in the pool, page 0 (the trash page) included.
        page_size: tokens a page.
        max_num_seqs: sequences that may run at once.
        max_model_len: longest sequence, prompt and output together.
        max_num_batched_tokens: most tokens of one step: one of each row that decodes, and of
            prompts what is left. More than `max_num_seqs`, so that prompts always get on.
        max_chunks: most prompts that one step reads from.
        max_steps: most decode steps in one dispatch: one while a prompt waits or is being read.
        max_waiting: queue bound; a submission past it is refused.
        policy: `continuous` admits whenever a row and the pages are free; `static` admits only
            when nothing runs, a whole batch at a time; `makespan` is for many requests that are
            there at once: those that may become longest first, and prompts no sooner than they
            must be read for all to end soon. It knows limits, not where sequences really end.
        prefix_caching: pages of prompts that begin alike are computed once.
        max_guesses: most tokens that are guessed for a row in one step.
        host_slots: pages for which the host's memory has room; see `tier`.
    """

    num_pages: int
    page_size: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int = 2048
    max_chunks: int = 32
    max_steps: int = 8
    max_waiting: int = 1_000_000
    policy: Policy = "continuous"
    prefix_caching: bool = True
    max_guesses: int = 0
    host_slots: int = 0

    def most_steps(self, guesses: int) -> int:
        """Decode steps of one dispatch, at most. Those that guess take about twice as long, and
        how soon their sequences end is not known when the next dispatch is queued."""
        return max(1, self.max_steps // 2) if guesses else self.max_steps


@dataclass(frozen=True)
class Speculative:
    """How tokens are guessed, to be checked by the model several at a time.

    Attributes:
        method: `draft`: another, smaller model; `lookup`: what followed the last tokens when they
            occurred before; `skip`: the model itself without some of its layers.
        draft: the other model: a directory, or a Hub id.
        tokens: guesses of a step, at most. There are fewer, or none, where that is faster.
        adapt: False: always so many.
        rule: `shared`: a guess holds if it is what the model draws anyway, so that tokens are those
            of a run without speculation. `rejection`: more guesses hold, and tokens have the
            model's distribution; but which they are depends on how many were guessed.
        longest, shortest: of `lookup`: how many of the last tokens are looked for.
        skip: of `skip`: layers left out; none: `count` are chosen, those that are missed least in
            `text`, a file (`skipping.choose_layers`).
        forced: for measurements: guesses hold with this probability, whatever they are, and the
            text is nobody's.

    Raises:
        ValueError: a value out of range; names it and what is accepted.
    """

    method: Method
    draft: str | None = None
    tokens: int = 4
    adapt: bool = True
    rule: Rule = "shared"
    longest: int = 3
    shortest: int = 1
    skip: tuple[int, ...] = ()
    count: int | None = None
    text: str | None = None
    forced: float | None = None

    def __post_init__(self) -> None:
        for name, accepted in {"method": get_args(Method), "rule": get_args(Rule)}.items():
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"speculative: {name}={getattr(self, name)!r}: expected one of {accepted}"
                )
        for name in ("tokens", "longest", "shortest"):
            value = getattr(self, name)
            if (
                not isinstance(value, int)
                or isinstance(value, bool)
                or not (1 <= value <= MOST_GUESSES)
            ):
                raise ValueError(
                    f"speculative: {name}={value!r}: expected an integer from 1 to {MOST_GUESSES}"
                )
        if not isinstance(self.adapt, bool):
            raise ValueError(f"speculative: adapt={self.adapt!r}: expected True or False")
        share = self.forced
        if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
            raise ValueError(f"speculative: forced={share!r}: expected from 0 to 1")
        layers = self.skip
        if not isinstance(layers, tuple) or not all(type(i) is int and i >= 0 for i in layers):
            raise ValueError(f"speculative: skip={layers!r}: expected numbers of layers, from 0 on")
        if self.shortest > self.longest:
            raise ValueError(
                f"speculative: shortest={self.shortest}: expected at most longest={self.longest}"
            )
        if self.draft is not None and self.method != "draft":
            raise ValueError(
                f"speculative: draft={self.draft!r} with method={self.method!r}: a draft model is "
                "for the method 'draft'"
            )
        chosen = self.count is not None and self.text is not None
        given = bool(self.skip) + chosen
        if given != (self.method == "skip") or (self.count is None) != (self.text is None):
            raise ValueError(
                f"speculative: skip={self.skip}, count={self.count}, text={self.text!r} with "
                f"method={self.method!r}: the method 'skip', and no other, needs layers to leave "
                "out, or a count and a text to choose them by"
            )


@dataclass(frozen=True)
class EngineOptions:
    """What a user may choose about an engine; see `jaxinfer.LLM` for each.

    Raises:
        ValueError: an option out of range; names it and what is accepted.
    """

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    device_weight_bytes: int | None = None
    kv_host_bytes: int = 0
    kv_cache_dtype: Literal["auto", "int8", "fp8", "fp8_e4m3"] = "auto"
    seed: int = 0
    invariant: bool = True
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    page_size: int = 32
    max_num_batched_tokens: int | None = None
    max_steps: int | None = None
    max_waiting: int = 1_000_000
    policy: Policy = "continuous"
    prefix_caching: bool = True
    response_cache: int = 0
    event_log: str | None = None
    compilation_cache: str | None = None
    speculative: Speculative | None = None

    def __post_init__(self) -> None:
        for name, accepted in {
            "dtype": ("bfloat16", "float16", "float32"),
            "kv_cache_dtype": ("auto", "int8", "fp8", "fp8_e4m3"),
            "policy": get_args(Policy),
        }.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {accepted}")
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        at_least_one = ("max_num_seqs", "max_waiting", "page_size", *sizes)
        optional = (
            "max_num_batched_tokens", "max_steps", "max_model_len", "kv_cache_bytes",
            "device_weight_bytes",
        )  # fmt: skip
        for name in (*at_least_one, *optional):
            value = getattr(self, name)
            if value is None and name not in at_least_one:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
        budget = self.max_num_batched_tokens
        if budget is not None and budget <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={budget}: expected more than max_num_seqs="
                f"{self.max_num_seqs}, so that prompts get on while every row decodes"
            )
        for name in ("response_cache", "kv_host_bytes"):
            kept = getattr(self, name)
            if not isinstance(kept, int) or isinstance(kept, bool) or kept < 0:
                raise ValueError(f"{name}={kept!r}: expected an integer of at least 0")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed={self.seed!r}: expected an integer")
        for name in ("invariant", "prefix_caching"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False")
        if self.kv_host_bytes and not self.prefix_caching:
            raise ValueError(
                f"kv_host_bytes={self.kv_host_bytes} with prefix_caching=False: pages are kept for "
                "prompts that begin alike: leave one of them out"
            )
        if self.event_log is not None and not Path(self.event_log).absolute().parent.is_dir():
            raise ValueError(
                f"event_log={self.event_log!r}: expected a file in a folder that exists"
            )
        if self.event_log is not None and self.data_parallel_size > 1:
            raise ValueError(
                f"event_log={self.event_log!r} with data_parallel_size={self.data_parallel_size}: "
                "a log is of one scheduler, and each replica has its own: leave one of them out"
            )
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization!r}: expected above 0, at "
                "most 1"
            )
        if self.page_size & (self.page_size - 1) or not 8 <= self.page_size <= 256:
            raise ValueError(f"page_size={self.page_size}: expected 8, 16, 32, 64, 128 or 256")
