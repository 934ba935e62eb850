"""The command line of `bench.compare`: presets, sizes, and what is refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import cases, record, serving
from bench.engines import ENGINES
from bench.sizes import FULL, SHORT, SMOKE, Model, Sizes

FIXED, MIXED = ("latency", "prefill"), ("throughput", "serve")
WORKLOADS = (*FIXED, *MIXED, "memory", "startup", "quantised", "speculative")
USUAL = (*FIXED, *MIXED, "memory", "startup")
BRIEF = (*FIXED, *MIXED)  # of --short


def _list(convert: Callable[[str], Any]) -> Callable[[str], tuple]:
    return lambda text: tuple(convert(word) for word in text.split(","))


def _one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def check(word: str) -> str:
        if word not in known:
            raise ValueError(f"{word!r}: expected one of {', '.join(known)}")
        return word

    return check


def make_parser() -> argparse.ArgumentParser:
    """See the module's head; sizes that are not given are those of the preset."""
    made = argparse.ArgumentParser(description="jaxinfer beside PyTorch engines")
    made.add_argument("--model", help="a shape, such as llama-3.1-8b; demo; or a directory")
    made.add_argument("--engines", type=_list(_one_of(tuple(ENGINES))), default=tuple(ENGINES),
                      help="the first is what others are compared with")  # fmt: skip
    made.add_argument("--workloads", type=_list(_one_of(WORKLOADS)))
    preset = made.add_mutually_exclusive_group()
    preset.add_argument("--short", action="store_true", help="under 8 minutes on one GPU")
    preset.add_argument("--smoke", action="store_true", help="the demo model, tiny sizes")
    made.add_argument("--batch-size", dest="batch_sizes", type=_list(int))
    made.add_argument("--input-len", dest="input_lens", type=_list(int), help="of latency")
    made.add_argument("--output-len", dest="output_lens", type=_list(int), help="SHORT,LONG")
    made.add_argument("--prefill-len", dest="prefill_lens", type=_list(int))
    made.add_argument("--num-prompts", type=int)
    made.add_argument("--dataset-name", dest="datasets", type=_list(str))
    made.add_argument("--request-rate", dest="request_rates", type=_list(float))
    made.add_argument("--burstiness", type=_list(float), help="1: Poisson; less: bursts")
    made.add_argument("--goodput", nargs="+", help="limits in ms: ttft:250 tpot:40")
    made.add_argument("--num-iters", type=int, help="repeats of every case")
    made.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--max-num-seqs", type=int, default=256)
    made.add_argument("--quantization", type=_list(str), default=("int4",), help="of `quantised`")
    made.add_argument("--speculative", default="lookup", help="or a draft model's directory")
    made.add_argument("--engine-args", type=json.loads, default={}, help='{"jaxinfer": {…}}')
    made.add_argument("--together", type=int, help="engines loaded at once; as many as fit")
    made.add_argument("--minutes", type=float, help="until all has ended; the rest is left out")
    made.add_argument("--readme", action="store_true", help="rewrite README's table")
    made.add_argument("--out", type=Path, default=record.RESULTS)
    return made


def parse(words: list[str] | None = None) -> tuple[argparse.Namespace, Sizes]:
    """Options, with what the preset decides, and the sizes."""
    parser = make_parser()
    args = parser.parse_args(words)
    preset = SMOKE if args.smoke else SHORT if args.short else FULL
    names = ("batch_sizes", "input_lens", "output_lens", "prefill_lens", "num_prompts", "datasets",
             "request_rates", "burstiness")  # fmt: skip
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    try:
        if args.goodput:
            given["goodput"] = serving.parse_limits(args.goodput)
        sizes = replace(preset, **given)
        for dataset in sizes.datasets:
            cases.listed(Model({"vocab_size": 2}), dataset, replace(sizes, num_prompts=1), 0)
        if len(sizes.output_lens) != 2 or not 0 < sizes.output_lens[0] < sizes.output_lens[1]:
            raise ValueError(f"--output-len {sizes.output_lens}: expected SHORT,LONG, growing")
        if unknown := set(args.engine_args) - set(ENGINES):
            raise ValueError(f"--engine-args of {', '.join(unknown)}: no such engine")
    except ValueError as error:
        parser.error(str(error))
    args.workloads = args.workloads or (BRIEF if args.short else USUAL)
    args.model = args.model or ("demo" if args.smoke else "llama-3.2-1b")
    args.dtype = args.dtype or ("float32" if args.smoke else "bfloat16")
    args.num_iters = args.num_iters or (2 if args.smoke else 3)
    return args, sizes
