"""The offline API: `LLM`. Prompts in, text and log-probabilities out."""

from __future__ import annotations

import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxinfer import functional, saving, warmup
from jaxinfer.cache import resolve_kv_dtype
from jaxinfer.config import EngineOptions, ModelConfig, Speculative
from jaxinfer.distributed import connect, together
from jaxinfer.engine import Engine
from jaxinfer.errors import (
    CapacityError,
    CheckpointError,
    FunctionFault,
    InvalidRequest,
    JaxinferError,
    QueueFull,
)
from jaxinfer.following import follow
from jaxinfer.functional import Functional
from jaxinfer.hooks import Hook, Inside, Intervention, LogitsFn, Rows, bind, check
from jaxinfer.loading import (
    agree,
    batcher_config,
    check_dense,
    check_params,
    has_quantised,
    load_weights,
    make_meshes,
    model_config,
    model_tokenizer,
    open_source,
    plan,
    prepare_backend,
    read_bytes,
    split_given,
    split_stored,
)  # fmt: skip
from jaxinfer.models.sites import widths
from jaxinfer.models.weights import abstract_params, declare
from jaxinfer.observe import DISPATCHES_AHEAD
from jaxinfer.offload import host_places, lies, place_of
from jaxinfer.parallel import arrange, copy_to, device_bytes, lay_out, reading_mesh, said
from jaxinfer.quant import pack_params
from jaxinfer.replicas import Replicas
from jaxinfer.requests import (
    Request,
    Sample,
    answer,
    finish,
    refused,
    sequences,
    share_beginnings,
    take,
    token_logprobs,
)
from jaxinfer.response_cache import Key, ResponseCache, response_key
from jaxinfer.speculative import Draft, costs, load_draft, parse, prepare, settled
from jaxinfer.types import (
    MAX_PRIORITY,
    MAX_SEED,
    MAX_TOP_LOGPROBS,
    Delta,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from jaxinfer.validation import (
    as_list,
    as_prompts,
    next_version,
    one_each,
    one_or_each,
    validate,
    validate_prompt,
)
from jaxinfer.warmup import WarmUp

if TYPE_CHECKING:
    from jaxinfer.metrics import Metrics, Together
    from jaxinfer.models.decoder import Params
    from jaxinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Encode = Callable[[Any], Any]
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
        from jaxinfer.hub import resolve_model

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
            source = open_source(resolve_model(str(model), revision))
            config = model_config(source)
            agree(self._link, config, options)
            prepare_backend(options)
            meshes = make_meshes(config, options)
            mesh = reading_mesh(meshes)
            how = options.speculative
            draft = None if how is None else prepare(how, config, options, mesh=mesh)
            others = 0 if draft is None else draft.bytes
            split = split_stored(source, config, options, mesh)
            drafter = None if draft is None else draft.drafter
            plan(  # whether it fits, before reading
                config, options, loaded=False, weights=split.device + others, drafter=drafter,
                host_weights=split.host, buffers=split.buffers, meshes=meshes, link=self._link,
            )  # fmt: skip
            tokenizer = model_tokenizer(source)
            # The smaller one first: if it cannot be read, nothing else is.
            guessing = None if draft is None else load_draft(draft, options, mesh)
            params = load_weights(source, config, jnp.dtype(dtype), mesh, split.layers)
            if draft is not None:
                draft = settled(draft, params, config, tokenizer)
            given = _shapes(params) if mesh is None else abstract_params(config, jnp.dtype(dtype))
            if mesh is not None and has_quantised(params):
                given = None  # split: not laid out anew in memory
            self._start(
                params, config, tokenizer, options, draft, guessing, given, meshes, owned=True
            )

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
        self = cls.__new__(cls)
        self._link = connect()
        with together(self._link):
            how = None if speculative is None else parse(speculative)
            chosen = EngineOptions(speculative=how, **options)
            dtype = jnp.dtype(chosen.dtype)
            check_params(params, config, dtype)
            if how is None and draft is not None:
                raise ValueError('a draft was given: expected speculative="draft" with it')
            agree(self._link, config, chosen)
            prepare_backend(chosen)
            meshes = make_meshes(config, chosen)
            mesh = reading_mesh(meshes)
            found = None if how is None else prepare(how, config, chosen, given=draft, mesh=mesh)
            if draft is not None:
                check_params(*draft, dtype)
            if mesh is not None:
                check_dense([params, draft and draft[0]], mesh)
            split = split_given(params, config, chosen, mesh)
            given, guessing = _shapes(params), None
            params = _put(params, config, mesh, split.layers)
            if draft is not None:
                guessing = pack_params(_put(*draft, mesh), dtype, consume=False, mesh=mesh)
            elif found is not None:
                guessing = load_draft(found, chosen, mesh)
            if found is not None:
                found = settled(found, params, config, tokenizer)
            self._start(
                params, config, tokenizer, chosen, found, guessing, given, meshes, owned=False
            )
        return self

    def _start(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        options: EngineOptions,
        draft: Draft | None,
        guessing: Params | None,
        given: Params | None,
        meshes: Sequence[Mesh | None],
        *,
        owned: bool,
    ) -> None:
        mesh = reading_mesh(meshes)
        params = pack_params(params, jnp.dtype(options.dtype), consume=owned, mesh=mesh)
        drafter = None if draft is None else draft.drafter
        split, others = lies(params), 0 if guessing is None else device_bytes(guessing)
        if split.layers and jax.tree.structure(given) != jax.tree.structure(declare(config)):
            given = None  # quantised: all would be packed on the device at once
        self._given, self._mesh = given, mesh  # `given`: as updates must be; None: there are none
        copies = [copy_to((params, guessing), mesh) for mesh in meshes]
        memory = plan(
            config, options, loaded=True, weights=split.device + others, drafter=drafter,
            host_weights=split.host, buffers=split.buffers, meshes=meshes, link=self._link,
        )  # fmt: skip
        devices = sum(mesh.size for mesh in meshes if mesh is not None)
        logger.info("%s%s", f"each of {devices} devices: " if devices else "", memory)
        self.config, self.memory_plan, self.tokenizer = config, memory, tokenizer
        self._options = options
        self._seeds = random.Random(options.seed)
        self._ids = itertools.count()
        self._owners: dict[int, tuple[Request, Sample]] = {}
        self.params_version: int | str = 0  # of the weights; see `update_params`
        self.response_cache = ResponseCache(options.response_cache)
        limits = batcher_config(config, options, memory, drafter)
        kv_dtype = resolve_kv_dtype(options.kv_cache_dtype, options.dtype)
        follows = self._link is not None and not self._link.leads
        log = None if follows else options.event_log
        self._event_log = open(log, "w") if log else None  # noqa: SIM115
        stages = options.pipeline_parallel_size  # they read theirs one after the other
        engines = [
            Engine(
                own, config, limits, dtype=kv_dtype, invariant=options.invariant,
                event_log=self._event_log, drafter=drafter, draft=guess,
                costs=None if drafter is None else costs(
                    config, drafter, draft_bytes=stages * others,
                    weight_bytes=stages * (round(read_bytes(memory)) - others),
                    gpu=jax.devices()[0].platform == "gpu", devices=options.tensor_parallel_size,
                ),
                mesh=mesh, link=self._link,
            )
            for mesh, (own, guess) in zip(meshes, copies, strict=True)
        ]  # fmt: skip
        self._engine: Engine | Replicas | None = (
            engines[0] if len(engines) == 1 else Replicas(engines)
        )
        if self._link is not None:
            self._link.meet()  # a collective would not wait for ever for one that still reads

    # -- life -------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees the device's memory. Nothing can be generated afterwards.

        Of several processes the first lets the others go; another one that closes before that is
        a failure of all.
        """
        self._fail_all(JaxinferError("the LLM was closed"))
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
        planned = self.memory_plan
        if planned.limit is not None and done.step_bytes > planned.steps:
            raise CapacityError(
                f"a step needs {done.step_bytes} bytes beside weights and cache, {planned.steps} "
                "were kept free: lower max_num_batched_tokens, max_num_seqs or kv_cache_bytes"
            )
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
        inside = self._inside(len(several), capture, intervene, logits_fn)
        return self._complete(several, params, on_error, self._encode, priority, inside)

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
        return self._complete(several, params, on_error, self.chat_tokens)

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
        if not isinstance(top, int | np.integer) or not 0 <= top <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(
                f"{top!r} is not an integer from 0 to {MAX_TOP_LOGPROBS}", field="top"
            )
        params = SamplingParams(temperature=0.0, prompt_logprobs=int(top))
        several = as_prompts(sequences)
        inside = self._inside(len(several), capture, intervene, None)
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
        self._check_one_device("functional")
        several = as_prompts(prompts)
        each = one_each(params, len(several))
        requests = [self._prepare(p, each[i], i) for i, p in enumerate(several)]
        M = len(several) if rows is None else rows
        inside = bind(capture, None, logits_fn, self.config) or Inside()
        for bound in inside.hooks:
            check(bound.hook, self.config, jnp.dtype(self._options.dtype), count=M)
        for index, request in enumerate(requests):
            if request.params.n > 1 or request.params.penalised:
                raise InvalidRequest(
                    "n > 1 and penalties are not for `functional`: fork rows, or use generate",
                    index=index, field="params",
                )  # fmt: skip
        specs = [sequences(request)[0] for request in requests]
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
        inside = self._inside(1, capture, intervene, logits_fn)
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
        self._queue(queued)
        for request, found in zip(requests, known, strict=True):
            if found is not None:
                answer(request, found)

    def _queue(self, requests: Sequence[Request]) -> None:
        wanted = sum(len(r.samples) for r in requests)
        if self.engine.waiting + wanted > self._options.max_waiting:
            raise QueueFull(
                f"{wanted} sequences do not fit in the queue: {self.engine.waiting} of "
                f"{self._options.max_waiting} wait already"
            )
        pairs = [(request, sample) for request in requests for sample in request.samples]
        ids = self.engine.submit([s for request in requests for s in sequences(request)])
        for sequence, (request, sample) in zip(ids, pairs, strict=True):
            sample.sequence = sequence
            self._owners[sequence] = (request, sample)

    def pump(self, *, schedule: bool = True) -> None:
        """One turn of the engine, its news given to the requests they belong to.

        What goes wrong with one request's text fails that request. What goes wrong in a step fails
        all that were running, and is raised. Without `schedule` only what was begun is read.
        """
        engine = self.engine
        try:
            for update in engine.step() if schedule else engine.read():
                owner = self._owners.get(update.id)
                if owner is None:  # given up meanwhile
                    continue
                request, sample = owner
                if update.fault is not None:
                    request.failed = FunctionFault(
                        update.fault, index=request.index, request_id=request.id
                    )
                    self.cancel([request])
                    continue
                try:
                    take(request, sample, update, self.tokenizer)
                    self._keep(request)
                except Exception as error:
                    request.failed = JaxinferError(f"{type(error).__name__}: {error}")
                    self.cancel([request])
                    continue
                if sample.finish_reason:
                    del self._owners[update.id]
                    engine.cancel(update.id, complete=True)
        except BaseException as error:
            # A step that broke off may have consumed the state it was given, and news half given
            # out are lost: start anew.
            self._fail_all(JaxinferError(f"interrupted by {type(error).__name__}: {error}"))
            if self._link is None:
                engine.reset()
            else:  # nobody knows what the other processes have run
                self._link.fail(error, running=True)
                self.close()
            raise

    def cancel(self, requests: Sequence[Request]) -> None:
        """Gives up what is left of requests; nothing where they have finished."""
        for sample in (s for request in requests for s in request.samples):
            if sample.sequence is not None and self._owners.pop(sample.sequence, None):
                self.engine.cancel(sample.sequence)

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
        if self._given is None:
            how = said(self._mesh) or f"device_weight_bytes={self._options.device_weight_bytes}"
            raise CheckpointError(
                f"quantised weights with {how} are not updated: expected dense ones; "
                "make another LLM of the directory"
            )
        check_params(params, self.config, jnp.dtype(self._options.dtype), like=self._given)
        if in_flight == "abort":
            owners = saving.distinct(request for request, _ in self._owners.values())
            self.cancel(owners)
            for request in owners:
                request.failed = JaxinferError("given up: the weights were updated")
        while self._owners:
            self.pump()
        try:
            if self._mesh is not None:  # dense, and whole
                params = arrange(params, self.config, self._mesh)
            self.engine.update_params(
                pack_params(params, jnp.dtype(self._options.dtype), consume=False)
            )
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

    def _complete(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        on_error: Literal["raise", "return"],
        encode: Encode,
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

    def _inside(
        self, count: int, capture: Any, intervene: Any, logits_fn: Any
    ) -> Callable[[int], Inside | None]:
        """What each of `count` requests wants of the inside, checked when it is asked for."""
        named = {"capture": capture, "intervene": intervene, "logits_fn": logits_fn}
        for name, value in named.items():
            if value is not None and not (name == "capture" and not value):
                self._check_one_device(name)
        changes = one_or_each(intervene, count, "intervene")
        logits = one_or_each(logits_fn, count, "logits_fn")
        checked: set[Hook] = set()

        def of(index: int) -> Inside | None:
            found = bind(capture, changes[index], logits[index], self.config, index=index)
            self._check_room(found.capture if found else (), index)
            new = {bound.hook for bound in (found.hooks if found else ())} - checked
            for hook in new:
                check(hook, self.config, jnp.dtype(self._options.dtype), index=index)
            checked.update(new)
            return found

        return of

    def _check_one_device(self, field: str) -> None:
        """Raises InvalidRequest where several devices share the model: each sees a part of it."""
        if self._mesh is not None:
            raise InvalidRequest(f"not with {said(self._mesh)}: expected 1", field=field)

    def _check_one_process(self, method: str) -> None:
        """Raises JaxinferError where several share the model."""
        if self._link is not None:
            raise JaxinferError(f"{method}: not with {self._link.count} processes: expected 1")

    def _encode(self, prompt: Any) -> Any:
        """Token ids of text; what is not text is taken for token ids, and checked later."""
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: give token ids")
        return self.tokenizer.encode(prompt)

    def _check_room(self, capture: Sequence[str], index: int) -> None:
        """Raises InvalidRequest if steps that capture these sites could run out of memory."""
        every, memory = widths(self.config), self.memory_plan
        tokens = self.engine.limits.max_num_batched_tokens
        token_bytes = sum(every[site] for site in capture) * jnp.dtype(self._options.dtype).itemsize
        needed = DISPATCHES_AHEAD * tokens * token_bytes
        if memory.limit is not None and needed > memory.steps:
            raise InvalidRequest(
                f"{len(capture)} sites take {needed} bytes in steps of {tokens} tokens, "
                f"{memory.steps} are free: name fewer, or lower max_num_batched_tokens",
                index=index, field="capture",
            )  # fmt: skip

    def _prepare(
        self,
        prompt: Any,
        params: SamplingParams,
        index: int,
        *,
        encode: Encode | None = None,
        generate: bool = True,
        priority: int = 0,
        inside: Inside | None = None,
    ) -> Request:
        """Checks a request and tokenises it; touches nothing else."""
        validate(params, index=index, vocab_size=self.config.vocab_size)
        if not isinstance(priority, int | np.integer) or not abs(priority) <= MAX_PRIORITY:
            raise InvalidRequest(
                f"{priority!r} is not an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}",
                index=index, field="priority",
            )  # fmt: skip
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer", index=index, field="stop")
        try:
            ids = (encode or self._encode)(prompt)
        except InvalidRequest as error:  # the tokenizer does not know which request it serves
            raise InvalidRequest(error.message, index=index, field=error.field) from error
        longest = self.memory_plan.max_model_len
        tokens = validate_prompt(
            ids,
            index=index,
            vocab_size=self.config.vocab_size,
            max_prompt=longest - 1 if generate else longest,
        )
        most = longest if params.max_tokens is None else len(tokens) + params.max_tokens
        return Request(
            id=str(next(self._ids)),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=tokens,
            params=params,
            seed=self._seeds.randrange(MAX_SEED) if params.seed is None else params.seed,
            limit=min(most, longest) if generate else len(tokens),
            eos_ids=self.config.eos_token_ids,
            samples=[Sample(i) for i in range(params.n)],
            priority=int(priority),
            inside=inside,
            index=index,
        )

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

    def _fail_all(self, error: JaxinferError) -> None:
        for request, _ in self._owners.values():
            request.failed = error
        self._owners.clear()


def _shapes(params: Params) -> Params:
    return jax.eval_shape(lambda tree: tree, params)


def _put(
    params: Params, config: ModelConfig, mesh: Mesh | None, layers: Sequence[int] = ()
) -> Params:
    """Weights in memory to where they are to lie, the matrices of `layers` on the host."""
    if mesh is not None:
        return lay_out(params, config, mesh, layers)
    if not layers:
        return jax.device_put(params)

    def put(place: Sharding, matrix: Any) -> Any:
        return jax.device_put(matrix, jax.tree.map(partial(place_of, place), matrix))

    return jax.tree.map(put, host_places(declare(config), None, layers), params)
