"""Training a draft model to guess what a target model says: knowledge distillation.

At every position of a text the draft learns the target's whole distribution of what follows, by
KL(target || draft) at temperature 1 (Hinton et al. 2015, Distilling the knowledge in a neural
network). Zhou et al. 2023 (DistillSpec) do so for speculative decoding: the share of guesses that
rejection sampling takes is 1 - TV(target, draft), and TV² is at most half of that KL. The text is
given; neither model generates here.

Letters: B sequences, T tokens a sequence, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import Params, apply
from jaxinfer.training import lm

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class DistillConfig:
    """How a draft is trained. Everything but `save_every` decides what comes out, to the bit.

    Attributes:
        steps: updates.
        batch_size: sequences a step, B.
        sequence_length: tokens a sequence, T.
        learning_rate: the highest, of AdamW.
        warmup: share of the steps in which the learning rate rises; then it falls to 0.
        weight_decay: of matrices, per unit of learning rate.
        cross_entropy: share of the data's own tokens in the loss, in [0, 1]; the rest is KL.
        seed: of the order of the text.
        save_every: steps between two checkpoints.
        dtype: of both forwards. Parameters, optimiser state and the loss are float32.

    Raises:
        ValueError: a value out of its range; it is named.
    """

    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    cross_entropy: float = 0.0
    seed: int = 0
    save_every: int = 100
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate {self.learning_rate}: expected more than 0")
        for name in ("warmup", "cross_entropy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected between 0 and 1")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay {self.weight_decay}: expected 0 or more")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: expected 0 or more")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype}: expected float32 or bfloat16")


class Metrics(NamedTuple):
    """Of one step, before its update: float32 scalars, mean nats a token.

    Attributes:
        loss: what was minimised.
        kl: KL(target || draft).
    """

    loss: jax.Array
    kl: jax.Array


# --- checks, before any work ----------------------------------------------------------------------


def check_models(draft: ModelConfig, target: ModelConfig, how: DistillConfig) -> None:
    """Whether `draft` can learn from `target` by sequences of that length.

    Raises:
        ValueError: vocabularies of two sizes, or sequences that are longer than a model's context.
    """
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"the draft's vocabulary has {draft.vocab_size} tokens, the target's "
            f"{target.vocab_size}: expected the same, and the same tokenizer"
        )
    most = min(draft.max_position, target.max_position)
    if how.sequence_length > most:
        raise ValueError(
            f"sequence_length {how.sequence_length}: expected at most {most}, the shorter context "
            "of the two models"
        )


def check_text(num_tokens: int, how: DistillConfig) -> None:
    """Whether a text is long enough to train on. Raises ValueError where it is not."""
    least = 2 * how.sequence_length + 1
    if num_tokens < least:
        raise ValueError(
            f"{num_tokens} tokens to train on: expected at least {least}, two sequences of "
            f"{how.sequence_length} and one more"
        )


# --- loss -----------------------------------------------------------------------------------------


def kl_divergence(target: jax.Array, draft: jax.Array) -> jax.Array:
    """KL(target || draft) in nats, float32 [...], of log-probabilities float32 [..., V]."""
    return (jnp.exp(target) * (target - draft)).sum(-1)


def loss_fn(
    params: Params, config: ModelConfig, tokens: jax.Array, target: jax.Array, how: DistillConfig
) -> tuple[jax.Array, jax.Array]:
    """The loss of a draft on tokens int32 [B, T+1], and its mean KL alone: nats a token.

    Args:
        params: the draft's, float32; computed in `how.dtype`.
        config: the draft's.
        tokens: each but the first is predicted from those before.
        target: log-probabilities float32 [B, T, V] of the target at the same positions.
        how: its `cross_entropy` weighs the two losses.
    """
    cast = jax.tree.map(lambda p: p.astype(how.dtype), params)
    logp = lm.log_probs(cast, config, tokens[:, :-1])
    kl = kl_divergence(target, logp).mean()
    if not how.cross_entropy:
        return kl, kl
    hard = lm.nll(logp, tokens[:, 1:]).mean()
    return (1 - how.cross_entropy) * kl + how.cross_entropy * hard, kl


# --- steps ----------------------------------------------------------------------------------------


def create_state(params: Params, config: ModelConfig, how: DistillConfig) -> TrainState:
    """A draft's parameters, float32, at step 0 with a fresh AdamW."""
    optimizer = lm.make_optimizer(config, "adamw", weight_decay=how.weight_decay)
    state = TrainState.create(apply_fn=apply, params=params, tx=optimizer)
    # An array from the start, as it is after a step and in a checkpoint: one program for all.
    return state.replace(step=jnp.zeros((), jnp.int32))


@functools.partial(
    jax.jit, static_argnames=("config", "target_config", "how"), donate_argnames="state"
)
def train_step(
    state: TrainState,
    target: Params,
    tokens: jax.Array,
    rate: jax.Array,
    *,
    config: ModelConfig,
    target_config: ModelConfig,
    how: DistillConfig,
) -> tuple[TrainState, Metrics]:
    """One update of the draft on tokens int32 [B, T+1]; the target runs in the same program.

    Args:
        state: of `create_state`; donated.
        target: its parameters, quantised or not, computed in their dtype; they do not change.
        tokens: each but the first is predicted from those before.
        rate: float32 scalar, the learning rate.
        config: the draft's.
        target_config: the target's; a vocabulary of the same size.
        how: see `loss_fn`.
    """
    wanted = jax.lax.stop_gradient(lm.log_probs(target, target_config, tokens[:, :-1]))

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        return loss_fn(params, config, tokens, wanted, how)

    (value, kl), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return lm.update(state, grads, rate), Metrics(value, kl)


def batches(num_tokens: int, how: DistillConfig, first: int = 0) -> Iterator[np.ndarray]:
    """First tokens of each step's sequences from step `first` on, int32 [B], without end.

    A function of the seed and the step: `batches(n, how, i)` goes on as `batches(n, how)` does
    after i steps. Every token is met once an epoch, see `lm.window_starts`.
    """
    windows = lm.window_starts(np.random.default_rng(how.seed), num_tokens, how.sequence_length)
    windows = itertools.islice(windows, first * how.batch_size, None)
    while True:
        yield np.fromiter(windows, np.int32, how.batch_size)


def run(
    state: TrainState,
    target: Params,
    tokens: np.ndarray,
    how: DistillConfig,
    *,
    config: ModelConfig,
    target_config: ModelConfig,
    first: int = 0,
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Trains from step `first` to the last; yields (steps done, state, Metrics) after each.

    A state that was yielded is donated to the next step: copy or save it before going on.
    The last state is the same, to the bit, wherever between the runs were cut; on one machine.

    Args:
        state: after `first` steps; donated.
        target: see `train_step`.
        tokens: the text, integers [N].
        how: see `DistillConfig`.
        config: the draft's.
        target_config: the target's.
        first: steps that were done before.

    Raises:
        ValueError: see `check_models`, `check_text`; before the first step.
    """
    check_models(config, target_config, how)
    check_text(len(tokens), how)
    warmup = max(1, round(how.warmup * how.steps))
    rates = lm.learning_rates(how.steps, how.learning_rate, warmup)
    order = batches(len(tokens), how, first)
    place = np.arange(how.sequence_length + 1)
    for step, starts in zip(range(first, how.steps), order, strict=False):
        windows = jnp.asarray(tokens[starts[:, None] + place], jnp.int32)
        state, metrics = train_step(
            state, target, windows, rates[step],
            config=config, target_config=target_config, how=how,
        )  # fmt: skip
        yield step + 1, state, metrics
