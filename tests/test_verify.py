"""The comparison with transformers: its figures, its errors and, where torch is, the real thing."""

from __future__ import annotations

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from jaxinfer import verify
from jaxinfer.errors import InvalidRequest, JaxinferError
from jaxinfer.models.families import read_config

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ["llama-gqa-llama3rope-tied", "qwen2-mixed-window", "qwen3-tied-bias"]


def _trace(seed: int, length: int, greedy: tuple[int, ...]) -> verify.Trace:
    random = np.random.default_rng(seed)
    return verify.Trace(
        random.normal(size=(2, length, 8)).astype(np.float32),
        random.normal(size=(length, 5)).astype(np.float32),
        greedy,
    )


def test_equal_traces_have_no_error() -> None:
    traces = [_trace(0, 3, (1, 2)), _trace(1, 7, (3, 4))]
    report = verify.compare("m", traces, traces, "float32", "float32")
    assert report == verify.Report(
        model="m",
        dtype="float32",
        reference_dtype="float32",
        num_prompts=2,
        num_positions=10,
        layer_error_mean=(0.0, 0.0),
        layer_error_max=(0.0, 0.0),
        kl_mean=0.0,
        kl_max=0.0,
        top1_agreement=1.0,
        greedy_tokens=2,
        greedy_agreement=1.0,
        greedy_identical=2,
    )


def test_figures_of_traces_that_differ() -> None:
    theirs = verify.Trace(
        np.ones((1, 2, 4), np.float32), np.zeros((2, 2), np.float32), (1, 2, 3, 4)
    )
    resid = np.ones((1, 2, 4), np.float32)
    resid[0, 1] = 1.5  # the second position is off by half
    logits = np.array([[0, 0], [0, math.log(3)]], np.float32)  # p = (1/4, 3/4) against (1/2, 1/2)
    ours = verify.Trace(resid, logits, (1, 2, 9, 4))
    report = verify.compare("m", [ours], [theirs], "bfloat16", "float32")
    assert report.layer_error_mean == pytest.approx((0.25,))
    assert report.layer_error_max == pytest.approx((0.5,))
    assert report.kl_max == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    assert report.kl_mean == pytest.approx(report.kl_max / 2)
    assert report.top1_agreement == 0.5
    assert (report.greedy_agreement, report.greedy_identical) == (0.5, 0)


def test_render_shows_every_layer_and_figure() -> None:
    ours, theirs = [_trace(0, 3, (1, 2))], [_trace(1, 3, (1, 5))]
    report = verify.compare("some/model", ours, theirs, "bfloat16", "float32")
    written = io.StringIO()
    Console(file=written, width=120).print(verify.render(report))
    for shown in (
        "some/model: jaxinfer bfloat16 against transformers float32",
        f"{report.kl_mean:.3g} nats",
        "50.00% (0 of 1 prompts identical)",
        f"{report.layer_error_mean[0]:.3g}",
        f"{report.layer_error_max[1]:.3g}",
    ):
        assert shown in written.getvalue()


def test_jaxinfer_traces_agree_with_the_goldens() -> None:
    """The half that needs no torch: `run_jaxinfer` in float32 against what PyTorch recorded."""
    name = NAMES[0]
    arrays = load_file(GOLDENS / name / "golden.safetensors")
    length = int(arrays["prompt_lengths"][2])
    tokens = arrays["tokens"][2, : length + 32].tolist()
    [trace] = verify.run_jaxinfer(
        GOLDENS / name, read_config(GOLDENS / name), [tokens[:length]], "float32", 32
    )
    np.testing.assert_allclose(trace.resid, arrays["resid"], atol=1e-4, rtol=0)
    assert trace.logits.shape == (length, arrays["logits"].shape[1])
    assert list(trace.greedy) == tokens[length:]


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed here")
def test_without_torch_the_error_says_so() -> None:
    with pytest.raises(JaxinferError, match="install torch"):
        verify.verify(GOLDENS / NAMES[0])


@pytest.mark.parametrize("wrong", [{"greedy_tokens": 0}, {"prompts": []}])
def test_nothing_to_compare_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        verify.verify(GOLDENS / NAMES[0], **wrong)


@pytest.mark.parametrize("name", NAMES)
def test_verify_live(name: str) -> None:
    pytest.importorskip("torch", reason="the live comparison with transformers needs torch")
    prompts = [[5], list(range(70))]
    report = verify.verify(GOLDENS / name, prompts=prompts, dtype="float32")
    assert (report.num_prompts, report.num_positions) == (2, 71)
    assert len(report.layer_error_max) == read_config(GOLDENS / name).num_layers
    assert max(report.layer_error_max) < 2e-5
    assert report.kl_max < 1e-8
    assert report.top1_agreement == 1.0
    assert report.greedy_identical == 2


def test_verify_live_refuses_bad_prompts() -> None:
    pytest.importorskip("torch", reason="the live comparison with transformers needs torch")
    with pytest.raises(InvalidRequest, match="request 1"):
        verify.verify(GOLDENS / NAMES[0], prompts=[[5], []])
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        verify.verify(GOLDENS / NAMES[0], prompts=["text"])
