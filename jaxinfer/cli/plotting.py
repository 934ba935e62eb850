"""The roofline of a model on a GPU, as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxinfer.errors import CapacityError

if TYPE_CHECKING:
    from jaxinfer.config import ModelConfig
    from jaxinfer.placement import Setting
    from jaxinfer.roofline import Step

BATCHES = (1, 8, 32, 128, 512)


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
    try:
        figure.savefig(path)
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
