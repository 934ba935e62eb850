"""Decode with layers on the host: how close a step comes to what the link from the host allows.

    python -m bench.offload
    python -m bench.offload --shape llama-3.1-8b:int4 --gigabytes 3

Random weights; of the shape's layers as many stay on the device as `--gigabytes` allow: with the
cache and what steps need, the 8B shape takes less than 8 GB (`device_bytes`). In one process, on
one device: the link is measured with large copies from pinned memory, then decode at each batch
size, the greedy steps of `LLM`. `share_of_link` is streamed bytes over time over the link's
bandwidth: 1 would mean that the link never rests.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import decode, parts, record, shapes
from bench.ceilings import rotating, seconds_per_call
from bench.parts import Part, emit
from bench.record import Record
from bench.timing import step_ms

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

CONTEXT, SHORT, LONG = 128, 5, 21  # tokens: a step takes a fifth of a second
REPEATS, PAGE = 3, 32
COPIED = 1 << 28  # bytes of a copy, as large as a layer's largest matrices
LIMIT_S = 230.0


def link_bytes_per_s(nbytes: int = COPIED) -> float:
    """From pinned memory to the device, of copies that follow each other."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxinfer.offload import DEVICE, HOST, moved

    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 255, (nbytes // 1024, 1024), np.uint8) for _ in range(4)]
    far = [jax.block_until_ready(moved(jnp.asarray(x), HOST)) for x in inputs]
    call = rotating(lambda x: moved(x, DEVICE), far)
    return nbytes / seconds_per_call(call, jax.block_until_ready, calls=8)


def start(shape: str, budget: int, batches: list[int]) -> LLM:
    """An LLM of random weights, some of them on the host."""
    import jax.numpy as jnp

    from jaxinfer import LLM
    from jaxinfer.cache import page_bytes
    from jaxinfer.pages import pages_for

    config, params = shapes.model_config(shape), shapes.init_params(shape, jnp.bfloat16)
    pages = max(batches) * pages_for(CONTEXT + LONG, PAGE) + 1
    return LLM.from_params(
        params, config, device_weight_bytes=budget, page_size=PAGE,
        kv_cache_bytes=pages * page_bytes(config, PAGE, jnp.bfloat16),
        max_num_seqs=max(batches), max_model_len=CONTEXT + LONG, prefix_caching=False,
    )  # fmt: skip


def measure(shape: str, budget: int, batches: list[int], nbytes: int) -> Iterator[Record]:
    """The link, then each batch; the link once more in the end, and the faster counts."""
    links = [link_bytes_per_s(nbytes)]
    llm = start(shape, budget, batches)
    memory, short = llm.memory_plan, shapes.short(shape)
    times = {}
    for batch in batches:
        pairs = decode.timed_pairs(llm, batch, CONTEXT, repeats=REPEATS, short=SHORT, long=LONG)
        times[batch] = step_ms(pairs, SHORT, LONG)
    llm.close()
    links.append(link_bytes_per_s(nbytes))
    link = max(links)
    yield Record("offload.link.bytes_per_s", link, "bytes/s", {"of_each": links, "bytes": nbytes})
    for batch, found in times.items():
        step = statistics.median(found) / 1000
        name = f"offload.{short}.b{batch}"
        detail: dict[str, Any] = {
            "memory_plan": str(memory),
            "device_weight_bytes": budget,
            "device_bytes": memory.weights + memory.cache + memory.steps,
            "streamed_bytes": memory.host_weights,
            "context": CONTEXT,
            "ms_of_each_repeat": [round(ms, 3) for ms in found],
        }
        yield Record(f"{name}.ms_per_step", 1000 * step, "ms", detail)
        yield Record(f"{name}.tok_s", batch / step, "tok/s", {"ms_per_step": 1000 * step})
        share = memory.host_weights / step / link
        yield Record(f"{name}.share_of_link", share, "ratio", {"link_bytes_per_s": link})


def run_part(args: argparse.Namespace) -> None:
    """What the process of the part does."""
    import jax

    parts.check_platform(jax.default_backend())
    budget, nbytes = int(args.gigabytes * 1e9), min(COPIED, int(args.copied))
    for found in measure(args.shape, budget, args.batch, nbytes):
        emit(args.records, found)


def main() -> None:
    parser = argparse.ArgumentParser(description="decode with layers on the host")
    parser.add_argument("--shape", default="llama-3.1-8b", help="of bench.shapes")
    parser.add_argument("--gigabytes", type=float, default=6.5, help="of weights on the device")
    parser.add_argument("--batch", type=lambda s: [*map(int, s.split(","))], default=[1, 16])
    parser.add_argument("--copied", type=float, default=COPIED, help="bytes of a copy")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        run_part(args)
        return
    words = ("--part", "--shape", args.shape, "--gigabytes", str(args.gigabytes))
    words += ("--batch", ",".join(map(str, args.batch)), "--copied", str(args.copied))
    # The weights are made before the LLM, which could have reserved the memory itself.
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    name = f"offload.{shapes.short(args.shape)}"
    part = Part(name, "bench.offload", words, LIMIT_S, env)
    parts.run_and_print([part], "bench.offload", args.out)


if __name__ == "__main__":
    main()
