"""What quantised weights cost in quality, and what they save, on a held-out text.

Dense and quantised layers run side by side, one of each on the device at a time: a model need not
fit there. Letters: B texts of T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import apply
from jaxinfer.models.weights import MATRICES, tree_bytes
from jaxinfer.quantise import RESID, embed_text, run_layer


class Quality(NamedTuple):
    """Of a quantised model against the dense one.

    Attributes:
        layer_bytes: of the layers' matrices, with their scales.
        bits_per_weight: of them.
        mean_kl, max_kl: KL(dense || quantised) of a position, in nats.
        top1_agreement: share of positions with the same likeliest token.
        perplexity, perplexity_dense: of the text.
        positions: how many.
    """

    layer_bytes: int
    bits_per_weight: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    perplexity: float
    perplexity_dense: float
    positions: int


class Streams(NamedTuple):
    """Hidden states [B, T, E] of both models, and the sizes of the layers they went through."""

    dense: jax.Array
    quantised: jax.Array
    values: int = 0
    stored: int = 0


def begin(
    embed: jax.Array, tokens: Sequence[Sequence[int]] | jax.Array, config: ModelConfig
) -> Streams:
    """Of tokens [B, T], before the first layer. Raises InvalidRequest as `quantise_params`."""
    hidden = embed_text(embed, tokens, config)
    return Streams(hidden, hidden)


def through(
    streams: Streams, dense: dict[str, Any], quantised: dict[str, Any], alone: ModelConfig
) -> Streams:
    """After one layer more; `alone`: the config of a model that is this layer."""
    return Streams(
        run_layer(dense, alone, streams.dense, (RESID,))[RESID],
        run_layer(quantised, alone, streams.quantised, (RESID,))[RESID],
        streams.values + sum(dense[name].size for name in MATRICES),
        streams.stored + sum(tree_bytes(quantised[name]) for name in MATRICES),
    )


def finish(
    streams: Streams, others: dict[str, Any], config: ModelConfig, tokens: Sequence[Sequence[int]]
) -> Quality:
    """After the last layer; `others`: what a model has beside its layers."""
    config = replace(config, layers=())
    want, got = (
        [np.asarray(_log_probs(others, config, hidden[i])) for i in range(len(tokens))]
        for hidden in (streams.dense, streams.quantised)
    )
    return compare(want, got, tokens, values=streams.values, stored=streams.stored)


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(others: dict[str, Any], config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """float32 [T, V] of hidden states [T, E]."""
    tokens = jnp.zeros((1, len(hidden)), jnp.int32)
    change = {"embed": lambda x: hidden[None]}
    out = apply({**others, "layers": []}, config, tokens, change=change)
    return jax.nn.log_softmax(out.logits[0].astype(jnp.float32))


def compare(
    want: Sequence[np.ndarray],
    got: Sequence[np.ndarray],
    tokens: Any,
    *,
    values: int,
    stored: int,
) -> Quality:
    """From log-probabilities [T, V] of each text, dense and quantised, of its tokens [T].

    `values`: of the layers' matrices; `stored`: the bytes that they take.
    """
    kl = np.concatenate([divergence(p, q) for p, q in zip(want, got, strict=True)])
    same = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in zip(want, got, strict=True)])

    def perplexity(logs: Sequence[np.ndarray]) -> float:
        each = [
            x[np.arange(len(t) - 1), np.asarray(t)[1:]] for x, t in zip(logs, tokens, strict=True)
        ]
        return float(np.exp(-np.concatenate(each).mean()))

    return Quality(
        stored, 8 * stored / values, float(kl.mean()), float(kl.max()), float(same.mean()),
        perplexity(got), perplexity(want), int(kl.size),
    )  # fmt: skip


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats at each position, from log-probabilities [N, V]; summed in float64."""
    p64, q64 = p.astype(np.float64), q.astype(np.float64)
    return (np.exp(p64) * (p64 - q64)).sum(-1)
