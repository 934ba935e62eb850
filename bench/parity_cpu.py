"""float32 parity with PyTorch on a CPU, over the golden models of `tests/goldens`.

    python -m bench.parity_cpu

The worst logit error of the forward without a cache, and the fewest greedy tokens that the engine
has in common with PyTorch before the first that differs. The tests hold the same bounds; this
records how far inside them we are.
"""

from __future__ import annotations

import argparse
from itertools import takewhile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from bench import parts, record
from bench.parts import Part, emit
from bench.record import ROOT, Record

GOLDENS = ROOT / "tests" / "goldens"
GREEDY = 32


def measure(directory: Path) -> tuple[float, int]:
    """(largest logit error over max|logit|, fewest equal greedy tokens) of one golden model."""
    from checkpoints import load_params
    from jaxinfer import LLM, SamplingParams
    from jaxinfer.models.decoder import apply
    from jaxinfer.models.families import read_config
    from jaxinfer.models.weights import declare

    golden = load_file(directory / "golden.safetensors")
    config = read_config(directory)
    params = load_params(directory, declare(config), dtype=jnp.float32)
    logits = jax.jit(lambda p, t: apply(p, config, t).logits)(params, jnp.asarray(golden["tokens"]))
    prompt, position = golden["logit_rows"].T
    error = np.abs(np.asarray(logits)[prompt, position] - golden["logits"]).max()
    rows = list(zip(golden["tokens"].tolist(), golden["prompt_lengths"].tolist(), strict=True))
    with LLM(directory, dtype="float32") as llm:
        outputs = llm.generate(
            [row[:n] for row, n in rows],
            SamplingParams(temperature=0, max_tokens=GREEDY, ignore_eos=True),
        )
    equal = [
        sum(1 for _ in takewhile(bool, map(int.__eq__, out.outputs[0].token_ids, row[n:])))
        for out, (row, n) in zip(outputs, rows, strict=True)
    ]
    return float(error / np.abs(golden["logits"]).max()), min(equal)


def run_part(path: Path | None) -> None:
    """Records the worst of all golden models."""
    models = sorted(p.parent for p in GOLDENS.glob("*/golden.safetensors"))
    found = {model.name: measure(model) for model in models}
    errors = {name: error for name, (error, _) in found.items()}
    equal = {name: tokens for name, (_, tokens) in found.items()}
    worst, fewest = max(errors.values()), min(equal.values())
    emit(path, Record("parity.cpu.max_relative_logit_error", worst, "ratio", errors))
    emit(path, Record("parity.cpu.equal_greedy_tokens", fewest, "tokens", equal))


def main() -> None:
    parser = argparse.ArgumentParser(description="float32 parity with PyTorch's goldens")
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        run_part(args.records)
        return
    run = record.start(parts.command_line("bench.parity_cpu"))
    path = record.path_for(run, "parity", args.out)
    todo = [Part("parity.cpu", "bench.parity_cpu", ("--part",), 400, {"JAX_PLATFORMS": "cpu"})]
    parts.print_table(parts.run_parts(todo, run, path))


if __name__ == "__main__":
    main()
