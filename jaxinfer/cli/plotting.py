"""Rooflines as pictures: of a model on a GPU, and of the ops of a step that was measured."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxinfer.errors import CapacityError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxinfer.config import ModelConfig
    from jaxinfer.placement import Setting
    from jaxinfer.profiling.measure import Profile
    from jaxinfer.roofline import Step

BATCHES = (1, 8, 32, 128, 512)
SUFFIXES = (".png", ".svg", ".html")
EDGES = 1e-2, 1e5  # FLOPs a byte
COLOURS = 10  # that matplotlib goes through


def need_matplotlib() -> None:
    """Raises ValueError where matplotlib is not installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def plot_roofline(model: str, config: ModelConfig, setting: Setting, path: Path) -> None:
    """FLOP/s over FLOPs a byte: the GPU's roof by its datasheet and as reached, decode steps of
    several batches (those that fit) and a prompt's reading; all of one GPU.

    Raises:
        CapacityError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    from jaxinfer.placement import largest_batch

    gpu, stored = setting.gpu, setting.stored
    peak = getattr(gpu, stored.rate) or gpu.flops_16bit
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    reach = gpu.efficiency
    for label, flops, bandwidth in (
        ("datasheet", peak, gpu.memory_bandwidth),
        ("reached", peak * reach.matmul, gpu.memory_bandwidth * reach.copy),
    ):
        ridge = flops / bandwidth
        axes.plot([1, ridge, 1e4], [bandwidth, flops, flops], label=label)
    most = largest_batch(config, setting)
    for batch in sorted({b for b in (*BATCHES, setting.batch) if b <= max(most, setting.batch)}):
        intensity, rate = _decode_point(config, replace(setting, batch=batch))
        axes.plot(intensity, rate, "o", color="black")
        axes.annotate(str(batch), (intensity, rate), textcoords="offset points", xytext=(4, -12))
    axes.plot(*_prefill_point(config, setting), "^", color="black", label="a prompt")
    axes.plot([], [], "o", color="black", label="decode, by sequences")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte read", ylabel="FLOP/s of a GPU")
    axes.set_title(f"{model}, {setting.precision} on {gpu.name}, context {setting.context}")
    axes.legend()
    _write(figure, path)


def check_name(path: Path) -> None:
    """Raises ValueError unless a picture can be written under such a name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot {path}: expected a name with {', '.join(SUFFIXES)}")


def plot_profile(model: str, found: Profile, path: Path) -> None:
    """Every group of ops under the ceilings measured, and what the engine's time is made of. Ops
    without FLOPs are at the left edge, by the bytes that they move.

    Raises:
        CapacityError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    roof, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    peak, bandwidth = found.ceilings.matmul_flops_per_s, found.ceilings.copy_bytes_per_s
    left, right = EDGES
    roof.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], color="black")
    for phase, marker in zip(found.phases, "o^", strict=True):
        points = [op for op in phase.ops if op.bytes and op.seconds]
        x = [max(left, op.flops / op.bytes) for op in points]
        y = [at * op.bytes / op.seconds for at, op in zip(x, points, strict=True)]
        roof.plot(x, y, marker, label=phase.name)
        for label, at in _labels([op.name for op in points], x, y):
            roof.annotate(label, at, textcoords="offset points", xytext=(5, -10), fontsize=8)
    roof.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s")
    roof.set_title("copy bandwidth and matrix product, as measured here")
    roof.legend()
    names, below = [phase.name for phase in found.phases], [0.0] * len(found.phases)
    shown = [_shown(phase.parts) for phase in found.phases]
    for i, part in enumerate(found.phases[0].parts):
        heights = [one[part] / p.engine_s for one, p in zip(shown, found.phases, strict=True)]
        if any(heights):
            hatch = "//" if i >= COLOURS else None
            bars.bar(names, heights, bottom=below, label=part, hatch=hatch)
            below = [at + height for at, height in zip(below, heights, strict=True)]
    bars.set_ylabel("of the time in the engine")
    times = (f"{phase.name} {1e3 * phase.engine_s:.3f} ms" for phase in found.phases)
    bars.set_title(", ".join(times))
    bars.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    figure.suptitle(
        f"{model}, {found.precision}, {found.dtype} on {found.device}: batch {found.batch}, "
        f"context {found.context}, prompt {found.prompt}"
    )
    _write(figure, path)


def _labels(
    names: Sequence[str], x: Sequence[float], y: Sequence[float]
) -> list[tuple[str, tuple[float, float]]]:
    """A label for each point; one for those that lie so close that they would cover each other."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, at in enumerate(zip(x, y, strict=True)):
        close = tuple(round(math.log10(v) / step) for v, step in zip(at, (0.5, 0.3), strict=True))
        found.setdefault((close[0], close[1]), []).append(i)
    return [
        (", ".join(names[i] for i in some), (x[some[0]], min(y[i] for i in some)))
        for some in found.values()
    ]


def _shown(parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds as a bar can show them: what is below 0 taken off the largest part but the first, the
    gaps between kernels where CUDA graphs, which are off in the recording, close them."""
    found, less = dict(parts), -sum(seconds for seconds in parts.values() if seconds < 0)
    for part in sorted([*found][1:], key=lambda name: -found[name]):
        off = min(less, max(0.0, found[part]))
        found[part], less = max(0.0, found[part]) - off, less - off
    return found


def _write(figure: Figure, path: Path) -> None:
    try:
        if path.suffix != ".html":
            figure.savefig(path)
            return
        picture = io.StringIO()
        figure.savefig(picture, format="svg")
        _, start, svg = picture.getvalue().partition("<svg")  # after what is of a file of its own
        path.write_text(f"<!doctype html><meta charset=utf-8>{start}{svg}", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CapacityError(f"--plot {path}: cannot be written: {error}") from error


def _work(step: Step) -> tuple[float, float]:
    """FLOPs, and bytes read."""
    flops = step.matrix_flops + step.head_flops + step.attention_flops
    return flops, step.matrix_bytes + step.other_bytes + step.kv_bytes


def _decode_point(config: ModelConfig, setting: Setting) -> tuple[float, float]:
    from jaxinfer.placement import decode_time, stage_rows, stage_step
    from jaxinfer.roofline import padded

    step, rows = stage_step(config, setting), stage_rows(setting)
    flops, read = _work(step)
    # padding computes too, but for nothing
    flops -= (1 - rows / padded(rows)) * (step.matrix_flops + step.head_flops)
    return flops / read, flops / decode_time(config, setting)[1].total


def _prefill_point(config: ModelConfig, setting: Setting) -> tuple[float, float]:
    from jaxinfer.estimate import prefill_time
    from jaxinfer.roofline import prefill_steps, shard

    part = shard(config, setting.tp, setting.pp)
    steps = [_work(s) for s in prefill_steps(part, setting.stored, setting.prompt_tokens)]
    flops, read = (sum(each) for each in zip(*steps, strict=True))
    return flops / read, flops / prefill_time(config, setting)[1]
