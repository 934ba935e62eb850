"""bf16 log-probabilities beside HF transformers', on this device.

    python -m bench.parity_gpu --shape llama-3.2-1b

HF makes a model of the named shape with random bf16 weights and saves it; random prompts are
scored by HF in float32 (the reference: the same weights, TF32 off), by HF in bf16, and by jaxinfer
in bf16: its forward without a cache (`apply`, whose whole distribution is compared) and its engine
(`llm.logprobs`, over the paged cache). What jaxinfer's error means is read off HF's own beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench import parts, record, shapes
from bench.parts import Part, emit
from bench.record import Record

PROMPTS, LENGTH = 8, 128
STD = 0.04  # of the weights: wide enough that the distributions are not flat
REFERENCE = "hf_fp32"
ROWS = 64  # of the vocabulary's width, compared at once


def make_parts(shape: str, folder: str) -> list[Part]:
    """HF, jaxinfer, the comparison; arrays go from one to the next in `folder`."""
    name = f"parity.{shapes.short(shape)}"
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}

    def part(step: str, **options: Any) -> Part:
        args = ("--part", step, "--shape", shape, "--folder", folder)
        return Part(f"{name}.{step}", "bench.parity_gpu", args, **options)

    return [part("hf", torch=True), part("jaxinfer", env=env), part("compare")]


def run_hf(shape: str, folder: Path) -> None:
    """Writes the model, the prompts and both of HF's log-probabilities."""
    import torch  # pyright: ignore[reportMissingImports]

    from bench.engines.hf import random_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts.check_platform(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = random_model(shapes.hf_config(shape), device, torch.bfloat16, STD)
    model.save_pretrained(folder / "model")
    vocab_size = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, (PROMPTS, LENGTH))
    np.save(folder / "tokens.npy", tokens)
    ids = torch.from_numpy(tokens).to(device)

    def score(name: str) -> None:
        with torch.no_grad():
            found = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)
        np.save(folder / f"{name}.npy", found.cpu().numpy())

    score("hf_bf16")
    model.float()  # every bf16 weight is a float32: the model is the same
    model.set_attn_implementation("eager")  # in plain float32, as the fused kernels may not be
    score(REFERENCE)


def run_jaxinfer(folder: Path) -> None:
    """Writes jaxinfer's log-probabilities: of `apply`, and of the engine."""
    import jax
    import jax.numpy as jnp

    from jaxinfer import LLM
    from jaxinfer.loading import load_weights
    from jaxinfer.models.decoder import apply
    from jaxinfer.models.families import read_config

    parts.check_platform(jax.default_backend())
    tokens = np.load(folder / "tokens.npy")
    with LLM(folder / "model", max_num_seqs=PROMPTS, max_model_len=2 * LENGTH) as llm:
        scored = llm.logprobs(tokens.tolist(), top=1)
        np.savez(
            folder / "jaxinfer_engine.npz",
            logprobs=np.stack([s.logprobs for s in scored]),
            top=np.stack([s.top_ids[:, 0] for s in scored]),
        )
    config = read_config(folder / "model")
    params = load_weights(folder / "model", config, jnp.bfloat16)
    score = jax.jit(lambda p, t: jax.nn.log_softmax(apply(p, config, t).logits))
    np.save(folder / "jaxinfer_apply.npy", score(params, jnp.asarray(tokens, jnp.int32)))


def compare(shape: str, folder: Path) -> list[Record]:
    """Records `parity.1b.ENGINE.FIGURE` of each engine against HF in float32."""
    tokens = np.load(folder / "tokens.npy")
    reference = np.load(folder / f"{REFERENCE}.npy", mmap_mode="r")
    following = tokens[:, 1:]
    found = []
    for engine in ("hf_bf16", "jaxinfer_apply"):
        other = np.load(folder / f"{engine}.npy", mmap_mode="r")
        figures = {
            **token_figures(
                _taken(reference, following),
                _taken(other, following),
                reference[:, :-1].argmax(-1),
                other[:, :-1].argmax(-1),
            ),
            "mean_kl": mean_kl(reference, other),
        }
        found += _records(shape, engine, figures, tokens)
    with np.load(folder / "jaxinfer_engine.npz") as engine:
        figures = token_figures(
            _taken(reference, following),
            engine["logprobs"],
            reference[:, :-1].argmax(-1),
            engine["top"],
        )
    return found + _records(shape, "jaxinfer_engine", figures, tokens)


def token_figures(
    reference: np.ndarray, other: np.ndarray, reference_top: np.ndarray, other_top: np.ndarray
) -> dict[str, float]:
    """Error of log-probabilities of the tokens that follow, and how often the likeliest agree.

    Args:
        reference, other: float [B, T].
        reference_top, other_top: int [B, T].
    """
    error = np.abs(other.astype(np.float64) - reference)
    return {
        "top1_agreement": float((reference_top == other_top).mean()),
        "mean_logprob_error": float(error.mean()),
        "max_logprob_error": float(error.max()),
    }


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over positions of KL(reference || other), nats, from log-probabilities [B, T, V]."""
    p = reference.reshape(-1, reference.shape[-1])
    q = other.reshape(-1, other.shape[-1])
    total = 0.0
    for start in range(0, len(p), ROWS):  # float64 of it all would not fit in memory
        a = p[start : start + ROWS].astype(np.float64)
        b = q[start : start + ROWS].astype(np.float64)
        total += float((np.exp(a) * (a - b)).sum())
    return total / len(p)


def _taken(logprobs: np.ndarray, following: np.ndarray) -> np.ndarray:
    return np.take_along_axis(logprobs[:, :-1], following[..., None], axis=-1)[..., 0]


def _records(
    shape: str, engine: str, figures: dict[str, float], tokens: np.ndarray
) -> list[Record]:
    detail = {"reference": REFERENCE, "prompts": list(tokens.shape), "weight_std": STD}
    units = {"top1_agreement": "ratio"}
    name = f"parity.{shapes.short(shape)}.{engine}"
    return [
        Record(f"{name}.{figure}", value, units.get(figure, "nats"), detail)
        for figure, value in figures.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="bf16 log-probabilities beside HF's")
    parser.add_argument("--shape", default="llama-3.2-1b", choices=shapes.HF_CONFIGS)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", choices=("hf", "jaxinfer", "compare"), help="run this part here")
    parser.add_argument("--folder", type=Path, help="where the parts leave their arrays")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part == "hf":
        run_hf(args.shape, args.folder)
    elif args.part == "jaxinfer":
        run_jaxinfer(args.folder)
    elif args.part == "compare":
        for found in compare(args.shape, args.folder):
            emit(args.records, found)
    else:
        run = record.start(parts.command_line("bench.parity_gpu"))
        path = record.path_for(run, "parity", args.out)
        with tempfile.TemporaryDirectory(prefix="bench-parity-") as folder:
            run = parts.run_parts(make_parts(args.shape, folder), run, path)
        parts.print_table(run)


if __name__ == "__main__":
    main()
