"""Several processes as one engine, on the CPU: real ones, joined by jax, and what becomes of them.

This file runs itself as the processes: each function of `PARTS` is what one of them does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import pytest

from checkpoints.write import write_hf
from jaxinfer import LLM, JaxinferError, distributed
from jaxinfer.backend import default_cache_directory, use_compilation_cache
from jaxinfer.config import EngineOptions
from jaxinfer.distributed import ADDRESS, COUNT, PROCESS
from jaxinfer.engine import Engine
from jaxinfer.models.weights import declare
from jaxinfer.starting import agree
from tests.test_tensor_parallel import (
    CONFIG,
    GREEDY,
    HF,
    PROMPTS,
    ROOT,
    note_error,
    tokens_of,
    weights,
)

NOTICED_S = 10  # within which the death of a process ends the others
RUNNING = "running"


def make(folder: Path, **options: Any) -> LLM:
    sizes: dict[str, Any] = {
        "max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 1 << 16, "max_steps": 1,
        "max_num_batched_tokens": 16, "page_size": 8, "tensor_parallel_size": 2,
    }  # fmt: skip
    return LLM(folder / "model", dtype="float32", **sizes | options)


# -- what the processes do ------------------------------------------------------------------------


def held(llm: LLM) -> int:
    """Bytes of the weights that lie in this process."""
    parts = (part for x in jax.tree.leaves(llm.params) for part in x.addressable_shards)
    return sum(part.data.nbytes for part in parts)


def serve(folder: Path, process: int, **options: Any) -> None:
    """Notes what came out; of several processes the first goes on until something stops it."""
    with make(folder, **options) as llm:
        (folder / f"held{process}").write_text(str(held(llm)))
        if llm.follow():
            return
        several = jax.process_count() > 1
        found: dict[str, Any] = {"tokens": tokens_of(llm)}
        if several:
            note_error(found, "save", lambda: llm.save(folder / "state"))
            note_error(found, "update_params", lambda: llm.update_params({}))
            note_error(found, "request", lambda: llm.generate([[]]))  # and nobody minds
        (folder / f"found{jax.process_count()}").write_text(json.dumps(found))
        print(RUNNING, flush=True)
        while several:
            tokens_of(llm)


def stages(folder: Path, process: int) -> None:
    """Two stages, that are warmed up, and speculate; all processes end when the first does."""
    found = {}
    with make(folder, tensor_parallel_size=1, pipeline_parallel_size=2) as llm:
        if not llm.follow():
            assert llm.warm_up([GREEDY]).unequal == ()
            found["tokens"] = tokens_of(llm)
    how = "lookup,tokens=2,adapt=false"
    with make(folder, tensor_parallel_size=1, pipeline_parallel_size=2, speculative=how) as llm:
        if not llm.follow():
            found["guessed"] = tokens_of(llm)
            assert llm.metrics.summary().acceptance is not None
    if found:
        (folder / f"found{jax.process_count()}").write_text(json.dumps(found))


def disagree(folder: Path, process: int) -> None:
    make(folder, max_num_seqs=4 - process)


def unread(folder: Path, process: int) -> None:
    """The second has the config alone."""
    make(folder / "half" if process else folder)


def raises(folder: Path, process: int) -> None:
    """The second goes wrong while the first waits for what both compute."""
    run, steps = Engine.run, iter(range(9))

    def unlucky(self: Engine, *args: Any) -> Any:
        if process and next(steps, None) is None:
            raise RuntimeError("out of luck")
        return run(self, *args)

    Engine.run = unlucky  # type: ignore[method-assign]
    serve(folder, process)


PARTS: dict[str, Callable[[Path, int], None]] = {
    f.__name__: f for f in (serve, stages, disagree, unread, raises)
}


# -- the tests ------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """A process that did: its exit code, negative for a signal, and what it wrote to stderr."""

    code: int
    errors: str


class Running(NamedTuple):
    process: subprocess.Popen[str]
    errors: Path

    def until_running(self) -> None:
        assert self.process.stdout is not None
        assert RUNNING in map(str.strip, self.process.stdout), self.errors.read_text()

    def ended(self, within: float = 300) -> Ended:
        try:
            code = self.process.wait(within)
        finally:
            self.process.kill()  # nothing, where it has ended
        assert self.process.stdout is not None
        self.process.stdout.close()
        return Ended(code, self.errors.read_text())


def start(folder: Path, command: Sequence[str], count: int = 2) -> list[Running]:
    """So many processes of one device each; one alone has two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for i in range(count):
        devices = 2 if count == 1 else 1
        env = {
            **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }  # fmt: skip
        if count > 1:
            env |= {ADDRESS: f"127.0.0.1:{port}", COUNT: str(count), PROCESS: str(i)}
        errors = folder / f"errors{count}.{i}"
        with errors.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=file, text=True
            )
        found.append(Running(process, errors))
    return found


def start_part(folder: Path, part: str, count: int = 2) -> list[Running]:
    return start(folder, [__file__, part, str(folder)], count)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in it, and one with a model's config alone."""
    path = tmp_path_factory.mktemp("model")
    write_hf(path / "model", weights(), declare(CONFIG), HF)
    half = path / "half" / "model"
    half.mkdir(parents=True)
    (half / "config.json").write_bytes((path / "model" / "config.json").read_bytes())
    return path


class Served(NamedTuple):
    """What two processes computed, and what one with two devices did; and how the two ended when
    one was killed."""

    several: dict[str, Any]
    one: dict[str, Any]
    held: list[int]
    ends: list[Ended]


def serve_and_kill(model: Path, victim: int) -> Served:
    both = start_part(model, "serve")
    try:
        both[0].until_running()
        both[victim].process.send_signal(signal.SIGKILL)
        ends = [one.ended(NOTICED_S) for one in both]
    finally:
        for one in both:
            one.process.kill()
    held = [int((model / f"held{i}").read_text()) for i in range(2)]
    (alone,) = start_part(model, "serve", 1)
    assert alone.ended().code == 0
    found = [json.loads((model / f"found{count}").read_text()) for count in (2, 1)]
    return Served(found[0], found[1], held, ends)


@pytest.fixture(scope="module")
def served(model: Path) -> Served:
    return serve_and_kill(model, victim=1)


def test_tokens_are_those_of_one_process(served):
    assert served.several["tokens"] == served.one["tokens"]
    assert len({tuple(tokens) for tokens in served.one["tokens"]}) == len(PROMPTS)


def test_each_process_holds_its_part(served):
    whole = sum(x.nbytes for x in jax.tree.leaves(weights()))
    assert all(0.5 * whole <= held < 0.55 * whole for held in served.held)  # norms on both


def test_what_is_not_done_over_processes_is_refused(served):
    for name in ("save", "update_params"):
        assert served.several[name] == f"JaxinferError: {name}: not with 2 processes: expected 1"
    assert "it is empty" in served.several["request"]


def test_a_killed_process_is_noticed(served):
    code, errors = served.ends[0]
    assert code != 0
    assert "heartbeat" in errors
    assert "Task 1" in errors or "unhealthy (stopped sending heartbeats):\n1\n" in errors


@pytest.mark.slow
def test_a_killed_controller_is_noticed(model):
    code, errors = serve_and_kill(model, victim=0).ends[1]
    assert code != 0
    assert "leader task" in errors


@pytest.mark.parametrize(
    "part",
    ["unread", pytest.param("raises", marks=pytest.mark.slow)],
)
def test_a_process_that_fails_stops_the_others(model, part):
    first, second = (one.ended() for one in start_part(model, part))
    what = {"unread": "CheckpointError: ", "raises": "RuntimeError: out of luck"}[part]
    assert first.code == 1
    assert f"jaxinfer: process 1 of 2 failed: {what}" in first.errors
    assert "; process 0 stops" in first.errors
    assert second.code == 1
    assert what in second.errors


def test_processes_that_disagree_are_refused(model):
    for code, errors in [one.ended() for one in start_part(model, "disagree")]:
        assert code == 1
        assert "options.max_num_seqs: process 0 4, process 1 3" in errors


@pytest.mark.slow
def test_stages_over_processes(model):
    both, (alone,) = start_part(model, "stages"), start_part(model, "stages", 1)
    for one in (*both, alone):
        code, errors = one.ended()
        assert code == 0, errors
    several, one = (json.loads((model / f"found{count}").read_text()) for count in (2, 1))
    assert several == one
    assert several["guessed"] == several["tokens"]


@pytest.mark.slow
def test_the_command_line_of_all_but_the_first_follows(tmp_path):
    run = "import sys; from jaxinfer.cli import main; sys.exit(main())"
    command = ["-c", run, "generate", "def f(", "--max-tokens", "8"]
    command += ["--tensor-parallel-size", "2", "--json"]
    said = []
    for count in (2, 1):
        for i, one in enumerate(start(tmp_path, command, count)):
            out = one.process.communicate(timeout=300)[0]
            assert one.process.returncode == 0, one.errors.read_text()
            records = [line for line in out.splitlines() if line.startswith("{")]
            assert len(records) == (i == 0)  # beside what XLA says of its collectives
            said += [json.loads(line)["outputs"] for line in records]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({ADDRESS: "a:1"}, f"{ADDRESS}=a:1: expected {COUNT} and {PROCESS} with it"),
        ({COUNT: "2", PROCESS: "1"}, f"{COUNT}=2, {PROCESS}=1: expected {ADDRESS} too"),
        ({ADDRESS: "a:1", COUNT: "two", PROCESS: "0"}, f"{COUNT}='two': expected an integer"),
        ({ADDRESS: "a:1", COUNT: "2", PROCESS: "2"}, f"{PROCESS}=2: expected 0 to 1"),
    ],
)  # fmt: skip
def test_incomplete_variables_are_refused(monkeypatch, variables, message):
    for name in (ADDRESS, COUNT, PROCESS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(JaxinferError, match=message):
        distributed.start()


@pytest.mark.parametrize("option", [{"data_parallel_size": 2}, {"device_weight_bytes": 1 << 30}])
def test_options_of_one_process_are_refused(option):
    link: Any = SimpleNamespace(count=2)
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.*: expected .* with 2 processes"):
        agree(link, CONFIG, EngineOptions(**option))


if __name__ == "__main__":
    distributed.start()
    use_compilation_cache(default_cache_directory())
    PARTS[sys.argv[1]](Path(sys.argv[2]), int(os.environ.get(PROCESS, "0")))
