"""Distillation: what the loss is, that it falls, that a run that was cut in two ends as one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.steps import latest_step, restore_step, save_step
from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.quality import divergence
from jaxinfer.quant.make import Recipe
from jaxinfer.quantise import Method, quantise_params
from jaxinfer.training import distill, lm
from jaxinfer.training.distill import DistillConfig

VOCAB = 32
HOW = DistillConfig(steps=60, batch_size=4, sequence_length=16, learning_rate=0.02, seed=3)
TEXT = np.random.default_rng(0).integers(0, VOCAB, 400).astype(np.int32)


def config(hidden: int = 16, vocab: int = VOCAB) -> ModelConfig:
    return ModelConfig(
        family="Qwen3ForCausalLM", vocab_size=vocab, hidden_size=hidden, intermediate_size=32,
        num_heads=2, num_kv_heads=1, head_dim=8, layers=(LayerConfig(),), max_position=64,
        qk_norm=True, tie_embeddings=True,
    )  # fmt: skip


TARGET, DRAFT = config(24), config()


@pytest.fixture(scope="module")
def target() -> Any:
    """Random, and sure of itself: of small embeddings every token would be as likely."""
    params = lm.init(TARGET, jax.random.key(7))
    return params | {"embed": params["embed"] * 30}


def begin() -> Any:
    return distill.create_state(lm.init(DRAFT, jax.random.key(0)), DRAFT, HOW)


def train(state: Any, target: Any, **changes: Any) -> Any:
    return distill.run(state, target, TEXT, HOW, config=DRAFT, target_config=TARGET, **changes)


def test_the_loss_is_the_kl_of_the_whole_distributions(target: Any) -> None:
    params = lm.init(DRAFT, jax.random.key(1))
    tokens = jnp.asarray(TEXT[:34].reshape(2, 17))
    p, q = (
        np.asarray(lm.log_probs(weights, c, tokens[:, :-1]))
        for weights, c in ((target, TARGET), (params, DRAFT))
    )
    want = divergence(p, q).mean()
    hard = -np.take_along_axis(q, np.asarray(tokens)[:, 1:, None], axis=2).mean()
    assert want > 0.5
    for share in (0.0, 0.25, 1.0):
        how = replace(HOW, cross_entropy=share)
        loss, kl = distill.loss_fn(params, DRAFT, tokens, jnp.asarray(p), how)
        assert float(kl) == pytest.approx(want, rel=1e-5)
        assert float(loss) == pytest.approx((1 - share) * want + share * hard, rel=1e-5)


def test_the_loss_falls_and_the_target_stays(target: Any) -> None:
    before = copy.deepcopy(target)
    losses = [float(metrics.loss) for _, _, metrics in train(begin(), target)]
    assert len(losses) == HOW.steps
    assert losses[-1] < 0.5 * losses[0]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, target)))


def test_a_quantised_target_teaches(target: Any) -> None:
    rounded = quantise_params(target, TARGET, Method(Recipe("int", 8, 8)))
    tokens = jnp.asarray(TEXT[: HOW.batch_size * 17].reshape(-1, 17))
    kl = []
    for weights in (target, rounded):
        _, metrics = distill.train_step(
            begin(), weights, tokens, np.float32(0), config=DRAFT, target_config=TARGET, how=HOW
        )
        kl.append(float(metrics.kl))
    assert kl[0] != kl[1]
    assert kl[0] == pytest.approx(kl[1], rel=0.05)


@pytest.mark.parametrize("cut", [1, 25])
def test_a_run_that_was_cut_ends_with_the_same_bits(target: Any, tmp_path: Path, cut: int) -> None:
    *_, (_, whole, _) = train(begin(), target)
    for step, state, _ in train(begin(), target):
        if step == cut:
            save_step(tmp_path, step, state, {"cut": cut})
            break
    like = jax.eval_shape(begin)
    assert latest_step(tmp_path) == (cut, {"cut": cut})
    *_, (last, again, _) = train(restore_step(tmp_path, cut, like), target, first=cut)
    assert last == HOW.steps
    want, got = (jax.tree.leaves_with_path((s.step, s.params, s.opt_state)) for s in (whole, again))
    assert len(want) == len(got) > 20
    for (path, a), (_, b) in zip(want, got, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def test_the_order_is_a_function_of_seed_and_step() -> None:
    whole, later = (distill.batches(len(TEXT), HOW, first) for first in (0, 17))
    seen = [next(whole) for _ in range(20)]
    for starts in seen[17:]:
        np.testing.assert_array_equal(starts, next(later))
    other = distill.batches(len(TEXT), replace(HOW, seed=4))
    assert not np.array_equal(seen[0], next(other))


def test_only_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    assert latest_step(tmp_path / "nothing") is None
    for step in (1, 2):
        save_step(tmp_path, step, {"x": jnp.arange(3) + step}, {"step": step})
    (tmp_path / "step-00000003.tmp-1").mkdir()  # of a run that was killed
    assert latest_step(tmp_path) == (2, {"step": 2})
    found = restore_step(tmp_path, 2, {"x": jax.ShapeDtypeStruct((3,), jnp.int32)})
    np.testing.assert_array_equal(found["x"], [2, 3, 4])
    save_step(tmp_path, 4, {"x": jnp.zeros(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps 0"),
        ({"batch_size": -1}, "batch_size -1"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"cross_entropy": 1.5}, "cross_entropy 1.5"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"seed": -1}, "seed -1"),
        ({"dtype": "float16"}, "dtype float16"),
    ],
)
def test_settings_out_of_range(changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}: expected"):
        replace(HOW, **changes)


def test_models_and_texts_that_do_not_fit(target: Any) -> None:
    with pytest.raises(ValueError, match=r"vocabulary has 31 tokens, the target's 32"):
        distill.check_models(config(vocab=31), TARGET, HOW)
    with pytest.raises(ValueError, match="sequence_length 65: expected at most 64"):
        distill.check_models(DRAFT, TARGET, replace(HOW, sequence_length=65))
    with pytest.raises(ValueError, match="32 tokens to train on: expected at least 33"):
        distill.check_text(32, HOW)
    distill.check_text(33, HOW)
