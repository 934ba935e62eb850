"""Output tokens a second of 1000 requests at once, with lognormal lengths, in one `generate` call.

    python -m bench.throughput --measure throughput,static --shape llama-3.1-8b

`static` is the same engine under `policy="static"`: batches of 32 in order of arrival, each run to
the end of its longest. Of the first 128 requests it is measured; to the whole list it is scaled by
decode steps, of which a batch takes as many as its longest output. Other engines: `bench.compare`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bench import measuring, start, workloads
from bench.measuring import Measurement, Setup
from bench.record import Record
from bench.workloads import Scale, Workload

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

SEED = 100  # of the ids, and those of later runs follow: no two runs share a prefix


def seconds(llm: LLM, load: Workload) -> float:
    """Of one `generate` call with all the requests; they get the tokens that they asked for."""
    params = load.params
    began = time.perf_counter()
    outputs = llm.generate(load.prompts, params)
    took = time.perf_counter() - began
    got = [len(output.outputs[0].token_ids) for output in outputs]
    if got != list(load.tokens):
        wrong = sum(a != b for a, b in zip(got, load.tokens, strict=True))
        raise RuntimeError(f"{wrong} of {len(got)} requests did not get the tokens they asked for")
    return took


def measure(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`throughput.8b.out_tok_s`."""
    scale, vocab_size = setup.scale, llm.config.vocab_size

    def fresh(seed: int) -> Workload:
        return workloads.lognormal(scale, vocab_size, seed)

    _, runs = start.until_warm(llm, lambda i: seconds(llm, fresh(SEED + i)))
    each = [seconds(llm, fresh(SEED + start.MOST_RUNS + i)) for i in range(setup.repeats)]
    load, took = fresh(SEED), statistics.median(each)
    detail = {**setup.detail, **runs, "wall_s_of_each": each}
    yield _record(f"throughput.{setup.name}", load, took, detail)


def measure_static(llm: LLM, setup: Setup) -> Iterator[Record]:
    """`throughput.8b.static.out_tok_s`, scaled to the whole list."""
    scale, vocab_size = setup.scale, llm.config.vocab_size
    rows, n = scale.static_rows, scale.static_requests
    load = workloads.lognormal(scale, vocab_size, SEED + 20)  # of the others only the ids differ

    def once(i: int) -> float:
        return seconds(llm, workloads.lognormal(scale, vocab_size, SEED + 20 + i).first(n))

    took, runs = start.until_warm(llm, once)
    steps, all_steps = (workloads.longest_of_batches(load.tokens[:k], rows) for k in (n, None))
    detail = {
        **setup.detail,
        **runs,
        "batch": rows,
        "requests_measured": n,
        "wall_s": took,
        "out_tok_s_of_those": sum(load.tokens[:n]) / took,
        "scaled_by": "decode steps: of each batch, as many as its longest output",
        "decode_steps": [steps, all_steps],
    }
    value = load.output_tokens / (took * all_steps / steps)
    yield Record(f"throughput.{setup.name}.static.out_tok_s", value, "tok/s", detail)


def derived(records: Sequence[Record]) -> list[Record]:
    """`.over_static`."""
    rates = {r.name: r for r in records if r.value and r.name.endswith(".out_tok_s")}
    found = []
    for name, ours in rates.items():
        stem, _, rest = name.removesuffix(".out_tok_s").partition(".")
        if stem != "throughput" or "." in rest:
            continue
        if static := rates.get(f"throughput.{rest}.static.out_tok_s"):
            found.append(_ratio(f"throughput.{rest}.over_static", ours, static))
    return found


def _ratio(name: str, ours: Record, theirs: Record) -> Record:
    assert ours.value is not None
    assert theirs.value is not None
    return Record(name, ours.value / theirs.value, "ratio", {ours.name: ours.value})


def _record(name: str, load: Workload, took: float, detail: dict) -> Record:
    counts = {
        "requests": len(load.prompts),
        "input_tokens": load.input_tokens,
        "output_tokens": load.output_tokens,
        "wall_s": took,
    }
    return Record(f"{name}.out_tok_s", load.output_tokens / took, "tok/s", {**counts, **detail})


def _static_options(scale: Scale) -> dict:
    return {"max_num_seqs": scale.static_rows}


MEASUREMENTS = {
    "throughput": Measurement(measure, 150.0, policy="makespan", start_s=400.0),
    "static": Measurement(measure_static, 150.0, options=_static_options, policy="static"),
}


if __name__ == "__main__":
    measuring.main("bench.throughput", MEASUREMENTS, derived=derived)
