"""The compiled steps: what runs on the device, how it is compiled, and into which shapes.

`prefill_step` and `decode_step` are pure; `StepCompiler` compiles them ahead of time, once for
each `StepKey`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer import sampling
from jaxinfer.batch import (
    MIN_ROWS,
    Chunk,
    DecodePlan,
    SeqState,
    admit,
    assemble_chunk,
    assemble_decode,
    extend,
)
from jaxinfer.cache import PagedCache
from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import AttentionOptions, Params, forward, logits
from pallas_kernels.paged_attention import Backend

logger = logging.getLogger(__name__)

SCORE_BLOCK = 64  # rows of logits at once when a whole prompt is scored

# A row's bits must not depend on how many rows it is computed with. cuBLAS by its own heuristics
# gives that from 8 rows on; autotuning and Triton's matmul do not (ADR 003).
INVARIANT_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


@dataclass(frozen=True)
class StepKey:
    """What makes one compiled step differ from another.

    Attributes:
        kind: `prefill` runs one chunk of one sequence, `decode` some steps of many rows.
        size: tokens of the chunk, or rows.
        pages: columns of the page table that the step looks at.
        page_size: tokens a page.
        max_steps: decode only; how many steps the program runs.
        backend: of the attention op.
        invariant: a token's bits depend on its sequence alone.
        random, truncated: whether any row samples at random; whether any truncates by top-k,
            top-p or min-p.
        top: None without log-probabilities, else how many of the likeliest to return.
        whole_prompt: prefill only; the chunk is the whole prompt, and cuDNN may attend.
        score: prefill only; how many of the likeliest to return after every token of the chunk.
    """

    kind: Literal["prefill", "decode"]
    size: int
    pages: int
    page_size: int
    max_steps: int = 1
    backend: Backend = "auto"
    invariant: bool = True
    random: bool = False
    truncated: bool = False
    top: int | None = None
    whole_prompt: bool = False
    score: int | None = None


class Sampled(NamedTuple):
    """Tokens of N steps and R rows. int32 [N, R], -1 where a row was not running.

    `logprobs`: arrays [N, R] or [N, R, top], when asked for. `scores`: [C] or [C, top].
    """

    tokens: Array
    logprobs: sampling.Logprobs | None
    scores: sampling.Logprobs | None


def prefill_step(
    params: Params,
    cache: PagedCache,
    seq: SeqState,
    chunk: Chunk,
    *,
    config: ModelConfig,
    key: StepKey,
) -> tuple[PagedCache, SeqState, Sampled]:
    """Runs one prompt chunk; on the last one samples the first output token."""
    seq = admit(seq, chunk)
    batch = assemble_chunk(seq, chunk, pages=key.pages, page_size=key.page_size)
    last = batch.logit_rows
    if key.score is not None:
        batch = batch._replace(logit_rows=jnp.arange(key.size, dtype=jnp.int32))
    options = AttentionOptions(key.size, key.backend, key.invariant, key.whole_prompt)
    out, cache = forward(params, config, batch, cache, attention=options)
    hidden = out.hidden if key.score is None else out.hidden[last]
    scores = None
    if key.score is not None:
        scores = _score(params, out.hidden, jnp.asarray(chunk.targets), top=key.score)

    row = jnp.asarray(chunk.row)[None]
    view = jax.tree.map(lambda x: x[row], (seq.rows, seq.penalties))
    length = jnp.asarray(chunk.start + chunk.count)[None]
    raw = logits(params, hidden)[:1]
    token = sampling.sample(raw, *_order(view, length), truncated=key.truncated, random=key.random)
    wanted = jnp.asarray(chunk.last)[None] & (length < seq.limits[row])
    going = wanted & ~_ends(token, length, seq.limits[row], view[0].stop_ids)
    seq = seq._replace(
        tokens=seq.tokens.at[row].set(token),
        lengths=seq.lengths.at[row].set(length),
        active=seq.active.at[row].set(going),
        penalties=_count(seq.penalties, row, wanted, token),
    )
    logprobs = None
    if key.top is not None:
        logprobs = jax.tree.map(lambda x: x[None], sampling.token_logprobs(raw, token, top=key.top))
    return cache, seq, Sampled(jnp.where(wanted, token, -1)[None], logprobs, scores)


def decode_step(
    params: Params,
    cache: PagedCache,
    seq: SeqState,
    plan: DecodePlan,
    *,
    config: ModelConfig,
    key: StepKey,
) -> tuple[PagedCache, SeqState, Sampled]:
    """`plan.steps` decode steps of rows 0 to `key.size`, at most `key.max_steps`.

    All `max_steps` are computed, those without a row to run too: a loop that ends early would make
    the host wait for the device at every look, and then the device for the host.
    """
    R, N = key.size, key.max_steps
    seq = extend(seq, plan)
    options = AttentionOptions(1, key.backend, key.invariant)
    everyone = jnp.arange(R)

    def one(cache: PagedCache, seq: SeqState) -> tuple[PagedCache, SeqState, Sampled]:
        batch = assemble_decode(seq, rows=R, pages=key.pages, page_size=key.page_size)
        out, cache = forward(params, config, batch, cache, attention=options)
        raw = logits(params, out.hidden)[:R]
        view = jax.tree.map(lambda x: x[:R], (seq.rows, seq.penalties))
        active, lengths = seq.active[:R], seq.lengths[:R] + 1
        token = sampling.sample(
            raw, *_order(view, lengths), truncated=key.truncated, random=key.random
        )
        going = active & ~_ends(token, lengths, seq.limits[:R], view[0].stop_ids)
        seq = seq._replace(
            tokens=seq.tokens.at[:R].set(jnp.where(active, token, seq.tokens[:R])),
            lengths=seq.lengths.at[:R].set(jnp.where(active, lengths, seq.lengths[:R])),
            active=seq.active.at[:R].set(going),
            penalties=_count(seq.penalties, everyone, active, token),
        )
        logprobs = None
        if key.top is not None:
            logprobs = sampling.token_logprobs(raw, token, top=key.top)
        return cache, seq, Sampled(jnp.where(active, token, -1), logprobs, None)

    def step(carry: tuple[PagedCache, SeqState], i: Array) -> Any:
        cache, seq = carry
        running, due = seq.active, i < plan.steps
        cache, seq, sampled = one(cache, seq._replace(active=running & due))
        return (cache, seq._replace(active=jnp.where(due, seq.active, running))), sampled

    (cache, seq), sampled = lax.scan(step, (cache, seq), jnp.arange(N))
    return cache, seq, sampled


def _order(
    view: tuple[sampling.SamplingRows, sampling.PenaltyState | None], positions: Array
) -> tuple[sampling.SamplingRows, Array, sampling.PenaltyState | None]:
    return view[0], positions, view[1]


def _ends(token: Array, length: Array, limit: Array, stop_ids: Array) -> Array:
    """Whether `token`, about to stand at position `length`, is the sequence's last."""
    return (length + 1 >= limit) | jnp.any(token[:, None] == stop_ids, axis=-1)


def _count(
    penalties: sampling.PenaltyState | None, row: Array, active: Array, token: Array
) -> sampling.PenaltyState | None:
    if penalties is None:
        return None
    counts = penalties.counts.at[row, token].add(active.astype(jnp.int32))
    return penalties._replace(counts=counts)


def _score(params: Params, hidden: Array, targets: Array, *, top: int) -> sampling.Logprobs:
    """Log-probabilities of `targets` [C] given hidden [C, E], a block of logits at a time."""
    C, E = hidden.shape
    block = min(C, SCORE_BLOCK)

    def score(part: tuple[Array, Array]) -> sampling.Logprobs:
        return sampling.token_logprobs(logits(params, part[0]), part[1], top=top)

    out = lax.map(score, (hidden.reshape(-1, block, E), targets.reshape(-1, block)))
    return jax.tree.map(lambda x: x.reshape(C, *x.shape[2:]), out)


def bucket(n: int, *, minimum: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is at least n and `minimum`."""
    power = 1
    while power < max(n, minimum):
        power *= 2
    three_quarters = power * 3 // 4
    return three_quarters if power >= 4 and three_quarters >= max(n, minimum) else power


def chunk_bucket(n: int) -> int:
    """Tokens of the compiled prefill step that runs a chunk of n: a power of two, at least 16."""
    return max(2 * MIN_ROWS, 1 << (n - 1).bit_length())


def row_bucket(n: int) -> int:
    """Rows of the compiled decode step that runs rows 0 to n: a power of two."""
    return 1 << (n - 1).bit_length()


class StepCompiler:
    """Compiles steps ahead of time and keeps them.

    Args:
        config: the model.
        invariant: compile so that a row's bits do not depend on the batch (costs nothing much;
            see ADR 003).
        platform: `gpu` or `cpu`; the options are XLA's for GPUs.
    """

    def __init__(self, config: ModelConfig, *, invariant: bool, platform: str) -> None:
        self._config = config
        self._options = INVARIANT_OPTIONS if invariant and platform == "gpu" else {}
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_seconds = 0.0

    @property
    def count(self) -> int:
        """Steps compiled so far."""
        return len(self._compiled)

    def run(
        self,
        key: StepKey,
        params: Params,
        cache: PagedCache,
        seq: SeqState,
        plan: Chunk | DecodePlan,
    ) -> tuple[PagedCache, SeqState, Sampled]:
        """Runs a step, compiling it first if need be. `cache` and `seq` are donated."""
        # Penalties change the state's structure, and with it the program.
        lookup = (key, seq.penalties is not None)
        if lookup not in self._compiled:
            self._compiled[lookup] = self._compile(key, params, cache, seq, plan)
        return self._compiled[lookup](params, cache, seq, plan)

    def _compile(self, key: StepKey, *args: Any) -> Callable[..., Any]:
        begin = time.perf_counter()
        step = prefill_step if key.kind == "prefill" else decode_step
        fn = jax.jit(partial(step, config=self._config, key=key), donate_argnums=(1, 2))
        compiled = fn.lower(*args).compile(compiler_options=self._options or None)
        seconds = time.perf_counter() - begin
        self.compile_seconds += seconds
        logger.info("compiled %s in %.2f s", key, seconds)
        return compiled
