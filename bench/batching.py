"""All that is measured of batching, in a process for each kind of LLM.

    python -m bench.batching --shape llama-3.1-8b
    python -m bench.batching --measure throughput,serve,waste --seconds 60

Each is a script of its own too: `bench.throughput`, `bench.serve`, `bench.prefix`, `bench.steady`,
`bench.soak`, `bench.waste`; `bench.invariance` and `bench.host` are not part of it. The same
requests in other engines: `bench.compare`.
"""

from __future__ import annotations

from bench import (
    measuring,
    prefix,
    serve,
    soak,
    steady,
    throughput,
    waste,
)

# Those that share an LLM follow one another; `waste` warms up what `throughput` measures.
MEASUREMENTS = {
    **waste.MEASUREMENTS,
    **throughput.MEASUREMENTS,
    **serve.MEASUREMENTS,
    **steady.MEASUREMENTS,
    **prefix.MEASUREMENTS,
    **soak.MEASUREMENTS,
}


def main() -> None:
    measuring.main("bench.batching", MEASUREMENTS, derived=throughput.derived)


if __name__ == "__main__":
    main()
