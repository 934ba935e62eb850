"""Temporary memory of a compiled step: what lies on the device at once, beside weights and pages.

XLA gives all arrays of a program one block of memory, and those that do not live at the same time
the same places. So a step needs what its hungriest *phase* needs, and each phase is a sum of named
arrays. Which arrays live together was read from XLA's buffer assignments of steps that were
compiled for an H100; tests/temporaries.json has what it allocated, docs/sizing.md shows some.

Letters: T tokens, R rows of logits, E hidden size, F MLP width, V vocabulary, H query heads, K
key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxinfer.batch import MIN_ROWS
from jaxinfer.config import ModelConfig
from pallas_kernels.attention_common import SCRATCH_BYTES
from pallas_kernels.sm90_config import scratch_bytes

WORKSPACE, SMALL_WORKSPACE = 32 << 20, 4 << 20  # cuBLAS's, while it multiplies dense matrices
SUMS = 1024  # float32 a row of logits: what `sampling.token_logprobs` sums first
MASSES = 8192  # tokens: rows of keys and masses are padded to a multiple; see `threshold_mosaic`
CUSTOM_TOP = 16  # likeliest tokens, at most, that XLA finds without sorting
SCORE_ROWS = 256  # see `runner.SCORE_BLOCK`

ACTIVATIONS = {
    "residual stream", "normed stream", "rotations", "qkv", "queries", "attended", "product",
    "sums", "gathered", "gate_up", "neurons", "hidden",
}  # fmt: skip

Terms = Mapping[str, int]  # bytes by what they are for


@dataclass(frozen=True)
class StepShape:
    """What decides the memory of a step; the fields are those of `runner.StepKey`.

    Attributes:
        rows: that decode.
        tokens: of the step, those of prompts included; 0: it reads none.
        chunks: prompts that it reads from, at most.
        max_kv: tokens of a sequence, at most: columns of the page table times the page's size.
        random, truncated, top, score, guesses: as there.
        penalties: whether the state has those.
    """

    rows: int
    tokens: int
    chunks: int
    max_kv: int
    random: bool = False
    truncated: bool = False
    top: int | None = None
    score: int | None = None
    guesses: int = 0
    penalties: bool = False

    @property
    def width(self) -> int:
        """T."""
        return self.tokens or max(self.rows * (self.guesses + 1), MIN_ROWS)

    @property
    def logit_rows(self) -> int:
        """R."""
        return self.rows + self.chunks if self.tokens else self.width


@dataclass(frozen=True)
class Phase:
    """What lives at once at some time of a step; `terms` in bytes."""

    name: str
    terms: Terms

    @property
    def bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def activations(self) -> int:
        """Those of them that are the layers' arrays of tokens."""
        return sum(size for name, size in self.terms.items() if name in ACTIVATIONS)


def step_bytes(config: ModelConfig, shape: StepShape, **how: Any) -> int:
    """Bytes of the hungriest phase; see `hungriest`."""
    return hungriest(config, shape, **how).bytes


def hungriest(
    config: ModelConfig,
    shape: StepShape,
    *,
    dtype: Any,
    kv_dtype: Any = None,
    dense: bool = True,
    gathered: int = 0,
    hopper: bool = True,
) -> Phase:
    """The phase that needs most.

    Args:
        config: the model, or one device's part of it.
        shape: of the step.
        dtype: of the activations.
        kv_dtype: of the pages; None: `dtype`.
        dense: whether the layers' matrices are; others have kernels that need no workspace.
        gathered: devices whose partial results are gathered to be summed; 0: a kernel sums them
            in place of those of one, or there is one device.
        hopper: on other GPUs the workspace is smaller, and partial results are few.
    """
    width = jnp.dtype(dtype).itemsize
    quantised = kv_dtype is not None and jnp.dtype(kv_dtype) != jnp.dtype(dtype)
    workspace = WORKSPACE if hopper else SMALL_WORKSPACE
    partials = _partials(config, shape, quantised)
    if not hopper:
        partials = min(partials, SCRATCH_BYTES)
    layers = _layers(
        config,
        shape,
        width,
        partials=partials,
        workspace=workspace if dense else 0,
        gathered=gathered,
    )
    found = layers | _outputs(config, shape, width, workspace)
    return max((Phase(name, terms) for name, terms in found.items()), key=lambda p: p.bytes)


def _layers(
    config: ModelConfig,
    shape: StepShape,
    width: int,
    *,
    partials: int,
    workspace: int,
    gathered: int,
) -> dict[str, Terms]:
    """Phases of a layer: what the layers need by turns takes the same places."""
    c, T = config, shape.width
    stream, neurons = T * c.hidden_size * width, T * c.intermediate_size * width
    heads, kv = (T * count * c.head_dim * width for count in (c.num_heads, c.num_kv_heads))
    # Cosines and sines, float32, of each kind of rotation; they live as long as the layers.
    kinds = len({layer.rope for layer in c.layers} - {None})
    every = {"residual stream": stream, "rotations": 4 * kinds * T * c.head_dim}
    normed, dense = every | {"normed stream": stream}, {"workspace": workspace}
    return {
        "qkv": normed | dense | {"qkv": heads + 2 * kv},
        "attention": every | {"queries": heads, "attended": heads, "partial results": partials},
        # Summed in the order of the devices. One of the sums lies where no gap is large enough.
        "sum over devices": every | {
            "product": stream, "sums": 2 * stream, "gathered": gathered * stream,
        },
        "gate_up": normed | dense | {"gate_up": 2 * neurons},
        "activation": every | {"gate_up": 2 * neurons, "neurons": neurons},
        "down": every | dense | {"neurons": neurons, "product": stream},
    }  # fmt: skip


def _partials(config: ModelConfig, shape: StepShape, quantised: bool) -> int:
    """Of the hungriest attention call: see `sm90_config.scratch_bytes`."""
    T, both = shape.width, bool(shape.tokens)
    calls = [(T if both else shape.rows, shape.rows, 1, both)]
    if both:  # beside what decodes, which is a sequence there
        calls.append((T, shape.chunks + 1, T, False))
    if shape.guesses:
        calls = [(T, shape.rows, shape.guesses + 1, False)]
    return max(
        scratch_bytes(
            T=T, S=S, H=config.num_heads, K=config.num_kv_heads, D=config.head_dim,
            max_kv=shape.max_kv, max_query=most, window=window, quantised=quantised, into=into,
        )
        for window in {layer.window for layer in config.layers}
        for T, S, most, into in calls
    )  # fmt: skip


def _outputs(config: ModelConfig, shape: StepShape, width: int, workspace: int) -> dict[str, Terms]:
    """Phases after the layers: logits, and what is made of them. Random draws need no memory:
    noise is made where it is added."""
    R, V, T = shape.logit_rows, config.vocab_size, shape.width
    raw = R * V * width
    stream = T * config.hidden_size * width
    hidden = R * config.hidden_size * width
    found: dict[str, Terms] = {"logits": {"hidden": hidden, "logits": raw, "workspace": workspace}}
    if shape.truncated:
        padded = -(-V // MASSES) * MASSES
        # Penalties are not applied in place, and log-probabilities are of the model's own logits.
        kept = shape.penalties + (shape.top is not None)
        found["truncation"] = {
            "logits": raw, "logits as they were": kept * raw, "keys": 4 * R * padded,
            "masses": 4 * R * padded,
        }  # fmt: skip
    if shape.top is not None:
        found["log-probabilities"] = _log_probabilities(shape, shape.top, R, V, raw)
    if shape.score is not None:
        found |= _scores(shape.score, min(SCORE_ROWS, T) * V, width, stream, workspace)
    return found


def _log_probabilities(shape: StepShape, top: int, R: int, V: int, raw: int) -> Terms:
    """Of R rows: for 0 of the likeliest their sum alone, for few of them float32 of all, for many
    those sorted too."""
    if top == 0:
        return {"logits": raw, "logits as they were": raw, "sums": 4 * R * SUMS}
    if top <= CUSTOM_TOP:
        return {"logits": raw, "log-probabilities": 4 * R * V, "sums": 4 * R * SUMS}
    # A greedy row's token is looked for last, in the logits.
    kept = 0 if shape.random else raw
    ordered = {"sorted": 4 * R * V, "tokens": 4 * R * V}
    return {"logits": kept, "log-probabilities": 4 * R * V, **ordered}


def _scores(top: int, block: int, width: int, stream: int, workspace: int) -> dict[str, Terms]:
    """Of all tokens' hidden states, so many logits at once."""
    found: dict[str, Terms] = {
        "scores": {
            "hidden": 3 * stream, "logits of a block": block * width, "workspace": workspace,
        }
    }  # fmt: skip
    if top:
        sort = top > CUSTOM_TOP
        found["scores of likeliest"] = {
            "hidden": stream, "log-probabilities": 4 * block,
            **({"tokens": 4 * block} if sort else {"logits of a block": block * width}),
        }  # fmt: skip
    return found
