"""The offline API: `LLM`. Prompts in, text and log-probabilities out."""

from __future__ import annotations

import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import jax
import jax.numpy as jnp

from jaxinfer import functional, saving, warmup
from jaxinfer.cache import resolve_kv_dtype
from jaxinfer.config import EngineOptions, ModelConfig, Speculative
from jaxinfer.delivery import Owners, deliver, fail_all, give_up, queue
from jaxinfer.distributed import connect, together
from jaxinfer.engine import Engine
from jaxinfer.errors import InvalidRequest, JaxinferError
from jaxinfer.following import follow
from jaxinfer.functional import Functional
from jaxinfer.hooks import Inside, Intervention, LogitsFn, Rows, bind, check
from jaxinfer.in_memory import as_loaded, check_update
from jaxinfer.memory import check_steps
from jaxinfer.preparing import Rules, check_one_device, insides, prepare, single_sequences
from jaxinfer.replicas import Replicas
from jaxinfer.requests import Request, answer, finish, refused
from jaxinfer.response_cache import Key, ResponseCache, response_key
from jaxinfer.scoring import scoring_params, share_beginnings, token_logprobs
from jaxinfer.sources import Source, drawn, given, stored
from jaxinfer.speculative import parse
from jaxinfer.starting import Started, start
from jaxinfer.types import Delta, RequestOutput, SamplingParams, TokenLogprobs
from jaxinfer.validation import (
    as_list,
    as_prompts,
    next_version,
    one_each,
    one_or_each,
    validate,
)
from jaxinfer.warmup import WarmUp

if TYPE_CHECKING:
    from jaxinfer.metrics import Metrics, Together
    from jaxinfer.models.decoder import Params
    from jaxinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


Prompt = str | Sequence[int]
Message = Mapping[str, Any]
LogitsFns = LogitsFn | Callable[[jax.Array, Rows, Any], jax.Array]


class LLM:
    """A model, loaded and ready to generate. A context manager; `close` frees the device.

    Args:
        model: a directory in Hugging Face's format, a GGUF file, a Hub id, or `demo`, the model
            that ships with jaxinfer. Quantised matrices stay so (docs/quantization.md).
        revision: of a Hub id.
        dtype: `bfloat16`, `float16` or `float32`; of weights and activations.
        max_model_len: longest sequence in tokens; None: the model's limit, or what memory allows.
        max_num_seqs: sequences that run at once.
        gpu_memory_utilization: share of the GPU's memory to take. JAX decides it when it starts:
            too late if it has run something before; then the log says so.
        kv_cache_bytes: size of the KV cache on each device; None: what is left.
        device_weight_bytes: what the model's weights may take of each device. The matrices of
            layers that do not fit lie in the host's memory, from where every step copies them
            (docs/offload.md). It changes no token. None: all lie on the device.
        kv_host_bytes: of the host's memory, for each device: room for KV pages that had to leave
            it, from where they are copied back when a prompt begins alike, or goes on after it was
            preempted (docs/offload.md). It changes no token. 0: none.
        kv_cache_dtype: `auto`: `dtype`. `int8`, or `fp8` (`fp8_e4m3`): half the bytes, with a scale
            for every token and head.
        seed: draws the seeds of requests that bring none.
        invariant: a request's tokens do not depend on what it is batched with (ADR 003).
        tensor_parallel_size: devices that share every layer, the first of this process; it must
            divide heads, MLP and vocabulary. Other degrees give other bits (docs/parallel.md).
        pipeline_parallel_size: stages that hold the layers in turn, each on as many devices as
            share a layer; it must divide the layers, and both together the vocabulary.
        data_parallel_size: replicas of the model, of as many devices each, that share the requests;
            sizes are those of each, but for `max_waiting`. It changes no token.
        page_size: tokens a page of the cache.
        max_num_batched_tokens: most tokens of one step: one for each sequence that decodes, and as
            much of prompts as that leaves; longer ones are read in chunks. None: 2048, or twice
            `max_num_seqs`.
        max_steps: most decode steps in one dispatch, while nothing waits. Tokens then come in
            groups of so many. None: 1, and more for small models on a GPU, whose steps take less
            time than the host needs to prepare one; 4 with stages, which then stand idle less.
        max_waiting: queue bound; more requests at once raise QueueFull.
        policy: `continuous` fills rows as they become free; `static` runs whole batches;
            `makespan` has many requests that are there at once end sooner, by beginning with those
            whose `max_tokens` is largest: nobody's turn is certain while others come.
        prefix_caching: prompts that begin alike share the pages of their beginning, full ones,
            which are computed once: also while the first of them is still being read, and later as
            long as the pages are not needed. It changes no token.
        response_cache: answers kept, in requests; 0: none. A request that was answered before, of
            the same tokens and parameters, greedy or with its own seed, gets the same answer
            without being run.
        event_log: file for the scheduler's events, written anew; `jaxinfer replay` shows from it
            what was scheduled, step by step.
        compilation_cache: directory for compiled programs; None: under the user's cache
            directory; "": none.
        speculative: guesses tokens, several of which the model then checks at once: `draft=MODEL`,
            a smaller model with the same tokens; `lookup`, what followed when the same words
            occurred before; `skip=4-9`, the model without some of its layers; or
            `config.Speculative`. It changes no token (docs/speculation.md).

    Raises:
        UnsupportedModel, CheckpointError, CapacityError: before the weights are read where it can
            be known then.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        revision: str | None = None,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.9,
        kv_cache_bytes: int | None = None,
        device_weight_bytes: int | None = None,
        kv_host_bytes: int = 0,
        kv_cache_dtype: Literal["auto", "int8", "fp8", "fp8_e4m3"] = "auto",
        seed: int = 0,
        invariant: bool = True,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        page_size: int = 32,
        max_num_batched_tokens: int | None = None,
        max_steps: int | None = None,
        max_waiting: int = 1_000_000,
        policy: Literal["continuous", "static", "makespan"] = "continuous",
        prefix_caching: bool = True,
        response_cache: int = 0,
        event_log: str | None = None,
        compilation_cache: str | None = None,
        speculative: str | Mapping[str, Any] | Speculative | None = None,
    ) -> None:
        self._link = connect()
        with together(self._link):
            options = EngineOptions(
                dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
                gpu_memory_utilization=gpu_memory_utilization, kv_cache_bytes=kv_cache_bytes,
                device_weight_bytes=device_weight_bytes, kv_host_bytes=kv_host_bytes,
                kv_cache_dtype=kv_cache_dtype, seed=seed, invariant=invariant,
                tensor_parallel_size=tensor_parallel_size,
                pipeline_parallel_size=pipeline_parallel_size,
                data_parallel_size=data_parallel_size, page_size=page_size,
                max_num_batched_tokens=max_num_batched_tokens, max_steps=max_steps,
                max_waiting=max_waiting, policy=policy, prefix_caching=prefix_caching,
                response_cache=response_cache, event_log=event_log,
                compilation_cache=compilation_cache,
                speculative=None if speculative is None else parse(speculative),
            )  # fmt: skip
            self._take(start(stored(model, revision), options, self._link), options)

    @classmethod
    def from_params(
        cls,
        params: Params,
        config: ModelConfig,
        *,
        tokenizer: Tokenizer | None = None,
        draft: tuple[Params, ModelConfig] | None = None,
        speculative: str | Mapping[str, Any] | Speculative | None = None,
        **options: Any,
    ) -> Self:
        """An LLM over weights that are in memory already (a tree of `models.weights.declare`).

        Takes the options of `LLM`. The weights' dtype must be `dtype`. `draft`: a model that
        guesses, in memory already, for `speculative="draft"`. On several devices weights are
        dense, and whole as for one device: each device is given a copy of its part.

        Raises:
            CheckpointError: `params` is not the tree of `config` and `dtype`; lists what differs.
            CapacityError, ValueError: as `LLM`.
        """

        def source(chosen: EngineOptions) -> Source:
            return given(params, config, chosen, tokenizer=tokenizer, draft=draft)

        return cls._from_source(source, speculative, options)

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        *,
        weights_seed: int = 0,
        speculative: str | Mapping[str, Any] | Speculative | None = None,
        **options: Any,
    ) -> Self:
        """An LLM of random dense weights, to time a shape without a checkpoint: each device draws
        what it holds. Takes the options of `LLM`.

        Args:
            config: the model; `models.families` makes one of a Hugging Face config.
            weights_seed: of the weights. Where several devices share a layer they are other ones.

        Raises:
            CapacityError, ValueError: as `LLM`.
        """
        return cls._from_source(lambda _: drawn(config, weights_seed), speculative, options)

    @classmethod
    def _from_source(
        cls,
        source: Callable[[EngineOptions], Source],
        speculative: str | Mapping[str, Any] | Speculative | None,
        options: Mapping[str, Any],
    ) -> Self:
        """An LLM over weights that are no checkpoint's."""
        self = cls.__new__(cls)
        self._link = connect()
        with together(self._link):
            how = None if speculative is None else parse(speculative)
            chosen = EngineOptions(speculative=how, **options)
            self._take(start(source(chosen), chosen, self._link), chosen)
        return self

    def _take(self, started: Started, options: EngineOptions) -> None:
        """Begins with an engine that nobody else has."""
        self._engine: Engine | Replicas | None = started.engine
        self.config, self.tokenizer = started.config, started.tokenizer
        self.memory_plan = started.memory
        self._mesh, self._updatable = started.mesh, started.updatable
        self._event_log, self._options = started.event_log, options
        self._seeds = random.Random(options.seed)
        self._ids = itertools.count()
        self._owners: Owners = {}
        self.params_version: int | str = 0  # of the weights; see `update_params`
        self.response_cache = ResponseCache(options.response_cache)

    # -- life -------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees the device's memory. Nothing can be generated afterwards.

        Of several processes the first lets the others go; another one that closes before that is
        a failure of all.
        """
        fail_all(self._owners, JaxinferError("the LLM was closed"))
        self._engine = None
        if self._link is not None:
            self._link.close()
        if self._event_log is not None:
            self._event_log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def follow(self) -> bool:
        """Where several processes share the model: has all but the first do what the first one's
        LLM does, until that is closed (docs/parallel.md). Every other use is the first one's.

        Returns:
            False, at once, on the first process or the only one; True afterwards on the others.
        """
        if self._link is None or self._link.leads:
            return False
        assert isinstance(self.engine, Engine), "there are no replicas over processes"
        with together(self._link, running=True):
            follow(self.engine, self._link)
        return True

    @property
    def engine(self) -> Engine | Replicas:
        """The engine underneath, or those of all replicas as one.

        Raises:
            JaxinferError: the LLM has been closed.
        """
        if self._engine is None:
            raise JaxinferError("this LLM is closed")
        return self._engine

    @property
    def metrics(self) -> Metrics | Together:
        """What the engine did so far, and how long it took; see `metrics.Metrics.summary`.

        Raises:
            JaxinferError: the LLM has been closed.
        """
        return self.engine.metrics

    @property
    def params(self) -> Params:
        """The model's weights, on the device, or some on the host: see `offload`. They are not to
        be donated to anything.

        On several devices they are those of `declare(config, tensor_parallel_size,
        pipeline_parallel_size)`; with `data_parallel_size` those of the first replica.

        Raises:
            JaxinferError: the LLM has been closed.
        """
        return self.engine.params

    def warm_up(self, params: Sequence[SamplingParams] = (warmup.GREEDY, warmup.SAMPLED)) -> WarmUp:
        """Compiles, several at a time, every program that requests like these may need.

        Nothing is compiled afterwards while such requests are served. Each program is run once; if
        it does not give a probe the bits that the others give, the log says so.

        Args:
            params: one for each kind of request that is to come: kinds differ in whether they are
                sampled, truncated, penalised, and in their log-probabilities.

        Raises:
            CapacityError: a program needs more memory than was planned for it.
            JaxinferError: something runs already.
        """
        for index, one in enumerate(params):
            validate(one, index=index, vocab_size=self.config.vocab_size)
        with together(self._link, running=True):
            done = self.engine.warm_up(params)
        logger.info("%d programs in %.1f s", done.programs, done.seconds)
        if done.unequal:
            logger.warning("not invariant: other bits come out of %s", done.unequal)
        check_steps(self.memory_plan, done.step_bytes)
        return done

    # -- generation -------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        on_error: Literal["raise", "return"] = "raise",
        capture: Sequence[str] = (),
        intervene: Intervention | Sequence[Intervention | None] | None = None,
        logits_fn: LogitsFns | Sequence[LogitsFns | None] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; results in the order of the prompts.

        Args:
            prompts: texts or lists of token ids; one alone is a list of one.
            params: for all prompts, or one for each.
            priority: for all prompts, or one for each; smaller ones are served first, and give way
                last where pages run out. Nobody waits for ever.
            on_error: `raise` refuses the whole call for one bad request, before any work;
                `return` serves the others and gives the bad one's error in `RequestOutput.error`.
            capture: sites whose activations come with each output, patterns among them:
                `layers.*.resid`. See `models.sites`, or `jaxinfer info --sites`.
            intervene: changes activations; for all prompts, or one for each. See `hooks`.
            logits_fn: changes logits; likewise.

        Raises:
            InvalidRequest, QueueFull.
            FunctionFault: an `intervene` or `logits_fn` made NaN or infinity.
        """
        several = as_prompts(prompts)
        inside = insides(self._rules, len(several), capture, intervene, logits_fn)
        return self._complete(several, params, on_error, priority=priority, inside=inside)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        capture: Sequence[str] = (),
        intervene: Intervention | None = None,
        logits_fn: LogitsFns | None = None,
    ) -> Iterator[Delta]:
        """Completes one prompt, yielding what is new as it comes; the last Delta has the result.

        The request is checked at once; it runs while the iterator is read. Closing the iterator
        cancels it. See `generate`.
        """
        request = self.prepare(
            prompt, params,
            priority=priority, capture=capture, intervene=intervene, logits_fn=logits_fn,
        )  # fmt: skip
        assert request.deltas is not None
        return self._stream(request, request.deltas)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, through the model's chat template."""
        several = as_list(messages, "messages")
        if len(several) and isinstance(several[0], Mapping):
            several = [several]
        return self._complete(several, params, on_error, encode=self.chat_tokens)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the model's answer."""
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: give token ids", field="messages")
        return self.tokenizer.apply_chat_template(messages)

    def logprobs(
        self,
        sequences: Prompt | Sequence[Prompt],
        *,
        top: int = 0,
        capture: Sequence[str] = (),
        intervene: Intervention | Sequence[Intervention | None] | None = None,
    ) -> list[TokenLogprobs]:
        """Log-probability of every token of each sequence after its first, given those before.

        Sequences that begin alike, as the answers to one question do, have their beginning computed
        once.

        Args:
            sequences: texts or lists of token ids.
            top: how many of the likeliest tokens to return at each position.
            capture, intervene: as in `generate`.

        Raises:
            InvalidRequest, QueueFull, FunctionFault.
        """
        params = scoring_params(top)
        several = as_prompts(sequences)
        inside = insides(self._rules, len(several), capture, intervene, None)
        requests = [
            self._prepare(sequence, params, index, generate=False, inside=inside(index))
            for index, sequence in enumerate(several)
        ]
        shared = self._options.prefix_caching and not any(r.inside for r in requests)
        least = self.memory_plan.page_size if shared else self.memory_plan.max_model_len
        for some in share_beginnings(requests, least):
            self._run(some)
        return [token_logprobs(request) for request in requests]

    def functional(
        self,
        prompts: Prompt | Sequence[Prompt] = (),
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        rows: int | None = None,
        num_pages: int | None = None,
        capture: Sequence[str] = (),
        logits_fn: LogitsFns | None = None,
        donate: bool = False,
    ) -> Functional:
        """The engine as a value: `step(params, state) -> (state, out)` and a state to begin with.

        The prompts are read into rows 0, 1, …; the first step samples their first tokens, with the
        seeds and draws that `generate` would have. See `functional`, also for `fork`. The weights
        are `llm.params`. Nothing of this LLM's own engine is touched; memory for the state is taken
        beside it.

        Args:
            prompts, params: as of `generate`, without penalties, and one sample of each.
            rows: of the state; None: as many as prompts.
            num_pages: pages of `page_size` tokens; None: enough for every row to end.
            capture: sites whose activations each step returns.
            logits_fn: changes logits [rows, V] of all rows at once, which it may mix.
            donate: a step uses up the state that it is given. Otherwise old states stay as they
                are, and every step copies the pages.

        Raises:
            InvalidRequest, CapacityError.
        """
        check_one_device(self._mesh, "functional")
        several = as_prompts(prompts)
        each = one_each(params, len(several))
        requests = [self._prepare(p, each[i], i) for i, p in enumerate(several)]
        M = len(several) if rows is None else rows
        inside = bind(capture, None, logits_fn, self.config) or Inside()
        for bound in inside.hooks:
            check(bound.hook, self.config, jnp.dtype(self._options.dtype), count=M)
        specs = single_sequences(requests)
        return functional.start(
            self.params, self.config, self.engine.compiler, specs,
            rows=M,
            num_pages=num_pages,
            longest=max([s.limit for s in specs], default=self.memory_plan.max_model_len),
            page_size=self.memory_plan.page_size,
            kv_dtype=resolve_kv_dtype(self._options.kv_cache_dtype, self._options.dtype),
            invariant=self._options.invariant,
            inside=inside, donate=donate,
        )  # fmt: skip

    # -- for loops of one's own, as AsyncLLM's -------------------------------------------------

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        capture: Sequence[str] = (),
        intervene: Intervention | None = None,
        logits_fn: LogitsFns | None = None,
    ) -> Request:
        """A checked request, for `submit`; what comes of it is added to its `deltas`.

        See `generate`.

        Raises:
            InvalidRequest.
        """
        params = SamplingParams() if params is None else params
        inside = insides(self._rules, 1, capture, intervene, logits_fn)
        request = self._prepare(prompt, params, 0, priority=priority, inside=inside(0))
        request.deltas = deque()
        return request

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests of `prepare`; one whose answer is kept is finished at once.

        Raises:
            QueueFull: all of them were left out.
        """
        for request in requests:
            request.key, request.params_version = self._key(request), self.params_version
        known = [self.response_cache.get(request.key) for request in requests]
        queued = [r for r, found in zip(requests, known, strict=True) if found is None]
        queue(self.engine, self._owners, queued, self._options.max_waiting)
        for request, found in zip(requests, known, strict=True):
            if found is not None:
                answer(request, found)

    def pump(self, *, schedule: bool = True) -> None:
        """One turn of the engine, its news given to the requests they belong to.

        What goes wrong with one request's text fails that request. What goes wrong in a step fails
        all that were running, and is raised. Without `schedule` only what was begun is read.
        """
        engine = self.engine
        try:
            for update in engine.step() if schedule else engine.read():
                deliver(update, engine, self._owners, tokenizer=self.tokenizer, keep=self._keep)
        except BaseException as error:
            # A step that broke off may have consumed the state it was given, and news half given
            # out are lost: start anew.
            broken = JaxinferError(f"interrupted by {type(error).__name__}: {error}")
            fail_all(self._owners, broken)
            if self._link is None:
                engine.reset()
            else:  # nobody knows what the other processes have run
                self._link.fail(error, running=True)
                self.close()
            raise

    def cancel(self, requests: Sequence[Request]) -> None:
        """Gives up what is left of requests; nothing where they have finished."""
        if self._engine is not None:  # else there is nothing left of them
            give_up(self._engine, self._owners, requests)

    def update_params(
        self,
        params: Params,
        *,
        version: int | str | None = None,
        in_flight: Literal["drain", "abort"] = "drain",
    ) -> None:
        """Takes other weights, without compiling anything: see `Engine.update_params`.

        Cached prefixes and answers of before are not used any more.

        Args:
            params: a tree like that of the model, in its dtype; arrays on the device, which are
                taken as they are, or NumPy arrays. On several devices they are whole, and dense, as
                for one device.
            version: name of the weights, which results carry as `params_version`; None: the number
                after the one before.
            in_flight: `drain` lets all requests finish first, `abort` fails them.

        Raises:
            CheckpointError: the tree is not the model's; lists what differs. Nothing has changed.
            ValueError: `in_flight` or `version` is something else.
            JaxinferError: the weights could not be transferred; the LLM is then closed.
        """
        self._check_one_process("update_params")
        if in_flight not in ("drain", "abort"):
            raise ValueError(f"in_flight={in_flight!r}: expected 'drain' or 'abort'")
        version = next_version(self.params_version, version)
        config, options, mesh = self.config, self._options, self._mesh
        check_update(params, config, options, like=self._updatable, mesh=mesh)
        if in_flight == "abort":
            owners = saving.distinct(request for request, _ in self._owners.values())
            self.cancel(owners)
            for request in owners:
                request.failed = JaxinferError("given up: the weights were updated")
        while self._owners:
            self.pump()
        try:
            self.engine.update_params(as_loaded(params, config, jnp.dtype(options.dtype), mesh))
        except BaseException as error:
            self.close()
            raise JaxinferError(f"the update broke off, the LLM is closed: {error}") from error
        self.params_version = version
        self.response_cache.clear()

    # -- to go on later ---------------------------------------------------------------------

    def save(self, directory: str | Path, *, pages: bool = False) -> None:
        """Writes all requests that have not finished, with what they have so far; they go on.

        What was begun is read first, and reaches its requests as ever; nothing new is begun.
        Requests that finish by it, or had finished, are not saved: the caller has them.

        Args:
            directory: made, or replaced if a state was saved there before; it appears as a whole.
            pages: with the KV cache's pages in use, of one replica only. Without, a file of some
                kilobytes; what runs is then computed anew, with the same tokens, by any number of
                replicas.

        Raises:
            CheckpointError: it cannot be written, or something else has that name.
            JaxinferError: `pages` with `data_parallel_size`.
        """
        self._check_one_process("save")
        while self.engine.in_flight:
            self.pump(schedule=False)
        next_id = next(self._ids)
        self._ids = itertools.count(next_id)
        requests = saving.distinct(request for request, _ in self._owners.values())
        state = self.engine.snapshot(pages=pages)
        saving.save(directory, saving.Saved(state, requests, next_id, self._seeds.getstate()))

    def load(self, directory: str | Path) -> list[Request]:
        """Takes over the requests that `save` wrote, and queues them: `pump` until they finish.

        Requests come in the order of their submission, with their ids, and nobody reads their
        `deltas` yet. The next request's id and seed are what they would have been.

        Raises:
            CheckpointError: the directory is not one that `save` wrote as a whole.
            JaxinferError, CapacityError: requests run here already; or the model, or the sizes, are
                not those of the state: names what differs. See `Engine.restore`.
        """
        self._check_one_process("load")
        saved = saving.load(directory)
        self.engine.restore(saved.engine)
        self._ids = itertools.count(max(saved.next_id, next(self._ids)))
        self._seeds.setstate(saved.seeds)
        for request in saved.requests:
            request.key, request.params_version = self._key(request), self.params_version
            for sample in request.samples:
                if sample.sequence is not None and sample.finish_reason is None:
                    self._owners[sample.sequence] = (request, sample)
        return saved.requests

    # -- inside -----------------------------------------------------------------------------

    @property
    def _rules(self) -> Rules:
        return Rules(
            self.config, self.tokenizer, self.memory_plan,
            self.engine.limits.max_num_batched_tokens, jnp.dtype(self._options.dtype), self._mesh,
        )  # fmt: skip

    def _prepare(self, prompt: Any, params: SamplingParams, index: int, **more: Any) -> Request:
        """See `preparing.prepare`."""
        return prepare(self._rules, prompt, params, index, ids=self._ids, seeds=self._seeds, **more)

    def _complete(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        on_error: Literal["raise", "return"],
        *,
        encode: Callable[[Any], Any] | None = None,
        priority: int | Sequence[int] = 0,
        inside: Callable[[int], Inside | None] = lambda _: None,
    ) -> list[RequestOutput]:
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'return'")
        each = one_each(params, len(prompts))
        places = one_or_each(priority, len(prompts), "priority")
        requests: list[Request | RequestOutput] = []
        for index, prompt in enumerate(prompts):
            try:
                request = self._prepare(
                    prompt, each[index], index,
                    encode=encode, priority=places[index], inside=inside(index),
                )  # fmt: skip
                requests.append(request)
            except InvalidRequest as error:
                if on_error == "raise":
                    raise
                requests.append(refused(prompt, error, str(next(self._ids))))
        self._run([r for r in requests if isinstance(r, Request)], on_error)
        return [r if isinstance(r, RequestOutput) else self._result(r) for r in requests]

    def _result(self, request: Request) -> RequestOutput:
        if request.failed is None:
            return finish(request, self.tokenizer)
        return refused(request.prompt or request.prompt_ids, request.failed, request.id)

    def _check_one_process(self, method: str) -> None:
        """Raises JaxinferError where several share the model."""
        if self._link is not None:
            raise JaxinferError(f"{method}: not with {self._link.count} processes: expected 1")

    def _run(
        self, requests: Sequence[Request], on_error: Literal["raise", "return"] = "raise"
    ) -> None:
        """Runs requests to their end; `return` leaves those that fail alone as they are."""
        try:
            self.submit(requests)
            for request in requests:  # each turn of the engine serves them all
                while not (request.finished or request.failed):
                    self.pump()
                if request.failed and on_error == "raise":
                    raise request.failed
        finally:
            self.cancel(requests)

    def _stream(self, request: Request, deltas: deque[Delta]) -> Iterator[Delta]:
        try:
            self.submit([request])
            while True:
                while deltas:
                    yield deltas.popleft()
                if request.failed:
                    raise request.failed
                if request.finished:
                    return
                self.pump()
        finally:
            self.cancel([request])

    def _key(self, request: Request) -> Key | None:
        """None where no answer is to be kept, as for a request that only scores its prompt."""
        if not self.response_cache.entries or request.limit == len(request.prompt_ids):
            return None
        if request.inside is not None:
            return None
        return response_key(request.prompt_ids, request.params, self.params_version)

    def _keep(self, request: Request) -> None:
        """Keeps a finished request's answer, unless the weights have changed meanwhile."""
        if request.finished and request.key is not None and request.key == self._key(request):
            self.response_cache.put(request.key, finish(request, self.tokenizer))
