"""The engine's own GPU figures in one call: ceilings, decode, start times, parity, invariance.

    python -m bench.all --minutes 8

Parts run in order of what matters most; what does not fit in the time is recorded as failed. The
result file is rewritten after every part, and copied to the folder that the environment variable
`OUT` names, where there is one. A table is printed last. Other engines: `bench.compare`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from bench import ceilings, decode, invariance, parity_gpu, parts, record


def main() -> None:
    parser = argparse.ArgumentParser(description="every GPU figure in one call")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try it on a CPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--llm", type=json.loads, default={}, help="options of LLM, as JSON")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help="parts whose names start so, in this order",
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    names = ["tiny"] if args.tiny else ["llama-3.1-8b", "llama-3.2-1b"]
    run = record.start(parts.command_line("bench.all"))
    if run.device["kind"] == "cpu" and not args.tiny:
        parser.error("there is no GPU here; --tiny tries it on a CPU, bench.demo measures on one")
    path = record.path_for(run, "all", args.out)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        todo = [
            *ceilings.make_parts(tiny=args.tiny),
            *decode.make_parts(names, [args.batch], [args.context], folder, options=args.llm),
            *parity_gpu.make_parts(names[-1], folder),
            *invariance.make_parts("demo"),
        ]
        if args.only:
            todo = [part for name in args.only for part in todo if part.name.startswith(name)]
        run = parts.run_parts(todo, run, path, minutes=args.minutes)
    parts.print_table(run)
    print(path)


if __name__ == "__main__":
    main()
