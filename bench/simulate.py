"""The scheduler against a formula instead of a device: policies, page sizes and budgets compared.

    python -m bench.simulate --policy continuous,static,makespan --page-size 32,64 --requests 1000
    python -m bench.simulate --max-num-seqs 256 --budget 512,2048 --rate 16
    python -m bench.simulate --fit

Runs `batcher.step` as `Engine` does, two dispatches in flight, on a clock that `bench.costs` drives;
the host takes no time. Requests are the lognormal list, over again where more are asked for: all at
once, or as a Poisson process. Nothing here is measured; `--fit` shows how far the formula is from
steps that were. What a simulation cannot see: how long requests take to prepare, and sequences that
end before their limit.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import costs, parts, record, workloads
from bench.costs import CostModel
from bench.record import Record
from jaxinfer import batcher
from jaxinfer.buckets import make_buckets
from jaxinfer.config import BatcherConfig
from jaxinfer.engine import DISPATCHES_AHEAD
from jaxinfer.pages import page_keys
from jaxinfer.plans import Kind, step_key

POLICIES = ("continuous", "static", "makespan")
KV_TOKENS = 450_000  # that an H100 of 80 GB holds beside 8B in bfloat16
QUEUE = 4096  # see `simulate`
MOST_TOKENS = 2304  # of a sequence without a shared prefix


@dataclass(frozen=True)
class Load:
    """Requests in order of arrival.

    Attributes:
        name: in the names of records.
        due: float64 [n], seconds.
        prompts, outputs: int64 [n], tokens of each.
        prefix: tokens that all prompts begin with, part of `prompts`.
    """

    name: str
    due: np.ndarray
    prompts: np.ndarray
    outputs: np.ndarray
    prefix: int = 0


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Attributes:
        seconds: from the first arrival's clock, 0, to the last result.
        steps: of the device; `dispatches`, of which a few may have several steps.
        ttft: float64 [n], seconds from when a request was due to its first token.
        itl: float32 [output tokens - n], seconds between tokens; those of one dispatch after the
            first follow after nothing.
        waste: slots of granted pages that hold no token, over slots; the mean of the dispatches.
        padding: tokens computed for nothing, over tokens computed.
    """

    seconds: float
    steps: int
    dispatches: int
    output_tokens: int
    ttft: np.ndarray
    itl: np.ndarray
    waste: float
    preemptions: int
    padding: float


def make_load(requests: int, *, rate: float | None = None, prefix: int = 0) -> Load:
    """The lognormal list, `requests` of it; all at once, or `rate` a second.

    Raises:
        ValueError: fewer requests than one, no positive rate, or a negative prefix.
    """
    if requests < 1 or prefix < 0 or (rate is not None and not rate > 0):
        raise ValueError(
            f"requests={requests}, rate={rate}, prefix={prefix}: expected at least 1 request, a "
            "rate above 0 or None, and a prefix of at least 0 tokens"
        )
    prompts, outputs = (np.resize(np.array(x, np.int64), requests) for x in workloads.lengths())
    due, name = np.zeros(requests), "lognormal"
    if rate is not None:
        seconds = 2 * requests / rate + 100 / rate  # more than enough
        due, name = np.array(workloads.arrivals(rate, seconds)[:requests]), f"{rate:g}rps"
    name += f".prefix{prefix}" if prefix else ""
    return Load(name, due, prompts + prefix, outputs, prefix)


def simulate(load: Load, config: BatcherConfig, cost: CostModel, *, queue: int = QUEUE) -> Result:
    """Runs all requests to their end.

    Args:
        load: what is asked for.
        config: of the scheduler.
        cost: of the device's steps.
        queue: the most that the scheduler is shown as waiting; others are submitted as room
            appears, half a queue at a time. In order of arrival it makes no difference; `makespan`
            sorts no more than these.

    Raises:
        ValueError: a request that never fits; see `batcher.step`.
    """
    return _Loop(load, config, cost, min(queue, config.max_waiting)).run()


class _Dispatch(NamedTuple):
    action: batcher.Run
    end: float


class _Loop:
    """`Engine`'s loop without the tokens: schedule, run, observe. All arrays are by request."""

    def __init__(self, load: Load, config: BatcherConfig, cost: CostModel, queue: int) -> None:
        self.load, self.config, self.cost, self.queue = load, config, cost, queue
        self.buckets = make_buckets(config, gpu=True)
        self.state = batcher.create_state(config)
        self.events: list[batcher.Event] = []
        self.in_flight: deque[_Dispatch] = deque()
        self.preempted: set[int] = set()
        n = len(load.due)
        self.sent, self.produced = 0, np.zeros(n, np.int64)
        self.first, self.newest = np.full(n, np.nan), np.zeros(n)
        self.now = self.busy_until = 0.0
        shared = np.arange(load.prefix if config.prefix_caching else 0, dtype=np.int32)
        self.keys = page_keys(shared, config.page_size)
        self.none = self.keys[:0]
        self.gaps: list[np.ndarray] = []
        self.together = self.steps = self.dispatches = self.preemptions = 0
        self.waste = 0.0
        self.computed = self.padded = 0

    def run(self) -> Result:
        n = len(self.load.due)
        while True:
            while len(self.in_flight) < DISPATCHES_AHEAD and self._dispatch():
                pass
            if self.in_flight:
                self._observe(self.in_flight.popleft())
            elif self.sent < n and batcher.idle(self.state):
                self.now = max(self.now, float(self.load.due[self.sent]))
            elif not self.events:
                break
        if self.sent < n or not batcher.idle(self.state):
            raise RuntimeError(f"the scheduler stands still at {self.now} s: {self.state.rows}")
        return Result(
            seconds=self.now,
            steps=self.steps,
            dispatches=self.dispatches,
            output_tokens=int(self.produced.sum()),
            ttft=self.first - self.load.due,
            itl=np.concatenate([*self.gaps, np.zeros(self.together, np.float32)]),
            waste=self.waste / self.dispatches,
            preemptions=self.preemptions,
            padding=1 - self.computed / self.padded,
        )

    def _submit(self) -> None:
        """Those that are due, as many as the queue has room for."""
        due = int(np.searchsorted(self.load.due, self.now, side="right")) - self.sent
        waiting = len(self.state.waiting.ids)
        count = min(due, self.queue - waiting)
        if count <= 0 or (count < due and waiting > self.queue // 2):
            return
        ids = np.arange(self.sent, self.sent + count)
        prompts = self.load.prompts[ids]
        keys = batcher.objects([self.keys] * count)
        submit = batcher.Submit(ids, prompts, prompts + self.load.outputs[ids], ids.copy(), keys)
        self.events.append(submit)
        self.sent += count

    def _dispatch(self) -> bool:
        """Lets the scheduler decide; whether it had anything to do."""
        self._submit()
        events, self.events = tuple(self.events), []
        self.state, actions = batcher.step(self.state, events, self.config)
        run = None
        for action in actions:
            match action:
                case batcher.Run():
                    run = action
                case batcher.Preempt():
                    self.preempted.add(action.id)
                    self.preemptions += 1
                case batcher.Refuse():
                    raise AssertionError("the queue is never overfilled")
        self._return_preempted()
        if run is None:
            return False
        self.busy_until = max(self.busy_until, self.now) + self._seconds(run)
        self.in_flight.append(_Dispatch(run, self.busy_until))
        self._count()
        return True

    def _seconds(self, run: batcher.Run) -> float:
        key = step_key(
            run, Kind(), None, limits=self.config, buckets=self.buckets, invariant=True
        )
        rows = self.state.rows
        # The newest token was sampled by the step before, and is in the cache from this one on.
        held = int((rows.prompt + rows.scheduled)[run.rows].sum()) - len(run.rows)
        held -= len(run.rows) * (run.steps - 1) / 2  # in the middle of its steps
        tokens = key.tokens or key.rows
        self.steps += run.steps
        self.padded += run.steps * tokens
        read = sum(chunk.stop - chunk.start for chunk in run.chunks)
        self.computed += run.steps * len(run.rows) + read
        step = self.cost.step_ms(tokens=tokens, held=held, rows=key.rows + key.chunks)
        return run.steps * step / 1000

    def _count(self) -> None:
        """Notes the waste; as `inside.waste`."""
        rows = self.state.rows
        running = rows.id >= 0
        read = rows.prefilled >= rows.prompt
        held = np.where(read, rows.prompt + np.maximum(rows.scheduled - 1, 0), rows.prefilled)
        slots = int(rows.held.sum()) * self.config.page_size
        self.dispatches += 1
        self.waste += 1 - int(held[running].sum()) / slots

    def _observe(self, done: _Dispatch) -> None:
        """The host reads what a dispatch brought, when it ends."""
        self.now = done.end
        run = done.action
        before = self.produced[run.ids]
        brought = np.minimum(run.steps, self.load.outputs[run.ids] - before)
        if (brought < 1).any():
            raise AssertionError("a sequence decodes that has ended")
        self.together += int(brought.sum()) - len(brought)
        read = np.array([chunk.id for chunk in run.chunks if chunk.last], np.int64)
        ids = np.concatenate([run.ids, read])
        self.produced[run.ids] += brought
        self.produced[read] += 1
        begun = np.isnan(self.first[ids])
        self.first[ids[begun]] = self.now
        self.gaps.append((self.now - self.newest[ids[~begun]]).astype(np.float32))
        self.newest[ids] = self.now
        ended = ids[self.produced[ids] == self.load.outputs[ids]]
        if len(ended):
            keys = batcher.objects([self.none] * len(ended))
            self.events.append(batcher.Finished(ended, keys))
            self.preempted.difference_update(ended.tolist())
        self._return_preempted()

    def _return_preempted(self) -> None:
        """Those of which no results are on their way wait again."""
        if not self.preempted:
            return
        on_the_way = {c.id for done in self.in_flight for c in done.action.chunks}
        on_the_way.update(*(done.action.ids.tolist() for done in self.in_flight))
        for sequence in sorted(self.preempted - on_the_way):
            self.preempted.remove(sequence)
            tokens = int(self.load.prompts[sequence] + self.produced[sequence])
            self.events.append(batcher.Return(sequence, tokens, self.keys))


def configurations(args: argparse.Namespace) -> list[BatcherConfig]:
    """Every combination that was asked for; static batching also with the rows it is known for.

    As an engine, it takes no budget that is not larger than `max_num_seqs`: these are left out, and
    the output says so.
    """
    found = []
    for policy, size, budget in product(args.policy, args.page_size, args.budget):
        static = [workloads.FULL.static_rows] if policy == "static" else []
        for rows in dict.fromkeys([*static, *args.max_num_seqs]):
            if budget <= rows:
                print(f"left out: {policy}, budget {budget} with max_num_seqs {rows}")
                continue
            config = BatcherConfig(
                num_pages=args.kv_tokens // size,
                page_size=size,
                max_num_seqs=rows,
                max_model_len=MOST_TOKENS + args.prefix,
                max_num_batched_tokens=budget,
                max_steps=args.max_steps,
                policy=policy,
            )
            found.append(config)
    return found


def record_of(load: Load, config: BatcherConfig, cost: CostModel, result: Result) -> Record:
    """`simulate.lognormal.makespan.seqs1024.page64.budget2048.out_tok_s`, the rest in its detail."""
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
    made.add_argument("--policy", type=lambda text: text.split(","), default=list(POLICIES))
    made.add_argument("--page-size", type=numbers, default=[64])
    made.add_argument("--budget", type=numbers, default=[2048], help="max_num_batched_tokens")
    made.add_argument("--max-num-seqs", type=numbers, default=[1024])
    made.add_argument("--max-steps", type=int, default=1, help="decode steps a dispatch, at most")
    made.add_argument("--kv-tokens", type=int, default=KV_TOKENS, help="that the cache holds")
    made.add_argument("--requests", type=int, default=1000)
    made.add_argument("--rate", type=float, help="requests a second; all at once without")
    made.add_argument("--prefix", type=int, default=0, help="tokens that all prompts begin with")
    made.add_argument("--queue", type=int, default=QUEUE, help="requests the scheduler sees waiting")
    made.add_argument("--fit", action="store_true", help="print the formula and its residuals")
    made.add_argument("--out", type=Path, help="folder of the result file; none without")
    return made


def main() -> None:
    made = parser()
    args = made.parse_args()
    cost = costs.fit()
    if args.fit:
        costs.print_fit(cost)
        return
    if unknown := set(args.policy) - set(POLICIES):
        made.error(f"--policy {', '.join(sorted(unknown))}: expected some of {', '.join(POLICIES)}")
    try:
        load = make_load(args.requests, rate=args.rate, prefix=args.prefix)
    except ValueError as error:
        made.error(str(error))
    run = record.start(parts.command_line("bench.simulate"))
    run = replace(run, device={"kind": "simulated", "count": 1, "memory": 0})
    found = configurations(args)
    print_heading()
    for config in found:
        result = record_of(load, config, cost, simulate(load, config, cost))
        print_row(result)
        run = replace(run, records=(*run.records, result))
    if args.out:
        path = record.path_for(run, "simulate", args.out)
        record.write(run, path)
        print(path)


if __name__ == "__main__":
    main()
