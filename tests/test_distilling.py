"""`jaxinfer distill`, on tiny models with the demo's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.demo.train import model_config, write_model
from jaxinfer import cli
from jaxinfer.cli import distill_run
from jaxinfer.cli.distill_run import DistillOptions
from jaxinfer.cli.distilling import distill
from jaxinfer.errors import CheckpointError, InvalidRequest, UnsupportedModel
from jaxinfer.hub import DEMO_MODELS
from jaxinfer.loading import load_weights
from jaxinfer.models.families import parse_config, read_config
from jaxinfer.tokenizer import load_tokenizer
from jaxinfer.training import lm

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / DEMO_MODELS["demo"]
STEPS = 6


def shape(width: int, **changes: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    return model_config(sizes, end_of_text=0) | {"head_dim": 16} | changes


def write(directory: Path, hf: dict[str, Any], seed: int) -> None:
    config = parse_config(hf)
    params = lm.half(lm.init(config, jax.random.key(seed)))
    write_model(directory, params, config, hf, DEMO)


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill_run, "MORE", 16)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target` and `draft`, directories; `draft.json`, `text.py`; `out`, of a run not stopped."""
    folder = tmp_path_factory.mktemp("distill")
    write(folder / "target", shape(32), 0)
    write(folder / "draft", shape(16), 1)
    (folder / "draft.json").write_text(json.dumps(shape(16)))
    (folder / "text.py").write_text(Path(__file__).read_text())
    distill(options(folder, folder / "out"))
    return folder


def options(made: Path, out: Path, **changes: Any) -> DistillOptions:
    given = DistillOptions(
        str(made / "target"), str(made / "draft.json"), made / "text.py", out, steps=STEPS,
        batch_size=2, sequence_length=16, learning_rate=0.01, save_every=2, k=2,
    )  # fmt: skip
    return replace(given, **changes)


def test_the_draft_is_a_model_with_the_targets_tokenizer(made: Path) -> None:
    out = made / "out"
    assert not (made / "out.training").exists()
    config = read_config(out)
    params = load_weights(out, config, jnp.bfloat16)
    first = lm.half(lm.init(config, jax.random.key(0)))
    assert not np.array_equal(params["embed"], first["embed"])
    ours, its = (load_tokenizer(path) for path in (out, made / "target"))
    assert ours is not None
    assert its is not None
    assert ours.encode("def f(x):") == its.encode("def f(x):")
    found = json.loads((out / "distillation.json").read_text())["found"]
    for when in ("before", "after"):
        assert 0 <= found["acceptance"][when] <= 1
    assert found["k"] == 2


def test_stopped_and_gone_on_with_it_ends_with_the_same_bits(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def told(done: int, total: int, said: str) -> None:
        assert said.startswith("loss ")
        assert total == STEPS
        if done == 4:  # told of one step late: 5 are done, of which 4 are saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(options(made, out), lambda name: nullcontext(told))
    assert "4 of 6 steps are in" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(ValueError, match=r"seed was 0, now 1; k was 2, now 3"):
        distill(options(made, out, seed=1, k=3))
    found = distill(options(made, out, save_every=3))
    assert "4 of 6 steps are in" in capsys.readouterr().err
    for name in ("model.safetensors", "config.json", "distillation.json"):
        assert (out / name).read_bytes() == (made / "out" / name).read_bytes(), name
    assert not (tmp_path / "out.training").exists()

    assert distill(options(made, out)) == found  # does nothing
    assert "done already" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"learning_rate was 0.01, now 0.02"):
        distill(options(made, out, learning_rate=0.02))


def test_a_draft_that_has_weights_goes_on_from_them(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line. At so small a rate nothing is learnt."""
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("for i in range(10):\n    print(i, i * i, i * i * i)\n" * 6)
    out = tmp_path / "out"
    code = cli.main([
        "distill", "--target", str(made / "target"), "--draft-config", str(made / "draft"),
        "--data", str(made / "text.py"), "--held-out", str(held_out), "--out", str(out),
        "--steps", "1", "--batch-size", "2", "--sequence-length", "16",
        "--learning-rate", "1e-9", "--cross-entropy", "0.5", "-k", "2",
    ])  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "acceptance.before" in shown.out
    assert "acceptance.after" in shown.out
    got, want = (load_weights(p, read_config(p), jnp.float32) for p in (out, made / "draft"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-8), got, want)


def test_what_does_not_fit_is_refused_before_any_work(made: Path, tmp_path: Path) -> None:
    other, text = tmp_path / "other.json", tmp_path / "text.txt"
    ours = options(made, tmp_path / "out")
    other.write_text(json.dumps(shape(16, vocab_size=4095)))
    with pytest.raises(ValueError, match="vocabulary has 4095 tokens, the target's 4096"):
        distill(replace(ours, draft=str(other)))
    other.write_text(json.dumps(shape(16, quantization_config={"quant_method": "gptq"})))
    with pytest.raises(UnsupportedModel, match="dense one"):
        distill(replace(ours, draft=str(other)))
    with pytest.raises(CheckpointError, match="does not exist"):
        distill(replace(ours, draft=str(tmp_path / "nothing")))
    with pytest.raises(CheckpointError, match="does not exist"):
        distill(replace(ours, target=str(tmp_path / "nothing")))
    text.write_text("x = 1\n")
    with pytest.raises(ValueError, match="tokens to train on: expected at least 33"):
        distill(replace(ours, data=text))
    with pytest.raises(ValueError, match="of held-out text: expected at least 64"):
        distill(replace(ours, held_out=text))
    with pytest.raises(ValueError, match=r"--data .*nothing: cannot be read: No such file"):
        distill(replace(ours, data=tmp_path / "nothing"))
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        distill(replace(ours, data=text))
    with pytest.raises(ValueError, match="-k 0: expected at least 1"):
        distill(replace(ours, k=0))
    with pytest.raises(ValueError, match="steps 0: expected at least 1"):
        distill(replace(ours, steps=0))
    with pytest.raises(CheckpointError, match=r"exists already, and holds no distillation.json"):
        distill(replace(ours, out=made / "draft"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()
