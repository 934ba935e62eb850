"""Compares a checkpoint's computation here with that of Hugging Face transformers on PyTorch.

PyTorch runs first and is unloaded before JAX starts, so that a GPU holds one model at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jaxinfer.errors import JaxinferError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from jaxinfer.config import ModelConfig
    from jaxinfer.tokenizer import Tokenizer

Dtype = Literal["bfloat16", "float16", "float32"]

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n    ",
    "In 1905 Albert Einstein published four papers. The first explained the photoelectric effect "
    "by light that comes in quanta; the second showed from the motion of particles in a fluid that "
    "atoms exist; the third introduced special relativity, and the fourth",
)
PROMPT_LENGTHS = (1, 20, 100)  # of random tokens, for a model without a tokenizer
COMPILED_LENGTH = 64  # prompts are padded to multiples of this, so that few lengths are compiled


@dataclass(frozen=True)
class Report:
    """How far jaxinfer is from the reference.

    Attributes:
        model: what was compared.
        dtype, reference_dtype: of the weights and activations here and in the reference.
        num_prompts, num_positions: what was compared; every position counts once.
        layer_error_mean, layer_error_max: for each layer, the norm of the difference of the
            residual streams after it over the norm of the reference's; over positions.
        kl_mean, kl_max: KL(reference || jaxinfer) of the next token, in nats; over positions.
        top1_agreement: share of positions at which both find the same token likeliest.
        greedy_tokens: number of tokens that each prompt was continued by, greedily, by the
            engine here and by the reference.
        greedy_agreement: mean share of those before the first that differs.
        greedy_identical: number of prompts whose continuations are the same.
    """

    model: str
    dtype: Dtype
    reference_dtype: Dtype
    num_prompts: int
    num_positions: int
    layer_error_mean: tuple[float, ...]
    layer_error_max: tuple[float, ...]
    kl_mean: float
    kl_max: float
    top1_agreement: float
    greedy_tokens: int
    greedy_agreement: float
    greedy_identical: int


class Trace(NamedTuple):
    """What one engine computed for one prompt of T tokens; float32.

    `resid` [L, T, E]: after each layer. `logits` [T, V]. `greedy`: the tokens that follow.
    """

    resid: np.ndarray
    logits: np.ndarray
    greedy: tuple[int, ...]


def verify(
    model: str | Path,
    *,
    revision: str | None = None,
    prompts: Sequence[str | Sequence[int]] | None = None,
    dtype: Dtype = "bfloat16",
    reference_dtype: Dtype | None = None,
    greedy_tokens: int = 32,
) -> Report:
    """Runs `model` here and in transformers, layer by layer and as an engine, and compares.

    Args:
        model: as for `LLM`.
        revision: of a Hub id.
        prompts: texts or token ids. None: a few short texts, or random tokens where the model has
            no tokenizer. The logits of all of them are kept in host memory.
        dtype: of weights and activations here.
        reference_dtype: of those in transformers; None: `dtype`.
        greedy_tokens: how many tokens to continue each prompt by.

    Raises:
        ValueError: `greedy_tokens` is below 1, or `prompts` is empty.
        JaxinferError: PyTorch is not installed.
        InvalidRequest: a prompt is empty, too long or not of this model's vocabulary.
        UnsupportedModel, CheckpointError, CapacityError: as for `LLM`.
    """
    from jaxinfer.hub import resolve_model
    from jaxinfer.models.families import read_config
    from jaxinfer.tokenizer import load_tokenizer

    if greedy_tokens < 1 or (prompts is not None and not prompts):
        raise ValueError(
            f"greedy_tokens={greedy_tokens}, prompts={prompts!r}: at least one of each is needed"
        )
    _import_torch()
    directory = resolve_model(model, revision)
    config = read_config(directory)
    longest = config.max_position - greedy_tokens
    sequences = _tokenise(prompts, load_tokenizer(directory), config, longest)
    theirs = run_reference(directory, sequences, reference_dtype or dtype, greedy_tokens)
    ours = run_jaxinfer(directory, config, sequences, dtype, greedy_tokens)
    return compare(str(model), ours, theirs, dtype, reference_dtype or dtype)


def _import_torch() -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise JaxinferError(
            "verify compares with transformers on PyTorch, which is not installed: "
            "install torch beside jaxinfer"
        ) from None
    return torch


def _tokenise(
    prompts: Sequence[str | Sequence[int]] | None,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    longest: int,
) -> list[list[int]]:
    from jaxinfer.errors import InvalidRequest
    from jaxinfer.validation import validate_prompt

    if prompts is None and tokenizer is None:
        random = np.random.default_rng(0)
        lengths = [min(n, longest) for n in PROMPT_LENGTHS]
        return [random.integers(config.vocab_size, size=n).tolist() for n in lengths]
    sequences = []
    for index, prompt in enumerate(PROMPTS if prompts is None else prompts):
        if isinstance(prompt, str) and tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: give token ids", index=index)
        ids = tokenizer.encode(prompt) if tokenizer and isinstance(prompt, str) else prompt
        checked = validate_prompt(
            ids, index=index, vocab_size=config.vocab_size, max_prompt=longest
        )
        sequences.append(list(checked))
    return sequences


def run_reference(
    directory: Path, sequences: Sequence[Sequence[int]], dtype: Dtype, greedy_tokens: int
) -> list[Trace]:
    """transformers' `Trace` of each prompt, by itself, with plain (`eager`) attention."""
    torch = _import_torch()
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
    )
    cuda = torch.cuda.is_available()
    model = model.to("cuda" if cuda else "cpu").eval()
    with torch.no_grad():
        traces = [_trace(torch, model, sequence, greedy_tokens) for sequence in sequences]
    del model
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return traces


def _trace(torch: Any, model: Any, sequence: Sequence[int], greedy_tokens: int) -> Trace:
    resid: list[np.ndarray] = []

    def keep(_module: Any, _inputs: Any, out: Any) -> None:
        resid.append(out[0].float().cpu().numpy())

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    out = model(torch.tensor([sequence], device=model.device), use_cache=True)
    for hook in hooks:
        hook.remove()
    logits = out.logits[0].float().cpu().numpy()
    greedy: list[int] = []
    while len(greedy) < greedy_tokens:
        token = out.logits[:, -1:].argmax(-1)
        greedy.append(int(token))
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return Trace(np.stack(resid), logits, tuple(greedy))


def run_jaxinfer(
    directory: Path,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    dtype: Dtype,
    greedy_tokens: int,
) -> list[Trace]:
    """jaxinfer's `Trace` of each prompt: `decoder.apply`, and the engine for `greedy`."""
    import jax
    import jax.numpy as jnp

    from jaxinfer.backend import reserve_memory
    from jaxinfer.llm import LLM
    from jaxinfer.loading import load_weights
    from jaxinfer.models import decoder
    from jaxinfer.models.sites import layer_site
    from jaxinfer.types import SamplingParams

    reserve_memory(0.9)
    params = load_weights(directory, config, jnp.dtype(dtype))
    residuals = tuple(layer_site(i, "resid") for i in range(config.num_layers))
    run = jax.jit(lambda params, tokens: decoder.apply(params, config, tokens, capture=residuals))
    found = []
    for sequence in sequences:
        padded = np.zeros((1, -(-len(sequence) // COMPILED_LENGTH) * COMPILED_LENGTH), np.int32)
        padded[0, : len(sequence)] = sequence
        logits, captured = run(params, padded)
        layers = [np.asarray(captured[site][0, : len(sequence)]) for site in residuals]
        resid = np.stack(layers).astype(np.float32)
        found.append(Trace(resid, np.asarray(logits[0, : len(sequence)]), ()))
    with LLM.from_params(
        params,
        config,
        dtype=dtype,
        max_num_seqs=len(sequences),
        max_model_len=max(map(len, sequences)) + greedy_tokens,
    ) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=greedy_tokens, ignore_eos=True)
        outputs = llm.generate(sequences, greedy)
    return [
        trace._replace(greedy=output.outputs[0].token_ids)
        for trace, output in zip(found, outputs, strict=True)
    ]


def compare(
    model: str,
    ours: Sequence[Trace],
    theirs: Sequence[Trace],
    dtype: Dtype,
    reference_dtype: Dtype,
) -> Report:
    """The `Report` of two engines' traces of the same prompts."""
    layers = np.concatenate(
        [
            np.linalg.norm(a.resid - b.resid, axis=-1) / np.linalg.norm(b.resid, axis=-1)
            for a, b in zip(ours, theirs, strict=True)
        ],
        axis=1,
    )  # [L, positions]
    kl = np.concatenate([_kl(b.logits, a.logits) for a, b in zip(ours, theirs, strict=True)])
    top1 = np.concatenate(
        [a.logits.argmax(-1) == b.logits.argmax(-1) for a, b in zip(ours, theirs, strict=True)]
    )
    steps = len(theirs[0].greedy)
    agreed = [_common_prefix(a.greedy, b.greedy) for a, b in zip(ours, theirs, strict=True)]
    return Report(
        model=model,
        dtype=dtype,
        reference_dtype=reference_dtype,
        num_prompts=len(theirs),
        num_positions=len(kl),
        layer_error_mean=tuple(layers.mean(1).tolist()),
        layer_error_max=tuple(layers.max(1).tolist()),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1_agreement=float(top1.mean()),
        greedy_tokens=steps,
        greedy_agreement=float(np.mean(agreed)) / max(steps, 1),
        greedy_identical=sum(n == steps for n in agreed),
    )


def _kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats at each position, in float64."""

    def log_softmax(row: np.ndarray) -> np.ndarray:
        shifted = row.astype(np.float64) - row.max()
        return shifted - np.log(np.exp(shifted).sum())

    # Row by row: a prompt's worth of a large vocabulary in float64 is gigabytes.
    result = np.empty(len(p_logits))
    for i, (p_row, q_row) in enumerate(zip(p_logits, q_logits, strict=True)):
        p, q = log_softmax(p_row), log_softmax(q_row)
        result[i] = np.exp(p) @ (p - q)
    return result


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            return i
    return len(a)


def render(report: Report) -> RenderableType:
    """A title and two tables: the figures as a whole, and the error after each layer."""
    from rich.console import Group
    from rich.table import Table

    r = report
    title = f"{r.model}: jaxinfer {r.dtype} against transformers {r.reference_dtype}"
    whole = Table("figure", "value")
    whole.add_row("prompts, positions", f"{r.num_prompts}, {r.num_positions}")
    whole.add_row("KL, mean", f"{r.kl_mean:.3g} nats")
    whole.add_row("KL, max", f"{r.kl_max:.3g} nats")
    whole.add_row("top-1 agreement", f"{r.top1_agreement:.2%}")
    whole.add_row(
        f"greedy agreement, {r.greedy_tokens} tokens",
        f"{r.greedy_agreement:.2%} ({r.greedy_identical} of {r.num_prompts} prompts identical)",
    )
    layers = Table("after layer", "error of the residual stream, mean", "max")
    for i, (mean, worst) in enumerate(zip(r.layer_error_mean, r.layer_error_max, strict=True)):
        layers.add_row(str(i), f"{mean:.3g}", f"{worst:.3g}")
    return Group(title, whole, layers)
