"""Training a language model from scratch, on a corpus of sixteen words."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.training import lm

VOCAB, LENGTH, STEPS, BATCH = 32, 16, 120, 8


def config(tied: bool = True, layers: int = 1) -> ModelConfig:
    return ModelConfig(
        family="Qwen3ForCausalLM", vocab_size=VOCAB, hidden_size=16, intermediate_size=32,
        num_heads=2, num_kv_heads=1, head_dim=8, layers=(LayerConfig(),) * layers, max_position=64,
        qk_norm=True, tie_embeddings=tied,
    )  # fmt: skip


def corpus() -> jax.Array:
    """Sixteen words of four tokens, in random order: the first token of a word tells the rest."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, VOCAB, (16, 4))
    words[:, 0] = np.arange(16)
    return jnp.asarray(words[rng.integers(0, 16, 400)].reshape(-1).astype(np.uint16))


# Two TrainStates share a compiled step when they share the optimiser.
make_optimizer = functools.cache(lm.make_optimizer)
log_probs = jax.jit(lm.log_probs, static_argnums=1)


def train(optimizer: lm.Optimizer, seed: int = 0, teachers: lm.Teachers | None = None):
    c, tokens = config(), corpus()
    state = lm.create_state(c, jax.random.key(seed), make_optimizer(c, optimizer))
    windows = lm.window_starts(np.random.default_rng(seed), len(tokens), LENGTH)
    starts = np.fromiter(windows, np.int32, STEPS * BATCH).reshape(STEPS, BATCH)
    rates = lm.learning_rates(STEPS, 0.02, warmup=6)
    return lm.train_steps(
        state, tokens, jnp.asarray(starts), jnp.asarray(rates),
        config=c, length=LENGTH, teachers=teachers,
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_loss_falls_and_the_run_repeats(optimizer: lm.Optimizer):
    (first, metrics), (second, _) = train(optimizer), train(optimizer)
    assert metrics.loss[0] > 3  # near log(32) at random
    assert metrics.loss[-1] < metrics.loss[0] - 1
    assert int(first.step) == STEPS
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first.params, second.params)))


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_finite_and_reach_every_weight(tied: bool):
    c = config(tied)
    params = lm.init(c, jax.random.key(0))
    tokens = corpus()[: 2 * (LENGTH + 1)].reshape(2, -1).astype(jnp.int32)
    grads = jax.jit(jax.grad(lm.loss_fn), static_argnums=1)(params, c, tokens)
    for path, g in jax.tree.leaves_with_path(grads):
        assert g.dtype == jnp.float32
        assert np.isfinite(g).all(), path
        assert np.abs(g).max() > 0, path


@pytest.mark.slow
def test_a_teacher_alone_makes_the_student_like_it():
    teacher, _ = train("muon")
    teachers = lm.Teachers((teacher.params,), jnp.float32(1.0))
    student, metrics = train("muon", seed=1, teachers=teachers)
    tokens = corpus()[:LENGTH][None].astype(jnp.int32)
    want, got, fresh = (
        np.exp(log_probs(p, config(), tokens))
        for p in (teacher.params, student.params, lm.init(config(), jax.random.key(1)))
    )
    assert np.abs(want - got).sum(-1).mean() < 0.5 * np.abs(want - fresh).sum(-1).mean()
    assert metrics.loss[-1] < metrics.loss[0] - 1


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_only_matrices_decay(optimizer: lm.Optimizer):
    c = config(tied=False)
    params = lm.init(c, jax.random.key(0))
    tx = lm.make_optimizer(c, optimizer, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for (path, p), u in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(updates), strict=True
    ):
        np.testing.assert_allclose(u, -0.5 * p if p.ndim == 2 else 0 * p, atol=1e-6, err_msg=path)


def test_splitting_the_matrices_is_undone_by_joining():
    params = lm.init(config(tied=False, layers=2), jax.random.key(0))
    split = lm.split_matrices(params, config())
    assert split["matrices"]["q"].shape == (2, 16, 16)
    assert split["matrices"]["k"].shape == split["matrices"]["v"].shape == (2, 8, 16)
    assert split["matrices"]["gate"].shape == (2, 32, 16)
    joined = lm.join_matrices(split)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, joined, params)))


def test_learning_rates_rise_then_fall_to_zero():
    rates = lm.learning_rates(100, 0.1, warmup=10)
    assert rates.argmax() == 9
    assert rates[9] == pytest.approx(0.1, rel=0.02)
    assert (np.diff(rates[:10]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()
    assert 0 < rates[-1] < 0.002


def test_an_epoch_of_windows_meets_every_token_once():
    n, length = 1000, 16
    windows = lm.window_starts(np.random.default_rng(0), n, length)
    first = [next(windows) for _ in range(n // length - 1)]
    covered = np.concatenate([np.arange(s + 1, s + 1 + length) for s in first])
    assert len(np.unique(covered)) == len(covered)
    assert covered.max() < n
    with pytest.raises(ValueError, match="too few"):
        next(lm.window_starts(np.random.default_rng(0), 20, 16))


@pytest.mark.parametrize("n", [5, 17, 70])
def test_score_counts_every_token_once_whatever_the_windows(n: int):
    c = config()
    params = lm.init(c, jax.random.key(0))
    tokens = np.asarray(corpus()[:n])
    whole = -np.take_along_axis(
        np.asarray(log_probs(params, c, jnp.asarray(tokens[None, :-1], jnp.int32)))[0],
        tokens[1:, None].astype(int), axis=1,
    )[:, 0]  # fmt: skip
    got = lm.score(params, c, tokens, length=16, stride=8, batch=3)
    assert got.shape == (n - 1,)
    np.testing.assert_allclose(got[:16], whole[:16], atol=1e-4)
    # The second window sees the text from token 8 on, and scores what the first did not.
    fresh = lm.score(params, c, tokens[min(8, n - 2) :], length=16, batch=3)
    np.testing.assert_allclose(got[16:24], fresh[8:16] if n > 17 else [], atol=1e-4)
