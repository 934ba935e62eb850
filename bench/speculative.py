"""What speculation brings in the engine, against the same engine without it, in turns.

    python -m bench.speculative --measure demo,shapes,parts

`shapes`: an 8B shape with random weights, one request, drafts of a 1B and a 100M shape. Random
models never agree: guesses are made to hold by chance (`Speculative.forced`). It is time that is
measured, and the name of the record says so. Then 64 requests with the controller on, none forced.
`demo`: the demo's pair and prompt lookup on text that repeats itself and on text that does not; and
that 1000 prompts have the same tokens with every proposer as without.
`parts`: a step that guesses over its parts, each compiled alone: the draft's forwards, one of the
target over as many tokens; and that forward over one of a single token.

A ratio is the median of those of pairs of calls, in turns; `low` is its lower bound, of a one-sided
95 % interval by resampling pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import parts, record, shapes
from bench.decode import random_prompts
from bench.parts import Part, emit
from bench.record import Record

if TYPE_CHECKING:
    from jaxinfer.llm import LLM
    from jaxinfer.types import SamplingParams

TARGET, DRAFTS = "llama-3.1-8b", ("llama-3.2-1b", "llama-draft-100m")
K, HELD = 4, 0.75
DRAWS = 2000
WARM = 4  # repeats before any is timed
CALLS = 8  # of the demo's models that are timed together: one takes some 50 ms
MEASURES = ("demo", "shapes", "parts")

Prompts = Sequence[list[int]]


# -- ratios ---------------------------------------------------------------------------------------


def lower_bound(ratios: Sequence[float], seed: int = 0) -> float:
    """Of the median, one-sided 95 %, by resampling."""
    rng = np.random.default_rng(seed)
    draws = rng.choice(np.asarray(ratios), (DRAWS, len(ratios)))
    return float(np.quantile(np.median(draws, axis=1), 0.05))


def seconds(llm: LLM, calls: Sequence[Prompts], params: SamplingParams) -> tuple[float, Any]:
    """Of `generate` calls, one after the other, and what came of them."""
    began = time.perf_counter()
    outputs = [out for prompts in calls for out in llm.generate(list(prompts), params)]
    return time.perf_counter() - began, [out.outputs[0].token_ids for out in outputs]


def faster(
    name: str, plain: LLM, guessing: LLM, draws: Callable[[int], Prompts], params: SamplingParams,
    *, repeats: int, detail: dict[str, Any], calls: int = 1, same: bool = True, warm: bool = True,
) -> Iterator[Record]:  # fmt: skip
    """How many times faster the second is, on prompts that neither has read before.

    Args:
        draws: the prompts of each call. Those below 0 teach the controller.
        calls: of a repeat: short ones are timed together.
        same: both must say the same.
        warm: compiles all programs first; otherwise those that the untimed repeats need.
    """
    for llm in (plain, guessing) if warm else ():
        llm.warm_up([params])
    ratios, times = [], []
    for turn in range(-WARM, repeats):
        order = (plain, guessing) if turn % 2 else (guessing, plain)
        prompts = [draws(turn * calls + i) for i in range(calls)]
        took = {id(llm): seconds(llm, prompts, params) for llm in order}
        if turn < 0:
            continue
        (a, said), (b, others) = took[id(plain)], took[id(guessing)]
        if same and said != others:
            raise RuntimeError(f"{name}: other tokens with speculation than without")
        ratios.append(a / b)
        times.append((round(a, 4), round(b, 4)))
    found = statistics.median(ratios)
    detail = {**detail, "low": lower_bound(ratios), "seconds_plain_guessing": times}
    detail |= acceptance(guessing)
    yield Record(f"{name}.speedup", round(found, 4), "ratio", detail)
    yield Record(f"{name}.speedup_low", round(detail["low"], 4), "ratio", {})


def acceptance(llm: LLM) -> dict[str, Any]:
    """Of what the LLM did last."""
    some, share = [s for s in llm.metrics.steps if s.attempted], llm.metrics.summary().acceptance
    held = sum(s.held for s in some)
    rows = sum(s.rows * s.steps for s in some)
    return {
        "acceptance": None if share is None else round(share, 4),
        "tokens_a_step": round(1 + held / rows, 4) if rows else None,
        "dispatches_that_guessed": f"{len(some)} of {len(llm.metrics.steps)}",
    }


# -- an 8B shape ----------------------------------------------------------------------------------


def measure_shapes(args: argparse.Namespace) -> Iterator[Record]:
    import jax.numpy as jnp

    from jaxinfer import LLM, SamplingParams

    config = shapes.model_config(TARGET)
    params = shapes.init_params(TARGET, jnp.bfloat16)
    rest: dict[str, Any] = {"max_model_len": 4096, "kv_cache_bytes": 8 << 30, "max_num_seqs": 64}
    start = partial(LLM.from_params, params, config, **rest)
    one = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    plain = start()

    def draws(turn: int, batch: int = 1, context: int = 1024) -> Prompts:
        return random_prompts(1000 + 7 * turn + batch, batch, context, config.vocab_size)

    many = partial(draws, batch=64, context=128)
    kinds: dict[str, Any] = dict.fromkeys(DRAFTS) | {"lookup": "lookup"}
    kinds["skip"] = f"skip=8-23,tokens={K}"
    for kind in args.kinds or kinds:
        text = kinds[kind]
        given, name = None, shapes.short(kind)
        if text is None:
            given = (shapes.init_params(kind, jnp.bfloat16), shapes.model_config(kind))
        if text is None and 1 in args.batch:
            how = f"draft,tokens={K},adapt=false,forced={HELD}"
            with start(draft=given, speculative=how) as llm:
                yield from faster(
                    f"speculative.8b.{name}.forced{HELD}.b1", plain, llm, draws, one,
                    repeats=args.repeats, detail={"synthetic": how, "context": 1024}, same=False,
                )  # fmt: skip
        if 64 not in args.batch:
            continue
        with start(draft=given, speculative=text or f"draft,tokens={K}") as llm:
            yield from faster(
                f"speculative.8b.{name}.b64", plain, llm, many, one, repeats=args.repeats,
                detail={"context": 128, "requests": 64}, warm=False,
            )  # fmt: skip


# -- the demo's pair ------------------------------------------------------------------------------


def demo_prompts(count: int, tokens: int) -> list[list[int]]:
    """Beginnings of windows of held-out files."""
    from bench.kv_quality import DEMO, windows
    from jaxinfer.tokenizer import load_tokenizer

    found = []
    for text in windows("held_out", load_tokenizer(DEMO / "target")):
        found += [text[at : at + tokens].tolist() for at in range(0, len(text) - tokens, tokens)]
    if not found:
        raise RuntimeError("no held-out text")
    return [found[i % len(found)][: tokens - i // len(found)] for i in range(count)]


def in_turn(prompts: Prompts, batch: int, turn: int) -> Prompts:
    """The prompts of a turn, of a list that begins again."""
    return [prompts[(turn * batch + i) % len(prompts)] for i in range(batch)]


def measure_demo(args: argparse.Namespace) -> Iterator[Record]:
    from jaxinfer import LLM, SamplingParams

    # Few sizes, so that there are few programs to compile.
    rest: dict[str, Any] = {
        "dtype": args.dtype, "kv_cache_bytes": 1 << 30,
        "max_num_batched_tokens": 256, "max_model_len": 1024,
    }  # fmt: skip
    specs = {"lookup": "lookup,tokens=8", "draft": f"draft=demo-draft,tokens={K}"}
    specs["skip"] = f"skip=3-6,tokens={K}"
    greedy = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    noise = SamplingParams(temperature=1.5, seed=1, max_tokens=args.tokens, ignore_eos=True)
    edits = [(p + p + p[: len(p) // 2]) for p in demo_prompts(160, 160)]
    code = demo_prompts(args.prompts, 96)
    texts = {"edits": (edits, greedy), "noise": (demo_prompts(500, 96), noise)}

    def start(**options: Any) -> LLM:
        return LLM("demo", **(rest | options))

    checked: dict[str, Any] = {"max_num_seqs": 64, "max_steps": 1}
    with start(**checked) as plain:
        expected = seconds(plain, [code], replace(greedy, max_tokens=64))[1]
    rest["max_num_seqs"] = max(args.batch)
    with start() as plain:
        for kind in args.kinds or specs:
            text = specs[kind]
            with start(speculative=text) as llm:
                for name in args.texts:
                    prompts, how = texts[name]
                    for batch in args.batch:
                        yield from faster(
                            f"speculative.demo.{kind}.{name}.b{batch}", plain, llm,
                            partial(in_turn, prompts, batch), how,
                            repeats=2 * args.repeats, calls=CALLS,
                            detail={"speculative": text, "calls": CALLS},
                        )  # fmt: skip
            if not code:
                continue
            fixed = f"{text},adapt=false"
            with start(speculative=fixed, **checked) as llm:
                got = seconds(llm, [code], replace(greedy, max_tokens=64))[1]
                wrong = sum(a != b for a, b in zip(expected, got, strict=True))
                detail = {"prompts": len(code), "speculative": fixed, **acceptance(llm)}
                yield Record(f"speculative.demo.{kind}.other_tokens", wrong, "prompts", detail)


# -- a step and its parts -------------------------------------------------------------------------


def measure_parts(args: argparse.Namespace) -> Iterator[Record]:
    """Of an 8B target and a 1B draft, one row of 1024 tokens."""
    import jax
    import jax.numpy as jnp

    from jaxinfer import speculate
    from jaxinfer.proposers import draft_model
    from jaxinfer.runner import INVARIANT_OPTIONS
    from jaxinfer.sampling import pack_row, stack_rows
    from jaxinfer.types import SamplingParams
    from jaxinfer.windows import begin, model_forward

    names = {"target": TARGET, "draft": DRAFTS[0]}
    configs = {name: shapes.model_config(shape) for name, shape in names.items()}
    params = {name: shapes.init_params(shape, jnp.bfloat16) for name, shape in names.items()}
    how = pack_row(SamplingParams(temperature=0), seed=0, sample=0, stop_ids=(), min_length=0)
    rows = jax.tree.map(jnp.asarray, stack_rows([how]))
    prompt = random_prompts(0, 1, 1024, configs["target"].vocab_size)
    state = begin(params, configs, prompt, rows, [2048], k=K, page_size=32, dtype=jnp.bfloat16)
    target, draft = (model_forward(name, configs[name]) for name in ("target", "draft"))
    drawing = speculate.Drawing(False, False)
    guess = draft_model(draft)
    window = jnp.zeros((1, K + 1), jnp.int32)

    def whole(params: Any, state: Any) -> Any:
        after, _ = speculate.step(state, params, draft=guess, target=target, drawing=drawing)
        # As long as before: every run does the same.
        return after._replace(
            fresh=state.fresh, fresh_count=state.fresh_count, lengths=state.lengths
        )

    def verify(params: Any, state: Any, width: int = K + 1) -> Any:
        tokens, count = window[:, :width], jnp.full(1, width)
        found, kept = target(params, state.target, tokens, count, state.lengths - 1)
        return state._replace(target=kept, fresh=state.fresh + found.argmax(-1).max() * 0)

    def guesses(params: Any, state: Any) -> Any:
        after, found = guess(params, state, K, drawing)
        return after._replace(fresh=state.fresh + found.tokens.max() * 0)

    runs = {"whole": whole, "draft": guesses, "verify": verify}
    runs["one"] = partial(verify, width=1)
    for name, f in runs.items():
        options = INVARIANT_OPTIONS if jax.default_backend() == "gpu" else None
        runs[name] = jax.jit(f, donate_argnums=1, compiler_options=options)
        state = jax.block_until_ready(runs[name](params, state))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, f in runs.items():
            began = time.perf_counter()
            for _ in range(args.loops):
                state = f(params, state)
            jax.block_until_ready(state)
            times[name].append(1000 * (time.perf_counter() - began) / args.loops)
    ms = {name: statistics.median(found) for name, found in times.items()}
    detail = {"ms": {name: round(x, 4) for name, x in ms.items()}, "k": K, "context": 1024}
    over = ms["whole"] / (ms["draft"] + ms["verify"])
    yield Record("speculative.8b.1b.step_over_parts", round(over, 4), "ratio", detail)
    yield Record(
        "speculative.8b.verify5_over_1", round(ms["verify"] / ms["one"], 4), "ratio", detail
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="speculation in the engine")
    parser.add_argument("--measure", default=",".join(MEASURES))
    parser.add_argument("--prompts", type=int, default=1000, help="whose tokens are compared")
    parser.add_argument("--texts", nargs="*", default=["edits", "noise"])
    parser.add_argument("--tokens", type=int, default=256, help="of a request that is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loops", type=int, default=20)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--kinds", nargs="*", default=[], help="of proposers; all if none is named")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", choices=MEASURES, help="measure in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        measure = {"demo": measure_demo, "shapes": measure_shapes, "parts": measure_parts}[
            args.part
        ]
        for found in measure(args):
            emit(args.records, found)
        return
    run = record.start(parts.command_line("bench.speculative"))
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    names = ("prompts", "tokens", "repeats", "loops", "dtype")
    options = [x for name in names for x in (f"--{name}", str(getattr(args, name)))]
    options += ["--batch", *map(str, args.batch), "--kinds", *args.kinds, "--texts", *args.texts]
    made = [
        Part(f"speculative.{name}", "bench.speculative", ("--part", name, *options), 420, env)
        for name in args.measure.split(",")
    ]
    parts.print_table(parts.run_parts(made, run, record.path_for(run, "speculative", args.out)))


if __name__ == "__main__":
    main()
