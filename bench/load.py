"""Memory that loading a checkpoint takes: the host's, beside the parameters, and the GPU's.

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
from jaxinfer.known_models import RECIPES


def status_bytes(field: str) -> int:
    """A field of /proc/self/status such as VmHWM (peak resident memory), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def write(shape: str, folder: Path) -> None:
    """A checkpoint of the shape with random weights: bf16, or in compressed-tensors' format."""
    import jax.numpy as jnp

    from checkpoints import write_hf
    from checkpoints.formats.export import Writer, quantization_config
    from jaxinfer.models.weights import declare
    from jaxinfer.quant.make import Recipe

    weights, hf = declare(shapes.model_config(shape)), shapes.hf_config(shape)
    params = shapes.init_params(shape, jnp.bfloat16)
    quantised = shape.partition(":")[2]
    if not quantised:
        write_hf(folder, params, weights, hf)
        return
    said = quantization_config(Recipe(**RECIPES[quantised]))
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer(folder)
    writer.write(*({k: v for k, v in tree.items() if k != "layers"} for tree in (params, weights)))
    for layer, weight in zip(params["layers"], weights["layers"], strict=True):
        writer.write(layer, weight)
    writer.close({**hf, "quantization_config": said})


def load(shape: str, folder: Path) -> list[Record]:
    """Loads it as an LLM does; the host's and the GPU's memory, and the seconds taken."""
    import jax
    import jax.numpy as jnp

    from jaxinfer.loading import load_weights
    from jaxinfer.models.weights import tree_bytes
    from jaxinfer.quant import pack_params

    (device,) = jax.devices()[:1]
    before, began = status_bytes("VmRSS"), time.perf_counter()
    params = load_weights(folder, shapes.model_config(shape), jnp.bfloat16)
    params = jax.block_until_ready(pack_params(params, jnp.bfloat16, consume=True))
    seconds, size = time.perf_counter() - began, tree_bytes(params)
    above = status_bytes("VmHWM") - before - (size if device.platform == "cpu" else 0)
    detail = {"shape": shape, "parameters_bytes": size, "files": "read, not mapped"}
    name = f"load.{shapes.short(shape)}"
    found = [
        Record("load.peak_rss_above_mapped_bytes", above, "bytes", detail),
        Record(f"{name}.s", round(seconds, 2), "s", detail),
        Record(f"{name}.weight_bytes", size, "bytes", detail),
    ]
    if stats := device.memory_stats():
        peak = stats["peak_bytes_in_use"]
        found.append(Record(f"{name}.device_peak_bytes", peak, "bytes", detail))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="host memory that loading takes")
    parser.add_argument("--shape", default="llama-3.2-1b", help="or llama-3.1-8b:int4")
    parser.add_argument("--part", choices=("write", "load"), help="do this step in this process")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    shapes.hf_config(args.shape)
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
