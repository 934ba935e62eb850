"""What `jaxinfer estimate --check` says of shapes with random weights: predicted beside measured.

    python -m bench.estimate_check
    python -m bench.estimate_check --shapes llama-3.1-8b:int4 --batch 64

`memory_error`: of weights, pages and compiled temporaries together; `decode_error`: of a step. Both
are the distance of predicted over measured from 1, and there only where something was predicted;
every figure is in the detail.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench import parts, record, shapes
from bench.parts import Part, emit
from bench.record import Record

if TYPE_CHECKING:
    from jaxinfer.cli.checking import Check

SHAPES = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.2-1b:int4", "llama-3.1-8b:int4")
ERRORS = {"memory_error": "memory, of these", "decode_error": "decode step"}
CONTEXT, LIMIT_S = 2048, 150.0


def check(shape: str, batch: int) -> Iterator[Record]:
    """One shape, `NAME` or `NAME:PRECISION`."""
    from jaxinfer.cli.checking import measured
    from jaxinfer.cli.estimating import EstimateOptions
    from jaxinfer.cli.measuring import MeasureOptions, load_measured, settled

    model, _, kind = shape.partition(":")
    options = EstimateOptions(model, precision=kind or "bf16", batch=batch, context=CONTEXT)
    config, chosen = settled(
        MeasureOptions(model, batch=batch, context=CONTEXT, random=kind or "auto"), CONTEXT
    )
    with (loaded := load_measured(chosen, config)).llm:
        found = measured(options, chosen, config, loaded)
    yield from errors(f"estimate.{shapes.short(shape)}.b{batch}", found)


def errors(stem: str, found: Check) -> Iterator[Record]:
    """Of what was predicted."""
    from jaxinfer.cli.checking import json_record

    items = {item.what: item for item in found.items}
    for name, what in ERRORS.items():
        if (error := items[what].error) is not None:
            yield Record(f"{stem}.{name}", round(abs(error), 4), "ratio", json_record(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="estimates beside what was measured")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", help="measure this shape in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        for found in check(args.part, args.batch):
            emit(args.records, found)
        return
    made = [
        Part(f"estimate.{shapes.short(shape)}", "bench.estimate_check",
             ("--part", shape, "--batch", str(args.batch)), LIMIT_S)
        for shape in args.shapes
    ]  # fmt: skip
    parts.run_and_print(made, "bench.estimate_check", args.out)


if __name__ == "__main__":
    main()
