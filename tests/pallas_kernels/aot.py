"""Compiles kernels to the SASS of a named GPU on a machine that has none, and says what they use.

    python -m tests.pallas_kernels.aot sm90 --only decode

One architecture a process. Prints one JSON object a case: `name`, `registers` of a thread (the most
of the case's kernels), `spill_bytes`, `shared_bytes`, `seconds`, and `problem`, null when it is
fit to run. The problems: an error of the compiler, a spill (beyond what the case allows), more
shared memory than the GPU has, and what ptxas says when it makes a kernel slow (wgmma serialised,
register hand-over ignored).

It needs ptxas, libdevice and JAX's CUDA plugin, which `make aot` puts in `.venv/aot`: in the
environment itself the plugin would complain at every start that there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).parents[2]
TARGETS = Path(__file__).with_name("targets")
SPECS = {"sm90": ("h100.txtpb", "sm_90a"), "sm80": ("a100.txtpb", "sm_80")}
CASES = "tests.pallas_kernels.aot_registry:cases"
PLUGIN = "jax_plugins.xla_cuda13"
SLOW = re.compile(r".*(?:are serialized|setmaxnreg.*ignored).*", re.IGNORECASE)


def plugin_path() -> str | None:
    """What PYTHONPATH must hold for the plugin to be found; "" where it is installed already."""
    try:
        if find_spec(PLUGIN) is not None:
            return ""
    except ModuleNotFoundError:
        pass
    folder = Path(sys.prefix) / "aot"
    return str(folder) if (folder / PLUGIN.replace(".", "/")).is_dir() else None


def compile_in_subprocess(
    arch: str, cases: str = CASES, only: str = "", timeout_s: float = 600
) -> list[dict[str, Any]]:
    """The reports of every case for `arch`; see the module's head.

    Args:
        arch: of `SPECS`.
        cases: `module:function`; the function takes `arch` and returns a list of `Case`.
        only: cases whose names contain this.
        timeout_s: of the whole process.

    Raises:
        RuntimeError: the plugin is missing, or the process failed as a whole.
    """
    words = ("--here", arch, "--cases", cases, "--only", only)
    dumps = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
    said = run_with_plugin("tests.pallas_kernels.aot", *words, timeout_s=timeout_s, env=dumps)
    return [json.loads(line) for line in said.splitlines()]


def run_with_plugin(
    module: str, *words: str, timeout_s: float = 600, env: Mapping[str, str] = MappingProxyType({})
) -> str:
    """What a module prints that compiles for GPUs, in a process of its own that finds the plugin.

    Args:
        words: its command line.
        env: added to the environment.

    Raises:
        RuntimeError: the plugin is missing, or the process failed.
    """
    extra = plugin_path()
    if extra is None:
        raise RuntimeError("no CUDA plugin to compile with: run `make aot`")
    path = os.pathsep.join(filter(None, (str(ROOT), extra, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr[-3000:]}")
    return done.stdout


def compile_all(arch: str, cases: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Compiles each case here. The process must have been started with the environment above."""
    import jax
    import numpy as np

    # MLIR has no public way to lower a limit that it takes from the GPU that is there.
    from jax.experimental.mosaic.gpu.core import artificial_shared_memory_limit

    jax.config.update("jax_enable_compilation_cache", False)
    jax.devices()  # finds the plugin and registers it: to initialise it by hand would do so twice
    devices, limit = topology(arch)
    mesh = jax.sharding.Mesh(np.array(devices), ("gpu",))
    on_gpu = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for case in cases:
        began = time.perf_counter()
        error = None
        with _captured() as log:
            try:
                # Mosaic asks the default device which architecture it lowers for.
                with (
                    jax.default_device(devices[0]),
                    artificial_shared_memory_limit(limit),
                ):
                    jitted = jax.jit(case.function, in_shardings=on_gpu, out_shardings=on_gpu)
                    jitted.lower(*case.args).compile()
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"[:2000]
            sys.stdout.flush()
            text = Path(log.name).read_text()
        seconds = round(time.perf_counter() - began, 2)
        allowed = getattr(case, "spill_bytes", 0)
        yield {"name": case.name, **report(arch, text, error, allowed), "seconds": seconds}


def topology(arch: str, count: int = 1) -> tuple[Any, int]:
    """So many devices to compile for, and the shared memory of a block there, in bytes. JAX must
    have found the plugin."""
    from jax.experimental import topologies

    spec = (TARGETS / SPECS[arch][0]).read_text()
    found = re.search(r"shared_memory_per_block_optin: (\d+)", spec)
    assert found is not None
    shape = f"1x1x{count}"
    described = topologies.get_topology_desc(platform="cuda", target_config=spec, topology=shape)
    return described.devices, int(found[1])


def report(arch: str, log: str, error: str | None, allowed_spill: int = 0) -> dict[str, Any]:
    """What ptxas and Mosaic said of one case's kernels, as a row without name and time."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    # Not from the warning, which says the same again.
    found = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    spills = sum(int(n) for both in found for n in both)
    scratch = re.findall(r"smem_scratch_bytes=(\d+),.*barrier_counts=(.*?), scoped", log)
    shared = [
        int(nbytes)
        + 8 * sum(int(n) * int(k) for n, k in re.findall(r"num_barriers=(\d+).*?\): (\d+)", counts))
        for nbytes, counts in scratch
    ]
    wrong = set(re.findall(r"for '(sm_\w+)'", log)) - {SPECS[arch][1]}
    slow = SLOW.search(log)
    problem = error
    if problem is None and not registers:
        problem = "no Mosaic kernel was compiled"
    if problem is None and wrong:
        problem = f"compiled for {sorted(wrong)}"
    if problem is None and spills > allowed_spill:
        problem = f"spills {spills} bytes"
    if problem is None and slow:
        problem = slow[0].strip()
    return {
        "registers": max(registers, default=0),
        "spill_bytes": spills,
        "shared_bytes": max(shared, default=0),
        "problem": problem,
    }


@contextmanager
def _captured() -> Iterator[Any]:
    """Everything written to stdout and stderr, by native code too, into a file."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(fd) for fd in (1, 2)]
        try:
            for fd in (1, 2):
                os.dup2(log.fileno(), fd)
            yield log
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, old in zip((1, 2), saved, strict=True):
                os.dup2(old, fd)
                os.close(old)


def main() -> int:
    parser = argparse.ArgumentParser(description="compile kernels without a GPU")
    parser.add_argument("arch", choices=sorted(SPECS))
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--cases", default=CASES, help="module:function")
    parser.add_argument("--here", action="store_true", help="the environment is set: compile")
    args = parser.parse_args()
    if not args.here:
        rows = compile_in_subprocess(args.arch, args.cases, args.only)
        for row in rows:
            print(json.dumps(row))
        return int(any(row["problem"] for row in rows))
    module, _, function = args.cases.partition(":")
    cases = getattr(importlib.import_module(module), function)(args.arch)
    for row in compile_all(args.arch, [case for case in cases if args.only in case.name]):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
