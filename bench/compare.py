"""jaxinfer beside PyTorch engines: the same weights, prompts and sampling, in turns on one device.

    python -m bench.compare --short
    python -m bench.compare --model llama-3.1-8b --engines jaxinfer,torch-compile,hf-static
    python -m bench.compare --smoke --engines jaxinfer

Each engine is a process of its own (`bench.engines`); all read one checkpoint, written with random
weights where a shape is named. They take turns at every repeat (`bench.sessions`); outputs are
counted, and greedy tokens compared. An engine that is not installed gets a line that says so.
Ceilings are measured in the same run. After `--minutes` it has ended, report included: what is not
measured by then is cut off, and has a line. Writes JSON, a table in Markdown and pictures
(`bench.report`); `--readme` puts table and pictures into README too, of a GPU only. Options are
named as in `vllm bench`, where it has them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import (
    cases,
    ceilings,
    figures,
    parts,
    record,
    report,
    sessions,
    shapes,
    startup,
    timing,
)
from bench.cases import Case
from bench.compare_options import FIXED, MIXED, parse
from bench.engines import ENGINES, Options
from bench.engines.client import Client
from bench.parts import Part
from bench.record import Record, Run
from bench.sessions import Failure, Session, Trial
from bench.sizes import Model, Sizes
from bench.until import NEVER, Until

DEMO = record.ROOT / "checkpoints" / "demo" / "target"
GUESS_ROOM = 16  # tokens beyond the longest request, for guesses
REPORT_S = 20.0  # of --minutes: to end processes, and for the table and the pictures


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk, and what is known of them. `name`: in the names of records."""

    name: str
    path: Path
    model: Model

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    @property
    def kv_token(self) -> int:
        """Bytes of keys and values of one."""
        return timing.kv_bytes(self.model.config, self.model.width)


def find_checkpoint(name: str, folder: Path, dtype: str) -> tuple[Checkpoint, list[Part]]:
    """`demo`, a directory, or a shape of `bench.shapes`, and the part that writes it into `folder`.

    Raises:
        ValueError: none of these.
    """
    width = 4 if dtype == "float32" else 2
    path = DEMO if name == "demo" else Path(name)
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text())
        called = "demo" if name == "demo" else path.resolve().name.replace(".", "-")
        return Checkpoint(called, path.resolve(), Model(config, width, width)), []
    config = shapes.hf_config(name)
    written = folder / shapes.short(name)
    weight = shapes.weight_bytes(name) if ":" in name else width
    args = ("--part", "write", "--shape", name, "--folder", str(written))
    part = Part(f"write.{shapes.short(name)}", "bench.load", args, 400)
    called = shapes.short(name).replace(".", "-")
    return Checkpoint(called, written, Model(config, weight, width)), [part]


def make_sessions(
    args: argparse.Namespace, sizes: Sizes, checkpoint: Checkpoint, memory: int | None
) -> list[Session]:
    """Of the workloads asked for, but for `startup` and `quantised`.

    Those of one kind share a session, in a short run all: engines start once, and compile for all
    of it at the same time. But cases that need so much memory that fewer engines fit have one of
    their own. `memory`: of the device, None where any number of engines fits.
    """

    def session(own: list[Case], **options: Any) -> Session:
        longest = cases.longest(own) + (GUESS_ROOM if options.get("speculative") else 0)
        most = Options(
            dtype=args.dtype, max_num_seqs=cases.rows(own, args.max_num_seqs),
            max_model_len=longest, temperature=args.temperature, **options,
        )  # fmt: skip
        return Session(checkpoint.path, most, tuple(own), args.engine_args, args.num_iters,
                       sizes.case_seconds)  # fmt: skip

    def wanted(names: tuple[str, ...]) -> list[Case]:
        return [
            case
            for name in names
            if name in args.workloads
            for case in cases.of_workload(name, checkpoint.model, sizes)
        ]

    found = []
    kinds = (FIXED, MIXED, ("memory",))
    if args.short:
        kinds = ((*FIXED, *MIXED), ("memory",))
    if args.smoke:
        kinds = ((*FIXED, *MIXED, "memory"),)
    for names in kinds:
        mixed = not args.smoke and any(name in args.workloads for name in names if name in MIXED)
        for own in _by_fit(wanted(names), args, checkpoint, memory):
            # Not beside FIXED: a prompt that is timed again would be found in the cache.
            caching = mixed and names == MIXED
            found.append(session(own, warm_up=mixed, prefix_caching=caching))
    if "speculative" in args.workloads:
        kind = "lookup" if args.speculative == "lookup" else "draft"
        for name, how in (("plain", None), (kind, args.speculative)):
            case = cases.speculative(checkpoint.model, sizes, name)
            found.append(session([case], speculative=how))
    return found


def _by_fit(
    own: Sequence[Case], args: argparse.Namespace, checkpoint: Checkpoint, memory: int | None
) -> Iterator[list[Case]]:
    """The cases for which most engines fit first. One whose batch fits no device is left out, with
    a line; lists of requests may wait for room."""
    by: dict[int, list[Case]] = {}
    for case in own:
        fit = sessions.fitting([case], args.max_num_seqs, checkpoint.kv_token, memory,
                               checkpoint.bytes, len(args.engines))  # fmt: skip
        if not fit and case.workload in FIXED:
            print(f"[{case.workload} {case.name}] left out: it does not fit this device")
        else:
            by.setdefault(max(1, fit), []).append(case)
    for fit in sorted(by, reverse=True):
        yield by[fit]


class Harness:
    """The run so far: its result file is written anew after every case."""

    def __init__(self, args: argparse.Namespace, run: Run, path: Path, folder: Path) -> None:
        """`folder`: of files that the run does not need afterwards."""
        self.args, self.run, self.path = args, run, path
        # PyTorch's caches are the run's own: who is ended while it compiles leaves broken files.
        self.env = {name: str(folder / name) for name in startup.TORCH_CACHES}
        self.missing: set[str] = set()  # engines that are not installed
        self.until = NEVER
        if args.minutes is not None:
            self.until = Until(time.monotonic() + 60 * args.minutes - REPORT_S)

    def run_parts(self, made: Sequence[Part]) -> None:
        self.run = parts.run_parts(made, self.run, self.path, minutes=self.until.left / 60)

    def add(self, before: Run, found: list[Record]) -> None:
        """Makes the run `before`, the records, what follows from them, and the versions that
        engines told of."""
        found = [
            *found, *figures.shares(found, before.ceilings), *figures.over_hf(found)
        ]  # fmt: skip
        run = parts.add(before, found)
        told = {
            name: version
            for r in found
            for name, version in r.detail.get("versions", {}).items()
            if version
        }
        self.run = replace(run, versions={**run.versions, **told})
        parts.keep(self.run, self.path)

    def run_session(self, session: Session, checkpoint: Checkpoint) -> None:
        """One session, all groups of the engines that can do some of it."""
        args, memory, before = self.args, _gpu_memory(self.run), self.run
        engines = [
            name
            for name in args.engines
            if name not in self.missing
            and any(case.needs <= ENGINES[name].can for case in session.cases)
        ]
        if not engines:
            return
        fit = sessions.fitting(session.cases, session.options.max_num_seqs, checkpoint.kv_token,
                               memory, checkpoint.bytes, len(engines))  # fmt: skip
        groups = sessions.make_groups(engines, min(fit, args.together or fit))
        names = sorted({case.workload for case in session.cases})
        print(f"[{' '.join(names)}] groups: {groups}", flush=True)
        events: list[sessions.Event] = []

        def add() -> None:
            self.add(before, figures.summarise(
                checkpoint.name, events, greedy=args.temperature == 0,
                exact=args.dtype == "float32", reference=args.engines[0],
            ))  # fmt: skip

        start = partial(Client, env=self.env)
        for event in sessions.run(session, groups, self.until, start=start):
            if events and event.case is not events[-1].case:
                add()  # what is there, if the run is ended from outside
            events.append(event)
            _tell(event)
            if isinstance(event, Failure) and event.missing and event.case is None:
                self.missing.add(event.engine)
        add()

    def run_startup(self, checkpoint: Checkpoint, prompt: int) -> None:
        """Each engine alone, from the start of its process: with nothing compiled, then again."""
        for name in self.args.engines:
            options = Options(dtype=self.args.dtype, extra=self.args.engine_args.get(name, {}))
            of = checkpoint.name, checkpoint.path, checkpoint.model.vocab_size
            found = list(startup.measure(name, *of, options, prompt, self.until))
            self.missing |= {name for r in found if r.name.endswith(".runs")}
            self.add(self.run, found)


def _gpu_memory(run: Run) -> int | None:
    return None if run.device["kind"] == "cpu" else run.device["memory"]


def _tell(event: sessions.Event) -> None:
    """A line of what has happened."""
    match event:
        case Trial():
            values = ", ".join(f"{k} {v:.4g}" for k, v in list(event.figures.items())[:3])
            print(f"  {event.case.workload} {event.case.name} {event.engine}: {values}", flush=True)
        case Failure():
            where = f"{event.case.workload} {event.case.name} " if event.case else ""
            print(f"  {where}{event.engine}: NOT RUN: {event.error}", flush=True)


def main(words: list[str] | None = None) -> Run:
    args, sizes = parse(words)
    run = record.start(parts.command_line("bench.compare"))
    if args.readme:
        report.check_device(run)
    with tempfile.TemporaryDirectory(prefix="bench-model-") as folder:
        harness = Harness(args, run, record.path_for(run, "compare", args.out), Path(folder))
        checkpoint, writing = find_checkpoint(args.model, Path(folder), args.dtype)
        tiny = run.device["kind"] == "cpu"
        harness.run_parts([*ceilings.make_parts(tiny=tiny)[: 1 if args.smoke else 2], *writing])
        if "startup" in args.workloads:
            harness.run_startup(checkpoint, min(1024, max(sizes.input_lens)))
        for session in make_sessions(args, sizes, checkpoint, _gpu_memory(run)):
            harness.run_session(session, checkpoint)
        for kind in args.quantization if "quantised" in args.workloads else ():
            other, writing = find_checkpoint(f"{args.model}:{kind}", Path(folder), args.dtype)
            harness.run_parts(writing)
            own = tuple(cases.of_workload("quantised", other.model, sizes))
            most = Options(dtype=args.dtype, max_num_seqs=cases.rows(own),
                           max_model_len=cases.longest(own))  # fmt: skip
            harness.run_session(
                Session(other.path, most, own, args.engine_args, args.num_iters), other
            )
    for path in report.write(harness.run, harness.path):
        print(path)
    if args.readme:
        report.rewrite_readme(harness.run)
    print(report.table(harness.run))
    return harness.run


if __name__ == "__main__":
    main()
