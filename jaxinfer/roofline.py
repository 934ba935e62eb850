"""How long a step takes: the bytes it must read, the products it must compute, and what is fixed.

    products  = hypot(weights read / bandwidth, FLOPs / rate)
    step      = products + max(keys and values read / bandwidth, attention / rate)
                + layers * (kernels' launches + two all-reduces)

`hypot` is the roofline with its corner rounded: near the corner a kernel waits for memory and
computes by turns. The constants below were fitted to this engine on one H100 (docs/sizing.md shows
predicted beside measured); on other GPUs they are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxinfer.cache import page_bytes
from jaxinfer.config import ModelConfig
from jaxinfer.hardware import Gpu
from jaxinfer.models.weights import MATRICES, count_params, declare
from jaxinfer.pages import pages_for

LAYER_S = 36e-6  # a layer's kernels: launches, beginnings and ends, what is small. H100, fitted
KV_READ, KV8_READ = 0.957, 0.88  # of the copy bandwidth: decode attention, 16- and 8-bit pages
ROWS = 8  # a step has a multiple of them (ADR 003)
CHUNK_TOKENS = 2048  # of prompts in one step, by the engine's default
# Two and four H200s, 2026-11-28 (bench/multi_gpu.md); other links are assumed alike.
LINK_SHARE = 0.53  # of a link's rate one way, by an all-reduce of 34 MB: 161 us
MESSAGE_S = 25e-6  # of any message between GPUs, however small: 20 to 37 us
# The same by Hopper's kernel, and for each GPU: 6 us between two, 10 between four.
KERNEL_S, KERNEL_EACH_S = 1.5e-6, 2e-6


@dataclass(frozen=True)
class Precision:
    """What the layers' matrices are stored and multiplied in; embeddings, norms and the output
    projection stay in `dtype`.

    Attributes:
        weight_bytes: of one weight, with its share of the scales.
        read: share of the copy bandwidth at which matrices are read.
        rate: which of the GPU's rates multiplies them; the 16-bit one where it has no such.
        layer_s: what it adds to `LAYER_S`.
    """

    weight_bytes: float
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    read: float = 1.0
    rate: Literal["flops_16bit", "flops_fp32", "ops_int8", "flops_fp8"] = "flops_16bit"
    layer_s: float = 0.0


# `read` by bench.quant_matmul: the time over the bytes, each less what a small matrix takes.
# Rounding the activations of four products takes 6 us a layer.
PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "bf16": Precision(2.0),
        "fp16": Precision(2.0, "float16"),
        "fp32": Precision(4.0, "float32", rate="flops_fp32"),
        "int8": Precision(1 + 2 / 128),  # weights alone; packed with a scale for every 128 columns
        "w8a8": Precision(1.0, rate="ops_int8", layer_s=6e-6),
        "fp8": Precision(1.0, rate="flops_fp8", layer_s=6e-6),
        "int4": Precision(0.5 + 2 / 128, read=0.88),  # groups of 128
        "nf4": Precision(0.5 + 2 / 64, read=0.86),  # groups of 64
    }
)


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights: in the layers' matrices, in norms and biases, in one vocabulary matrix,
    and how many of those there are."""

    matrices: int
    others: int
    vocabulary: int
    vocabularies: int

    def bytes(self, precision: Precision) -> float:
        """All of them in memory."""
        width = jnp.dtype(precision.dtype).itemsize
        rest = self.others + self.vocabularies * self.vocabulary
        return precision.weight_bytes * self.matrices + width * rest


class Work(NamedTuple):
    """Of one op in one step, in all layers: bytes that it must move, and FLOPs."""

    bytes: float
    flops: float


class Shape(NamedTuple):
    """How large a step is.

    Attributes:
        rows: tokens that are computed.
        logits: rows of logits.
        cached: tokens whose keys and values are read, added up over sequences and layers.
        pairs: of a token and one that it attends to, added up over layers.
    """

    rows: int
    logits: int
    cached: int
    pairs: int


@dataclass(frozen=True)
class Step:
    """What one GPU does in one step; bytes and FLOPs.

    Attributes:
        matrix_bytes, other_bytes: read, of the layers' matrices and of the other weights.
        kv_bytes: keys and values read, of rows that decode.
        small_bytes: the rest, of activations, of keys and values written: their time is in
            `LAYER_S`.
        matrix_flops, head_flops: of the layers' products and of the output projection.
        attention_flops: of attention.
        message_bytes: of one all-reduce; there are two a layer.
    """

    layers: int
    matrix_bytes: float
    other_bytes: float
    kv_bytes: float
    small_bytes: float
    matrix_flops: float
    head_flops: float
    attention_flops: float
    message_bytes: float


@dataclass(frozen=True)
class StepTime:
    """Where a step's time goes, in seconds. `read` and `compute` overlap; `attention` is what
    reading keys and values (`kv`) does not hide."""

    read: float
    compute: float
    kv: float
    attention: float
    launches: float
    communication: float

    @property
    def total(self) -> float:
        alone = self.kv + self.attention + self.launches + self.communication
        return math.hypot(self.read, self.compute) + alone


def shard(config: ModelConfig, tp: int, pp: int) -> ModelConfig:
    """What the fullest of `tp * pp` GPUs holds, as a config of its own. KV heads that do not go
    round are held twice. All of them share the vocabulary."""
    return replace(
        config,
        vocab_size=config.vocab_size // (tp * pp),
        intermediate_size=config.intermediate_size // tp,
        num_heads=config.num_heads // tp,
        num_kv_heads=max(1, config.num_kv_heads // tp),
        layers=config.layers[: math.ceil(config.num_layers / pp)],
    )


def count_sizes(config: ModelConfig) -> Sizes:
    """Of a whole model, or of a `shard`."""
    none = replace(config, layers=(), tie_embeddings=True)
    one = replace(none, layers=config.layers[:1])
    shapes = [declare(one)["layers"][0][name].shape for name in MATRICES]
    matrices = sum(rows * columns for rows, columns in shapes)
    others = count_params(one) - count_params(none) - matrices
    return Sizes(
        matrices=config.num_layers * matrices,
        others=config.num_layers * others + config.hidden_size,
        vocabulary=config.vocab_size * config.hidden_size,
        vocabularies=1 if config.tie_embeddings else 2,
    )


def padded(rows: int) -> int:
    """Rows that a step computes for so many."""
    return pages_for(rows, ROWS) * ROWS


def decode_step(
    part: ModelConfig, precision: Precision, *, rows: int, context: int, kv_dtype: str
) -> Step:
    """One token for each of `rows` sequences that hold `context` tokens."""
    return make_step(part, precision, decode_shape(part, rows, context), kv_dtype=kv_dtype)


def prefill_steps(part: ModelConfig, precision: Precision, prompt: int) -> list[Step]:
    """One prompt, read in chunks."""
    starts = range(0, prompt, CHUNK_TOKENS)
    shapes = [chunk_shape(part, x, min(prompt, x + CHUNK_TOKENS)) for x in starts]
    return [make_step(part, precision, shape, kv_dtype=precision.dtype) for shape in shapes]


def decode_shape(part: ModelConfig, rows: int, context: int) -> Shape:
    """Of `rows` sequences that hold `context` tokens, padded as a step is at least."""
    seen = rows * sum(min(layer.window or context, context) for layer in part.layers)
    return Shape(padded(rows), padded(rows), cached=seen, pairs=seen)


def chunk_shape(part: ModelConfig, start: int, end: int) -> Shape:
    """Of tokens `start` to `end` of a prompt. What was read before is attended to; reading it takes
    less time than that."""
    pairs = sum(_attended(end, x.window) - _attended(start, x.window) for x in part.layers)
    return Shape(padded(end - start), ROWS, cached=0, pairs=pairs)


def _attended(length: int, window: int | None) -> int:
    """Pairs of a token and one that it attends to, among the first `length` tokens."""
    near = min(length, window or length)
    return near * (near + 1) // 2 + (length - near) * near


def op_work(
    part: ModelConfig, precision: Precision, shape: Shape, *, kv_dtype: str
) -> dict[str, Work]:
    """Of each op, by the names of `jaxinfer.profiling.GROUPS`.

    A product reads its matrix; its activations are counted where they are made or read by other
    ops. Those move what goes in and what comes out.
    """
    c, width = part, jnp.dtype(precision.dtype).itemsize
    declared = declare(replace(c, layers=c.layers[:1]))["layers"][0]
    matrices = {name: c.num_layers * math.prod(declared[name].shape) for name in MATRICES}
    work = {
        name: Work(precision.weight_bytes * size, 2.0 * shape.rows * size)
        for name, size in matrices.items()
    }
    sizes, one = count_sizes(c), page_bytes(replace(c, layers=c.layers[:1]), 1, kv_dtype)
    queries = width * c.num_layers * c.num_heads * c.head_dim  # of a row
    qkv = queries + 2 * width * c.num_layers * c.num_kv_heads * c.head_dim
    # A layer's two norms read and write the stream and what is added; gate and up become one.
    layer = 8 * c.hidden_size + 3 * c.intermediate_size
    small = width * shape.rows * (c.num_layers * layer + 2 * c.hidden_size)
    return work | {
        "output": Work(width * sizes.vocabulary, 2.0 * shape.logits * sizes.vocabulary),
        "attention": Work(
            one * shape.cached + 2 * queries * shape.rows,
            4.0 * c.num_heads * c.head_dim * shape.pairs,
        ),
        "elementwise": Work(width * sizes.others + small, 0.0),
        "kv_write": Work(shape.rows * (qkv + queries + c.num_layers * one), 0.0),
        "sampling": Work(width * shape.logits * c.vocab_size, 0.0),
    }


def make_step(part: ModelConfig, precision: Precision, shape: Shape, *, kv_dtype: str) -> Step:
    """All of `op_work` together."""
    work, width = op_work(part, precision, shape, kv_dtype=kv_dtype), jnp.dtype(precision.dtype)
    products = [work[name] for name in MATRICES]
    matrix_bytes = sum(product.bytes for product in products)
    sizes, one = count_sizes(part), page_bytes(replace(part, layers=part.layers[:1]), 1, kv_dtype)
    kv_bytes = shape.cached * one
    other_bytes = width.itemsize * (sizes.others + sizes.vocabulary)
    moved = sum(op.bytes for op in work.values())
    return Step(
        layers=part.num_layers,
        matrix_bytes=matrix_bytes,
        other_bytes=other_bytes,
        kv_bytes=kv_bytes,
        small_bytes=moved - matrix_bytes - other_bytes - kv_bytes,
        matrix_flops=sum(product.flops for product in products),
        head_flops=work["output"].flops,
        attention_flops=work["attention"].flops,
        message_bytes=width.itemsize * shape.rows * part.hidden_size,
    )


def step_time(step: Step, gpu: Gpu, precision: Precision, *, kv_dtype: str, tp: int) -> StepTime:
    """How long it takes; `tp`: GPUs that share each layer."""
    reach, copy = gpu.efficiency, gpu.memory_bandwidth * gpu.efficiency.copy
    plain = gpu.flops_fp32 if precision.rate == "flops_fp32" else gpu.flops_16bit
    rate = getattr(gpu, precision.rate) or plain
    kv_read = KV8_READ if jnp.dtype(kv_dtype).itemsize == 1 else KV_READ
    kv = step.kv_bytes / (copy * kv_read)
    return StepTime(
        read=(step.matrix_bytes / precision.read + step.other_bytes) / copy,
        compute=(step.matrix_flops / rate + step.head_flops / plain) / reach.matmul,
        kv=kv,
        attention=max(0.0, step.attention_flops / (plain * reach.attention) - kv),
        launches=step.layers * (LAYER_S + precision.layer_s),
        communication=2 * step.layers * all_reduce_time(step.message_bytes, gpu, tp),
    )


def all_reduce_bytes(message: float, gpus: int) -> float:
    """What each GPU sends in a ring all-reduce: 2 (n - 1) / n of the message."""
    return 2 * (gpus - 1) / gpus * message


def all_reduce_time(message: float, gpu: Gpu, gpus: int) -> float:
    """Seconds of one all-reduce of `message` bytes."""
    if gpus == 1:
        return 0.0
    sent = all_reduce_bytes(message, gpus)
    least = KERNEL_S + KERNEL_EACH_S * gpus if gpu.hopper else MESSAGE_S
    return least + sent / (gpu.link_bandwidth(gpus) * LINK_SHARE)


def send_time(message: float, gpu: Gpu, gpus: int) -> float:
    """Seconds to hand `message` bytes to the next stage, in a group of `gpus`."""
    return MESSAGE_S + message / (gpu.link_bandwidth(gpus) * LINK_SHARE)
