"""Policies, page sizes and budgets compared, by the scheduler and a formula instead of a device.

    python -m bench.simulate --policy continuous,static,makespan --page-size 32,64 --requests 1000
    python -m bench.simulate --max-num-seqs 256 --budget 512,2048 --rate 16
    python -m bench.simulate --fit

Runs `batcher.step` as `Engine` does (`bench.virtual`), on a clock that `bench.costs` drives. The
requests are the lognormal list, over again where more are asked for: all at once, or as a Poisson
process. Nothing here is measured; `--fit` shows how far the formula is from steps that were. What
it cannot see: the host's own time, and sequences that end before their limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np

from bench import costs, parts, record, workloads
from bench.costs import CostModel
from bench.record import Record
from bench.virtual import QUEUE, Load, Result, make_load, simulate
from jaxinfer.buckets import max_chunks
from jaxinfer.config import BatcherConfig, EngineOptions

POLICIES = ["continuous", "static", "makespan"]
KV_TOKENS = 450_000  # what `sizing` leaves of an H100 of 80 GB, 8B in bfloat16
MOST_TOKENS = 2304  # of a sequence without a shared prefix


def configurations(args: argparse.Namespace) -> list[BatcherConfig]:
    """Every combination that was asked for; static batching also with the rows it is known for.

    As an engine, it takes no budget that is not larger than `max_num_seqs`: these are left out, and
    the output says so.

    Raises:
        ValueError: an option out of range.
    """
    longest, found, left_out = MOST_TOKENS + args.prefix, [], {}
    for policy, size, budget in product(args.policy, args.page_size, args.budget):
        static = [workloads.FULL.static_rows] if policy == "static" else []
        for rows in dict.fromkeys([*static, *args.max_num_seqs]):
            if budget <= rows:
                left_out[f"left out: {policy}, budget {budget} with max_num_seqs {rows}"] = True
                continue
            EngineOptions(  # has an eye on all of them
                policy=policy,
                page_size=size,
                max_num_seqs=rows,
                max_num_batched_tokens=budget,
                max_steps=args.max_steps,
            )
            if args.kv_tokens < longest + size:
                raise ValueError(f"kv_tokens={args.kv_tokens}: expected at least {longest + size}")
            config = BatcherConfig(
                num_pages=args.kv_tokens // size,
                page_size=size,
                max_num_seqs=rows,
                max_model_len=longest,
                max_num_batched_tokens=budget,
                max_steps=args.max_steps,
                max_chunks=max_chunks(policy, gpu=True),
                policy=policy,
            )
            found.append(config)
    if not found:
        raise ValueError("every budget is left out: expected one that is more than max_num_seqs")
    for line in left_out:
        print(line)
    return found


def record_of(load: Load, config: BatcherConfig, cost: CostModel, result: Result) -> Record:
    """`simulate.lognormal.makespan.seqs1024.page64.budget2048.out_tok_s`; the rest is detail."""
    name = (
        f"simulate.{load.name}.{config.policy}.seqs{config.max_num_seqs}.page{config.page_size}."
        f"budget{config.max_num_batched_tokens}.out_tok_s"
    )
    counts = ("seconds", "steps", "dispatches", "output_tokens", "waste", "preemptions", "padding")
    detail = {
        "requests": len(load.due),
        **{name: getattr(result, name) for name in counts},
        **latencies(result),
        "config": asdict(config),
        "cost": asdict(cost),
    }
    return Record(name, result.output_tokens / result.seconds, "tok/s", detail)


def latencies(result: Result) -> dict[str, float]:
    """In milliseconds; with all requests at once, the first token mostly tells who was first."""
    figures = {"ttft_p50_ms": (result.ttft, 50), "ttft_p99_ms": (result.ttft, 99)}
    if len(result.itl):
        figures["itl_p99_ms"] = (result.itl, 99)
    return {name: 1000 * float(np.percentile(x, p)) for name, (x, p) in figures.items()}


# Columns of the table: heading, key in the detail, format.
COLUMNS = (
    ("seconds", "seconds", ".2f"),
    ("steps", "steps", "d"),
    ("waste", "waste", ".2%"),
    ("padding", "padding", ".2%"),
    ("preempted", "preemptions", "d"),
    ("ttft p50", "ttft_p50_ms", ".0f"),
    ("ttft p99", "ttft_p99_ms", ".0f"),
    ("itl p99", "itl_p99_ms", ".1f"),
)


def print_heading() -> None:
    heads = "".join(f"{heading:>10}" for heading, _, _ in COLUMNS)
    print(f"{'policy':<12}{'seqs':>6}{'page':>6}{'budget':>8}{'tok/s':>9}{heads}")


def print_row(found: Record) -> None:
    """One configuration."""
    config = found.detail["config"]
    cells = "".join(
        f"{format(found.detail[key], form) if key in found.detail else '':>10}"
        for _, key, form in COLUMNS
    )
    print(
        f"{config['policy']:<12}{config['max_num_seqs']:>6}{config['page_size']:>6}"
        f"{config['max_num_batched_tokens']:>8}{found.value:>9.0f}{cells}",
        flush=True,
    )


def parser() -> argparse.ArgumentParser:
    """Options with commas are compared in every combination."""

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    made = argparse.ArgumentParser(description="the scheduler, with a formula for a device")
    made.add_argument("--policy", type=lambda text: text.split(","), default=POLICIES)
    made.add_argument("--page-size", type=numbers, default=[64])
    made.add_argument("--budget", type=numbers, default=[2048], help="max_num_batched_tokens")
    made.add_argument("--max-num-seqs", type=numbers, default=[1024])
    made.add_argument("--max-steps", type=int, default=1, help="decode steps a dispatch, at most")
    made.add_argument("--kv-tokens", type=int, default=KV_TOKENS, help="that the cache holds")
    made.add_argument("--requests", type=int, default=1000)
    made.add_argument("--rate", type=float, help="requests a second; all at once without")
    made.add_argument("--prefix", type=int, default=0, help="tokens that all prompts begin with")
    made.add_argument(
        "--queue", type=int, default=QUEUE, help="most that the scheduler sees waiting"
    )
    made.add_argument("--fit", action="store_true", help="print the formula and its residuals")
    made.add_argument("--out", type=Path, help="folder of the result file; none without")
    return made


def main(words: Sequence[str] | None = None) -> None:
    made = parser()
    args = made.parse_args(words)
    cost = costs.fit()
    if args.fit:
        costs.print_fit(cost)
        return
    try:
        load = make_load(args.requests, rate=args.rate, prefix=args.prefix)
        found = configurations(args)
        if args.queue < 1:
            raise ValueError(f"queue={args.queue}: expected at least 1")
    except ValueError as error:
        made.error(str(error))
    run = record.start(parts.command_line("bench.simulate"))
    run = replace(run, device={"kind": "simulated", "count": 1, "memory": 0})
    if args.queue < args.requests and "makespan" in args.policy:
        print(f"makespan sorts {args.queue} requests at a time, not all: --queue {args.requests}")
    print_heading()
    for config in found:
        result = record_of(load, config, cost, simulate(load, config, cost, queue=args.queue))
        print_row(result)
        run = replace(run, records=(*run.records, result))
    if args.out:
        path = record.path_for(run, "simulate", args.out)
        record.write(run, path)
        print(path)


if __name__ == "__main__":
    main()
