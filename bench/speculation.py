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

from bench import parts, record
from bench.kv_quality import DEMO, windows
from bench.parts import Part, emit
from bench.record import Record
from checkpoints import load_params
from jaxinfer.acceptance import count, prepare
from jaxinfer.config import Rule
from jaxinfer.models.families import read_config
from jaxinfer.models.weights import declare
from jaxinfer.tokenizer import load_tokenizer

PROMPT, MORE = 128, 128  # tokens
CASES: tuple[tuple[str, Rule, float], ...] = (
    ("draft", "shared", 0.0),
    ("draft", "shared", 0.7),
    ("draft", "shared", 1.0),
    ("draft", "rejection", 0.7),
    ("draft", "rejection", 1.0),
    ("lookup", "shared", 0.0),
    ("lookup", "shared", 0.7),
)


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
    proposer: str, rule: Rule, temperature: float, k: int, dtype: Any,
) -> list[Record]:  # fmt: skip
    """Acceptance and mean accepted length over all prompts."""
    run, configs = prepare(configs, proposer, rule, temperature)
    found = count(
        run, params, configs, prompts, more=MORE, k=k, dtype=dtype, temperature=temperature
    )
    detail = {
        "proposer": proposer, "rule": rule, "temperature": temperature, "k": k,
        "prompts": len(prompts), "prompt_tokens": PROMPT, "tokens": MORE, "dtype": str(dtype),
        **found._asdict(),
    }  # fmt: skip
    name = f"speculation.demo.{proposer}.{rule}.t{temperature:g}.k{k}"
    return [
        Record(f"{name}.acceptance", round(found.acceptance, 4), "ratio", detail),
        Record(f"{name}.mean_added", round(found.mean_added, 4), "tokens", detail),
    ]


def run_part(args: argparse.Namespace) -> None:
    dtype = jnp.dtype(args.dtype)
    configs, params = load_pair(dtype)
    long = [w for w in windows("held_out", load_tokenizer(DEMO / "target")) if len(w) >= PROMPT]
    prompts = [w[:PROMPT].tolist() for w in long[: args.prompts]]
    for case in CASES:
        for found in measure(configs, params, prompts, *case, args.k, dtype):
            emit(args.records, found)


def main() -> None:
    parser = argparse.ArgumentParser(description="how many guesses hold, on the demo's pair")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("-k", type=int, default=4, help="guesses of a step")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        run_part(args)
        return
    run = record.start(parts.command_line("bench.speculation"))
    options = ("--part", "--prompts", str(args.prompts), "-k", str(args.k), "--dtype", args.dtype)
    part = Part("speculation", "bench.speculation", options, 1800)
    parts.print_table(parts.run_parts([part], run, record.path_for(run, "speculation", args.out)))


if __name__ == "__main__":
    main()
