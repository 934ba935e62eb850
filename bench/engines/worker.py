"""One engine in its process: reads requests from its standard input, writes what came of them.

    python -m bench.engines.worker ENGINE CHECKPOINT OPTIONS_JSON

A line of JSON each way; see `bench.engines.client`, the other side. What the engine prints goes to
standard error.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

from bench.engines import ENGINES, Engine, Options, Request

TAIL = 2000  # characters of a traceback


def serve(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    """The answer to one command: `{"generate": [requests]}` or `{"memory": true}`."""
    if "memory" in command:
        return {"memory": engine.memory()._asdict()}
    requests = [Request(*each) for each in command["generate"]]
    before, began, clock = engine.programs(), time.time(), time.perf_counter()
    outputs = engine.generate(requests)
    seconds = time.perf_counter() - clock
    compiled = engine.programs() - before
    return {"outputs": outputs, "seconds": seconds, "began": began, "compiled": compiled}


def guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, or what went wrong in it."""
    try:
        return run()
    except Exception as error:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        return {"error": f"{type(error).__name__}: {error}", "tail": text[-TAIL:]}


def versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Of installed packages."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    name, checkpoint, options = sys.argv[1:]
    # Libraries print to the standard output: the answers go where it was.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    adapter = ENGINES[name]
    if missing := [package for package in adapter.packages if util.find_spec(package) is None]:
        print(json.dumps({"missing": f"{missing[0]} is not installed"}), file=answers)
        return
    told = (*adapter.packages, *(("torch",) if adapter.torch else ()))
    engine: Engine | None = None

    def start() -> dict[str, Any]:
        nonlocal engine
        module = importlib.import_module(adapter.module)
        given = Options(**json.loads(options))
        engine = module.load(Path(checkpoint), given, **adapter.how)
        return {"ready": time.time(), "versions": versions(told)}

    print(json.dumps(guarded(start)), file=answers)
    if engine is None:
        return
    loaded = engine
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(guarded(lambda c=command: serve(loaded, c))), file=answers)
    os._exit(0)  # threads of engines may hold the process


def encode(options: Options) -> str:
    """Options as the command line takes them."""
    return json.dumps(dataclasses.asdict(options))


if __name__ == "__main__":
    main()
