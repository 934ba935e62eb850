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
import numpy as np

from jaxinfer.backend import default_cache_directory, reserve_memory, use_compilation_cache
from jaxinfer.config import BatcherConfig, EngineOptions, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.engine import Sequence as EngineSequence
from jaxinfer.errors import CheckpointError, InvalidRequest, JaxinferError, QueueFull
from jaxinfer.models.weights import abstract_params, count_params, declare
from jaxinfer.progress import loading_bar
from jaxinfer.requests import Request, Sample, finish, merged_scores, take
from jaxinfer.sizing import MemoryPlan, device_memory, plan_memory
from jaxinfer.types import (
    MAX_SEED,
    MAX_TOP_LOGPROBS,
    Delta,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from jaxinfer.validation import validate, validate_prompt

if TYPE_CHECKING:
    from jaxinfer.models.decoder import Params
    from jaxinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Encode = Callable[[Any], Any]


class LLM:
    """A model, loaded and ready to generate. A context manager; `close` frees the device.

    Args:
        model: a directory in Hugging Face's format, a Hub id, or `demo`, the model that ships
            with jaxinfer.
        revision: of a Hub id.
        dtype: `bfloat16`, `float16` or `float32`; of weights, activations and cache.
        max_model_len: longest sequence in tokens; None: the model's limit, or what memory allows.
        max_num_seqs: sequences that run at once.
        gpu_memory_utilization: share of the GPU's memory to take. JAX decides it when it starts:
            too late if it has run something before; then the log says so.
        kv_cache_bytes: size of the KV cache; None: what is left.
        seed: draws the seeds of requests that bring none.
        invariant: a request's tokens do not depend on what it is batched with (ADR 003).
        tensor_parallel_size: 1; more is not supported yet.
        page_size: tokens a page of the cache.
        max_chunk: most prompt tokens a step; longer prompts are prefilled in chunks.
        max_steps: most decode steps in one dispatch: more is faster, but tokens come in larger
            groups.
        max_waiting: queue bound; more requests at once raise QueueFull.
        policy: `continuous` fills rows as they become free; `static` runs whole batches.
        compilation_cache: directory for compiled programs; None: under the user's cache
            directory; "": none.

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
        seed: int = 0,
        invariant: bool = True,
        tensor_parallel_size: int = 1,
        page_size: int = 64,
        max_chunk: int = 2048,
        max_steps: int = 8,
        max_waiting: int = 1_000_000,
        policy: Literal["continuous", "static"] = "continuous",
        compilation_cache: str | None = None,
    ) -> None:
        from jaxinfer.hub import resolve_model
        from jaxinfer.models.families import read_config
        from jaxinfer.tokenizer import load_tokenizer

        options = EngineOptions(
            dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization, kv_cache_bytes=kv_cache_bytes,
            seed=seed, invariant=invariant, tensor_parallel_size=tensor_parallel_size,
            page_size=page_size, max_chunk=max_chunk, max_steps=max_steps,
            max_waiting=max_waiting, policy=policy, compilation_cache=compilation_cache,
        )  # fmt: skip
        directory = resolve_model(str(model), revision)
        config = read_config(directory)
        _prepare_backend(options)
        plan = _plan(config, options, loaded=False)
        tokenizer = load_tokenizer(directory)
        params = _load(directory, config, jnp.dtype(dtype))
        self._start(params, config, plan, tokenizer, options)

    @classmethod
    def from_params(
        cls,
        params: Params,
        config: ModelConfig,
        *,
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> Self:
        """An LLM over weights that are in memory already (a tree of `models.weights.declare`).

        Takes the options of `LLM`. The weights' dtype must be `dtype`.

        Raises:
            CheckpointError: `params` is not the tree of `config` and `dtype`; lists what differs.
            CapacityError, ValueError: as `LLM`.
        """
        chosen = EngineOptions(**options)
        _check_params(params, config, jnp.dtype(chosen.dtype))
        _prepare_backend(chosen)
        self = cls.__new__(cls)
        plan = _plan(config, chosen, loaded=True)
        self._start(jax.device_put(params), config, plan, tokenizer, chosen)
        return self

    def _start(
        self,
        params: Params,
        config: ModelConfig,
        plan: MemoryPlan,
        tokenizer: Tokenizer | None,
        options: EngineOptions,
    ) -> None:
        logger.info("%s", plan)
        self.config, self.memory_plan, self.tokenizer = config, plan, tokenizer
        self._options = options
        self._seeds = random.Random(options.seed)
        self._ids = itertools.count()
        self._owners: dict[int, tuple[Request, Sample]] = {}
        limits = BatcherConfig(
            num_pages=plan.num_pages,
            page_size=plan.page_size,
            max_num_seqs=options.max_num_seqs,
            max_model_len=plan.max_model_len,
            max_chunk=options.max_chunk,
            max_steps=options.max_steps,
            max_waiting=options.max_waiting,
            policy=options.policy,
        )
        self._engine: Engine | None = Engine(
            params, config, limits, dtype=jnp.dtype(options.dtype), invariant=options.invariant
        )

    # -- life -------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees the device's memory. Nothing can be generated afterwards."""
        self._fail_all(JaxinferError("the LLM was closed"))
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine underneath.

        Raises:
            JaxinferError: the LLM has been closed.
        """
        if self._engine is None:
            raise JaxinferError("this LLM is closed")
        return self._engine

    # -- generation -------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[RequestOutput]:
        """Completes prompts; results in the order of the prompts.

        Args:
            prompts: texts or lists of token ids; one alone is a list of one.
            params: for all prompts, or one for each.
            on_error: `raise` refuses the whole call for one bad request, before any work;
                `return` serves the others and gives the bad one's error in `RequestOutput.error`.

        Raises:
            InvalidRequest, QueueFull.
        """
        return self._complete(_as_list(prompts), params, on_error, self._encode)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Completes one prompt, yielding what is new as it comes; the last Delta has the result.

        The request is checked at once; it runs while the iterator is read. Closing the iterator
        cancels it.
        """
        request = self._prepare(prompt, SamplingParams() if params is None else params, 0)
        request.deltas = deque()
        return self._stream(request, request.deltas)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, through the model's chat template."""
        several = _listed(messages, "messages")
        if len(several) and isinstance(several[0], Mapping):
            several = [several]
        return self._complete(several, params, on_error, self.chat_tokens)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the model's answer."""
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: give token ids", field="messages")
        return self.tokenizer.apply_chat_template(messages)

    def logprobs(
        self, sequences: Prompt | Sequence[Prompt], *, top: int = 0
    ) -> list[TokenLogprobs]:
        """Log-probability of every token of each sequence after its first, given those before.

        Args:
            sequences: texts or lists of token ids.
            top: how many of the likeliest tokens to return at each position.

        Raises:
            InvalidRequest, QueueFull.
        """
        if not isinstance(top, int | np.integer) or not 0 <= top <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(
                f"{top!r} is not an integer from 0 to {MAX_TOP_LOGPROBS}", field="top"
            )
        params = SamplingParams(temperature=0.0, prompt_logprobs=int(top))
        requests = [
            self._prepare(sequence, params, index, generate=False)
            for index, sequence in enumerate(_as_list(sequences))
        ]
        self._run(requests)
        return [_token_logprobs(request, top) for request in requests]

    # -- inside -----------------------------------------------------------------------------

    def _complete(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        on_error: Literal["raise", "return"],
        encode: Encode,
    ) -> list[RequestOutput]:
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'return'")
        each = _one_each(params, len(prompts))
        requests: list[Request | RequestOutput] = []
        for index, (prompt, wanted) in enumerate(zip(prompts, each, strict=True)):
            try:
                requests.append(self._prepare(prompt, wanted, index, encode=encode))
            except InvalidRequest as error:
                if on_error == "raise":
                    raise
                requests.append(_refused(prompt, error, next(self._ids)))
        self._run([r for r in requests if isinstance(r, Request)])
        return [r if isinstance(r, RequestOutput) else finish(r, self.tokenizer) for r in requests]

    def _encode(self, prompt: Any) -> Any:
        """Token ids of text; what is not text is taken for token ids, and checked later."""
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: give token ids")
        return self.tokenizer.encode(prompt)

    def _prepare(
        self,
        prompt: Any,
        params: SamplingParams,
        index: int,
        *,
        encode: Encode | None = None,
        generate: bool = True,
    ) -> Request:
        """Checks a request and tokenises it; touches nothing else."""
        validate(params, index=index, vocab_size=self.config.vocab_size)
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
        )

    def _submit(self, requests: Sequence[Request]) -> None:
        wanted = sum(len(r.samples) for r in requests)
        if self.engine.waiting + wanted > self._options.max_waiting:
            raise QueueFull(
                f"{wanted} sequences do not fit in the queue: {self.engine.waiting} of "
                f"{self._options.max_waiting} wait already"
            )
        pairs = [(request, sample) for request in requests for sample in request.samples]
        ids = self.engine.submit([s for request in requests for s in _sequences(request)])
        for sequence, (request, sample) in zip(ids, pairs, strict=True):
            sample.sequence = sequence
            self._owners[sequence] = (request, sample)

    def _run(self, requests: Sequence[Request]) -> None:
        """Runs requests to their end."""
        try:
            self._submit(requests)
            for request in requests:  # each turn of the engine serves them all
                self._wait(request)
        finally:
            self._cancel(requests)

    def _wait(self, request: Request) -> None:
        while not request.finished:
            if request.failed:
                raise request.failed
            self._pump()

    def _stream(self, request: Request, deltas: deque[Delta]) -> Iterator[Delta]:
        try:
            self._submit([request])
            while True:
                while deltas:
                    yield deltas.popleft()
                if request.failed:
                    raise request.failed
                if request.finished:
                    return
                self._pump()
        finally:
            self._cancel([request])

    def _pump(self) -> None:
        """One turn of the engine, its news given to the requests they belong to."""
        engine = self.engine
        try:
            for update in engine.step():
                owner = self._owners.get(update.id)
                if owner is None:  # given up meanwhile
                    continue
                request, sample = owner
                take(request, sample, update, self.tokenizer)
                if sample.finish_reason:
                    del self._owners[update.id]
                    engine.cancel(update.id)
        except BaseException as error:
            # A step that broke off may have consumed the state it was given, and news half given
            # out are lost: start anew.
            self._fail_all(JaxinferError(f"interrupted by {type(error).__name__}: {error}"))
            engine.reset()
            raise

    def _cancel(self, requests: Sequence[Request]) -> None:
        """Gives up what is left of requests; nothing where they have finished."""
        for sample in (s for request in requests for s in request.samples):
            if sample.sequence is not None and self._owners.pop(sample.sequence, None):
                self.engine.cancel(sample.sequence)

    def _fail_all(self, error: JaxinferError) -> None:
        for request, _ in self._owners.values():
            request.failed = error
        self._owners.clear()


def _prepare_backend(options: EngineOptions) -> None:
    reserve_memory(options.gpu_memory_utilization)
    if options.compilation_cache != "":
        chosen = options.compilation_cache
        use_compilation_cache(default_cache_directory() if chosen is None else Path(chosen))


def _plan(config: ModelConfig, options: EngineOptions, *, loaded: bool) -> MemoryPlan:
    """Divides the memory of the default device; `loaded`: the weights are in it already."""
    if options.max_model_len is not None and options.max_model_len > config.max_position:
        raise ValueError(
            f"max_model_len={options.max_model_len}: this model was made for sequences of up to "
            f"{config.max_position} tokens"
        )
    limit, in_use = device_memory(jax.devices()[0])
    dtype = jnp.dtype(options.dtype)
    weights = count_params(config) * dtype.itemsize
    return plan_memory(
        config,
        dtype=dtype,
        page_size=options.page_size,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        kv_cache_bytes=options.kv_cache_bytes,
        limit=limit,
        in_use=max(0, in_use - weights) if loaded else in_use,
    )


def _load(directory: Path, config: ModelConfig, dtype: Any) -> Params:
    """Weights from disk, with a progress bar where there is someone to see it."""
    from checkpoints import load_params

    # What a checkpoint may hold beside the weights: constants, and the tied matrix once more.
    extra = [r".*rotary_emb\.inv_freq"]
    if config.tie_embeddings:
        extra.append(r"lm_head\.weight")
    with loading_bar(directory.name) as progress:
        return load_params(
            directory, declare(config), dtype=dtype, allowed_extra=extra, progress=progress
        )


def _check_params(params: Params, config: ModelConfig, dtype: Any) -> None:
    """Raises CheckpointError unless `params` is the tree that `config` declares, in `dtype`."""

    def described(tree: Any) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): _describe(leaf)
            for path, leaf in jax.tree.flatten_with_path(tree)[0]
        }

    want, have = described(abstract_params(config, dtype)), described(params)
    problems = [
        f"{name}: {have.get(name, 'missing')}, expected {want.get(name, 'nothing there')}"
        for name in sorted(want.keys() | have.keys())
        if want.get(name) != have.get(name)
    ]
    if problems:
        raise CheckpointError(
            f"params are not those of this config with dtype={str(dtype)!r}:\n  "
            + "\n  ".join(problems)
        )


def _describe(leaf: Any) -> str:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}{list(leaf.shape)}"


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Any]:
    if isinstance(prompts, str):
        return [prompts]
    several = _listed(prompts, "prompt")
    one = len(several) and isinstance(several[0], int | np.integer)
    return [several] if one else several


def _listed(value: Any, field: str) -> Sequence[Any]:
    """`value` as a list of things, if it is one."""
    if isinstance(value, np.ndarray) and value.ndim:
        return list(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidRequest(f"{type(value).__name__} is not a list", field=field)
    return value


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    several = _listed(params, "params")
    if len(several) != count:
        raise InvalidRequest(f"{len(several)} SamplingParams for {count} prompts", field="params")
    return several


def _refused(prompt: Any, error: InvalidRequest, number: int) -> RequestOutput:
    return RequestOutput(
        request_id=str(number),
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=(),
        outputs=(),
        error=error,
    )


def _sequences(request: Request) -> list[EngineSequence]:
    prompt = np.asarray(request.prompt_ids, np.int32)
    return [
        EngineSequence(
            prompt=prompt,
            params=request.params,
            limit=request.limit,
            seed=request.seed,
            sample=sample.index,
            stop_ids=request.stop_ids,
            # The prompt is the same for every sample: one scores it for all.
            score=request.params.prompt_logprobs if sample.index == 0 else None,
        )
        for sample in request.samples
    ]


def _token_logprobs(request: Request, top: int) -> TokenLogprobs:
    scores = merged_scores(request)
    return TokenLogprobs(
        token_ids=request.prompt_ids,
        logprobs=scores.logprob,
        top_ids=scores.top_ids,
        top_logprobs=scores.top_logprobs,
    )
