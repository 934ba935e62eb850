"""The compiled steps: what runs on the device, how it is compiled, and into which shapes.

`run_step` is pure; `StepCompiler` compiles it ahead of time, once for each `StepKey`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer import sampling
from jaxinfer.batch import MIN_ROWS, Plan, SeqState, assemble, decoding, note_steps, prepare
from jaxinfer.cache import PagedCache
from jaxinfer.config import ModelConfig
from jaxinfer.drafting import Drafter, catch_up, speculate_rows
from jaxinfer.hooked import change_logits, changes, faults, hook_up
from jaxinfer.hooks import Hook, Rows, wanted_sites
from jaxinfer.models.decoder import NO_CHANGE, PEERS, AttentionOptions, Params, logits
from jaxinfer.packing import Packed, pack, unpack
from jaxinfer.pipeline import decode, forward
from jaxinfer.sharding import mesh_axes
from jaxinfer.speculate import Drawing
from jaxinfer.types import Axis
from pallas_kernels.exchange import Peers
from pallas_kernels.paged_attention import Backend

logger = logging.getLogger(__name__)

SCORE_BLOCK = 256  # rows of logits at once, at most, when a prompt is scored: enough for a matmul

# A row's bits must not depend on how many rows it is computed with. cuBLAS by its own heuristics
# gives that from 8 rows on; autotuning and Triton's matmul do not (ADR 003). Excess precision would
# leave out roundings wherever operations are fused, and what is fused depends on the shapes.
INVARIANT_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
    "xla_allow_excess_precision": False,
}


@dataclass(frozen=True)
class StepKey:
    """What makes one compiled step differ from another.

    Attributes:
        rows: rows that decode, at most.
        tokens: of the step, those of chunks included; 0: it has none.
        chunks: prompts that it reads from, at most.
        pages: columns of the page table that the step looks at.
        page_size: tokens a page.
        steps: decode steps that the program runs; 1 with chunks.
        backend: of the attention op.
        invariant: a token's bits depend on its sequence alone.
        random, truncated: whether any row samples at random; whether any truncates by top-k,
            top-p or min-p.
        top: None without log-probabilities, else how many of the likeliest to return.
        score: how many of the likeliest to return after every token of the chunks; None: nothing
            is scored.
        capture: sites whose activations are returned.
        hooks: users' functions; each token is for one of them at most.
        guesses: tokens that are guessed for each row in each step; only without chunks.
        catch_up: the draft model reads `tokens` that it has not seen, and that is all.
    """

    rows: int
    tokens: int
    chunks: int
    pages: int
    page_size: int
    steps: int = 1
    backend: Backend = "auto"
    invariant: bool = True
    random: bool = False
    truncated: bool = False
    top: int | None = None
    score: int | None = None
    capture: tuple[str, ...] = ()
    hooks: tuple[Hook, ...] = ()
    guesses: int = 0
    catch_up: bool = False


class Sampled(NamedTuple):
    """Results of a dispatch of K steps, for R rows that decode and then Q prompts.

    With k guesses a step brings k + 1 rows of tokens instead of one, and their log-probabilities.

    Attributes:
        tokens: int32 [K, R + Q]; -1 where a row has ended or a prompt goes on, and for guesses that
            did not hold.
        logprobs: [K, R + Q, …], or None.
        scores: [T, …]; of the targets of chunks, or None.
        captured: by site, [K, T, width]: of all tokens of each step, in their flat order.
        faults: int32 [K, 2, R + Q]; see `hooked.faults`; None without hooks.
        attempted: int32 [K, R]; see `speculate.Accepted`; None without guesses.
    """

    tokens: Array
    logprobs: sampling.Logprobs | None
    scores: sampling.Logprobs | None
    captured: dict[str, Array]
    faults: Array | None
    attempted: Array | None = None


def run_step(
    params: Params,
    cache: PagedCache,
    seq: SeqState,
    plan: Plan,
    tables: tuple[Any, ...] = (),
    draft: Params | None = None,
    *,
    config: ModelConfig,
    key: StepKey,
    drafter: Drafter | None = None,
    axis: Axis = None,
) -> tuple[PagedCache, SeqState, Sampled]:
    """One dispatch: what `plan` says, in the shapes that `key` says.

    `tables`: of its hooks; `draft`: weights of the drafter's model; `axis`: mesh axes when run
    under `shard_map`, where weights and caches are this device's part and all else is whole; under
    those of a pipeline `config` has the layers of one stage.

    Of several decode steps all `key.steps` are computed, those without a row to run too: a loop
    that ends early would make the host wait for the device at every look, and then the device for
    the host.
    """
    seq = prepare(seq, plan)
    if key.catch_up:
        assert drafter is not None
        assert draft is not None
        seq = catch_up(
            draft, cache, seq, plan, drafter=drafter, tokens=key.tokens, pages=key.pages,
            attention=AttentionOptions(key.backend, key.invariant), axis=axis,
        )  # fmt: skip
        return cache, seq, Sampled(jnp.zeros((0, 0), jnp.int32), None, None, {}, None)
    if isinstance(axis, tuple) and not key.tokens and not key.guesses:
        return decode(
            params, config, cache, seq, plan,
            partial(_sampled, params, config=config, key=key, axis=axis),
            steps=key.steps, pages=key.pages, page_size=key.page_size,
            attention=AttentionOptions(key.backend, key.invariant), axis=axis,
        )  # fmt: skip
    one = partial(_step, tables=tables, config=config, key=key, axis=axis)
    if key.guesses:
        assert drafter is not None
        one = partial(_guessing, draft=draft, drafter=drafter, config=config, key=key, axis=axis)
    if key.steps == 1:
        cache, seq, sampled = one(params, cache, seq, plan)
        scores = sampled.scores
        sampled = jax.tree.map(lambda x: x[None], sampled._replace(scores=None))
        return cache, seq, _in_rows(sampled, key)._replace(scores=scores)

    def step(carry: tuple[PagedCache, SeqState], i: Array) -> Any:
        cache, seq = carry
        running, due = seq.active, i < plan.steps
        paused = seq._replace(active=running & due)
        cache, seq, sampled = one(params, cache, paused, plan)
        return (cache, seq._replace(active=jnp.where(due, seq.active, running))), sampled

    # Steps that guess look at the text; of others it is written once, at their end.
    text, before = None if key.guesses else cache.tokens, seq
    if text is not None:
        cache = cache._replace(tokens=None)
    (cache, seq), sampled = lax.scan(step, (cache, seq), jnp.arange(key.steps))
    if text is not None:
        cache = cache._replace(tokens=note_steps(text, before, plan, sampled.tokens))
    return cache, seq, _in_rows(sampled, key)


def _in_rows(sampled: Sampled, key: StepKey) -> Sampled:
    """Tokens of a step that guesses, [K, k + 1, R], as those of so many steps."""
    if not key.guesses:
        return sampled
    tokens, logprobs = jax.tree.map(
        lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]),
        (sampled.tokens, sampled.logprobs),
    )
    return sampled._replace(tokens=tokens, logprobs=logprobs)


def _guessing(
    params: Params,
    cache: PagedCache,
    seq: SeqState,
    plan: Plan,
    *,
    draft: Params | None,
    drafter: Drafter,
    config: ModelConfig,
    key: StepKey,
    axis: Axis,
) -> tuple[PagedCache, SeqState, Sampled]:
    """From one token to `key.guesses` + 1 of every row that decodes."""
    cache, seq, accepted = speculate_rows(
        params, draft, cache, seq, plan,
        config=config, drafter=drafter, k=key.guesses, pages=key.pages,
        attention=AttentionOptions(key.backend, key.invariant),
        drawing=Drawing(key.truncated, key.random), top=key.top, axis=axis,
    )  # fmt: skip
    new = jnp.arange(key.guesses + 1) < accepted.added[:, None]
    tokens = jnp.where(new, accepted.tokens, -1).T
    logprobs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), accepted.logprobs)
    return cache, seq, Sampled(tokens, logprobs, None, {}, None, accepted.attempted)


def _step(
    params: Params,
    cache: PagedCache,
    seq: SeqState,
    plan: Plan,
    *,
    tables: tuple[Any, ...],
    config: ModelConfig,
    key: StepKey,
    axis: Axis,
) -> tuple[PagedCache, SeqState, Sampled]:
    """A token of every row that decodes, and of every prompt that is complete with this step."""
    T = key.tokens or max(key.rows, MIN_ROWS)
    batch = assemble(seq, plan, tokens=T, pages=key.pages, page_size=key.page_size)
    sampled_at, scores = batch.logit_rows, None
    if key.score is not None:
        batch = batch._replace(logit_rows=jnp.arange(T, dtype=jnp.int32))
    options = AttentionOptions(key.backend, key.invariant)
    hooked = hook_up(key.hooks, tables, plan, batch) if key.hooks else None
    out, cache = forward(
        params, config, batch, cache,
        attention=options,
        capture=(*key.capture, *wanted_sites(key.hooks)),
        change=NO_CHANGE if hooked is None else changes(hooked),
        axis=axis,
    )  # fmt: skip
    hidden = out.hidden
    if key.score is not None:
        assert plan.chunks is not None, "only prompts are scored"
        scores = _score(params, config, hidden, plan.chunks.targets, top=key.score, axis=axis)
        hidden = hidden[sampled_at]

    def change(raw: Array, how: sampling.SamplingRows, outcome: _Outcome) -> tuple[Array, Any]:
        if hooked is None:
            return raw, None
        at = sampled_at[: len(raw)]
        seen = {site: out.activations[site][at] for site in wanted_sites(key.hooks)}
        rows = Rows(how, outcome.length, batch.tokens[at], seen)
        changed, unfit = change_logits(hooked, raw, rows)
        return changed, faults(hooked, unfit & outcome.wanted, outcome.done, outcome.length)

    seq, sampled = _sampled(
        params, seq, plan, hidden, config=config, key=key, axis=axis, change=change
    )
    captured = {site: out.activations[site] for site in key.capture}
    return cache, seq, sampled._replace(scores=scores, captured=captured)


class _Outcome(NamedTuple):
    """Of the R rows that decode and the Q prompts: the row, the length that it has after this step,
    whether a token is wanted of it, and whether its state changes. [R + Q] each."""

    row: Array
    length: Array
    wanted: Array
    done: Array


def _sampled(
    params: Params,
    seq: SeqState,
    plan: Plan,
    hidden: Array,
    *,
    config: ModelConfig,
    key: StepKey,
    axis: Axis,
    change: Callable[..., tuple[Array, Any]] = lambda raw, *_: (raw, None),
) -> tuple[SeqState, Sampled]:
    """The next tokens of the R rows that decode and the Q prompts of a plan, whose last hidden
    states are the first of `hidden` […, E]; and the state with them.

    `change`: from logits, how each is sampled and its `_Outcome`, to other logits and `faults`.
    """
    M = seq.active.shape[0]
    row, length, wanted, done = outcome = _outcome(seq, plan)
    rows = jnp.minimum(row, M - 1)
    view = jax.tree.map(lambda x: x[rows], (seq.rows, seq.penalties))
    # Tokens are drawn shard by shard, without the others' logits; log-probabilities need them.
    whole = key.top is not None
    raw = logits(params, config, hidden, axis=axis if whole else None)[: len(row)]
    changed, found = change(raw, view[0], outcome)
    token = sampling.sample(
        changed, view[0], length, view[1], truncated=key.truncated, random=key.random,
        axis=None if whole else axis,
    )  # fmt: skip
    going = wanted & ~sampling.ends(token, length, seq.limits[rows], view[0].stop_ids)
    to = jnp.where(done, row, M)  # past the end: dropped
    seq = seq._replace(
        tokens=seq.tokens.at[to].set(token, mode="drop"),
        lengths=seq.lengths.at[to].set(length, mode="drop"),
        active=seq.active.at[to].set(going, mode="drop"),
        penalties=sampling.count_tokens(seq.penalties, jnp.where(wanted, row, M), token),
    )
    logprobs = None
    if key.top is not None:
        logprobs = sampling.token_logprobs(raw, token, top=key.top)
    return seq, Sampled(jnp.where(wanted, token, -1), logprobs, None, {}, found)


def _outcome(seq: SeqState, plan: Plan) -> _Outcome:
    M = seq.active.shape[0]
    row = jnp.asarray(plan.rows)
    at, active = decoding(seq, plan)
    length = seq.lengths[at] + 1
    if plan.chunks is None:
        return _Outcome(row, length, active, active)
    chunks = plan.chunks
    real = chunks.row < M
    wanted = chunks.last & real & (chunks.length < chunks.limit)
    return _Outcome(
        jnp.concatenate([row, chunks.row]),
        jnp.concatenate([length, chunks.length]),
        jnp.concatenate([active, wanted]),
        jnp.concatenate([active, real]),
    )


def _score(
    params: Params, config: ModelConfig, hidden: Array, targets: Array, *, top: int,
    axis: Axis,
) -> sampling.Logprobs:  # fmt: skip
    """Log-probabilities of `targets` [C] given hidden [C, E], a block of logits at a time."""
    C, E = hidden.shape
    block = math.gcd(C, SCORE_BLOCK)

    def score(part: tuple[Array, Array]) -> sampling.Logprobs:
        found = logits(params, config, part[0], axis=axis)
        return sampling.token_logprobs(found, part[1], top=top)

    out = lax.map(score, (hidden.reshape(-1, block, E), targets.reshape(-1, block)))
    return jax.tree.map(lambda x: x.reshape(C, *x.shape[2:]), out)


class StepCompiler:
    """Compiles steps ahead of time and keeps them.

    Args:
        config: the model, or each stage of it.
        invariant: compile so that a row's bits do not depend on the batch (costs nothing much;
            see ADR 003).
        platform: `gpu` or `cpu`; the options are XLA's for GPUs.
        drafter: what guesses, in steps that do.
        mesh: devices along one axis, or along that of stages and another; each runs the step on
            its part of what is split. Of one device: that one, with the program of one. None: the
            default device.
        peers: by what those along the last axis reach each other's memory; None: exchanges are
            XLA's.
        compiled: called when steps have been compiled, before they run.

    Attributes:
        options: of the compiler.
        everywhere: where lies what is whole on every device; None: on the default device.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        invariant: bool,
        platform: str,
        drafter: Drafter | None = None,
        mesh: Mesh | None = None,
        peers: Peers | None = None,
        compiled: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._drafter, self._done = config, drafter, compiled
        self._mesh = None if mesh is None or mesh.size == 1 else mesh
        self.everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._peers = peers
        self.options: dict[str, Any] = INVARIANT_OPTIONS if invariant and platform == "gpu" else {}
        self._compiled: dict[tuple[StepKey, bool], Any] = {}
        self.compile_seconds = 0.0

    @property
    def count(self) -> int:
        """Steps compiled so far."""
        return len(self._compiled)

    @property
    def keys(self) -> list[tuple[StepKey, bool]]:
        """Of the steps compiled so far, and whether each has penalties."""
        return list(self._compiled)

    @property
    def texts(self) -> list[str]:
        """Of the steps compiled so far, what the compiler made of them."""
        return [compiled.as_text() for compiled in self._compiled.values()]

    @property
    def step_bytes(self) -> int:
        """Temporary device memory of the hungriest step compiled so far."""
        found = (compiled.memory_analysis() for compiled in self._compiled.values())
        return max((m.temp_size_in_bytes for m in found if m is not None), default=0)

    def compile_all(
        self,
        keys: Iterable[StepKey],
        plans: Callable[[StepKey], Plan],
        *args: Any,
        draft: Params | None = None,
    ) -> None:
        """Compiles steps, several at a time.

        Args:
            keys: of the steps; what is compiled already is left alone.
            plans: makes a plan in a key's shapes.
            args: params, cache and state, or their shapes (with shardings if there is a mesh).
                Keys with hooks are not for this.
            draft: weights of the drafter's model, or their shapes.
        """
        begin, penalised = time.perf_counter(), args[-1].penalties is not None
        missing = [key for key in keys if (key, penalised) not in self._compiled]
        with ThreadPoolExecutor() as pool:
            # Tracing holds the interpreter, compiling does not.
            lowered = (
                (key, self._lower(key, *args, pack(plans(key), self.everywhere), (), draft))
                for key in missing
            )
            found = [(key, pool.submit(self._finish, key, low)) for key, low in lowered]
            for key, compiled in found:
                self._compiled[key, penalised] = compiled.result()
        self._done()
        self.compile_seconds += time.perf_counter() - begin

    def run(
        self,
        key: StepKey,
        params: Params,
        cache: PagedCache,
        seq: SeqState,
        plan: Packed,
        tables: tuple[Any, ...] = (),
        draft: Params | None = None,
    ) -> tuple[PagedCache, SeqState, Sampled]:
        """Runs a step, compiling it first if need be. `cache` and `seq` are donated.

        `plan` is a `Plan`, packed, `everywhere`; `tables` are those of the key's hooks; `draft`:
        weights of the drafter's model, for keys that need them.
        """
        # Penalties change the state's structure, and with it the program.
        lookup = (key, seq.penalties is not None)
        if lookup not in self._compiled:
            begin = time.perf_counter()
            lowered = self._lower(key, params, cache, seq, plan, tables, draft)
            self._compiled[lookup] = self._finish(key, lowered)
            self._done()
            self.compile_seconds += time.perf_counter() - begin
        weights, guessing = self._with_peers(params), self._with_peers(draft)
        return self._compiled[lookup](weights, cache, seq, plan, tables, guessing)

    def forget(self, hook: Hook) -> None:
        """Lets go of the programs that have a hook in them."""
        for key in [key for key in self._compiled if hook in key[0].hooks]:
            del self._compiled[key]

    def _with_peers(self, params: Params | None) -> Params | None:
        """Weights, and beside them what the exchanges of their products need."""
        if params is None or self._peers is None:
            return params
        return {**params, PEERS: self._peers.table}

    def _lower(self, key: StepKey, *args: Any) -> Any:
        mesh, (params, *rest, draft) = self._mesh, args
        args = (self._with_peers(params), *rest, self._with_peers(draft))

        def step(
            params: Params, cache: PagedCache, seq: SeqState, plan: Packed, tables: Any, draft: Any
        ) -> Any:
            return run_step(
                params, cache, seq, unpack(plan), tables, draft,
                config=self._config, key=key, drafter=self._drafter,
                axis=mesh_axes(mesh),
            )  # fmt: skip

        run = step
        if mesh is not None:
            specs = jax.tree.map(lambda x: x.sharding.spec, args)
            out = (specs[1], specs[2], PartitionSpec())
            # Gathered values are the same on every device, which their types do not say.
            run = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return jax.jit(run, donate_argnums=(1, 2)).lower(*args)

    def _finish(self, key: StepKey, lowered: Any) -> Any:
        begin = time.perf_counter()
        compiled = lowered.compile(compiler_options=self.options or None)
        logger.info("compiled %s in %.2f s", key, time.perf_counter() - begin)
        return compiled
