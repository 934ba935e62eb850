"""Does a request's result depend on what it is batched with? Tokens and log-probability bits.

    python -m bench.invariance --model demo

The same requests, half of them greedy, are run alone, a few at a time, and all at once; every
token and every bit of every log-probability is compared with the run alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench import parts, record
from bench.parts import Part, emit
from bench.record import Record

REQUESTS, TOKENS, FEW = 48, 32, 7
LONGEST_PROMPT = 300

Results = list[tuple[tuple[int, ...], bytes]]  # of each request: tokens, log-probabilities


def make_parts(model: str) -> list[Part]:
    """One process."""
    return [Part("invariance", "bench.invariance", ("--part", "--model", model), 120)]


def run_part(path: Path | None, model: str) -> None:
    """Records the share of requests that come out the same, for each arrangement."""
    import jax

    from jaxinfer import LLM, SamplingParams

    parts.check_platform(jax.default_backend())
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    rng = np.random.default_rng(0)
    with LLM(model, dtype=dtype, max_num_seqs=REQUESTS, max_model_len=512) as llm:
        lengths = rng.integers(1, LONGEST_PROMPT, REQUESTS)
        prompts = [rng.integers(0, llm.config.vocab_size, n).tolist() for n in lengths]
        params = [
            SamplingParams(
                temperature=0.8 * (i % 2), seed=i, max_tokens=TOKENS, ignore_eos=True, logprobs=0
            )
            for i in range(REQUESTS)
        ]

        def run(rows: Sequence[int]) -> Results:
            outputs = llm.generate([prompts[i] for i in rows], [params[i] for i in rows])
            found = []
            for completion in (output.outputs[0] for output in outputs):
                assert completion.logprobs is not None
                entries = zip(completion.logprobs, completion.token_ids, strict=True)
                bits = np.array([entry[t].logprob for entry, t in entries], np.float32)
                found.append((completion.token_ids, bits.tobytes()))
            return found

        def arranged(size: int) -> Results:
            groups = [range(REQUESTS)[at : at + size] for at in range(0, REQUESTS, size)]
            return [result for group in groups for result in run(group)]

        alone = arranged(1)
        for name, size in (("few", FEW), ("all", REQUESTS)):
            together = arranged(size)
            detail = {"model": model, "dtype": dtype, "requests": REQUESTS, "tokens": TOKENS}
            detail["at_once"] = size
            for kind, part in (("tokens", 0), ("logprob_bits", 1)):
                same = [a[part] == b[part] for a, b in zip(alone, together, strict=True)]
                emit(
                    path, Record(f"invariance.{name}.{kind}", np.mean(same).item(), "ratio", detail)
                )


def main() -> None:
    parser = argparse.ArgumentParser(description="the same requests in other batches")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        run_part(args.records, args.model)
        return
    run = record.start(parts.command_line("bench.invariance"))
    path = record.path_for(run, "invariance", args.out)
    parts.print_table(parts.run_parts(make_parts(args.model), run, path))


if __name__ == "__main__":
    main()
