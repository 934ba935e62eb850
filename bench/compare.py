"""jaxinfer beside PyTorch engines: the same weights, prompts and sampling, in turns on one device.

    python -m bench.compare --short
    python -m bench.compare --model llama-3.1-8b --engines jaxinfer,torch-compile,hf-static
    python -m bench.compare --smoke --engines jaxinfer

Each engine is a process of its own (`bench.engines`); all read one checkpoint, written with random
weights where a shape is named. They take turns at every repeat (`bench.sessions`); outputs are
counted, and greedy tokens compared. An engine that is not installed gets a line that says so.
Ceilings are measured in the same run. Writes JSON, a table in Markdown and pictures
(`bench.report`); `--readme` puts table and pictures into README too, of a GPU only. Options are
named as in `vllm bench`, where it has them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import cases, ceilings, figures, parts, record, report, serving, sessions, shapes, timing
from bench.cases import FULL, SHORT, SMOKE, Case, Model, Sizes
from bench.engines import ENGINES, SPECULATIVE, Options, Request
from bench.engines.client import Client, EngineError, Missing
from bench.parts import Part
from bench.record import Record, Run
from bench.sessions import Failure, Session, Trial

FIXED, MIXED = ("latency", "prefill"), ("throughput", "serve")
WORKLOADS = (*FIXED, *MIXED, "memory", "startup", "quantised", "speculative")
USUAL = (*FIXED, *MIXED, "memory", "startup")
DEMO = record.ROOT / "checkpoints" / "demo" / "target"
GUESS_ROOM = 16  # tokens beyond the longest request, for guesses
START_TOKENS = 16  # of the first request: long enough to need the decode step too
# Programs compiled before are kept in these, by one engine or another.
CACHES = (
    "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH",
    "VLLM_CACHE_ROOT", "JAX_COMPILATION_CACHE_DIR",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk, and what is known of them. `name`: in the names of records."""

    name: str
    path: Path
    model: Model

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))


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


def make_sessions(args: argparse.Namespace, sizes: Sizes, checkpoint: Checkpoint) -> list[Session]:
    """Of the workloads asked for, but for `startup` and `quantised`; those of one kind share."""

    def session(own: list[Case], **options: Any) -> Session:
        longest = cases.longest(own) + (GUESS_ROOM if options.get("speculative") else 0)
        most = Options(
            dtype=args.dtype, max_num_seqs=cases.rows(own, args.max_num_seqs),
            max_model_len=longest, temperature=args.temperature, **options,
        )  # fmt: skip
        return Session(checkpoint.path, most, tuple(own), args.engine_args, args.num_iters)

    def wanted(names: tuple[str, ...]) -> list[Case]:
        return [
            case
            for name in names
            if name in args.workloads
            for case in cases.of_workload(name, checkpoint.model, sizes)
        ]

    found = []
    kinds = ((FIXED, False), (MIXED, True), (("memory",), False))
    if args.smoke:  # all of it in one
        kinds = (((*FIXED, *MIXED, "memory"), False),)
    for names, mixed in kinds:
        if own := wanted(names):
            found.append(session(own, warm_up=mixed, prefix_caching=mixed))
    if "speculative" in args.workloads:
        kind = "lookup" if args.speculative == "lookup" else "draft"
        for name, how in (("plain", None), (kind, args.speculative)):
            case = cases.speculative(checkpoint.model, sizes, name)
            found.append(session([case], speculative=how))
    return found


class Harness:
    """The run so far: its result file is written anew after every session."""

    def __init__(self, args: argparse.Namespace, run: Run, path: Path) -> None:
        self.args, self.run, self.path = args, run, path
        self.missing: set[str] = set()  # engines that are not installed
        minutes = args.minutes
        self.deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, found: list[Record]) -> None:
        """Adds records, what follows from them, and the versions that engines told of."""
        found = [
            *found, *figures.shares(found, self.run.ceilings), *figures.over_hf(found)
        ]  # fmt: skip
        self.run = parts.add(self.run, found)
        told = {
            name: version
            for r in found
            for name, version in r.detail.get("versions", {}).items()
            if version
        }
        self.run = replace(self.run, versions={**self.run.versions, **told})
        parts.keep(self.run, self.path)

    def run_session(self, session: Session, checkpoint: Checkpoint) -> None:
        """One session, all groups of engines."""
        args, memory = self.args, _gpu_memory(self.run)
        engines = [name for name in args.engines if name not in self.missing]
        if any(SPECULATIVE in case.needs for case in session.cases):
            engines = [name for name in engines if SPECULATIVE in ENGINES[name].can]
        if self.late() or not engines:
            return
        kv_token = timing.kv_bytes(checkpoint.model.config, checkpoint.model.width)
        fit = sessions.fitting(session, kv_token, memory, checkpoint.bytes, len(engines))
        groups = sessions.make_groups(engines, min(fit, args.together or fit))
        names = sorted({case.workload for case in session.cases})
        print(f"[{' '.join(names)}] groups: {groups}", flush=True)
        events = []
        for event in sessions.run(session, groups, self.late):
            events.append(event)
            _tell(event)
            if isinstance(event, Failure) and event.missing and event.case is None:
                self.missing.add(event.engine)
        self.add(
            figures.summarise(
                checkpoint.name, events, greedy=args.temperature == 0,
                exact=args.dtype == "float32", reference=args.engines[0],
            )
        )  # fmt: skip

    def run_startup(self, checkpoint: Checkpoint, prompt: int) -> None:
        """Each engine alone, from the start of its process: with nothing compiled, then again."""
        for name in self.args.engines:
            if self.late():
                return
            found = list(start_records(name, checkpoint, self.args, prompt))
            self.missing |= {name for r in found if r.name.endswith(".runs")}
            self.add(found)


def start_records(
    name: str, checkpoint: Checkpoint, args: argparse.Namespace, prompt: int
) -> Iterator[Record]:
    """`.cold_s` and `.warm_s`, from the start of the process to its first token.

    The detail has the time to the last of `START_TOKENS`, and until the weights were loaded. Files
    are in the page cache either way.
    """
    (request,) = cases.fixed(1, 1, prompt, START_TOKENS, checkpoint.model.vocab_size)
    options = Options(
        dtype=args.dtype, max_num_seqs=1, max_model_len=prompt + START_TOKENS,
        extra=args.engine_args.get(name, {}),
    )  # fmt: skip
    case = Case("startup", f"in{prompt}", lambda _: [[request]], lambda calls, got: {})
    stem, detail = (f(checkpoint.name, case, name) for f in (figures.stem, figures.described))
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        env = {variable: str(Path(folder) / variable) for variable in CACHES}
        for kind in ("cold", "warm"):
            try:
                seconds, stages = _start(name, checkpoint.path, options, env, request)
            except Missing as error:
                yield Record(f"{stem}.runs", 0, "", detail | {"why": str(error)})
                return
            except EngineError as error:
                told = detail | {"output_tail": error.tail}
                yield Record(f"{stem}.{kind}.failed", None, "", told, str(error))
                return
            yield Record(f"{stem}.{kind}_s", round(seconds, 3), "s", detail | stages)
            print(f"  startup {name} {kind}: {seconds:.1f} s", flush=True)


def _start(
    name: str, path: Path, options: Options, env: dict[str, str], request: Request
) -> tuple[float, dict[str, float]]:
    with Client(name, path, options, env) as client:
        loaded = client.wait()
        reply = client.generate([request], sessions.CALL_S)
        times = [reply.began + t - client.began for t in reply.outputs[0].times]
        stages = {"loaded_s": loaded - client.began, "last_token_s": times[-1]}
        return times[0], {stage: round(s, 3) for stage, s in stages.items()}


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


def _list(convert: Callable[[str], Any]) -> Callable[[str], tuple]:
    return lambda text: tuple(convert(word) for word in text.split(","))


def _one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def check(word: str) -> str:
        if word not in known:
            raise ValueError(f"{word!r}: expected one of {', '.join(known)}")
        return word

    return check


def make_parser() -> argparse.ArgumentParser:
    """See the module's head; sizes that are not given are those of the preset."""
    made = argparse.ArgumentParser(description="jaxinfer beside PyTorch engines")
    made.add_argument("--model", help="a shape, such as llama-3.1-8b; demo; or a directory")
    made.add_argument("--engines", type=_list(_one_of(tuple(ENGINES))), default=tuple(ENGINES),
                      help="the first is what others are compared with")  # fmt: skip
    made.add_argument("--workloads", type=_list(_one_of(WORKLOADS)), default=USUAL)
    preset = made.add_mutually_exclusive_group()
    preset.add_argument("--short", action="store_true", help="under 8 minutes on one GPU")
    preset.add_argument("--smoke", action="store_true", help="the demo model, tiny sizes")
    made.add_argument("--batch-size", dest="batch_sizes", type=_list(int))
    made.add_argument("--input-len", dest="input_lens", type=_list(int), help="of latency")
    made.add_argument("--output-len", dest="output_lens", type=_list(int), help="SHORT,LONG")
    made.add_argument("--prefill-len", dest="prefill_lens", type=_list(int))
    made.add_argument("--num-prompts", type=int)
    made.add_argument("--dataset-name", dest="datasets", type=_list(str))
    made.add_argument("--request-rate", dest="request_rates", type=_list(float))
    made.add_argument("--burstiness", type=_list(float), help="1: Poisson; less: bursts")
    made.add_argument("--goodput", nargs="+", help="limits in ms: ttft:250 tpot:40")
    made.add_argument("--num-iters", type=int, help="repeats of every case")
    made.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--max-num-seqs", type=int, default=256)
    made.add_argument("--quantization", type=_list(str), default=("int4",), help="of `quantised`")
    made.add_argument("--speculative", default="lookup", help="or a draft model's directory")
    made.add_argument("--engine-args", type=json.loads, default={}, help='{"jaxinfer": {…}}')
    made.add_argument("--together", type=int, help="engines loaded at once; as many as fit")
    made.add_argument("--minutes", type=float, help="what would begin later is left out")
    made.add_argument("--readme", action="store_true", help="rewrite README's table")
    made.add_argument("--out", type=Path, default=record.RESULTS)
    return made


def parse(words: list[str] | None = None) -> tuple[argparse.Namespace, Sizes]:
    """Options, with what the preset decides, and the sizes."""
    parser = make_parser()
    args = parser.parse_args(words)
    preset = SMOKE if args.smoke else SHORT if args.short else FULL
    names = ("batch_sizes", "input_lens", "output_lens", "prefill_lens", "num_prompts", "datasets",
             "request_rates", "burstiness")  # fmt: skip
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    try:
        if args.goodput:
            given["goodput"] = serving.parse_limits(args.goodput)
        sizes = replace(preset, **given)
        for dataset in sizes.datasets:
            cases.listed(Model({"vocab_size": 2}), dataset, replace(sizes, num_prompts=1), 0)
        if len(sizes.output_lens) != 2 or not 0 < sizes.output_lens[0] < sizes.output_lens[1]:
            raise ValueError(f"--output-len {sizes.output_lens}: expected SHORT,LONG, growing")
        if unknown := set(args.engine_args) - set(ENGINES):
            raise ValueError(f"--engine-args of {', '.join(unknown)}: no such engine")
    except ValueError as error:
        parser.error(str(error))
    args.model = args.model or ("demo" if args.smoke else "llama-3.2-1b")
    args.dtype = args.dtype or ("float32" if args.smoke else "bfloat16")
    args.num_iters = args.num_iters or (2 if args.smoke else 3)
    return args, sizes


def main(words: list[str] | None = None) -> Run:
    args, sizes = parse(words)
    run = record.start(parts.command_line("bench.compare"))
    harness = Harness(args, run, record.path_for(run, "compare", args.out))
    with tempfile.TemporaryDirectory(prefix="bench-model-") as folder:
        checkpoint, writing = find_checkpoint(args.model, Path(folder), args.dtype)
        tiny = run.device["kind"] == "cpu"
        harness.run = parts.run_parts(
            [*ceilings.make_parts(tiny=tiny)[: 1 if args.smoke else 2], *writing], run, harness.path
        )
        if "startup" in args.workloads:
            harness.run_startup(checkpoint, min(1024, max(sizes.input_lens)))
        for session in make_sessions(args, sizes, checkpoint):
            harness.run_session(session, checkpoint)
        for kind in args.quantization if "quantised" in args.workloads else ():
            other, writing = find_checkpoint(f"{args.model}:{kind}", Path(folder), args.dtype)
            harness.run = parts.run_parts(writing, harness.run, harness.path)
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
