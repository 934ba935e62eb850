"""Several measurements in one process, on one LLM: starting one costs a minute of GPU time.

A measurement is a generator of records; each is written as soon as it comes. One that fails, or
takes longer than its limit, adds a failed record, and the next one runs all the same. Those that
need other options of LLM get a process of their own. `main` is the command line of all of them:

    python -m bench.MODULE --measure a,b --shape llama-3.1-8b --llm '{"page_size": 32}'
"""

from __future__ import annotations

import argparse
import json
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import parts, record, shapes, start
from bench.parts import Part, emit
from bench.record import Record
from bench.workloads import Scale, scale_of
from jaxinfer.config import Policy

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

START_S = 150.0  # of a process: weights, compilation
TAIL = 4000  # characters of a traceback


@dataclass(frozen=True)
class Setup:
    """What a measurement is told beside its LLM.

    Attributes:
        name: the shape's, in the names of records: `8b`.
        scale: sizes.
        rate: requests a second, of `serve`.
        seconds: of `soak`.
        repeats: of timed pairs.
        detail: options and memory, for the records.
    """

    name: str
    scale: Scale
    rate: float = 16.0
    seconds: float = 60.0
    repeats: int = 3
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One of a script's measurements.

    Attributes:
        run: yields its records.
        limit_s: it is ended after this; `soak`'s own seconds come on top.
        kinds: what its steps must be able to do; see `start.warm_up`.
        options: of the scale, to those of LLM that it takes where the command line names no others:
            the fewer rows and tokens, the fewer programs to compile. Measurements that follow one
            another with the same options share an LLM.
        policy: of the scheduler, without which it would measure something else.
        start_s: what its process may take before: the more programs, the longer.
    """

    run: Callable[[LLM, Setup], Iterator[Record]]
    limit_s: float
    kinds: tuple[str, ...] = (start.GREEDY,)
    options: Callable[[Scale], dict[str, Any]] = lambda _: {}
    policy: Policy = "continuous"
    start_s: float = START_S


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread after so many seconds."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def guarded(path: Path | None, name: str, seconds: float, found: Iterator[Record]) -> None:
    """Writes the records as they come; what goes wrong becomes one more: `NAME.failed`."""
    try:
        with limit(seconds):
            for one in found:
                emit(path, one)
    except Exception as error:
        text = traceback.format_exc()
        print(text, flush=True)
        said = f"{type(error).__name__}: {error}"
        emit(path, Record(f"{name}.failed", None, "", {"output_tail": text[-TAIL:]}, said))


def llm_options(scale: Scale, own: Measurement, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the LLM: the scale's, then a measurement's own, then those of the command line; and the
    measurement's policy."""
    usual = {
        "max_num_seqs": scale.rows,
        "max_model_len": scale.max_model_len,
        "page_size": scale.page_size,
        "kv_cache_bytes": scale.kv_cache_bytes,
    }
    return {**usual, **own.options(scale), **given, "policy": own.policy}


def run_part(measurements: Mapping[str, Measurement], args: argparse.Namespace) -> None:
    """One process: the measurements of `args.measure`, which share the first one's LLM."""
    scale = scale_of(args.shape)
    chosen = {name: measurements[name] for name in args.measure}
    options = llm_options(scale, next(iter(chosen.values())), args.llm)
    model = start.load(args.shape)
    llm = start.start(model, options)
    start.warm_up(llm, sorted({kind for m in chosen.values() for kind in m.kinds}))
    detail = {
        "options": options,
        "memory_plan": str(llm.memory_plan),
        "weights": "random",
        "compiled_at_start": llm.engine.compiler.count,
        "compile_s_at_start": round(llm.engine.compiler.compile_seconds, 1),
    }
    setup = Setup(model.name, scale, args.rate, args.seconds, args.repeats, detail)
    for name, measurement in chosen.items():
        seconds = measurement.limit_s + (args.seconds if name == "soak" else 0)
        guarded(args.records, f"{name}.{model.name}", seconds, measurement.run(llm, setup))
    start.close(llm)


def make_parts(
    module: str, measurements: Mapping[str, Measurement], args: argparse.Namespace
) -> list[Part]:
    """A process for each run of measurements with the same options."""
    scale = scale_of(args.shape)
    made = []

    def shared(name: str) -> str:
        return str(llm_options(scale, measurements[name], args.llm))

    for _, same in groupby(args.measure, shared):
        names = list(same)
        words = ("--part", "--measure", ",".join(names), "--shape", args.shape)
        words += ("--llm", json.dumps(args.llm), "--rate", str(args.rate))
        words += ("--seconds", str(args.seconds), "--repeats", str(args.repeats))
        timeout_s = max(measurements[name].start_s for name in names)
        timeout_s += sum(measurements[name].limit_s for name in names)
        timeout_s += args.seconds if "soak" in names else 0
        made.append(Part(".".join(names), module, words, timeout_s, start.ENV))
    return made


def parser(measurements: Mapping[str, Measurement]) -> argparse.ArgumentParser:
    """Options that all the scripts have."""

    def names(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(measurements):
            raise ValueError(f"no such measurement: {', '.join(sorted(unknown))}")
        return text.split(",")

    def known(name: str) -> str:
        if name != "demo":
            shapes.hf_config(name)
        return name

    made = argparse.ArgumentParser(description=f"measures {', '.join(measurements)}")
    made.add_argument("--measure", type=names, default=list(measurements))
    made.add_argument("--shape", type=known, default="llama-3.1-8b", help="or demo")
    made.add_argument("--llm", type=json.loads, default={}, help="options of LLM, as JSON")
    made.add_argument("--rate", type=float, default=16.0, help="requests a second, of serve")
    made.add_argument("--seconds", type=float, default=60.0, help="of soak")
    made.add_argument("--repeats", type=int, default=3, help="of timed pairs")
    made.add_argument("--minutes", type=float, help="for all of it")
    made.add_argument("--out", type=Path, default=record.RESULTS)
    made.add_argument("--part", action="store_true", help="measure in this process")
    made.add_argument("--records", type=Path)
    return made


def main(
    module: str,
    measurements: Mapping[str, Measurement],
    *,
    derived: Callable[[Sequence[Record]], Sequence[Record]] = lambda _: (),
) -> None:
    """The command line of a script.

    Args:
        module: that is run.
        measurements: by name, in the order in which they run.
        derived: records that follow from all the others.
    """
    args = parser(measurements).parse_args()
    if args.part:
        run_part(measurements, args)
        return
    run = record.start(parts.command_line(module))
    path = record.path_for(run, module.rpartition(".")[2], args.out)
    todo = make_parts(module, measurements, args)
    run = parts.run_parts(todo, run, path, minutes=args.minutes)
    run = replace(run, records=(*run.records, *derived(run.records)))
    parts.keep(run, path)
    parts.print_table(run)
    print(path)
