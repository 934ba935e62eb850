"""What ran on the GPU, as JAX's profiler sees it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = tuple[float, float, str]  # start, duration, name of a kernel; in nanoseconds


def gpu_events(run: Callable[[], Any]) -> list[Event]:
    """The kernels of `run`, which waits for them itself, in order."""
    import jax
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in ProfileData.from_file(str(file)).planes if "GPU" in p.name]
        lines = [line for plane in planes for line in plane.lines if "Stream" in line.name]
        return sorted((e.start_ns, e.duration_ns, e.name) for line in lines for e in line.events)
