"""The comparison of log-probabilities, on arrays made up here."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from bench import parity_gpu


def _logprobs(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=shape)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_kl_is_exact_and_covers_every_row() -> None:
    p, q = _logprobs(0, (3, 50, 7)), _logprobs(1, (3, 50, 7))
    assert parity_gpu.mean_kl(p, p) == 0
    expected = float((np.exp(p) * (p - q)).sum(-1).mean())
    assert math.isclose(parity_gpu.mean_kl(p, q), expected, rel_tol=1e-12)


def test_token_figures() -> None:
    reference, other = np.array([[-1.0, -2.0]]), np.array([[-1.5, -2.0]])
    figures = parity_gpu.token_figures(reference, other, np.array([[3, 4]]), np.array([[3, 5]]))
    assert figures == {
        "top1_agreement": 0.5,
        "mean_logprob_error": 0.25,
        "max_logprob_error": 0.5,
    }


def test_compare_reads_what_the_parts_leave(tmp_path: Path) -> None:
    B, T, V = 2, 6, 11
    tokens = np.random.default_rng(2).integers(0, V, (B, T))
    reference = _logprobs(3, (B, T, V))
    np.save(tmp_path / "tokens.npy", tokens)
    np.save(tmp_path / "hf_fp32.npy", reference)
    np.save(tmp_path / "jaxinfer_apply.npy", reference)
    np.save(tmp_path / "hf_bf16.npy", _logprobs(4, (B, T, V)))
    of_next = np.take_along_axis(reference[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    top = reference[:, :-1].argmax(-1)
    np.savez(tmp_path / "jaxinfer_engine.npz", logprobs=of_next - 0.5, top=top)
    found = {r.name: r.value for r in parity_gpu.compare("llama-3.2-1b", tmp_path)}
    assert found["parity.1b.jaxinfer_apply.mean_kl"] == 0
    assert found["parity.1b.jaxinfer_apply.top1_agreement"] == 1
    assert found["parity.1b.jaxinfer_engine.top1_agreement"] == 1
    assert math.isclose(found["parity.1b.jaxinfer_engine.max_logprob_error"] or 0, 0.5)
    assert (found["parity.1b.hf_bf16.mean_kl"] or 0) > 0
