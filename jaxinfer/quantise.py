"""Quantises a decoder's layers one after the other, each with inputs from those before it as they
have become. One layer is on the device at a time, beside the calibration text's hidden states.

Letters: B texts of T tokens, E hidden size, F MLP width, K columns of a matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidRequest
from jaxinfer.models.decoder import apply
from jaxinfer.quant.make import (
    TINY,
    Recipe,
    awq_scales,
    gptq,
    round_clipped,
    round_to_nearest,
    smooth_scales,
)
from pallas_kernels.kv_quantise import LARGEST

Algorithm = Literal["rtn", "gptq", "awq", "smoothquant"]
# Each matrix, and the site of its inputs.
INPUTS = {
    "qkv": "layers.0.attn_norm",
    "o": "layers.0.attn_heads",
    "gate_up": "layers.0.mlp_norm",
    "down": "layers.0.mlp_hidden",
}
RESID = "layers.0.resid"
LEAST_TOKENS = 128  # of calibration text


@dataclass(frozen=True)
class Method:
    """How a model is quantised.

    Attributes:
        recipe: what its matrices become.
        algorithm: `rtn` rounds to nearest and needs no text; `gptq`, `awq`; `smoothquant` before
            activations are rounded too.
        act_order: of `gptq`.

    Raises:
        ValueError: a combination that makes no sense; it says which do.
    """

    recipe: Recipe
    algorithm: Algorithm = "rtn"
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise ValueError(
                f"algorithm {self.algorithm!r}: expected one of {', '.join(get_args(Algorithm))}"
            )
        if self.act_order and self.algorithm != "gptq":
            raise ValueError(f"act_order is of gptq, not of {self.algorithm}")
        if self.algorithm == "smoothquant" and self.recipe.activations is None:
            raise ValueError("smoothquant is for recipes whose activations are rounded too")
        if self.recipe.rows != 1 and self.algorithm not in ("rtn", "smoothquant"):
            raise ValueError(f"{self.algorithm} is for a scale a row, or a group of its columns")

    @property
    def needs_text(self) -> bool:
        """Whether it looks at what the model computes."""
        return self.algorithm != "rtn" or self.recipe.activations == "tensor"


class Statistics(NamedTuple):
    """Of the inputs of one matrix: the mean of x xᵀ, float32 [K, K]; mean and most of |x|: [K]."""

    hessian: jax.Array
    magnitude: jax.Array
    largest: jax.Array


def quantise_params(
    params: dict[str, Any],
    config: ModelConfig,
    method: Method,
    tokens: Sequence[Sequence[int]] | jax.Array | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """A model whose layers' matrices are quantised; embeddings, norms and output stay as they are.

    Args:
        params: a dense tree of `models.weights.declare(config)`.
        config: the model.
        method: how.
        tokens: [B, T]; calibration text, for all methods but `rtn`.
        progress: called with (layers done, layers in all).

    Raises:
        InvalidRequest: text is missing, too short, ragged, or has tokens that the model has not.
        ValueError: groups do not divide a matrix's columns.
    """
    layers = quantise_layers(
        iter(params["layers"]), config, method, params["embed"], tokens, progress=progress
    )
    return {**params, "layers": list(layers)}


def quantise_layers(
    layers: Iterable[dict[str, Any]],
    config: ModelConfig,
    method: Method,
    embed: jax.Array,
    tokens: Sequence[Sequence[int]] | jax.Array | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """As `quantise_params`, of layers that come one by one, and are yielded so: a model need never
    be in memory as a whole.

    Raises:
        InvalidRequest, ValueError: as `quantise_params`, before the first layer is asked for.
    """
    check_columns(config, method.recipe)
    hidden = embed_text(embed, tokens, config) if method.needs_text else None
    return _quantised(layers, config, method, hidden, progress)


def check_columns(config: ModelConfig, recipe: Recipe) -> None:
    """Raises ValueError unless the recipe's groups divide the columns of every matrix."""
    attention = config.num_heads * config.head_dim
    for columns in (config.hidden_size, attention, config.intermediate_size):
        recipe.groups(columns)
        if columns % 2:
            raise ValueError(f"a matrix of an odd number of columns, {columns}, is not quantised")


def only_layer(config: ModelConfig, index: int) -> ModelConfig:
    """Of a model that is one layer of another, for `run_layer`."""
    return replace(config, layers=(config.layers[index],), vocab_size=1, tie_embeddings=True)


def embed_text(embed: jax.Array, tokens: Any, config: ModelConfig) -> jax.Array:
    """The text's embeddings [B, T, E]."""
    if tokens is None or len(tokens) == 0:
        raise InvalidRequest("this method needs a calibration text", field="tokens")
    lengths = {len(row) for row in tokens}
    if len(lengths) != 1:
        raise InvalidRequest(f"rows of {sorted(lengths)} tokens: one length", field="tokens")
    ids = jnp.asarray(tokens, jnp.int32)
    if ids.size < LEAST_TOKENS:
        raise InvalidRequest(
            f"a calibration text of {ids.size} tokens is too short; at least {LEAST_TOKENS}",
            field="tokens",
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise InvalidRequest(
            f"token ids {int(ids.min())} to {int(ids.max())}: the model has {config.vocab_size}",
            field="tokens",
        )
    return embed[ids]


def _quantised(
    layers: Iterable[dict[str, Any]],
    config: ModelConfig,
    method: Method,
    hidden: jax.Array | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[dict[str, Any]]:
    for index, layer in enumerate(layers):
        alone = only_layer(config, index)
        if hidden is None:
            done = _rounded(layer, method, None)
        else:
            done = _quantise_layer(layer, alone, method, hidden)
            hidden = run_layer(done, alone, hidden, (RESID,))[RESID]
        if progress is not None:
            progress(index + 1, config.num_layers)
        yield done


def _quantise_layer(
    layer: dict[str, Any], config: ModelConfig, method: Method, hidden: jax.Array
) -> dict[str, Any]:
    found = _statistics(layer, config, hidden)
    if method.algorithm == "gptq":
        return _with_ranges(_rounded(layer, method, found), method, found)
    if method.algorithm != "rtn":
        layer = _scaled(layer, config, method, found)
        if method.algorithm == "awq" or method.recipe.activations == "tensor":
            found = _statistics(layer, config, hidden)
    if method.algorithm == "awq":
        return _clipped(layer, method, found)
    return _with_ranges(_rounded(layer, method, None), method, found)


def _with_ranges(
    layer: dict[str, Any], method: Method, found: dict[str, Statistics]
) -> dict[str, Any]:
    """The layer with the scales of its activations, where there is one for all tokens."""
    if method.recipe.activations != "tensor":
        return layer
    done = dict(layer)
    for name in INPUTS:
        most = jnp.maximum(found[name].largest.max(), TINY)
        done[name] = replace(layer[name], input_scale=most / LARGEST[layer[name].codes.dtype])
    return done


def _clipped(layer: dict[str, Any], method: Method, found: dict[str, Statistics]) -> dict[str, Any]:
    """The layer rounded to nearest, ranges clipped where that helps. Those of queries and keys stay
    whole, as in AWQ: their products are multiplied with each other."""
    done = dict(layer)
    for name in INPUTS:
        w = layer[name]
        if name == "qkv":
            done[name] = round_to_nearest(w, method.recipe, w.dtype)
        else:
            done[name] = round_clipped(w, found[name].hessian, method.recipe, w.dtype)
    return done


def _rounded(
    layer: dict[str, Any], method: Method, found: dict[str, Statistics] | None
) -> dict[str, Any]:
    """The layer with its matrices quantised: by GPTQ where it is told of their inputs."""
    done = dict(layer)
    for name in INPUTS:
        w = layer[name]
        if found is None:
            done[name] = round_to_nearest(w, method.recipe, w.dtype)
        else:
            done[name] = gptq(
                w, found[name].hessian, method.recipe,
                act_order=method.act_order, scale_dtype=w.dtype,
            )  # fmt: skip
    return done


def _scaled(
    layer: dict[str, Any], config: ModelConfig, method: Method, found: dict[str, Statistics]
) -> dict[str, Any]:
    """The same function, with columns of matrices scaled and what comes before divided by as much.

    The output projection is left alone: what comes before it are values that several heads share.
    """

    def scales(name: str, w: jax.Array) -> jax.Array:
        if method.algorithm == "smoothquant":
            return smooth_scales(w, found[name].largest)
        return awq_scales(w, found[name].hessian, found[name].magnitude, method.recipe)

    done = dict(layer)
    dtype = layer["down"].dtype
    if method.algorithm == "awq":  # SmoothQuant leaves the inner projection alone
        s = scales("down", layer["down"])
        rows = jnp.concatenate([jnp.ones_like(s), 1 / s])  # of gate and up
        done["down"] = (layer["down"] * s).astype(dtype)
        done["gate_up"] = (layer["gate_up"] * rows[:, None]).astype(dtype)
        if "gate_up_bias" in layer:
            done["gate_up_bias"] = (layer["gate_up_bias"] * rows).astype(dtype)
    for name, norm in (("qkv", "attn_norm"), ("gate_up", "mlp_norm")):
        s = scales(name, done[name])
        done[name] = (done[name] * s).astype(dtype)
        one = 1 if config.norm_plus_one else 0
        done[norm] = ((layer[norm] + one) / s - one).astype(layer[norm].dtype)
    return done


def _statistics(
    layer: dict[str, Any], config: ModelConfig, hidden: jax.Array
) -> dict[str, Statistics]:
    seen = run_layer(layer, config, hidden, tuple(INPUTS.values()))
    return {name: _statistic(seen[site]) for name, site in INPUTS.items()}


@jax.jit
def _statistic(x: jax.Array) -> Statistics:
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    hessian = jnp.matmul(flat.T, flat, precision="highest") / len(flat)
    return Statistics(hessian, jnp.abs(flat).mean(axis=0), jnp.abs(flat).max(axis=0))


@functools.partial(jax.jit, static_argnames=("config", "sites"))
def run_layer(
    layer: dict[str, Any], config: ModelConfig, hidden: jax.Array, sites: tuple[str, ...]
) -> dict[str, jax.Array]:
    """What one layer, as a model of its own, makes of hidden states [B, T, E], at `sites`."""
    E = config.hidden_size
    params = {
        "embed": jnp.zeros((1, E), hidden.dtype),
        "layers": [layer],
        "final_norm": jnp.ones(E, hidden.dtype),
    }
    tokens = jnp.zeros(hidden.shape[:-1], jnp.int32)
    change = {"embed": lambda x: hidden}
    return apply(params, config, tokens, capture=sites, change=change).activations
