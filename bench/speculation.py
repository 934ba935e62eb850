"""How many guesses hold: the demo's pair on held-out code, by proposer, rule and temperature.

    python -m bench.speculation

Each prompt is the beginning of a held-out file of this machine's standard library; the model goes
on from there. Acceptance is that of each attempted token: guesses up to and including the first
that is refused. `mean_added` is what a step adds, between 1 and k + 1. Nothing of it depends on
the machine's speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bench import parts, record
from bench.kv_quality import DEMO, windows
from bench.parts import Part, emit
from bench.record import Record
from checkpoints import load_params
from jaxinfer.acceptance import count, prepare
from jaxinfer.config import Method, Rule, Speculative
from jaxinfer.models.families import read_config
from jaxinfer.models.weights import declare
from jaxinfer.skipping import choose_layers
from jaxinfer.tokenizer import load_tokenizer

PROMPT, MORE = 128, 128  # tokens
CASES: tuple[tuple[Method, Rule, float], ...] = (
    ("draft", "shared", 0.0),
    ("draft", "shared", 0.7),
    ("draft", "shared", 1.0),
    ("draft", "rejection", 0.7),
    ("draft", "rejection", 1.0),
    ("lookup", "shared", 0.0),
    ("lookup", "shared", 0.7),
    ("skip", "shared", 0.0),
    ("skip", "shared", 0.7),
)
SKIPPED = 4  # of the target's 8 layers, chosen on the validation files


def load_pair(dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configs and weights of the demo's `target` and `draft`."""
    configs = {name: read_config(DEMO / name) for name in ("target", "draft")}
    weights = {
        name: load_params(DEMO / name, declare(config), dtype=dtype)
        for name, config in configs.items()
    }
    return configs, weights


def measure(
    configs: dict[str, Any], params: dict[str, Any], prompts: list[list[int]],
    proposer: Method, rule: Rule, temperature: float, k: int, dtype: Any, skip: tuple[int, ...],
) -> list[Record]:  # fmt: skip
    """Acceptance and mean accepted length over all prompts."""
    how = Speculative(proposer, rule=rule, skip=skip if proposer == "skip" else ())
    run, configs = prepare(configs, how, temperature)
    found = count(
        run, params, configs, prompts, more=MORE, k=k, dtype=dtype, temperature=temperature
    )
    detail = {
        "proposer": proposer, "rule": rule, "temperature": temperature, "k": k,
        "prompts": len(prompts), "prompt_tokens": PROMPT, "tokens": MORE, "dtype": str(dtype),
        **found._asdict(),
    }  # fmt: skip
    if how.skip:
        detail["skip"] = how.skip
    name = f"speculation.demo.{proposer}.{rule}.t{temperature:g}.k{k}"
    return [
        Record(f"{name}.acceptance", round(found.acceptance, 4), "ratio", detail),
        Record(f"{name}.mean_added", round(found.mean_added, 4), "tokens", detail),
    ]


def run_part(args: argparse.Namespace) -> None:
    dtype = jnp.dtype(args.dtype)
    configs, params = load_pair(dtype)
    tokenizer = load_tokenizer(DEMO / "target")
    long = [w for w in windows("held_out", tokenizer) if len(w) >= PROMPT]
    prompts = [w[:PROMPT].tolist() for w in long[: args.prompts]]
    cases = [case for case in CASES if case[0] in args.proposers]
    skip = ()
    if any(proposer == "skip" for proposer, *_ in cases):
        some = [w[:256] for w in windows("validation", tokenizer) if len(w) >= 256]
        skip = choose_layers(params["target"], configs["target"], np.stack(some[:8]), SKIPPED)
    for case in cases:
        for found in measure(configs, params, prompts, *case, args.k, dtype, skip):
            emit(args.records, found)


def main() -> None:
    parser = argparse.ArgumentParser(description="how many guesses hold, on the demo's pair")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("-k", type=int, default=4, help="guesses of a step")
    parser.add_argument("--dtype", default="float32")
    proposers = list(dict.fromkeys(case[0] for case in CASES))
    parser.add_argument("--proposers", nargs="*", default=proposers, choices=proposers)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        run_part(args)
        return
    run = record.start(parts.command_line("bench.speculation"))
    options = ["--part", "--prompts", str(args.prompts), "-k", str(args.k), "--dtype", args.dtype]
    options += ["--proposers", *args.proposers]
    part = Part("speculation", "bench.speculation", tuple(options), 3600)
    parts.print_table(parts.run_parts([part], run, record.path_for(run, "speculation", args.out)))


if __name__ == "__main__":
    main()
