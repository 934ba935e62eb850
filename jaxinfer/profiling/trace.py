"""What ran on the device, as JAX's profiler records it, and which part of the model each op is.

A kernel names the instruction of the compiled program that it is of, and the program's text names
for each instruction the scopes (`jax.named_scope`) in which the model made it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
OP_NAME = re.compile(r'metadata=\{[^}]*op_name="([^"]*)"')
OPERAND = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"\bcalls=%?([\w.\-]+)")


class Event(NamedTuple):
    """A kernel on a GPU, an op of the runtime on a CPU.

    Attributes:
        name: the kernel's.
        op, module: the instruction and the program that it is of; empty where the trace does not
            say.
        path: scopes, where the trace itself says them.
    """

    start_ns: float
    duration_ns: float
    name: str
    op: str = ""
    module: str = ""
    path: str = ""

    @property
    def end_ns(self) -> float:
        return self.start_ns + self.duration_ns


def record_events(run: Callable[[], Any]) -> list[Event]:
    """What `run` does on the default device, in order; it waits for it itself."""
    import jax
    from jax.profiler import ProfileData, ProfileOptions

    options = ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return sorted(_events(ProfileData.from_file(str(file))))


def _events(data: Any) -> Iterator[Event]:
    """Kernels of the streams of GPUs; without any, ops of the CPU's threads."""
    planes = {plane.name: plane for plane in data.planes}
    gpus = [plane for name, plane in planes.items() if "GPU" in name]
    for plane in gpus or [planes[name] for name in planes if name == "/host:CPU"]:
        for line in plane.lines:
            if gpus and "Stream" not in line.name:  # a GPU's other lines say the same again
                continue
            for event in line.events:
                stats = {name: value for name, value in event.stats if name is not None}
                if gpus or "hlo_op" in stats:
                    op, module, path = (
                        str(stats.get(name, "")) for name in ("hlo_op", "hlo_module", "tf_op")
                    )
                    yield Event(event.start_ns, event.duration_ns, event.name, op, module, path)


def op_paths(program: str) -> dict[str, str]:
    """Each instruction of a compiled program's text, with its scopes: `jit(step)/qkv/dot_general`.

    One that the compiler made and gave no scopes is part of what it calls (a fusion), or else of
    what uses it first (a copy into another layout).
    """
    paths: dict[str, str] = {}
    ends: dict[str, str] = {}  # of each computation, the last that says something
    without: dict[str, str | None] = {}  # with what it calls
    users: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if found := COMPUTATION.match(line):
            computation = found[1]
        elif found := INSTRUCTION.match(line):
            name, rest = found[1], line[found.end() :]
            if op_name := OP_NAME.search(rest):
                paths[name] = ends[computation] = op_name[1]
            else:
                called = CALLED.search(rest)
                without[name] = called and called[1]
            for operand in OPERAND.findall(rest):
                users.setdefault(operand, name)
    for name, called in reversed(without.items()):  # users come after what they use
        path = ends.get(called or "") or paths.get(users.get(name, ""))
        if path is not None:
            paths[name] = path
    return paths
