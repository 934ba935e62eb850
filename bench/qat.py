"""What training with rounded matrices wins back, on the demo's draft.

    python -m bench.qat

Fine-tunes it on the corpus' training files with int4 and int8 matrices, and scores held-out files:
`qat.BITS.loss_over_rtn` is the held-out loss over that of rounding the same model to nearest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import parts, record
from bench.kv_quality import DEMO, windows
from bench.parts import Part, emit
from bench.record import Record
from checkpoints import load_params
from jaxinfer.config import ModelConfig
from jaxinfer.models.families import read_config
from jaxinfer.models.weights import declare
from jaxinfer.quant.make import Recipe
from jaxinfer.quantise import Method, quantise_params
from jaxinfer.tokenizer import load_tokenizer
from jaxinfer.training import qat
from jaxinfer.training.lm import log_probs, nll

LENGTH, BATCH, RATE = 256, 8, 2e-4


def pieces(part: str) -> np.ndarray:
    """Windows of `LENGTH` + 1 tokens of a part of the corpus: int32 [M, LENGTH + 1]."""
    text = np.concatenate(windows(part, load_tokenizer(DEMO / "draft")))
    count = len(text) // (LENGTH + 1)
    return text[: count * (LENGTH + 1)].reshape(count, -1)


def held_out_loss(params: Any, config: ModelConfig, text: np.ndarray) -> float:
    """Mean nats a token."""
    step = jax.jit(lambda p, t: nll(log_probs(p, config, t[:, :-1]), t[:, 1:]).mean())
    batches = [text[i : i + BATCH] for i in range(0, len(text) - BATCH + 1, BATCH)]
    return float(np.mean([step(params, jnp.asarray(b)) for b in batches]))


def measure(steps: int) -> list[Record]:
    config = read_config(DEMO / "draft")
    dense = load_params(DEMO / "draft", declare(config), dtype=jnp.bfloat16)
    train, held_out, other = (pieces(p) for p in ("train", "held_out", "validation"))
    text = jnp.asarray(other[:32, :LENGTH])
    order = np.random.default_rng(0).permutation(len(train))
    found = []
    for bits in (4, 8):
        recipe = Recipe("int", bits, 64)
        state: Any = qat.create_state(
            dense, recipe, optax.adamw(optax.cosine_decay_schedule(RATE, steps))
        )
        for i in range(steps):
            rows = np.take(order, range(i * BATCH, (i + 1) * BATCH), mode="wrap")
            state, _ = qat.train_step(state, jnp.asarray(train[rows]), config=config, recipe=recipe)
        models = {
            "bf16": dense,
            "rtn": quantise_params(dense, config, Method(recipe)),
            "gptq": quantise_params(dense, config, Method(recipe, "gptq"), text),
            "qat": qat.finish(state.params, recipe),
        }
        losses = {name: held_out_loss(p, config, held_out) for name, p in models.items()}
        detail: dict[str, Any] = {**losses, "steps": steps, "tokens": steps * BATCH * LENGTH}
        found.append(
            Record(f"qat.int{bits}.loss_over_rtn", losses["qat"] / losses["rtn"], "ratio", detail)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="training with rounded matrices")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--part", action="store_true")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        for found in measure(args.steps):
            emit(args.records, found)
        return
    measured = record.start(parts.command_line("bench.qat"))
    path = record.path_for(measured, "qat", args.out)
    todo = [Part("qat", "bench.qat", ("--part", "--steps", str(args.steps)), 1800)]
    parts.print_table(parts.run_parts(todo, measured, path))


if __name__ == "__main__":
    main()
