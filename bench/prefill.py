"""Prefill of long prompts through the engine, on a named shape with random weights.

    python -m bench.prefill --shape llama-3.1-8b
    python -m bench.prefill --tokens 2048,4096,8192 --kinds invariant,free

8 prompts of 4095 tokens at once, one token each: `prefill.8b.8x4095.tok_s` with the engine's
defaults, `.free` with `invariant=False`, and `.tN` with so many tokens a step. The settings start
and compile at once and are timed in turns, each with 5 GB of KV cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import ceilings, decode, parts, record, shapes
from bench.parts import Part, emit
from bench.record import Record

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

PROMPTS, PROMPT, REPEATS = 8, 4095, 5
DEFAULT = 2048  # tokens of a step
KINDS = {"invariant": True, "free": False}


def seconds(llm: LLM, seed: int) -> float:
    """Of one token after each of several long prompts."""
    from jaxinfer import SamplingParams

    prompts = decode.random_prompts(50 + seed, PROMPTS, PROMPT, llm.config.vocab_size)
    began = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    return time.perf_counter() - began


def rate(llm: LLM, repeats: int) -> tuple[float, dict[str, Any]]:
    """Tokens a second, and what is told beside it. Programs must have been compiled."""
    times = [seconds(llm, seed) for seed in range(1, 1 + repeats)]
    detail = {"prompts": PROMPTS, "tokens": PROMPT, "seconds_of_each_repeat": times}
    return PROMPTS * PROMPT / statistics.median(times), detail


def name_of(shape: str, kind: str, tokens: int) -> str:
    words = ["prefill", shapes.short(shape), f"{PROMPTS}x{PROMPT}"]
    words += [kind] * (kind != "invariant") + [f"t{tokens}"] * (tokens != DEFAULT)
    return ".".join((*words, "tok_s"))


def measure(shape: str, kind: str, tokens: int) -> Iterator[Record]:
    from jaxinfer import LLM

    options: dict[str, Any] = {"invariant": KINDS[kind], "max_num_batched_tokens": tokens}
    options |= {"max_num_seqs": PROMPTS, "max_model_len": PROMPT + 1, "kv_cache_bytes": 5 << 30}
    llm = LLM.from_config(shapes.model_config(shape), prefix_caching=False, **options)
    seconds(llm, 0)
    with parts.turn():
        found, detail = rate(llm, REPEATS)
    yield Record(name_of(shape, kind, tokens), found, "tok/s", detail | {"options": options})


def make_parts(shape: str, kinds: list[str], tokens: list[int]) -> list[Part | list[Part]]:
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    made = [
        Part(
            name_of(shape, kind, n), "bench.prefill",
            ("--part", "--shape", shape, "--kinds", kind, "--tokens", str(n)), 300, env,
        )
        for kind, n in product(kinds, tokens)
    ]  # fmt: skip
    return [*ceilings.make_parts(tiny=False)[:1], made]


def _kinds(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(KINDS):
        raise argparse.ArgumentTypeError(f"{sorted(unknown)}: expected of {sorted(KINDS)}")
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description="prefill speed of jaxinfer")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--kinds", type=_kinds, default=list(KINDS))
    parser.add_argument("--tokens", type=lambda text: json.loads(f"[{text}]"), default=[DEFAULT])
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        for found in measure(args.shape, args.kinds[0], args.tokens[0]):
            emit(args.records, found)
        return
    made = make_parts(args.shape, args.kinds, args.tokens)
    parts.run_and_print(made, "bench.prefill", args.out)


if __name__ == "__main__":
    main()
