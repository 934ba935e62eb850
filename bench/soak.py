"""Random load with all pages taken: every request right, nothing compiled, memory as planned.

    python -m bench.soak --seconds 120 --shape llama-3.1-8b

For so many seconds new requests are added whenever those under way could grow to less than twice
the KV cache: sequences are preempted. Some requests are cancelled, before or after
their first tokens. Some of those that have ended are asked for again with one of their tokens as
stop token. In the end a random sample is run again, each alone, and must give the same tokens.
A failure is a request that came to anything but what it asked for.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench import inside, measuring, outcome, soak_requests, start, workloads
from bench.measuring import Measurement, Setup
from bench.record import Record
from bench.soak_requests import Ask
from jaxinfer.types import RequestOutput

if TYPE_CHECKING:
    from jaxinfer.llm import LLM
    from jaxinfer.requests import Request

SEED = 600
KINDS = (start.LOGPROBS,)  # the programs that these need serve all others too
OVERCOMMIT = 2.0
SAMPLE = 24  # of the requests run again; as many as fit in SAMPLE_S
SAMPLE_S = 25.0
SHORT_ENOUGH = 200  # output tokens, of those run again
WARM_SHARE = 0.3  # of the time, before steps compiled are counted, where nothing warms up ahead
SHOWN = 10


@dataclass
class Load:
    """What is under way, and what came of the rest."""

    live: dict[int, tuple[Ask, Request, int]] = field(default_factory=dict)  # and tokens so far
    done: list[tuple[Ask, RequestOutput]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    growth: int = 0  # tokens that those under way may come to
    number: int = 0

    def add(self, llm: LLM, ask: Ask) -> None:
        """Begins a request."""
        request = llm.prepare(ask.prompt, ask.params, priority=ask.priority)
        llm.submit([request])
        self.live[self.number] = (ask, request, 0)
        self.number += 1
        self.growth += ask.most_tokens

    def turn(self, llm: LLM) -> list[tuple[Ask, RequestOutput]]:
        """One turn of the engine; what has ended in it, and was right."""
        llm.pump()
        ended = []
        for number, (ask, request, had) in list(self.live.items()):
            assert request.deltas is not None
            result = None
            while request.deltas:
                delta = request.deltas.popleft()
                had += len(delta.token_ids)
                result = delta.result or result
            self.live[number] = (ask, request, had)
            cancelled = ask.cancel_after is not None and had >= ask.cancel_after
            if not (request.finished or request.failed or cancelled):
                continue
            del self.live[number]
            self.growth -= ask.most_tokens
            if request.failed or (result is None and not cancelled):
                self.failures.append(f"{_shown(ask)}: {request.failed or 'no result'}")
            elif cancelled and not request.finished:
                llm.cancel([request])
                self.counts["cancelled"] += 1
            elif result is not None:
                ended += self._judge(ask, result)
        return ended

    def _judge(self, ask: Ask, output: RequestOutput) -> list[tuple[Ask, RequestOutput]]:
        self.counts["finished"] += 1
        self.counts["tokens"] += sum(len(one.token_ids) for one in output.outputs)
        self.counts["stopped"] += any(one.finish_reason == "stop" for one in output.outputs)
        self.counts["cached"] += output.num_cached_tokens
        if said := soak_requests.wrong(ask, output):
            self.failures.append(f"{_shown(ask)}: {said}")
            return []
        self.done.append((ask, output))
        return [(ask, output)]


def run(llm: LLM, setup: Setup, load: Load, r: random.Random) -> int:
    """Fills and drains the engine; returns the steps compiled after the warm-up."""
    pages = llm.memory_plan.num_pages - 1
    target = OVERCOMMIT * pages * llm.memory_plan.page_size
    most = 2 * setup.scale.rows  # requests under way, more than which the rows cannot take
    source = soak_requests.asks(setup.scale, llm.config.vocab_size, SEED)
    began, compiled = time.monotonic(), None
    warm = 0.0 if hasattr(llm, "warm_up") else WARM_SHARE * setup.seconds
    pending: list[Ask] = []
    while (now := time.monotonic() - began) < setup.seconds or load.live:
        if compiled is None and now >= warm:
            compiled = llm.engine.compiler.count
        while now < setup.seconds and load.growth < target and len(load.live) < most:
            load.add(llm, pending.pop() if pending else next(source))
        for ask, output in load.turn(llm):
            if ask.expected is None and r.random() < soak_requests.AGAIN:
                pending.append(soak_requests.again(ask, output, r))
    load.counts["seconds"] = round(time.monotonic() - began)
    return llm.engine.compiler.count - (compiled or 0)


def alone(
    llm: LLM, done: Sequence[tuple[Ask, RequestOutput]], r: random.Random
) -> tuple[list[str], dict[str, int]]:
    """Runs a random sample again, each by itself: those with other tokens; and how many there were,
    and how many had other log-probabilities."""
    short = [x for x in done if (x[0].params.max_tokens or 0) <= SHORT_ENOUGH]
    latest, failures, counts = time.monotonic() + SAMPLE_S, [], Counter()
    for ask, output in r.sample(short, min(SAMPLE, len(short))):
        if time.monotonic() > latest:
            break
        (again,) = llm.generate([ask.prompt], ask.params)
        new, old = outcome.of(again), outcome.of(output)
        counts["run_again_alone"] += 1
        counts["of_those_other_logprobs"] += new.bits != old.bits
        if new.tokens != old.tokens:
            failures.append(f"{_shown(ask)}: other tokens when run alone")
    return failures, counts


def measure(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`soak.8b.requests`, `.failures`, `.compiles`, and on a GPU `.peak_over_plan`."""
    load, r, stem = Load(), random.Random(SEED), f"soak.{setup.name}"
    try:
        with inside.preemptions(llm) as preempted:
            compiles = run(llm, setup, load, r)
        different, again = alone(llm, load.done, r)
    finally:
        llm.cancel([request for _, request, _ in load.live.values()])
    failures = load.failures + different
    llm.pump()  # takes note of the last ones' end
    if slots := inside.waste(llm)[1]:
        failures.append(f"{slots} slots are granted still, with nothing under way")
    detail: dict[str, Any] = {
        **setup.detail,
        **load.counts,
        **again,
        "preemptions": preempted.count,
    }
    if not preempted.count:
        failures.append("nothing was preempted: the load was too small for this cache")
    yield Record(f"{stem}.requests", load.number, "requests", detail)
    shown = {"first": failures[:SHOWN]}
    yield Record(f"{stem}.failures", len(failures), "requests", shown)
    ahead = "warm_up" if hasattr(llm, "warm_up") else f"after {WARM_SHARE:.0%} of the time"
    yield Record(f"{stem}.compiles", compiles, "programs", {"counted_from": ahead})
    yield from _peak(llm, stem)


def _peak(llm: LLM, stem: str) -> Iterator[Record]:
    """Of the process so far, over what it may use; nothing where the device does not say."""
    import jax

    stats, plan = jax.devices()[0].memory_stats() or {}, llm.memory_plan
    if plan.limit is None or "peak_bytes_in_use" not in stats:
        return
    peak = stats["peak_bytes_in_use"]
    detail = {
        "peak_bytes": peak,
        "limit": plan.limit,
        "over_weights_cache_steps": peak / (plan.weights + plan.cache + plan.steps),
    }
    yield Record(f"{stem}.peak_over_plan", peak / plan.limit, "ratio", detail)


def _shown(ask: Ask) -> str:
    return f"prompt of {len(ask.prompt)}, {ask.params}, priority {ask.priority}"


MEASUREMENTS = {
    "soak": Measurement(measure, 120.0, KINDS, workloads.for_soak),
}


if __name__ == "__main__":
    measuring.main("bench.soak", MEASUREMENTS)
