"""Host memory that loading a checkpoint takes, beside the parameters themselves.

    python -m bench.load --shape llama-3.2-1b

Writes a checkpoint of the named shape with random weights, and loads it in a process of its own. On
a CPU the parameters are host memory too: what is reported is the peak above what the process held
before and above the parameters' own size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bench import parts, record, shapes
from bench.parts import Part, emit
from bench.record import Record


def status_bytes(field: str) -> int:
    """A field of /proc/self/status such as VmHWM (peak resident memory), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def write(shape: str, folder: Path) -> None:
    """A checkpoint of the shape with random bf16 weights."""
    import jax

    from checkpoints import write_hf
    from jaxinfer.models.weights import declare, init_params

    config = shapes.model_config(shape)
    params = init_params(config, jax.random.key(0))
    write_hf(folder, params, declare(config), shapes.hf_config(shape))


def load(shape: str, folder: Path) -> list[Record]:
    """Loads it; `load.peak_rss_above_mapped_bytes` and the seconds taken."""
    import jax
    import jax.numpy as jnp

    from checkpoints import load_params
    from jaxinfer.models.weights import declare

    config = shapes.model_config(shape)
    on_host = jax.devices()[0].platform == "cpu"
    before, began = status_bytes("VmRSS"), time.perf_counter()
    params = load_params(folder, declare(config), dtype=jnp.bfloat16)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    above = status_bytes("VmHWM") - before - (size if on_host else 0)
    detail = {"shape": shape, "parameters_bytes": size, "files": "read, not mapped"}
    return [
        Record("load.peak_rss_above_mapped_bytes", above, "bytes", detail),
        Record(f"load.{shapes.short(shape)}.s", round(seconds, 2), "s", detail),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="host memory that loading takes")
    parser.add_argument("--shape", default="llama-3.2-1b", choices=shapes.HF_CONFIGS)
    parser.add_argument("--part", choices=("write", "load"), help="do this step in this process")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part == "write":
        write(args.shape, args.folder)
    elif args.part == "load":
        for found in load(args.shape, args.folder):
            emit(args.records, found)
    else:
        run = record.start(parts.command_line("bench.load"))
        path = record.path_for(run, "load", args.out)
        with tempfile.TemporaryDirectory(prefix="bench-load-") as folder:
            todo = [
                Part(f"load.{step}", "bench.load",
                     ("--part", step, "--shape", args.shape, "--folder", folder), 400)
                for step in ("write", "load")
            ]  # fmt: skip
            run = parts.run_parts(todo, run, path)
        parts.print_table(run)


if __name__ == "__main__":
    main()
