"""Several GPUs of one host: tensor, pipeline and data parallelism beside one GPU, in one run.

    python -m bench.multi_gpu --devices 1 2                # 2 GPUs
    python -m bench.multi_gpu --devices 1 2 4 --large      # 4 GPUs, the 70B shape too
    python -m bench.multi_gpu --measure links --devices 2

`speed`: decode at batch 1 and 64 and prefill of the 8B shape by tensor parallelism, each degree in
a process of its own, and how many times faster than one GPU. `large`: the 70B shape in bf16 on four
GPUs, over its bandwidth limit. `replicas`: throughput of two replicas over that of one. `same`: of
200 prompts of the demo's, how many have one GPU's greedy tokens, and the largest error of a
log-probability of the 8B shape. `links`: what the exchanges of a layer take, alone, by kernels and
by XLA. `bench/multi_gpu.md` says what to expect.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import decode, parts, prefill, record, shapes, timing
from bench.parts import Part, emit
from bench.record import Record

if TYPE_CHECKING:
    import jax

    from jaxinfer.llm import LLM

SHAPE, LARGE = "llama-3.1-8b", "llama-3.1-70b"
CONTEXT, BATCHES, REPEATS, SHORT, LONG = 1024, (1, 64), 3, 17, 145
SHARE = 12 << 30  # bytes of KV cache, where settings share GPUs
COPY = 3.0e12  # bytes/s that one H100 copies at; `ceilings` of other runs
LINK_ROWS = (8, 64, 256, 1024, 2048, 4096)


def start(shape: str, options: dict[str, Any]) -> LLM:
    from jaxinfer import LLM

    return LLM.from_config(shapes.model_config(shape), **options)


def name_of(options: dict[str, Any]) -> str:
    """`tp2`, `pp2`, `dp2`, or `one`."""
    letters = {"tensor": "tp", "pipeline": "pp", "data": "dp"}
    found = [f"{s}{n}" for k, s in letters.items() if (n := options.get(f"{k}_parallel_size"))]
    return "".join(found) or "one"


# -- parts ----------------------------------------------------------------------------------------


def speed(shape: str, options: dict[str, Any], batches: list[int]) -> Iterator[Record]:
    """Decode and prefill of one setting. All settings start and compile at once, on the same GPUs,
    and are then timed in turns."""
    stem = f"multi_gpu.{shapes.short(shape)}.{name_of(options)}"
    sizes = {
        "max_num_seqs": max(*batches, prefill.PROMPTS),
        "max_model_len": prefill.PROMPT + 1 + LONG,
    }
    llm = start(shape, {**sizes, "prefix_caching": False, "kv_cache_bytes": SHARE, **options})

    def steps_of(batch: int, repeats: int) -> list[float]:
        pairs = decode.timed_pairs(llm, batch, CONTEXT, repeats=repeats, short=SHORT, long=LONG)
        return timing.step_ms(pairs, SHORT, LONG)

    for batch in batches:
        steps_of(batch, 1)
    prefill.seconds(llm, 0)
    with parts.turn():
        for batch in batches:
            steps = steps_of(batch, REPEATS)
            detail = {"options": options, "context": CONTEXT, "memory_plan": str(llm.memory_plan)}
            detail["ms_of_each_repeat"] = [round(ms, 3) for ms in steps]
            yield Record(f"{stem}.decode.b{batch}.ms", statistics.median(steps), "ms", detail)
        rate, detail = prefill.rate(llm, REPEATS)
    yield Record(f"{stem}.prefill.tok_s", rate, "tok/s", detail)
    yield Record(f"{stem}.exchanges", float(sum(exchanges(llm).values())), "", exchanges(llm))


def exchanges(llm: LLM) -> dict[str, int]:
    """Collectives in the text of the decode programs that were compiled, the largest count of
    each kind."""
    from jaxinfer.replicas import Replicas

    assert not isinstance(llm.engine, Replicas)
    found: Counter[str] = Counter()
    for text in llm.engine.compiler.texts:
        here = Counter(
            kind
            for line in text.splitlines()
            for kind in ("all-reduce", "all-gather", "collective-permute", "reduce-scatter")
            if f" {kind}(" in line or f" {kind}-start(" in line
        )
        found |= here
    return dict(found)


def replicas(options: dict[str, Any]) -> Iterator[Record]:
    """Output tokens per second of many requests at once."""
    from jaxinfer import SamplingParams

    llm = start(SHAPE, {"max_num_seqs": 256, "max_model_len": 1024, **options})
    how = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True)
    llm.warm_up([how])
    rates = []
    for seed in range(REPEATS):
        prompts = decode.random_prompts(seed, 1024, 128, llm.config.vocab_size)
        began = time.perf_counter()
        llm.generate(prompts, how)
        rates.append(1024 * 256 / (time.perf_counter() - began))
    detail = {"requests": 1024, "prompt": 128, "output": 256, "of_each_repeat": rates}
    name = f"multi_gpu.8b.{name_of(options)}.throughput.tok_s"
    yield Record(name, statistics.median(rates), "tok/s", detail)


def same(settings: list[dict[str, Any]]) -> Iterator[Record]:
    """Tokens of the demo's model and log-probabilities of the 8B shape, each beside one GPU's."""
    import jax.numpy as jnp

    from bench.speculative import demo_prompts
    from jaxinfer import LLM, SamplingParams

    prompts, how = demo_prompts(200, 96), SamplingParams(temperature=0, max_tokens=64)
    text = decode.random_prompts(3, 4, 512, shapes.model_config(SHAPE).vocab_size)
    params = shapes.init_params(SHAPE, jnp.bfloat16)
    found: dict[str, Any] = {}
    for options in ({}, *settings):
        with LLM("demo", kv_cache_bytes=1 << 29, max_model_len=512, **options) as llm:
            said = [out.outputs[0].token_ids for out in llm.generate(prompts, how)]
        rest = {"kv_cache_bytes": 1 << 30, "max_model_len": 1024, **options}
        with LLM.from_params(params, shapes.model_config(SHAPE), **rest) as llm:
            scores = np.array([one.logprobs for one in llm.logprobs(text)])
        one, name = found.setdefault("one", (said, scores)), name_of(options)
        if name == "one":
            continue
        equal = sum(a == b for a, b in zip(one[0], said, strict=True))
        yield Record(f"multi_gpu.demo.{name}.equal_prompts", equal, "prompts", {"of": len(prompts)})
        error = np.abs(one[1] - scores)
        detail = {"mean": float(error.mean()), "tokens": int(error.size)}
        yield Record(f"multi_gpu.8b.{name}.logprob_error", float(error.max()), "nats", detail)


def links(count: int) -> Iterator[Record]:
    """Microseconds of an exchange of [rows, 4096] bf16 on `count` GPUs, in a program of many."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxinfer.parallel import connected, replica_meshes

    (mesh,) = replica_meshes(count)
    assert mesh is not None, "several devices"
    peers = connected(mesh)
    table = jnp.zeros((count, 1), jnp.uint32) if peers is None else peers.table
    table = jax.device_put(table, NamedSharding(mesh, P("tensor")))
    for rows in LINK_ROWS:
        for name, kind in exchange_kinds(count).items():
            if name == "kernel" and peers is None:
                continue

            def many(x: jax.Array, table: jax.Array, kind: Any = kind) -> jax.Array:
                for _ in range(32):
                    x = kind(x * jnp.asarray(0.5, x.dtype), table)
                return x

            # In place, as a step's state is: CUDA graphs are made anew for other addresses.
            specs: Any = {"in_specs": (P(), P("tensor")), "out_specs": P(), "check_vma": False}
            run = jax.jit(jax.shard_map(many, mesh=mesh, **specs), donate_argnums=0)
            x = jax.device_put(jnp.ones((rows, 4096), jnp.bfloat16), NamedSharding(mesh, P()))
            times = []
            for _ in range(1 + 10):
                began = time.perf_counter()
                for _ in range(8):
                    x = run(x, table)
                jax.block_until_ready(x)
                times.append(1e6 * (time.perf_counter() - began) / (8 * 32))
            times = times[1:]  # the first compiles
            stem = f"multi_gpu.link{count}.{name}.{rows}x4096.us"
            yield Record(stem, statistics.median(times), "us", {"of_each": times})


def exchange_kinds(count: int) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Ways to sum over the axis `tensor`: functions of a device's part and of its row of
    `Peers.table`, which `kernel` alone needs."""
    import jax

    from pallas_kernels.exchange import exchange

    def gather_and_add(x: jax.Array, _: jax.Array) -> jax.Array:
        first, *rest = jax.lax.all_gather(x, "tensor")
        return functools.reduce(jax.lax.add, rest, first)

    def scatter_and_gather(x: jax.Array, _: jax.Array) -> jax.Array:
        parts = jax.lax.all_to_all(x.reshape(count, -1), "tensor", 0, 0, tiled=True)
        first, *rest = parts.reshape(count, -1)
        total = functools.reduce(jax.lax.add, rest, first)
        return jax.lax.all_gather(total, "tensor", tiled=True).reshape(x.shape)

    def psum(x: jax.Array, _: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "tensor")

    def kernel(x: jax.Array, table: jax.Array) -> jax.Array:
        return exchange(x, "tensor", table)

    return {f.__name__: f for f in (gather_and_add, scatter_and_gather, psum, kernel)}


# -- processes ------------------------------------------------------------------------------------


def make_parts(args: argparse.Namespace) -> list[Part | list[Part]]:
    """What is asked for, each in a process of its own; those of an inner list run together."""
    made: list[Part] = []
    wanted, together = args.measure.split(","), []
    degrees = [{"tensor_parallel_size": n} if n > 1 else {} for n in args.devices]
    fraction = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}

    def add(kind: str, options: Any, name: str, limit: float, env: dict[str, str]) -> None:
        words = ("--part", kind, "--options", json.dumps(options), "--shape", args.shape)
        words += ("--batch", *map(str, args.batch))
        made.append(Part(name, "bench.multi_gpu", words, limit, {**fraction, **env}))

    if "speed" in wanted:
        for options in degrees:
            env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            add("speed", options, f"speed.{name_of(options)}", 420, env)
        together, made[:] = [made[:]], []
    if "replicas" in wanted:
        for options in ({}, {"data_parallel_size": 2}):
            add("replicas", options, f"replicas.{name_of(options)}", 240, {})
    if "same" in wanted:
        others = [options for options in degrees if options]
        others += [{"pipeline_parallel_size": 2}, {"data_parallel_size": 2}]
        add("same", others, "same", 300, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    if "links" in wanted:
        for n in (n for n in args.devices if n > 1):
            add("links", n, f"links.{n}", 120, {})
    if args.large:
        options = {"tensor_parallel_size": 4, "max_num_seqs": 1, "max_model_len": 2048}
        add("large", options, "large", 420, {})
    return [*together, *made]


def run_part(args: argparse.Namespace) -> Iterator[Record]:
    """What the process of a part does."""
    options = json.loads(args.options)
    match args.part:
        case "speed":
            yield from speed(args.shape, options, args.batch)
        case "large":
            yield from large(options)
        case "replicas":
            yield from replicas(options)
        case "same":
            yield from same(options)
        case "links":
            yield from links(options)
        case kind:
            raise ValueError(f"part {kind!r}")


def large(options: dict[str, Any]) -> Iterator[Record]:
    """The 70B shape, one request: a step, and the time its bytes need over that."""
    llm = start(LARGE, options)
    pairs = decode.timed_pairs(llm, 1, CONTEXT, repeats=2, short=SHORT, long=LONG)
    ms = statistics.median(timing.step_ms(pairs, SHORT, LONG))
    least = 1e3 * timing.bytes_per_step(LARGE, 1, CONTEXT) / options["tensor_parallel_size"] / COPY
    detail = {"ms": ms, "least_ms": least, "memory_plan": str(llm.memory_plan)}
    name = f"multi_gpu.70b.{name_of(options)}.share_of_bandwidth"
    yield Record(name, least / ms, "ratio", detail)


def compared(run: record.Run) -> Iterator[Record]:
    """How many times faster than one GPU."""
    values = {r.name: r.value for r in run.records if r.value is not None}
    for name, value in values.items():
        words = name.split(".")
        if len(words) < 4 or words[0] != "multi_gpu" or words[2] == "one":
            continue
        one = values.get(".".join((*words[:2], "one", *words[3:])))
        if one is None or words[-1] not in ("ms", "tok_s"):
            continue
        times = one / value if words[-1] == "ms" else value / one
        yield Record(".".join((*words[:-1], "times")), round(times, 4), "ratio", {})


def main() -> None:
    parser = argparse.ArgumentParser(description="tensor, pipeline and data parallelism on GPUs")
    parser.add_argument("--measure", default="links,speed,replicas,same")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--large", action="store_true", help="the 70B shape, on 4 GPUs")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", help="measure in this process")
    parser.add_argument("--options", default="{}", help="of the part, as JSON")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        for found in run_part(args):
            emit(args.records, found)
        return
    run = record.start(parts.command_line("bench.multi_gpu"))
    path = record.path_for(run, "multi_gpu", args.out)
    run = parts.run_parts(make_parts(args), run, path)
    run = replace(run, records=(*run.records, *compared(run)))
    record.write(run, path)
    parts.print_table(run)


if __name__ == "__main__":
    main()
