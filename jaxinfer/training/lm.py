"""Training a small language model from scratch: pure steps on a flax `TrainState`.

The corpus is one long array of token ids on the device; a step gathers its windows there, and
`train_steps` scans over many steps in one dispatch. Parameters and optimiser state are float32,
the forward is bfloat16.

Letters: B sequences, T tokens a sequence, V vocabulary, K steps a dispatch, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from optax.contrib import MuonDimensionNumbers, muon

from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import Params, apply
from jaxinfer.models.weights import MATRICES, init_params

Attention = Literal["xla", "cudnn"] | None
Optimizer = Literal["adamw", "muon"]


class Teachers(NamedTuple):
    """Models to learn from. `weight` in [0, 1] is their share of the target distribution."""

    params: tuple[Params, ...]
    weight: jax.Array


class Metrics(NamedTuple):
    """Of one step: mean nats a token against the data, and the gradient's norm before clipping."""

    loss: jax.Array
    grad_norm: jax.Array


# --- loss ---------------------------------------------------------------------------------------


def log_probs(
    params: Params, config: ModelConfig, tokens: jax.Array, attention: Attention = None
) -> jax.Array:
    """Log-probabilities, float32 [B, T, V], of what follows each of tokens [B, T].

    Computed in the dtype of `params`.
    """
    return jax.nn.log_softmax(apply(params, config, tokens, implementation=attention).logits)


def half(params: Params) -> Params:
    """`params` in bfloat16, as the forward of training takes them."""
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)


def loss_fn(
    params: Params, config: ModelConfig, tokens: jax.Array, attention: Attention = None
) -> jax.Array:
    """Mean nats a token of tokens int32 [B, T+1]: each but the first, given those before it."""
    logp = log_probs(half(params), config, tokens[:, :-1], attention)
    return nll(logp, tokens[:, 1:]).mean()


def nll(logp: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood [B, T] of targets [B, T] under logp [B, T, V]."""
    return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


def distillation_loss(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    teacher_probs: jax.Array,
    weight: jax.Array,
    attention: Attention = None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy against (1 - weight) · data + weight · teacher (Hinton et al. 2015, T = 1).

    Args:
        params: the student's.
        config: the student's.
        tokens: int32 [B, T+1].
        teacher_probs: float32 [B, T, V].
        weight: scalar in [0, 1].
        attention: see `models.decoder.apply`.

    Returns:
        (the loss, mean nats a token against the data alone).
    """
    logp = log_probs(half(params), config, tokens[:, :-1], attention)
    hard = nll(logp, tokens[:, 1:]).mean()
    soft = -(teacher_probs * logp).sum(-1).mean()
    return (1 - weight) * hard + weight * soft, hard


# --- optimiser ----------------------------------------------------------------------------------


def init(config: ModelConfig, key: jax.Array) -> Params:
    """`init_params` in float32, projections into the residual stream scaled by 1/√(2L)."""
    params = init_params(config, key, jnp.float32)
    scale = (2 * config.num_layers) ** -0.5
    layers = [{**w, "o": w["o"] * scale, "down": w["down"] * scale} for w in params["layers"]]
    return {**params, "layers": layers}


def decay_mask(params: Params) -> Params:
    """True for matrices, which decay; False for norms and biases, which do not."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def make_optimizer(
    config: ModelConfig, name: Optimizer, *, weight_decay: float = 0.1, clip: float = 1.0
) -> optax.GradientTransformation:
    """Update directions at learning rate 1; `train_step` multiplies them by the step's rate.

    Args:
        config: the model, whose fused matrices `muon` takes apart.
        name: `adamw` (Loshchilov & Hutter 2019) for everything; or `muon` for the layers'
            matrices (Jordan 2024), scaled to AdamW's root mean square (Liu et al. 2025), and
            AdamW for the rest.
        weight_decay: of matrices, per unit of learning rate.
        clip: bound on the gradient's global norm.
    """
    b1, b2 = 0.9, 0.95
    if name == "adamw":
        update = optax.adamw(1.0, b1, b2, weight_decay=weight_decay, mask=decay_mask)
        return optax.chain(optax.clip_by_global_norm(clip), update)
    orthogonal: Any = {"matrices": MuonDimensionNumbers(2, 1), "rest": None}
    inner = muon(
        1.0, adam_b1=b1, adam_b2=b2, consistent_rms=0.2, muon_weight_dimension_numbers=orthogonal
    )
    return optax.chain(
        optax.clip_by_global_norm(clip),
        _on_matrices(inner, config),
        optax.add_decayed_weights(-weight_decay, decay_mask),  # updates point downhill already
    )


def _on_matrices(
    inner: optax.GradientTransformation, config: ModelConfig
) -> optax.GradientTransformation:
    """Shows `inner` the tree {matrices, rest} of `split_matrices`."""

    def init_fn(params: Any) -> Any:
        return inner.init(split_matrices(params, config))

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        shown = None if params is None else split_matrices(params, config)
        split: Any
        split, state = inner.update(split_matrices(updates, config), state, shown)
        return join_matrices(split), state

    return optax.GradientTransformation(init_fn, update_fn)


def split_matrices(params: Params, config: ModelConfig) -> Params:
    """{"matrices": the layers' matrices [L, out, in], fused ones apart; "rest": all else}."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    stacked = {name: jnp.stack([layer[name] for layer in params["layers"]]) for name in MATRICES}
    wq, wk, wv = jnp.split(stacked.pop("qkv"), [q, q + kv], axis=1)
    gate, up = jnp.split(stacked.pop("gate_up"), 2, axis=1)
    others = [{n: w for n, w in layer.items() if w.ndim < 2} for layer in params["layers"]]
    return {
        "matrices": {"q": wq, "k": wk, "v": wv, "gate": gate, "up": up, **stacked},
        "rest": {**params, "layers": others},
    }


def join_matrices(split: Params) -> Params:
    """The inverse of `split_matrices`."""
    m = split["matrices"]
    fused = {
        "qkv": jnp.concatenate([m["q"], m["k"], m["v"]], axis=1),
        "gate_up": jnp.concatenate([m["gate"], m["up"]], axis=1),
        "o": m["o"],
        "down": m["down"],
    }
    layers = [
        {**layer, **{name: w[i] for name, w in fused.items()}}
        for i, layer in enumerate(split["rest"]["layers"])
    ]
    return {**split["rest"], "layers": layers}


def learning_rates(steps: int, peak: float, warmup: int) -> np.ndarray:
    """float32 [steps]: linear from 0 to `peak` over `warmup` steps, then linear to 0."""
    step = np.arange(1, steps + 1)
    return (peak * np.minimum(step / warmup, (steps - step + 1) / max(1, steps - warmup))).astype(
        np.float32
    )


# --- steps --------------------------------------------------------------------------------------


def create_state(
    config: ModelConfig, key: jax.Array, optimizer: optax.GradientTransformation
) -> TrainState:
    """Random parameters and a fresh optimiser state."""
    return TrainState.create(apply_fn=apply, params=init(config, key), tx=optimizer)


def train_step(
    state: TrainState,
    tokens: jax.Array,
    rate: jax.Array,
    config: ModelConfig,
    *,
    teachers: Teachers | None = None,
    teacher_config: ModelConfig | None = None,
    attention: Attention = None,
) -> tuple[TrainState, Metrics]:
    """One update on tokens int32 [B, T+1] at learning rate `rate`."""

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        if teachers is None:
            value = loss_fn(params, config, tokens, attention)
            return value, value
        return distillation_loss(params, config, tokens, probs, teachers.weight, attention)

    if teachers is not None:
        shape = teacher_config or config
        inputs = tokens[:, :-1]
        each = [jnp.exp(log_probs(p, shape, inputs, attention)) for p in teachers.params]
        probs = sum(each[1:], each[0]) / len(each)
    (_, hard), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return update(state, grads, rate), Metrics(hard, optax.tree.norm(grads))


def update(state: TrainState, grads: Params, rate: jax.Array) -> TrainState:
    """`state` one step further: its optimiser's direction for `grads`, `rate` times as far."""
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


@functools.partial(
    jax.jit,
    static_argnames=("config", "length", "teacher_config", "attention"),
    donate_argnames="state",
)
def train_steps(
    state: TrainState,
    corpus: jax.Array,
    starts: jax.Array,
    rates: jax.Array,
    *,
    config: ModelConfig,
    length: int,
    teachers: Teachers | None = None,
    teacher_config: ModelConfig | None = None,
    attention: Attention = None,
) -> tuple[TrainState, Metrics]:
    """K updates in one dispatch.

    Args:
        state: donated.
        corpus: token ids, integers [N].
        starts: int32 [K, B]; sequence b of step k is corpus[start : start + length + 1].
        rates: float32 [K], learning rates.
        config: the model.
        length: T, tokens a sequence.
        teachers: models to distil from; None trains on the data alone.
        teacher_config: theirs; None: the same as `config`.
        attention: see `models.decoder.apply`.

    Returns:
        the state after K steps, and Metrics of arrays [K].
    """

    def body(state: TrainState, x: tuple[jax.Array, jax.Array]) -> tuple[TrainState, Metrics]:
        first, rate = x
        tokens = corpus[first[:, None] + jnp.arange(length + 1)].astype(jnp.int32)
        return train_step(
            state, tokens, rate, config,
            teachers=teachers, teacher_config=teacher_config, attention=attention,
        )  # fmt: skip

    return jax.lax.scan(body, state, (starts, rates))


def window_starts(rng: np.random.Generator, num_tokens: int, length: int) -> Iterator[int]:
    """First tokens of training windows, without end.

    Each epoch tiles the corpus with windows of `length + 1` overlapping by one token, from a
    random offset, in random order: every token but those of the ragged ends is learnt once.

    Raises:
        ValueError: the corpus is shorter than two windows.
    """
    if num_tokens < 2 * length + 1:
        raise ValueError(f"{num_tokens} tokens are too few for windows of {length}")
    while True:
        offset = int(rng.integers(length))
        starts = np.arange(offset, num_tokens - length, length)
        yield from rng.permutation(starts).tolist()


# --- scoring ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "attention"))
def _window_nll(
    params: Params, windows: jax.Array, config: ModelConfig, attention: Attention
) -> jax.Array:
    tokens = windows.astype(jnp.int32)
    return nll(log_probs(params, config, tokens[:, :-1], attention), tokens[:, 1:])


def score(
    params: Params,
    config: ModelConfig,
    tokens: np.ndarray,
    *,
    length: int = 1024,
    stride: int | None = None,
    batch: int = 32,
    attention: Attention = None,
) -> np.ndarray:
    """Nats of each token of a text but the first, float32 [N-1].

    Windows of `length` start every `stride` tokens. Each window scores its last `stride` tokens
    (the first window all of its own), so that every token is scored once, with at least
    `length - stride` tokens before it where the text has them.

    Args:
        params: computed in their dtype.
        config: the model.
        tokens: integers [N], N at least 2.
        length: tokens a window.
        stride: by default `length`: windows that do not overlap.
        batch: windows a dispatch.
        attention: see `models.decoder.apply`.
    """
    stride = stride or length
    targets = len(tokens) - 1
    starts = np.arange(0, max(1, targets - length + stride), stride)
    # The last batch is filled up with copies, and a short text padded: causal, so harmless.
    padded = np.pad(tokens, (0, length + stride))
    scores = np.zeros(targets + length + stride, np.float32)
    for i in range(0, len(starts), batch):
        rows = np.resize(starts[i : i + batch], batch)
        windows = padded[rows[:, None] + np.arange(length + 1)]
        nats = np.asarray(_window_nll(params, jnp.asarray(windows), config, attention))
        for start, row in zip(starts[i : i + batch], nats, strict=False):
            skip = 0 if start == 0 else length - stride
            scores[start + skip : start + length] = row[skip:]
    return scores[:targets]
