"""What quantised weights cost in quality, and what they save: KL, perplexity, bytes.

    python -m bench.quality

The demo target's layers are quantised by every method, calibrated on the validation files where
that is asked for, and compared with the bfloat16 model on the start of held-out files of this
machine's standard library. Nothing of it depends on the machine's speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import parts, record
from bench.kv_quality import DEMO, windows
from bench.parts import Part, emit
from bench.record import Record
from checkpoints import load_params
from jaxinfer.models.families import read_config
from jaxinfer.models.weights import MATRICES, declare, tree_bytes
from jaxinfer.quality import compare
from jaxinfer.quant.make import Recipe
from jaxinfer.quantise import Method, quantise_params
from jaxinfer.tokenizer import load_tokenizer
from jaxinfer.training.lm import log_probs

LENGTH = 512  # tokens of each file
W8A8 = Recipe("int", 8, -1, activations="token")
METHODS = {
    "int8": Method(Recipe("int", 8, -1)),
    "int8_g64": Method(Recipe("int", 8, 64)),
    "w8a8": Method(W8A8),
    "w8a8_smoothquant": Method(W8A8, "smoothquant"),
    "fp8": Method(Recipe("fp8", 8, -1, activations="token")),
    "int4_rtn": Method(Recipe("int", 4, 64)),
    "int4_rtn_zeros": Method(Recipe("int", 4, 64, symmetric=False)),
    "nf4": Method(Recipe("nf4", 4, 64)),
    "int4_awq": Method(Recipe("int", 4, 64), "awq"),
    "int4_awq_zeros": Method(Recipe("int", 4, 64, symmetric=False), "awq"),
    "int4_gptq": Method(Recipe("int", 4, 64), "gptq"),
    "int4_gptq_zeros": Method(Recipe("int", 4, 64, symmetric=False), "gptq"),
    "int4_gptq_act_order": Method(Recipe("int", 4, 64), "gptq", act_order=True),
}


logprobs = jax.jit(log_probs, static_argnames="config")


def text(part: str, files: int) -> jax.Array:
    """The first `LENGTH` tokens of files that are as long: [B, LENGTH]."""
    tokenizer = load_tokenizer(DEMO / "target")
    long = [w[:LENGTH] for w in windows(part, tokenizer) if len(w) >= LENGTH]
    return jnp.asarray(np.stack(long[:files]))


def measure(names: list[str], files: int) -> list[Record]:
    """`quality.METHOD.mean_kl` of each, with what else there is to say of it in `detail`."""
    config = read_config(DEMO / "target")
    dense = load_params(DEMO / "target", declare(config), dtype=jnp.bfloat16)
    held_out, calibration = text("held_out", files), text("validation", 16)
    want = [np.asarray(logprobs(dense, config, t[None]))[0] for t in held_out]
    found = []
    for name in names:
        params = quantise_params(dense, config, METHODS[name], calibration)
        got = [np.asarray(logprobs(params, config, t[None]))[0] for t in held_out]
        found.append(_record(name, want, got, np.asarray(held_out), dense, params))
    return found


def _record(
    name: str, want: list[np.ndarray], got: list[np.ndarray], tokens: np.ndarray,
    dense: Any, params: Any,
) -> Record:  # fmt: skip
    values = sum(layer[m].size for layer in dense["layers"] for m in MATRICES)
    stored = sum(tree_bytes(layer[m]) for layer in params["layers"] for m in MATRICES)
    found = compare(want, got, tokens, values=values, stored=stored)
    return Record(f"quality.{name}.mean_kl", found.mean_kl, "nats", found._asdict())


def plot(run: record.Run, path: Path) -> None:
    """Quality against bytes: the mean KL of each method over the bits of its weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, one in enumerate(run.records):
        if one.value is not None:
            name = one.name.removeprefix("quality.").removesuffix(".mean_kl")
            marker = "osD^v"[index // 10]  # colours come again after ten
            axes.scatter(one.detail["bits_per_weight"], one.value, marker=marker, label=name)
    axes.set(xlabel="bits a weight, with scales", ylabel="mean KL against bf16, nats", yscale="log")
    axes.set_title("Demo target on held-out code: quality against bytes")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description="quality of quantised weights")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--files", type=int, default=24, help="held-out files")
    parser.add_argument("--plot", type=Path, help="a picture of it, such as quality.svg")
    parser.add_argument("--part", action="store_true")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        for found in measure(args.methods.split(","), args.files):
            emit(args.records, found)
        return
    measured = record.start(parts.command_line("bench.quality"))
    passed = ("--part", "--methods", args.methods, "--files", str(args.files))
    path = record.path_for(measured, "quality", args.out)
    todo = [Part("quality", "bench.quality", passed, 1800)]
    measured = parts.run_parts(todo, measured, path)
    parts.print_table(measured)
    if args.plot is not None:
        plot(measured, args.plot)


if __name__ == "__main__":
    main()
