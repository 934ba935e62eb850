"""Does a request's result depend on how it is run? Tokens and log-probability bits.

    python -m bench.invariance --model demo,llama-3.1-8b

The same requests, half greedy and half at temperature 1 with a seed, run alone, and then:

- `batch7`, `batch64`, `all`: so many at once.
- `chunk`: another LLM over the same weights, which reads prompts in smaller chunks; a few at
  once.
- `prefix`: each of these again, its prompt found in the cache, as is checked.
- `preempt`: all at once in that LLM, whose cache is a fifth of what its rows would fill: its
  event log must show that sequences were preempted.
- `scored`: `llm.logprobs` of prompt and output, against those that came while it was generated.

`invariance.MODEL.ARRANGEMENT.tokens` and `.logprob_bits` are shares of requests that are the same
as alone. Prefixes are not shared in the first LLM, so that every batch reads its prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import inside, outcome, parts, record, shapes, start, workloads
from bench.outcome import Result
from bench.parts import Part, emit
from bench.record import Record
from jaxinfer.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

REQUESTS = {"demo": 200, "tiny": 16}  # a shape: SHAPE_REQUESTS
SHAPE_REQUESTS = 50
LONGEST_PROMPT = 300
TOKENS = (32, 160)  # output tokens; the longer ones grow over several pages
GROUPS = (7, 64)
MAX_MODEL_LEN = 512
PAGE_SIZE = 64
CHUNK = 96  # prompt tokens a step, in the other LLM
CHUNK_ROWS = 64
HELD = 5  # the cache holds one over this of what the requests in these rows come to
GROUP = 8  # one over this of the rows are used at once, so that their pages stay in the cache


@dataclass(frozen=True)
class Requests:
    """Of one model, in order."""

    prompts: tuple[list[int], ...]
    params: tuple[SamplingParams, ...]

    @property
    def pages(self) -> list[int]:
        """That each comes to."""
        lengths = [
            len(ids) + (p.max_tokens or 0) for ids, p in zip(self.prompts, self.params, strict=True)
        ]
        return [-(-n // PAGE_SIZE) for n in lengths]


def requests(n: int, vocab_size: int) -> Requests:
    """`n` of them, half greedy."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LONGEST_PROMPT, n).tolist()
    params = tuple(
        SamplingParams(
            temperature=float(i % 2), seed=i, max_tokens=int(tokens), ignore_eos=True, logprobs=0
        )
        for i, tokens in enumerate(rng.choice(TOKENS, n))
    )
    return Requests(workloads.random_ids(1, lengths, vocab_size), params)


def run(llm: LLM, asked: Requests, size: int, times: int = 1) -> list[list[RequestOutput]]:
    """All requests, `size` at once, and each such group `times` times: the outputs of each time."""
    outputs: list[list[RequestOutput]] = [[] for _ in range(times)]
    for at in range(0, len(asked.prompts), size):
        group = slice(at, at + size)
        for found in outputs:
            found += llm.generate(asked.prompts[group], asked.params[group])
    return outputs


def results(outputs: Sequence[RequestOutput]) -> list[Result]:
    return [outcome.of(output) for output in outputs]


def scored(llm: LLM, outputs: Sequence[RequestOutput]) -> list[Result]:
    """The same results with the log-probabilities that `llm.logprobs` gives."""
    sequences = [[*out.prompt_token_ids, *out.outputs[0].token_ids] for out in outputs]
    found = []
    for output, score in zip(outputs, llm.logprobs(sequences), strict=True):
        own = score.logprobs[len(output.prompt_token_ids) - 1 :]
        found.append(outcome.of(output)._replace(bits=np.asarray(own, np.float32).tobytes()))
    return found


def share_records(
    stem: str, base: Sequence[Result], other: Sequence[Result], detail: dict[str, Any]
) -> list[Record]:
    """Shares of requests with the same tokens, and with the same bits."""
    detail = {**detail, "requests": len(base), "digest": outcome.digest(base)}
    found = []
    for kind in Result._fields:
        same = [getattr(a, kind) == getattr(b, kind) for a, b in zip(base, other, strict=True)]
        name = f"{stem}.{'logprob_bits' if kind == 'bits' else kind}"
        found.append(Record(name, sum(same) / len(same), "ratio", detail))
    return found


def measure(model: start.Model, n: int, given: dict[str, Any]) -> Iterator[Record]:
    """All arrangements of one model, on two LLMs, one after the other."""
    stem = f"invariance.{model.name}"
    asked = requests(n, model.config.vocab_size)
    options = {"max_num_seqs": n, "max_model_len": MAX_MODEL_LEN, "page_size": PAGE_SIZE, **given}
    llm = start.start(model, {**options, "prefix_caching": False})
    start.warm_up(llm, (start.LOGPROBS,))
    (outputs,) = run(llm, asked, 1)
    alone = results(outputs)
    detail = {"dtype": model.dtype, "options": options}
    for size in (*(g for g in GROUPS if g < n), n):
        (together,) = run(llm, asked, size)
        name = "all" if size == n else f"batch{size}"
        yield from share_records(f"{stem}.{name}", alone, results(together), detail)
    checked = scored(llm, outputs)
    yield share_records(f"{stem}.scored", alone, checked, detail)[1]
    start.close(llm)
    yield from _with_little_memory(model, asked, alone, options)


def _with_little_memory(
    model: start.Model, asked: Requests, alone: list[Result], options: dict[str, Any]
) -> Iterator[Record]:
    """`chunk`, `prefix` and `preempt`, in an LLM with few pages, small chunks, prefixes shared."""
    from jaxinfer.cache import page_bytes

    stem = f"invariance.{model.name}"
    rows, n = min(len(alone), CHUNK_ROWS), len(alone)
    pages = 1 + max(sum(asked.pages) * rows // (n * HELD), MAX_MODEL_LEN // PAGE_SIZE)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        log = os.path.join(folder, "events.jsonl")
        other = {
            **options,
            "max_num_batched_tokens": CHUNK,
            "max_num_seqs": rows,
            "kv_cache_bytes": pages * page_bytes(model.config, PAGE_SIZE, model.dtype),
            "event_log": log,
        }
        llm = start.start(model, other)
        start.warm_up(llm, (start.LOGPROBS,))
        detail = {"dtype": model.dtype, "options": other}
        chunked, again = run(llm, asked, max(1, rows // GROUP), times=2)
        yield from share_records(f"{stem}.chunk", alone, results(chunked), detail)
        cached = [output.num_cached_tokens for output in again]
        if not any(cached):
            yield Record(f"{stem}.prefix.failed", None, error="no prompt was found in the cache")
        else:
            reuse = {**detail, "cached_tokens": sum(cached), "reused": sum(map(bool, cached))}
            yield from share_records(f"{stem}.prefix", alone, results(again), reuse)
        before = inside.logged_preemptions(Path(log))
        (crowded,) = run(llm, asked, n)
        detail["preemptions"] = inside.logged_preemptions(Path(log)) - before
        if not detail["preemptions"]:
            yield Record(f"{stem}.preempt.failed", None, error="nothing was preempted")
        else:
            yield from share_records(f"{stem}.preempt", alone, results(crowded), detail)
        start.close(llm)


def make_parts(*models: str, llm: dict[str, Any] | None = None) -> list[Part]:
    """A process for each: `demo`, or a shape of `bench.shapes`."""
    return [
        Part(
            f"invariance.{shapes.short(model)}",
            "bench.invariance",
            ("--part", "--model", model, "--llm", json.dumps(llm or {})),
            420,
            start.ENV,
        )
        for model in models
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="the same requests, run in other ways")
    parser.add_argument("--model", type=lambda text: text.split(","), default=["demo"])
    parser.add_argument("--llm", type=json.loads, default={}, help="options of LLM, as JSON")
    parser.add_argument("--requests", type=int, help="how many; fewer are faster")
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        (model,) = args.model
        n = args.requests or REQUESTS.get(model, SHAPE_REQUESTS)
        for found in measure(start.load(model), n, args.llm):
            emit(args.records, found)
        return
    run = record.start(parts.command_line("bench.invariance"))
    path = record.path_for(run, "invariance", args.out)
    parts.print_table(parts.run_parts(make_parts(*args.model, llm=args.llm), run, path))


if __name__ == "__main__":
    main()
