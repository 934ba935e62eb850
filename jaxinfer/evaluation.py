"""The lm-evaluation-harness on an `LLM`, in this process: its model `jaxinfer`.

Needs lm-eval (`pip install jaxinfer[eval]`), which needs no PyTorch. Importing this module makes
`jaxinfer` known to lm-eval, so `python -m jaxinfer.evaluation` is lm-eval's own command line with
it:

    python -m jaxinfer.evaluation run --model jaxinfer --model_args pretrained=demo --tasks ...
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

from jaxinfer.errors import InvalidRequest
from jaxinfer.eval_arguments import (
    Ends,
    Scored,
    fit_pair,
    fit_prompt,
    sampling_params,
    score,
    special_tokens,
    split_options,
)
from jaxinfer.llm import LLM

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
except ModuleNotFoundError as error:
    raise ImportError(
        f"jaxinfer.evaluation needs lm-eval ({error}): pip install jaxinfer[eval]"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EncodedPair = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("jaxinfer")
class JaxinferLM(TemplateLM):
    """An `LLM` as lm-eval sees a model. All requests of a kind are one call: the engine batches.

    What is too long loses the beginning of its context, as in lm-eval's Hugging Face model, and
    the log says so once a call. Sequences have `max_model_len` tokens here, the last scored one
    included: one less than there.

    Args:
        llm: what runs the requests. It stays the caller's, who closes it.
        prefix_token_id: stands before texts without context; None: the tokenizer's BOS, or EOS.
        max_gen_toks: tokens to generate where a task does not say.
        chat_template_args: given to the chat template, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: the LLM has no tokenizer, or an argument is out of range.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        chat_template_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if llm.tokenizer is None:
            raise ValueError(
                "this LLM has no tokenizer, and lm-eval's tasks are texts: add the tokenizer's "
                "files to the model's directory, or give LLM.from_params a tokenizer"
            )
        vocab_size = llm.config.vocab_size
        if prefix_token_id is not None and prefix_token_id not in range(vocab_size):
            raise ValueError(
                f"prefix_token_id={prefix_token_id!r}: expected an id from 0 to {vocab_size - 1}"
            )
        if not isinstance(max_gen_toks, int) or max_gen_toks < 1:
            raise ValueError(f"max_gen_toks={max_gen_toks!r}: expected an integer of at least 1")
        self.llm = llm
        self.tokenizer: PreTrainedTokenizerBase = llm.tokenizer.backend
        self._prefix = prefix_token_id
        self._chat = dict(chat_template_args or {})
        eos, special = self.tokenizer.eos_token, special_tokens(self.tokenizer)
        self._ends = Ends(None if eos is None else str(eos), special, max_gen_toks)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Self:
        """As `create_from_arg_obj`, of `pretrained=demo,dtype=float32`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Loads the model `pretrained`; other arguments are those of `LLM` and of this class.

        Args:
            arg_dict: the user's model arguments.
            additional_config: `batch_size`, `max_batch_size` and `device`, which lm-eval gives
                unasked. They have no effect: the engine batches, and JAX chooses the device.

        Raises:
            ValueError: `pretrained` is missing, or an argument is not known.
            CheckpointError, UnsupportedModel, CapacityError: as `LLM`.
        """
        unused = {n: value for n, value in (additional_config or {}).items() if value is not None}
        if unused:
            logger.info("no effect on jaxinfer: %s", unused)
        options, own = split_options(arg_dict)
        return cls(LLM(**options), **own)

    # -- tokens ---------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Longest sequence, in tokens."""
        return self.llm.memory_plan.max_model_len

    @property
    def max_gen_toks(self) -> int:
        return self._ends.max_tokens

    @property
    def eot_token_id(self) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.tokenizer.eos_token_id  # type: ignore[return-value]

    @property
    def prefix_token_id(self) -> int:
        """Stands before texts without context.

        Raises:
            ValueError: none was given, and the tokenizer has neither BOS nor EOS.
        """
        known = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in known if token is not None), None)
        if not isinstance(found, int):
            raise ValueError("the tokenizer has neither BOS nor EOS: give prefix_token_id")
        return found

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids. None adds special tokens, unless `string` begins with its BOS (a template)."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(str(bos)))
        encoded = self.tokenizer(
            string, add_special_tokens=add_special_tokens, verbose=False, **kwargs
        )
        return list(encoded["input_ids"])  # type: ignore[arg-type]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, up to where the assistant's next, or half given, message begins.

        Raises:
            InvalidRequest: there is no chat template, or it refuses these messages.
        """
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise InvalidRequest(
                "this model's tokenizer has no chat template; leave out apply_chat_template",
                field="messages",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._chat,
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        return str(text)

    # -- requests -------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        """Log-probability of each continuation, and whether greedy decoding would give it.

        Raises:
            InvalidRequest: a continuation is empty, or longer than `max_length` - 1 tokens.
        """
        for index, (_context, continuation) in enumerate(arguments(requests)):
            if not continuation:
                raise InvalidRequest("the continuation is empty", index=index, field="continuation")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[EncodedPair], **_: Any) -> list[Scored]:
        """Scores pairs of token ids; the same sequence is computed once."""
        longest = self.max_length
        sequences = [
            fit_pair(context, continuation, index, longest)
            for index, (_text, context, continuation) in enumerate(requests)
        ]
        self._note_truncated([len(context) + len(c) for _text, context, c in requests], sequences)
        distinct = list(dict.fromkeys(sequences))
        results = dict(zip(distinct, self.llm.logprobs(distinct, top=1), strict=True))
        scores = [
            score(results[sequence], len(continuation))
            for sequence, (_text, _context, continuation) in zip(sequences, requests, strict=True)
        ]
        for (text, _context, _continuation), one in zip(requests, scores, strict=True):
            if text is not None:  # a window of `loglikelihood_rolling` is no request
                self.cache_hook.add_partial("loglikelihood", text, one)
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts; long ones in windows, each token given all it can be."""
        windows: list[EncodedPair] = []
        owners: list[int] = []
        for index, (text,) in enumerate(arguments(requests)):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in rolling]
            windows += [(None, *pair) for pair in pairs]
            owners += [index] * len(pairs)
        totals = [0.0] * len(requests)
        for index, (logprob, _greedy) in zip(
            owners, self._loglikelihood_tokens(windows), strict=True
        ):
            totals[index] += logprob
        for asked, total in zip(arguments(requests), totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", asked, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of its stop strings, which is not part of the text.

        Raises:
            InvalidRequest: a generation argument that is not known, or out of range.
        """
        asked = arguments(requests)
        params = [sampling_params(kwargs, i, self._ends) for i, (_, kwargs) in enumerate(asked)]
        full = [self.tok_encode(context) or [self.prefix_token_id] for context, _ in asked]
        prompts = [
            fit_prompt(prompt, one, index, self.max_length)
            for index, (prompt, one) in enumerate(zip(full, params, strict=True))
        ]
        self._note_truncated([len(prompt) for prompt in full], prompts)
        texts = [output.outputs[0].text for output in self.llm.generate(prompts, params)]
        for one, text in zip(asked, texts, strict=True):
            self.cache_hook.add_partial("generate_until", one, text)
        return texts

    def _note_truncated(self, lengths: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        cut = [n for n, tokens in zip(lengths, kept, strict=True) if n > len(tokens)]
        if cut:
            logger.warning(
                "%d of %d requests do not fit in %d tokens (the longest has %d): the beginnings of "
                "their contexts are left out",
                len(cut), len(lengths), self.max_length, max(cut),
            )  # fmt: skip


def arguments(requests: Sequence[Instance]) -> list[tuple[Any, ...]]:
    """What each request asks: (context, continuation), (text,) or (context, keywords)."""
    return [cast("tuple[Any, ...]", request.args) for request in requests]


def evaluate(llm: LLM, tasks: Sequence[Any], **options: Any) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` on `llm`; `lm_eval.utils.make_table` prints what it returns.

    Where a metric's error is found by bootstrapping (`perplexity`, `f1`, `bleu`), lm-eval forks
    this process, in which JAX runs: set `DISABLE_MULTIPROC=1` for it not to.

    Args:
        llm: what runs them.
        tasks: names, dicts or objects of tasks.
        options: those of `simple_evaluate`, such as `limit`, `num_fewshot`, or a `task_manager` of
            tasks in a folder: `TaskManager(include_path=folder, include_defaults=False)`.
    """
    from lm_eval import simple_evaluate

    return simple_evaluate(model=JaxinferLM(llm), tasks=list(tasks), **options)  # type: ignore


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
