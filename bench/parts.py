"""Runs the parts of a benchmark, each in a process of its own, and keeps what each one found.

A part is `python -m MODULE ARGS --records FILE`: it appends every figure to FILE as soon as it has
it (`emit`). A part that fails or runs out of time keeps the figures it wrote and adds one failed
record; the next part runs all the same. The result file is rewritten after every part.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench import record
from bench.record import ROOT, Record, Run

STARTED = "BENCH_PART_STARTED"  # environment: time.time() at which the part's process was made
TURNS = "BENCH_TURNS"  # environment: a folder in which processes say that they are ready
TURNS_OF = "BENCH_TURNS_OF"  # environment: how many there are
PATIENCE_S = 300.0  # for the others to be ready
TORCH_PYTHON = "BENCH_TORCH_PYTHON"  # environment: the interpreter that has torch
ERROR_CHARS = 2000
UNITS = {"ms": 1e-3, "us": 1e-6}  # seconds


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of the part; a failure is recorded as `NAME.failed`.
        module: run with `python -m`.
        args: its command line, without `--records`.
        timeout_s: it is ended after this.
        env: added to the environment.
        torch: runs under `BENCH_TORCH_PYTHON`, where that names another interpreter.
    """

    name: str
    module: str
    args: tuple[str, ...] = ()
    timeout_s: float = 120.0
    env: dict[str, str] = field(default_factory=dict)
    torch: bool = False


def emit(path: Path | None, found: Record) -> None:
    """Appends a figure to the file that a part was given, and prints it."""
    line = json.dumps(asdict(found))
    print(line, flush=True)
    if path is not None:
        with path.open("a") as file:
            file.write(line + "\n")


def check_platform(platform: str) -> None:
    """Refuses to time a CPU where the run's device is a GPU.

    Args:
        platform: of the framework's device: `cpu`, `gpu` or `cuda`.

    Raises:
        RuntimeError: the machine has an NVIDIA GPU that the framework did not take.
    """
    if platform == "cpu" and record.device()["kind"] != "cpu":
        raise RuntimeError("the machine has a GPU, but the framework runs on the CPU")


def command_line(module: str) -> str:
    """How `module` was called, for `Run.command`; where the results go is left out."""
    words = sys.argv[1:]
    if "--out" in words:
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    return shlex.join(["python", "-m", module, *words])


def run_and_print(made: Sequence[Part | Sequence[Part]], module: str, out: Path) -> None:
    """Runs the parts of `module`, as it was called; writes their figures into the folder `out`, and
    prints them and the file's name."""
    run = record.start(command_line(module))
    path = record.path_for(run, module.rpartition(".")[2], out)
    print_table(run_parts(made, run, path))
    print(path)


def run_part(part: Part) -> list[Record]:
    """Runs one part to its end. Never raises for what goes wrong inside it."""
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        process = _begin(part, Path(folder))
        error = _wait(process, part.timeout_s)
        return _found(part, Path(folder), error, time.time() - began)


def run_together(parts: Sequence[Part]) -> list[Record]:
    """Runs parts side by side, as `run_part`; those that time something do so in a `turn`."""
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        turns, found = Path(folder) / "turns", []
        turns.mkdir()
        env = {TURNS: str(turns), TURNS_OF: str(len(parts))}
        processes = []
        for i, part in enumerate(parts):
            (own := Path(folder) / str(i)).mkdir()
            processes.append(_begin(replace(part, env={**part.env, **env}), own))
        with ThreadPoolExecutor(len(parts)) as pool:

            def ended(i: int) -> str | None:
                error = _wait(processes[i], parts[i].timeout_s)
                (turns / str(processes[i].pid)).touch()  # nobody need wait for it
                return error

            for i, error in enumerate(pool.map(ended, range(len(parts)))):
                found += _found(parts[i], Path(folder) / str(i), error, time.time() - began)
        return found


@contextmanager
def turn() -> Iterator[None]:
    """Waits until all processes of `run_together` are ready, then for this one's turn.

    What is timed in it has the device, and the processors, to itself. Elsewhere it does nothing.
    """
    folder = os.environ.get(TURNS)
    if folder is None:
        yield
        return
    (Path(folder) / str(os.getpid())).touch()
    latest = time.monotonic() + PATIENCE_S
    while len(os.listdir(folder)) < int(os.environ[TURNS_OF]) and time.monotonic() < latest:
        time.sleep(0.1)
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def interpreter(*, torch: bool) -> str:
    """Of a part's process: this one, or that which has torch."""
    return (os.environ.get(TORCH_PYTHON) if torch else None) or sys.executable


def _begin(part: Part, folder: Path) -> subprocess.Popen[bytes]:
    """Starts a part, which writes to `records` and `log` in `folder`."""
    python = interpreter(torch=part.torch)
    command = [python, "-m", part.module, *part.args, "--records", str(folder / "records")]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **part.env, STARTED: repr(time.time())}
    with (folder / "log").open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _found(part: Part, folder: Path, error: str | None, seconds: float) -> list[Record]:
    records = folder / "records"
    lines = records.read_text().splitlines() if records.exists() else []
    found = [Record(**json.loads(line)) for line in lines if line.endswith("}")]
    if error is not None:
        tail = without_paths((folder / "log").read_text(errors="replace"))[-ERROR_CHARS:]
        command = shlex.join(["-m", part.module, *part.args])
        detail = {"command": command, "output_tail": tail}
        found.append(Record(f"{part.name}.failed", None, detail=detail, error=error))
    print(f"[{part.name}] {seconds:.1f} s, {error or 'done'}", flush=True)
    return found


def without_paths(text: str) -> str:
    """Results are published: where this machine keeps things is nobody's business."""
    text = text.replace(f"{ROOT}/", "")
    for place in (sys.prefix, sys.base_prefix, str(Path.home())):
        text = text.replace(place, "...")
    return text


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session, and all of that: compilers have workers of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> str | None:
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(process)
    if code is None:
        return f"ended after {timeout_s:.0f} s"
    return None if code == 0 else f"exit code {code}"


def run_parts(
    parts: Sequence[Part | Sequence[Part]],
    run: Run,
    path: Path,
    *,
    minutes: float | None = None,
) -> Run:
    """Runs `parts` in order and writes the result file after each.

    Args:
        parts: what to run; those of an inner sequence run together.
        run: from `record.start`.
        path: of the result file; where the environment names a folder `OUT`, a copy goes there.
        minutes: parts that would start later than this are recorded as failed, and the one that
            runs then is ended.
    """
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    for item in parts:
        left = deadline - time.monotonic()
        group = [item] if isinstance(item, Part) else item
        group = [replace(part, timeout_s=min(part.timeout_s, left)) for part in group]
        if left <= 0:
            late = "not started: out of time"
            found = [Record(f"{part.name}.failed", None, error=late) for part in group]
        else:
            found = run_part(group[0]) if isinstance(item, Part) else run_together(group)
        run = add(run, found)
        keep(run, path)
    return run


def keep(run: Run, path: Path) -> None:
    """Writes the result file, and the copy of it in the folder that `OUT` names."""
    record.write(run, path)
    folder = os.environ.get("OUT")
    if folder and Path(folder).resolve() != path.parent.resolve():
        shutil.copy(path, folder)


def add(run: Run, found: Sequence[Record]) -> Run:
    """`run` with the records, the ceilings among them, and what follows from both."""
    run = replace(run, ceilings=best_ceilings((*run.records, *found)))
    shares = share_of_copy(found, run.ceilings.get("copy_bytes_per_s"))
    return replace(run, records=(*run.records, *found, *shares))


def best_ceilings(records: Sequence[Record]) -> dict[str, float]:
    """The largest figure of every record whose `detail["ceiling"]` names a ceiling."""
    best: dict[str, float] = {}
    for r in records:
        name = r.detail.get("ceiling")
        if name is not None and r.value is not None:
            best[name] = max(best.get(name, 0.0), r.value)
    return best


def share_of_copy(records: Sequence[Record], copy_bytes_per_s: float | None) -> list[Record]:
    """`X.pct_copy` for every time `X.ms_per_step` or `X.us` with `bytes_per_step` in its detail:
    bytes over time, over the copy bandwidth."""
    shares = []
    for r in records:
        counted, stem = r.detail.get("bytes_per_step"), r.name.rpartition(".")[0]
        if copy_bytes_per_s is None or counted is None or not r.value or r.unit not in UNITS:
            continue
        reached = counted / (r.value * UNITS[r.unit])
        shares.append(
            Record(
                f"{stem}.pct_copy",
                round(100 * reached / copy_bytes_per_s, 2),
                "%",
                {"bytes_per_s": reached, "copy_bytes_per_s": copy_bytes_per_s},
            )
        )
    return shares


def print_table(run: Run) -> None:
    """The run's figures, a line each: name, value, unit, or what failed."""
    for name, value in run.ceilings.items():
        print(f"{name:<44} {value:>12.4g}")
    for r in run.records:
        value = f"{r.value:>12.6g} {r.unit}" if r.value is not None else f"FAILED: {r.error}"
        print(f"{r.name:<44} {value}")
        if r.error:
            print("    " + r.detail.get("output_tail", "")[-600:].replace("\n", "\n    "))
