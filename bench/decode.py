"""Decode speed and start time of jaxinfer on a named shape with random weights.

    python -m bench.decode --shape llama-3.1-8b,llama-3.2-1b --batch 1 --context 1024
    python -m bench.decode --shape llama-3.1-8b --batch 1,64 --context 1024

No hub access and no tokenizer: weights are drawn on the device, prompts are random token ids, all
of it through `LLM`. Every shape is two processes: the first starts with an empty compilation cache
(`start.*.cold_s`) and then times decode; the second starts again with that cache filled
(`start.*.warm_s`). Either way the packages' files are in the page cache already. The ceilings are
measured in the same run. Other engines: `bench.compare`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import ceilings, parts, record, shapes
from bench.parts import Part, emit
from bench.record import Record
from bench.timing import LONG, REPEATS, SHORT, step_records

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

START_TOKENS = 16  # of the first request: long enough to need the decode step too


def make_parts(
    names: list[str],
    batches: list[int],
    contexts: list[int],
    cache: str,
    *,
    options: dict[str, Any] | None = None,
    repeats: int = REPEATS,
    warm: bool = True,
    in_pairs: bool = False,
) -> list[Part]:
    """Cold start with decode, then warm start, of each shape.

    Args:
        names: shapes.
        batches, contexts: every pair is timed, or with `in_pairs` the first two, and so on.
        cache: an empty folder for compiled programs, for the life of the parts.
        options: of `LLM`, beside those that the sizes decide.
        repeats: of every timing.
        warm: whether to start a second time.
    """
    made = []
    for name in names:
        env = {
            "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, name),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            # The weights are made before the LLM, which could have reserved the memory itself.
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
        }
        sizes = ("--batch", _join(batches), "--context", _join(contexts))
        sizes += ("--in-pairs",) if in_pairs else ()
        sizes += ("--llm", json.dumps(options or {}), "--repeats", str(repeats))
        args = ("--part", "cold", "--shape", name, *sizes)
        timeout_s = 180 + 60 * len(batches) * len(contexts)
        made.append(Part(f"decode.{shapes.short(name)}", "bench.decode", args, timeout_s, env))
        if warm:
            args = ("--part", "warm", "--shape", name, *sizes)
            made.append(Part(f"start.{shapes.short(name)}.warm", "bench.decode", args, 120, env))
    return made


def random_prompts(seed: int, batch: int, context: int, vocab_size: int) -> list[list[int]]:
    """`batch` prompts of `context` uniformly random token ids."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (batch, context))
    return ids.tolist()


def start_llm(shape: str, context: int, options: dict[str, Any]) -> tuple[LLM, dict[str, float]]:
    """An LLM with random weights, and the seconds that each stage of its start took.

    The stages add up to the time from the start of the process to the first token.
    """
    began = float(os.environ.get(parts.STARTED, time.time()))
    marks = [("", began)]

    def mark(stage: str) -> None:
        marks.append((stage, time.time()))

    import jax
    import jax.numpy as jnp

    from jaxinfer import LLM, SamplingParams

    config = shapes.model_config(shape)
    mark("imports_s")
    parts.check_platform(jax.default_backend())
    mark("backend_s")
    params = shapes.init_params(shape, jnp.bfloat16)
    mark("weights_s")
    llm = LLM.from_params(params, config, **options)
    del params  # quantised ones are packed: these are not needed any more
    mark("engine_s")
    (prompt,) = random_prompts(0, 1, context, config.vocab_size)
    sampling = SamplingParams(temperature=0, max_tokens=START_TOKENS, ignore_eos=True)
    deltas = llm.stream(prompt, sampling)
    first = next(deltas)
    if not first.token_ids:
        raise RuntimeError("the first Delta holds no token")
    mark("first_token_s")
    compiled = llm.engine.compiler.compile_seconds
    for _ in deltas:
        pass
    split = {name: t - before for (_, before), (name, t) in pairwise(marks)}
    split["compile_s"] = compiled
    split["first_token_s"] -= compiled
    return llm, split


def start_record(shape: str, kind: str, split: dict[str, float], context: int) -> Record:
    """`start.8b.cold_s`: their sum, with the stages in the detail."""
    detail: dict[str, Any] = {stage: round(s, 3) for stage, s in split.items()}
    detail |= {"prompt": context, "weights": "random, made on the device"}
    return Record(
        f"start.{shapes.short(shape)}.{kind}_s", round(sum(split.values()), 3), "s", detail
    )


def timed_pairs(
    llm: LLM, batch: int, context: int, *, repeats: int, short: int = SHORT, long: int = LONG
) -> list[tuple[float, float]]:
    """Seconds of `generate` for `short` and for `long` tokens, on new prompts in each repeat; see
    `bench.timing`."""
    from jaxinfer import SamplingParams

    def seconds(prompts: list[list[int]], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        began = time.perf_counter()
        outputs = llm.generate(prompts, sampling)
        took = time.perf_counter() - began
        if any(len(out.outputs[0].token_ids) != tokens for out in outputs):
            raise RuntimeError(f"generate did not return {tokens} tokens for every prompt")
        return took

    def prompts(seed: int) -> list[list[int]]:
        return random_prompts(seed, batch, context, llm.config.vocab_size)

    seconds(prompts(1), long)  # compiles every step that the timed calls need
    pairs = []
    for seed in range(2, 2 + repeats):
        fresh = prompts(seed)
        pairs.append((seconds(fresh, short), seconds(fresh, long)))
    return pairs


def run_part(args: argparse.Namespace) -> None:
    """What one of the processes does."""
    (shape,), batches, contexts = args.shape, args.batch, args.context
    longest = max(contexts)
    # Both calls of a pair read their prompts, so that this cancels.
    options = {"max_num_seqs": max(batches), "max_model_len": longest + LONG}
    options |= {"prefix_caching": False, **args.llm}
    llm, split = start_llm(shape, longest, options)
    emit(args.records, start_record(shape, args.part, split, longest))
    if args.part == "warm":
        return
    detail = {"options": options, "memory_plan": str(llm.memory_plan)}
    sizes = zip(batches, contexts, strict=True) if args.in_pairs else product(batches, contexts)
    for batch, context in sizes:
        pairs = timed_pairs(llm, batch, context, repeats=args.repeats)
        for found in step_records("decode", shape, batch, context, pairs, detail):
            emit(args.records, found)


def _join(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _names(text: str) -> list[str]:
    for name in text.split(","):
        shapes.hf_config(name)
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description="decode speed and start time of jaxinfer")
    parser.add_argument("--shape", type=_names, default=["llama-3.1-8b", "llama-3.2-1b"])
    parser.add_argument("--batch", type=_numbers, default=[1])
    parser.add_argument("--context", type=_numbers, default=[1024])
    parser.add_argument("--in-pairs", action="store_true", help="not every batch and context")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument(
        "--llm", type=json.loads, default={}, help='options of LLM, as JSON: {"max_steps": 16}'
    )
    parser.add_argument("--no-warm", action="store_true", help="start each shape only once")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", choices=("cold", "warm"), help="run this part in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part is not None:
        run_part(args)
        return
    run = record.start(parts.command_line("bench.decode"))
    path = record.path_for(run, "decode", args.out)
    with tempfile.TemporaryDirectory(prefix="bench-xla-") as cache:
        todo = ceilings.make_parts(tiny=args.shape == ["tiny"])
        todo += make_parts(
            args.shape, args.batch, args.context, cache, options=args.llm, repeats=args.repeats,
            warm=not args.no_warm, in_pairs=args.in_pairs,
        )  # fmt: skip
        run = parts.run_parts(todo, run, path)
    parts.print_table(run)


if __name__ == "__main__":
    main()
