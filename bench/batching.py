"""All that is measured of batching, in a process for each kind of LLM.

    python -m bench.batching --shape llama-3.1-8b
    python -m bench.batching --measure throughput,serve,waste --seconds 60 --no-hf

Each is a script of its own too: `bench.throughput`, `bench.serve`, `bench.prefix`, `bench.steady`,
`bench.soak`, `bench.waste`; `bench.invariance` and `bench.host` are not part of it.
"""

from __future__ import annotations

import argparse

from bench import (
    measuring,
    prefix,
    serve,
    soak,
    steady,
    throughput,
    waste,
    workloads,
)
from bench.parts import Part

HF_S = 180.0

# Those that share an LLM follow one another; `waste` warms up what `throughput` measures.
MEASUREMENTS = {
    **waste.MEASUREMENTS,
    **throughput.MEASUREMENTS,
    **serve.MEASUREMENTS,
    **steady.MEASUREMENTS,
    **prefix.MEASUREMENTS,
    **soak.MEASUREMENTS,
}


def hf_part(shape: str) -> Part:
    """HF transformers, in the environment that has torch."""
    n = workloads.scale_of(shape).first
    words = ("--shape", shape, "--requests", str(n), "--seconds", str(HF_S))
    return Part("hf_batching", "bench.hf_batching", words, HF_S + 60, torch=True)


def main() -> None:
    parser = measuring.parser(MEASUREMENTS)
    parser.add_argument("--no-hf", action="store_true", help="without HF transformers")
    args = parser.parse_args()

    def more(args: argparse.Namespace) -> list[Part]:
        return [] if args.no_hf else [hf_part(args.shape)]

    measuring.main("bench.batching", MEASUREMENTS, more=more, derived=throughput.derived, args=args)


if __name__ == "__main__":
    main()
