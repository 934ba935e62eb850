"""A model on GPUs that need not be there: what its fullest GPU holds, and what fits.

Memory is what `sizing` plans for (weights, KV pages, steps), time is `roofline`'s. Letters: `tp`
GPUs share each layer, `pp` stages hold the layers in turn, `dp` copies of all share the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxinfer.buckets import MOST_CHUNKS
from jaxinfer.cache import KV_DTYPES, page_bytes, resolve_kv_dtype
from jaxinfer.config import EngineOptions, ModelConfig
from jaxinfer.hardware import Gpu
from jaxinfer.pages import pages_for
from jaxinfer.roofline import (
    CHUNK_TOKENS,
    PRECISIONS,
    Precision,
    Step,
    StepTime,
    count_sizes,
    decode_step,
    padded,
    send_time,
    shard,
    step_time,
)
from jaxinfer.sizing import most_step_bytes
from jaxinfer.temporaries import StepShape, hungriest
from pallas_kernels.exchange_layout import memory_words

HOST_GPUS, MOST_GPUS = 8, 64  # most that share a layer; most that `search` looks at
MOST_ROWS = 1 << 20
SMALLER = ("fp8", "int4")  # what is tried where a precision does not fit
KV_CHOICES = ("auto", *KV_DTYPES)
PAGE = EngineOptions.page_size


@dataclass(frozen=True)
class Setting:
    """What is asked about.

    Attributes:
        gpu: a row of `hardware.GPUS`.
        precision: a key of `roofline.PRECISIONS`.
        kv_dtype: `auto` (as the activations), `int8` or `fp8`.
        batch: sequences that decode at once, over all copies.
        context: tokens that each holds: memory and decode are of a batch of this length.
        prompt: tokens of a prompt whose reading is timed; None: `context`.
        tp, pp, dp: see the module's head.
        utilization: share of the GPU's memory that is used.
        dtype: of activations, embeddings, norms and the output projection; None: the precision's.
    """

    gpu: Gpu
    precision: str = "bf16"
    kv_dtype: str = "auto"
    batch: int = 1
    context: int = 4096
    prompt: int | None = None
    tp: int = 1
    pp: int = 1
    dp: int = 1
    utilization: float = EngineOptions.gpu_memory_utilization
    dtype: Literal["bfloat16", "float16", "float32"] | None = None

    @property
    def gpus(self) -> int:
        """How many, in all."""
        return self.tp * self.pp * self.dp

    @property
    def rows(self) -> int:
        """Sequences of one copy."""
        return math.ceil(self.batch / self.dp)

    @property
    def prompt_tokens(self) -> int:
        return self.context if self.prompt is None else self.prompt

    @property
    def stored(self) -> Precision:
        """What `precision` and `dtype` stand for."""
        found = PRECISIONS[self.precision]
        return found if self.dtype is None else replace(found, dtype=self.dtype)

    @property
    def dense(self) -> bool:
        """Whether the layers' matrices are of the activations' dtype."""
        return PRECISIONS[self.precision].weight_bytes >= 2

    @property
    def kv_name(self) -> str:
        """The dtype of the pages."""
        return resolve_kv_dtype(self.kv_dtype, self.stored.dtype).name


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest GPU.

    Attributes:
        weights: its share.
        kv: pages of its rows.
        activations: the layers' arrays of tokens, of the hungriest compiled step.
        temporaries: that step's other needs: libraries' workspace, attention's partial results,
            logits.
        margin: what an engine keeps free beside them: for the steps of requests of other kinds
            than greedy ones, and for all that is not in compiled steps; see `sizing`.
        usable: what may be used.
    """

    weights: int
    kv: int
    activations: int
    temporaries: int
    margin: int
    usable: int

    @property
    def steps(self) -> int:
        """All that the hungriest step needs beside weights and pages."""
        return self.activations + self.temporaries

    @property
    def occupied(self) -> int:
        """Used, while that step runs."""
        return self.weights + self.kv + self.steps

    @property
    def needed(self) -> int:
        """That an engine will start."""
        return self.occupied + self.margin

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable


def check_setting(config: ModelConfig, setting: Setting) -> None:
    """Raises ValueError for what makes no sense; it names the value and what is accepted."""
    s = setting
    if s.precision not in PRECISIONS:
        raise ValueError(f"precision={s.precision!r}: expected one of {', '.join(PRECISIONS)}")
    if s.kv_dtype not in KV_CHOICES:
        raise ValueError(f"kv_dtype={s.kv_dtype!r}: expected one of {', '.join(KV_CHOICES)}")
    if s.stored.dtype == "bfloat16" and not s.gpu.bfloat16:
        raise ValueError(f"precision={s.precision!r}: {s.gpu.name} has no bfloat16; take fp16")
    for name in ("batch", "context", "tp", "pp", "dp"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)}: expected at least 1")
    if s.context > config.max_position:
        raise ValueError(
            f"context={s.context}: this model was made for sequences of up to"
            f" {config.max_position} tokens"
        )
    if not 1 <= s.prompt_tokens <= s.context:
        raise ValueError(f"prompt={s.prompt}: expected 1 to {s.context}, the context")
    if not 0 < s.utilization <= 1:
        raise ValueError(f"utilization={s.utilization}: expected above 0, at most 1")
    if not can_split(config, s.tp):
        works = degrees(config)
        raise ValueError(
            f"tp={s.tp}: expected at most {HOST_GPUS} GPUs, that divide {config.num_heads} heads,"
            f" {config.intermediate_size} columns of the MLP and {config.vocab_size} tokens, and"
            f" that {config.num_kv_heads} KV heads are shared out to evenly; nearest that works:"
            f" {min(works, key=lambda n: abs(n - s.tp))} (of {', '.join(map(str, works))})"
        )
    check_stages(config, s.tp, s.pp, f"pp={s.pp}")


def can_split(config: ModelConfig, tp: int) -> bool:
    """Whether `tp` GPUs of one host can share each layer."""
    c = config
    even = all(n % tp == 0 for n in (c.num_heads, c.intermediate_size, c.vocab_size))
    return even and tp <= HOST_GPUS and (c.num_kv_heads % tp == 0 or tp % c.num_kv_heads == 0)


def degrees(config: ModelConfig) -> list[int]:
    """All numbers of GPUs for which `can_split` holds, ascending."""
    return [n for n in range(1, HOST_GPUS + 1) if can_split(config, n)]


def can_stage(config: ModelConfig, tp: int, pp: int) -> bool:
    """Whether `pp` stages of `tp` devices can run one program, each of its own layers."""
    if pp == 1:
        return True
    each, rest = divmod(config.num_layers, pp)
    alike = all(config.layers[i] == config.layers[i % each] for i in range(pp * each))
    return not rest and alike and config.vocab_size % (tp * pp) == 0


def check_stages(config: ModelConfig, tp: int, pp: int, asked: str) -> None:
    """Raises ValueError unless `can_stage`; it says what was `asked`, and what works."""
    if can_stage(config, tp, pp):
        return
    works = [n for n in range(1, config.num_layers + 1) if can_stage(config, tp, n)]
    raise ValueError(
        f"{asked}: expected stages that share {config.num_layers} layers evenly, each with the "
        f"same windows and position embeddings in the same order, and of {tp} device(s), all of "
        f"which share {config.vocab_size} tokens evenly; nearest that works: "
        f"{min(works, key=lambda n: abs(n - pp))} (of {', '.join(map(str, works))})"
    )


def check_degrees(config: ModelConfig, options: EngineOptions, name: str) -> None:
    """Raises ValueError unless as many devices and stages as `options` say can share the model,
    which the message calls `name`; it says which degrees work."""
    size, stages = options.tensor_parallel_size, options.pipeline_parallel_size
    if size > 1 and not can_split(config, size):
        raise ValueError(
            f"tensor_parallel_size={size}: {name} has {config.num_heads} heads, "
            f"{config.num_kv_heads} KV heads, {config.intermediate_size} columns in the MLP and "
            f"{config.vocab_size} tokens, which must be shared out evenly; what works: "
            f"{', '.join(map(str, degrees(config)))}"
        )
    check_stages(config, size, stages, f"pipeline_parallel_size={stages}: {name}")


def memory_of(
    config: ModelConfig, setting: Setting, shapes: Sequence[StepShape] | None = None
) -> Memory:
    """What the fullest GPU holds. Pages of the engine's default size, one of them for trash.

    `shapes`: the steps that may run; None: those of greedy requests, as large as the engine's
    defaults let them be.
    """
    part, stored, size = shard(config, setting.tp, setting.pp), setting.stored, PAGE
    columns = pages_for(setting.context, size)
    rows, tokens = setting.rows, max(CHUNK_TOKENS, 2 * setting.rows)
    if shapes is None:
        shapes = [
            StepShape(padded(rows), n, MOST_CHUNKS if n else 0, columns * size) for n in (0, tokens)
        ]
    how: dict[str, Any] = {
        "dtype": stored.dtype, "kv_dtype": setting.kv_name, "hopper": setting.gpu.hopper,
        # Kernels sum on Hopper; one device gathers nothing.
        "gathered": 0 if setting.gpu.hopper or setting.tp == 1 else setting.tp,
    }  # fmt: skip
    phases = (hungriest(part, shape, dense=setting.dense, **how) for shape in shapes)
    step = max(phases, key=lambda phase: phase.bytes)
    # Log-probabilities are of whole rows of logits.
    whole = replace(part, vocab_size=config.vocab_size)
    # What GPUs write into each other's memory.
    peers = 4 * memory_words(setting.tp) if setting.gpu.hopper and setting.tp > 1 else 0
    most, margin = most_step_bytes(whole, rows=rows, tokens=tokens, max_kv=columns * size, **how)
    return Memory(
        weights=round(count_sizes(part).bytes(stored)),
        kv=(rows * columns + 1) * page_bytes(part, size, setting.kv_name),
        activations=step.activations,
        temporaries=step.bytes - step.activations,
        margin=max(0, most - step.bytes) + margin + peers,
        usable=int(setting.utilization * setting.gpu.visible_bytes),
    )


def stage_rows(setting: Setting) -> int:
    """Sequences that are in one stage at a time."""
    return math.ceil(setting.rows / setting.pp)


def stage_step(config: ModelConfig, setting: Setting) -> Step:
    """What one GPU of a stage does in a decode step, of its `stage_rows`."""
    return decode_step(
        shard(config, setting.tp, setting.pp),
        setting.stored,
        rows=stage_rows(setting),
        context=setting.context,
        kv_dtype=setting.kv_name,
    )


def decode_time(config: ModelConfig, setting: Setting) -> tuple[float, StepTime]:
    """Seconds between two tokens of a sequence, and where those of one stage go.

    The batch is cut into `pp` parts that go through the stages one behind the other.
    """
    step = stage_step(config, setting)
    stage = step_time(step, setting.gpu, setting.stored, kv_dtype=setting.kv_name, tp=setting.tp)
    return setting.pp * (stage.total + hop_time(step, setting)), stage


def hop_time(step: Step, setting: Setting) -> float:
    """Seconds to hand a step's rows to the next stage."""
    if setting.pp == 1:
        return 0.0
    return send_time(step.message_bytes, setting.gpu, setting.tp * setting.pp)


def largest_batch(config: ModelConfig, setting: Setting, *, tpot_ms: float | None = None) -> int:
    """Most sequences that fit, and of which each gets a token every `tpot_ms`; 0: not even `dp`."""

    def works(rows: int) -> bool:
        tried = replace(setting, batch=rows * setting.dp)
        if not memory_of(config, tried).fits:
            return False
        return tpot_ms is None or 1e3 * decode_time(config, tried)[0] <= tpot_ms

    return setting.dp * _largest(works, MOST_ROWS)


def search(config: ModelConfig, setting: Setting, *, most: int = MOST_GPUS) -> Setting | None:
    """The setting on the fewest GPUs that it fits on, in ones, twos, fours and so on, as they are
    sold; of several ways to share them the fastest in decode. None: not on `most`.

    `tp` and `pp` of `setting` are not looked at; each of its `dp` copies gets as many.

    Raises:
        ValueError: see `check_setting`.
    """
    check_setting(config, replace(setting, tp=1, pp=1))
    for gpus in (1 << i for i in range(most.bit_length())):
        fitting = [s for s in _layouts(config, setting, gpus) if memory_of(config, s).fits]
        if fitting:
            return min(fitting, key=lambda s: decode_time(config, s)[0])
    return None


def _layouts(config: ModelConfig, setting: Setting, gpus: int) -> Iterator[Setting]:
    for tp in range(1, min(gpus, HOST_GPUS) + 1):
        pp, rest = divmod(gpus, tp)
        if not rest and can_split(config, tp) and can_stage(config, tp, pp):
            yield replace(setting, tp=tp, pp=pp)


def nearest(config: ModelConfig, setting: Setting) -> Iterator[str]:
    """Changes that make it fit, each alone, in words."""

    def fits(**changes: Any) -> bool:
        return memory_of(config, replace(setting, **changes)).fits

    if batch := largest_batch(config, setting):
        yield f"batch {batch}"
    if context := _largest(lambda n: fits(context=n, prompt=None), setting.context):
        yield f"context {context}"
    if setting.kv_dtype == "auto" and fits(kv_dtype="fp8"):
        yield "kv-dtype fp8"
    width = PRECISIONS[setting.precision].weight_bytes
    for name in SMALLER:
        if PRECISIONS[name].weight_bytes < width and setting.gpu.bfloat16 and fits(precision=name):
            yield f"precision {name}"
            break
    if found := search(config, setting):
        split = [f"{name} {n}" for name, n in (("tp", found.tp), ("pp", found.pp)) if n > 1]
        yield f"{' '.join(split)} ({found.gpus} GPUs)"


def _largest(works: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that works, where all below it do too; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle) else (low, middle - 1)
    return low
