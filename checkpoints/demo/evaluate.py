"""Measures the demo pair on the held-out files.

    python -m checkpoints.demo.evaluate --data DIR --out DIR

`--data` is what `train prepare` wrote, `--out` what `train fit` wrote; `evaluation.json` goes
there. Runs on any device.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import lzma
import math
import random
import string
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.load import load_params
from checkpoints.write import write_json
from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import Params
from jaxinfer.models.families import read_config
from jaxinfer.models.weights import declare
from jaxinfer.training import lm

FUNCTIONS = 200
MAX_TOKENS = 256
TEMPERATURE = 0.7
PROTOCOL = (
    f"{FUNCTIONS} headers 'def name(arguments):' that fit on one line, drawn without replacement "
    f"(seed 0) from the functions and methods of the held-out files, decorators left out and the "
    f"header moved to column 0. Prompt: the header and a newline. Temperature {TEMPERATURE}, no "
    f"truncation, seed i for prompt i, at most {MAX_TOKENS} tokens. The function ends before the "
    "first line that is indented less than its body's first line; one that has not ended at the "
    "limit counts as it stands. Accepted: ast.parse raises nothing."
)


# --- compression --------------------------------------------------------------------------------


def bits_per_byte(
    params: Params,
    config: ModelConfig,
    tokens: np.ndarray,
    num_bytes: int,
    *,
    attention: lm.Attention = None,
) -> float:
    """Bits that the model needs for a text of `num_bytes`, divided by them.

    Windows of the model's whole context, half of which overlap: every token but those at the
    start of the text has at least half a context before it.
    """
    length = config.max_position
    nats = lm.score(
        params, config, tokens, length=length, stride=length // 2, batch=8, attention=attention
    )
    return float(nats.sum(dtype=np.float64)) / math.log(2) / num_bytes


def xz_bits_per_byte(text: bytes, prefix: bytes = b"") -> float:
    """Bits a byte that `xz -9e` adds for `text` after `prefix`."""
    extra = len(_xz(prefix + text)) - (len(_xz(prefix)) if prefix else 0)
    return 8 * extra / len(text)


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


# --- draft against target -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("target_config", "draft_config", "attention"))
def _agreement(
    target: Params,
    draft: Params,
    tokens: jax.Array,
    target_config: ModelConfig,
    draft_config: ModelConfig,
    attention: lm.Attention,
) -> tuple[jax.Array, jax.Array]:
    p = lm.log_probs(target, target_config, tokens, attention)
    q = lm.log_probs(draft, draft_config, tokens, attention)
    same = p.argmax(-1) == q.argmax(-1)
    return same.mean(), jnp.exp(jnp.minimum(p, q)).sum(-1).mean()


def acceptance(
    target: Params,
    target_config: ModelConfig,
    draft: Params,
    draft_config: ModelConfig,
    tokens: np.ndarray,
    *,
    length: int = 1024,
    batch: int = 8,
    attention: lm.Attention = None,
) -> dict[str, float]:
    """How often the draft's token is the target's, given the text so far, on whole windows.

    Returns:
        `greedy`: share of positions at which both models find the same token likeliest;
        `sampled`: Σ min(p, q), what rejection sampling accepts at temperature 1 (Leviathan et al.
        2023).
    """
    windows = tokens[: len(tokens) // (batch * length) * batch * length].reshape(-1, batch, length)
    found = [
        _agreement(target, draft, jnp.asarray(w, jnp.int32), target_config, draft_config, attention)
        for w in windows
    ]
    greedy, sampled = np.mean(np.asarray(found), axis=0)
    return {"greedy": float(greedy), "sampled": float(sampled), "tokens": windows.size}


# --- generated functions ------------------------------------------------------------------------


def headers(sources: Sequence[str], count: int) -> list[str]:
    """`count` prompts, as `PROTOCOL` says."""
    found = set()
    for source in sources:
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                line = lines[node.lineno - 1].strip()
                if line.startswith("def ") and line.endswith("):"):
                    found.add(line + "\n")
    return random.Random(0).sample(sorted(found), count)


def parses(source: str) -> bool:
    """Whether `ast.parse` accepts it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def body(text: str) -> tuple[str, bool]:
    """`text` up to the first line indented less than its first one, and whether there was one."""
    lines = text.split("\n")
    indents = [len(line) - len(line.lstrip()) if line.strip() else None for line in lines]
    first = next((n for n in indents if n is not None), 0)
    for at, indent in enumerate(indents):
        if indent is not None and indent < first:
            return "\n".join(lines[:at]), True
    return text, False


def sample_functions(directory: Path, prompts: Sequence[str], dtype: Any) -> dict[str, Any]:
    """Generates a function from each prompt, and counts those that parse."""
    from jaxinfer import LLM, SamplingParams

    column_0 = [f"\n{c}" for c in string.printable if not c.isspace()]
    params = [
        SamplingParams(temperature=TEMPERATURE, seed=i, max_tokens=MAX_TOKENS, stop=column_0)
        for i in range(len(prompts))
    ]
    with LLM(directory, dtype=dtype) as llm:
        outputs = [r.outputs[0] for r in llm.generate(prompts, params)]
    bodies = [body(o.text) for o in outputs]
    functions = [p + text + "\n" for p, (text, _) in zip(prompts, bodies, strict=True)]
    accepted = [parses(f) for f in functions]
    ended = [cut or o.finish_reason == "stop" for o, (_, cut) in zip(outputs, bodies, strict=True)]
    return {
        "accepted": sum(accepted) / len(accepted),
        "ended": sum(ended) / len(ended),
        "accepted_of_ended": sum(a and e for a, e in zip(accepted, ended, strict=True))
        / sum(ended),
        "examples": functions[:3],
    }


# --- command line -------------------------------------------------------------------------------


def evaluate(data: Path, out: Path) -> dict[str, Any]:
    """Everything above, for the pair under `out`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    train, tokens = np.load(data / "train.npy"), np.load(data / "held_out.npy")
    sources = split_files(tokenizer, tokens)
    text, prefix = ("".join(s).encode() for s in (sources, split_files(tokenizer, train)))
    gpu = jax.default_backend() == "gpu"
    attention, dtype = ("cudnn", "bfloat16") if gpu else ("xla", "float32")
    prompts = headers(sources, FUNCTIONS)
    report: dict[str, Any] = {
        "held_out_bytes": len(text),
        "held_out_tokens": len(tokens),
        "xz_bits_per_byte": xz_bits_per_byte(text),
        "xz_after_training_text_bits_per_byte": xz_bits_per_byte(text, prefix),
        "functions_protocol": PROTOCOL,
        "device": jax.devices()[0].device_kind,
        "dtype": dtype,
    }
    models = {}
    for role in ("target", "draft"):
        config = read_config(out / role)
        params = load_params(out / role, declare(config), dtype=jnp.dtype(dtype))
        models[role] = params, config
        report[role] = {
            "bits_per_byte": bits_per_byte(params, config, tokens, len(text), attention=attention),
            "functions": sample_functions(out / role, prompts, dtype),
        }
    (target, target_config), (draft, draft_config) = models["target"], models["draft"]
    report["acceptance"] = acceptance(
        target, target_config, draft, draft_config, tokens, attention=attention
    )
    return report


def split_files(tokenizer: Any, tokens: np.ndarray) -> list[str]:
    """The texts that `tokenizer.encode_files` joined."""
    ends = np.flatnonzero(tokens == tokens[0])
    parts = [tokens[a + 1 : b].tolist() for a, b in itertools.pairwise(ends)]
    return tokenizer.decode_batch(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the demo pair on the held-out files.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    report = evaluate(args.data, args.out)
    write_json(args.out / "evaluation.json", report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
