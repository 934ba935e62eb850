"""The work of `jaxinfer distill`: from what was asked for, and checked, to a draft's directory.

While it runs, checkpoints lie in `OUT.training`. When it is done OUT appears, whole, and they go.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.cli.options import Dtype
from jaxinfer.cli.output import note
from jaxinfer.cli.quantizing import COPIED
from jaxinfer.errors import JaxinferError

if TYPE_CHECKING:
    from jaxinfer.config import ModelConfig
    from jaxinfer.training.distill import DistillConfig

REPORT = "distillation.json"  # of OUT: what was asked for, and what came of it
MORE = 128  # tokens that follow a prompt, where acceptance is measured

Progress = Callable[[int, int, str], None]  # of steps done, steps in all, the loss
Bar = Callable[[str], AbstractContextManager[Progress | None]]  # of OUT's name
Found = dict[str, Any]


@dataclass(frozen=True)
class DistillOptions:
    """What the command line says; see `training.distill.DistillConfig`."""

    target: str
    draft: str
    data: Path
    out: Path
    held_out: Path | None = None
    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 1e-3
    cross_entropy: float = 0.0
    seed: int = 0
    save_every: int = 100
    dtype: Dtype = "auto"
    k: int = 4

    @property
    def training(self) -> Path:
        """Where checkpoints lie meanwhile."""
        return self.out.with_name(f"{self.out.name}.training")


@dataclass(frozen=True)
class Draft:
    """What the draft starts from: `directory` has its weights; None: they are random."""

    config: ModelConfig
    hf: dict[str, Any]
    directory: Path | None
    digest: str


@dataclass(frozen=True)
class Text:
    """Tokens to train on, and prompts of the rest."""

    train: Any
    prompts: list[list[int]]


@dataclass(frozen=True)
class Run:
    """All that was read before the weights.

    Attributes:
        directory: of the target.
        context: tokens; the shorter one of the two models.
        asked: what the result depends on, of JSON types.
    """

    options: DistillOptions
    how: DistillConfig
    directory: Path
    target_config: ModelConfig
    draft: Draft
    text: Text
    context: int
    asked: dict[str, Any]


def train(run: Run, begun: tuple[int, dict[str, Any]] | None, bar: Bar) -> Found:
    """Loads, measures, trains from the last checkpoint on, measures again and writes."""
    import jax
    import jax.numpy as jnp

    from checkpoints.steps import restore_step
    from jaxinfer.loading import load_weights
    from jaxinfer.models.weights import abstract_params
    from jaxinfer.training.distill import create_state
    from jaxinfer.training.lm import half

    options, draft = run.options, run.draft
    target = load_weights(run.directory, run.target_config, jnp.dtype(run.how.dtype))
    measure = _measuring(run, target)
    create = partial(create_state, config=draft.config, how=run.how)
    if begun is None:
        params = _first_params(run)
        first, before = 0, measure(half(params))
        # Committed to a device, as what a step returns is: else it would be compiled twice.
        state = jax.device_put(create(params), jax.devices()[0])
    else:
        first, before = begun[0], begun[1]["before"]
        like = jax.eval_shape(create, abstract_params(draft.config, jnp.float32))
        state = restore_step(options.training, first, like)
    said = {"asked": run.asked, "before": before}
    with bar(options.out.name) as progress:
        params = half(_steps(run, state, target, first, said, progress))
    found = {
        "acceptance": {"before": before, "after": measure(params)},
        "k": options.k, "prompts": len(run.text.prompts), "trained_on": len(run.text.train),
    }  # fmt: skip
    _write(run, params, {"asked": run.asked, "found": found})
    shutil.rmtree(options.training, ignore_errors=True)
    return found


def _first_params(run: Run) -> Any:
    """What the draft starts from, float32."""
    import jax
    import jax.numpy as jnp

    from jaxinfer.loading import load_weights
    from jaxinfer.training import lm

    draft = run.draft
    if draft.directory is None:
        return lm.init(draft.config, jax.random.key(run.how.seed))
    return load_weights(draft.directory, draft.config, jnp.float32)


def _measuring(run: Run, target: Any) -> Callable[[Any], float]:
    """What gives the acceptance of a draft's parameters, as they will be written: bfloat16."""
    import jax

    from jaxinfer.acceptance import count, prepare
    from jaxinfer.config import Speculative

    pair = {"target": run.target_config, "draft": run.draft.config}
    step, configs = prepare(pair, Speculative("draft"))
    dtype = run.how.dtype
    longest = max(map(len, run.text.prompts))
    more = min(MORE, run.context - longest)

    def measure(params: Any) -> float:
        draft = jax.tree.map(lambda p: p.astype(dtype), params)
        both = {"target": target, "draft": draft}
        found = count(
            step, both, configs, run.text.prompts, more=more, k=run.options.k, dtype=dtype
        )
        return round(found.acceptance, 4)

    return measure


def _steps(
    run: Run, state: Any, target: Any, first: int, said: dict[str, Any], progress: Progress | None
) -> Any:
    """Trains to the last step, saving now and then; the parameters."""
    from checkpoints.steps import save_step
    from jaxinfer.training import distill as training

    how, last, saved = run.how, None, first
    steps = training.run(
        state, target, run.text.train, how, config=run.draft.config,
        target_config=run.target_config, first=first,
    )  # fmt: skip
    try:
        for step, state, metrics in steps:
            if progress is not None and last is not None:  # one step late: nobody waits for it
                progress(step - 1, how.steps, f"loss {float(last.loss):.4f}")
            last = metrics
            if step % how.save_every and step != how.steps:
                continue
            if not math.isfinite(loss := float(metrics.loss)):
                raise JaxinferError(f"step {step}: the loss is {loss}; lower --learning-rate")
            save_step(run.options.training, step, state, said)
            saved = step
            note(f"step {step} of {how.steps}: loss {loss:.4f}, KL {float(metrics.kl):.4f}")
    except BaseException:
        note(f"ended early: {saved} of {how.steps} steps are in {run.options.training}; "
             "the same command goes on from there")  # fmt: skip
        raise
    return state.params


def _write(run: Run, params: Any, report: dict[str, Any]) -> None:
    """OUT, as a whole: a Hugging Face directory with the target's tokenizer, and the report."""
    from checkpoints.store import write_whole
    from checkpoints.write import write_hf, write_json
    from jaxinfer.models.weights import declare

    hf = run.draft.hf
    named = "dtype" if "dtype" in hf else "torch_dtype"
    hf = {k: v for k, v in hf.items() if k != "torch_dtype"} | {named: "bfloat16"}

    def write(path: Path) -> None:
        write_hf(path, params, declare(run.draft.config), hf)
        for file in (file for pattern in COPIED for file in run.directory.glob(pattern)):
            shutil.copy(file, path / file.name)
        write_json(path / REPORT, report)

    write_whole(run.options.out, write)
