"""What sampling costs beside a greedy choice, on the device, and the truncation alone.

    python -m bench.sampling

Prints and records of each case ms a call: `sampling.CASE.sS.ms`, where CASE is `greedy`, `random`
(temperature), `truncated` (with top-k, top-p and min-p in every row) or `threshold` (what is found
for it, alone), and S the rows. `threshold-reference` is the definition of that, `threshold-top_k`
and `threshold-top_p` the op with one of them alone. Before they are timed, thresholds are checked
against a sort, and the kernel's against the definition's. Calls are enqueued one after the other
over rotating logits and waited for once.

    python -m bench.sampling --rows 64 --part 64 --config '{"warpgroups": 8, "tile": 1024}'

tries another `threshold_mosaic.Config`, in this process, and records nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import parts, record
from bench.parts import Part, emit
from bench.record import Record
from jaxinfer.profiling.ceilings import rotating, seconds_per_call

VOCAB = 128_256
ROWS = (1, 8, 64, 256, 1024)
TOP_K, TOP_P, MIN_P = 1000, 0.95, 1e-4
BUFFERS = 4  # logits that are rotated; fewer where they are large


def make_parts(rows: Sequence[int], vocab: int) -> list[Part]:
    """A process for each number of rows."""
    args = ("--vocab", str(vocab))
    return [Part(f"sampling.s{s}", "bench.sampling", ("--part", str(s), *args), 180) for s in rows]


def check(logits: Any, found: Any) -> None:
    """Raises RuntimeError where the first row's threshold is not what a sort says (float64)."""
    import numpy as np

    x = np.asarray(logits[0])
    likelier = -np.sort(-x)
    kept = likelier[(likelier >= likelier[TOP_K - 1]) & (likelier >= np.log(np.float32(MIN_P)))]
    sums = np.cumsum(np.exp(kept.astype(np.float64)))
    expected = kept[int(np.searchsorted(sums, np.float32(TOP_P) * sums[-1]))]
    if float(found[0]) != expected:
        raise RuntimeError(f"threshold {float(found[0])}, by a sort {expected}")


def sampling_part(path: Path | None, S: int, V: int, tuning: dict[str, Any] | None) -> None:
    """Every case at S rows."""
    import jax
    import jax.numpy as jnp

    from jaxinfer import sampling
    from jaxinfer.types import SamplingParams
    from pallas_kernels.threshold import threshold

    parts.check_platform(jax.default_backend())
    params = SamplingParams(temperature=0.8, top_k=TOP_K, top_p=TOP_P, min_p=MIN_P)
    packed = [
        sampling.pack_row(params, seed=s, sample=0, stop_ids=(), min_length=0) for s in range(S)
    ]
    rows = jax.tree.map(jnp.asarray, sampling.stack_rows(packed))
    positions = jnp.arange(S, dtype=jnp.int32)

    @jax.jit
    def make(key: jax.Array) -> jax.Array:
        x = 3 * jax.random.normal(key, (S, V))
        return x - jnp.max(x, axis=-1, keepdims=True)

    wait = jax.block_until_ready
    keys = jax.random.split(jax.random.key(0), BUFFERS if S <= 64 else 2)
    logits = [wait(make(key)) for key in keys]
    config = None
    if tuning is not None:
        from pallas_kernels.threshold_mosaic import Config

        config = Config(**tuning)

    def finder(top_k: Any, top_p: Any, min_p: Any, backend: Any = "auto") -> Any:
        return jax.jit(lambda x: threshold(x, top_k, top_p, min_p, backend=backend, config=config))

    how, zeros = (rows.top_k, rows.top_p, rows.min_p), jnp.zeros(S)
    find, define = finder(*how), finder(*how, "reference")
    if V > TOP_K:
        check(logits[0], find(logits[0]))
    for x in logits:
        different = int(jnp.sum(find(x) != define(x)))
        if different:
            raise RuntimeError(f"{different} of {S} rows have another threshold than the reference")

    def draw(x: jax.Array, *, truncated: bool, random: bool) -> jax.Array:
        return sampling.sample(x, rows, positions, None, truncated=truncated, random=random)

    cases = {
        "greedy": jax.jit(partial(draw, truncated=False, random=False)),
        "random": jax.jit(partial(draw, truncated=False, random=True)),
        "truncated": jax.jit(partial(draw, truncated=True, random=True)),
        "threshold": find,
        "threshold-reference": define,
        "threshold-top_k": finder(rows.top_k, zeros + 1, zeros),
        "threshold-top_p": finder(0 * rows.top_k, rows.top_p, zeros),
    }
    for name, fn in cases.items():
        ms = 1000 * seconds_per_call(rotating(fn, logits), wait, calls=20)
        detail = {"rows": S, "vocab": V, "top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P}
        emit(path, Record(f"sampling.{name}.s{S}.ms", ms, "ms", detail))


def main() -> None:
    parser = argparse.ArgumentParser(description="time sampling on the device")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU")
    parser.add_argument("--rows", type=lambda text: [int(s) for s in text.split(",")])
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", type=int, help="run this number of rows in this process")
    parser.add_argument("--config", type=json.loads, help="of the kernel, JSON; with --part")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    vocab = args.vocab or (3000 if args.tiny else VOCAB)
    if args.part is not None:
        sampling_part(args.records, args.part, vocab, args.config)
        return
    run = record.start(parts.command_line("bench.sampling"))
    path = record.path_for(run, "sampling", args.out)
    rows = args.rows or ([1, 4] if args.tiny else ROWS)
    run = parts.run_parts(make_parts(rows, vocab), run, path)
    parts.print_table(run)
    print(path)


if __name__ == "__main__":
    main()
