"""`jaxinfer distill`: trains a draft model for a target, in a run that may be stopped anywhere.

While it runs, checkpoints lie in `OUT.training`. When it is done OUT appears, whole, and they go.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxinfer
from jaxinfer.cli.model import ModelOptions, choose_dtype, model_digest
from jaxinfer.cli.options import Dtype
from jaxinfer.cli.output import note
from jaxinfer.cli.quantizing import COPIED, dense_model, pieces, read_tokens
from jaxinfer.cli.results import differences
from jaxinfer.errors import CheckpointError, JaxinferError, UnsupportedModel
from jaxinfer.hub import resolve_model

if TYPE_CHECKING:
    from jaxinfer.config import ModelConfig
    from jaxinfer.training.distill import DistillConfig

REPORT = "distillation.json"  # of OUT: what was asked for, and what came of it
HELD_OUT = 20  # one token in so many, the last of the text, is held out
PROMPTS, PROMPT, MORE = 16, 64, 128  # tokens of a prompt, and tokens that follow it

Progress = Callable[[int, int, str], None]
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


def distill(options: DistillOptions, progress: Progress | None) -> Found:
    """Writes `options.out`, whole or not at all, going on where the same run was stopped.

    Returns:
        `acceptance`: of the draft's attempted guesses those that hold at temperature 0, `before`
        and `after`; `OUT/distillation.json` holds it too. And what it was measured on.

    Raises:
        CheckpointError: a model cannot be read, or OUT is something else.
        UnsupportedModel: the target is a GGUF file; or the draft is quantised.
        InvalidRequest: a text cannot be read.
        ValueError: a value out of its range, two vocabularies, a text that is too short; or what
            lies at OUT was asked for otherwise.
        JaxinferError: flax or optax are not installed; or the loss is not finite.
    """
    directory = _target(options.target)
    draft = _draft(options.draft)
    _check_installed()
    from jaxinfer.models.families import read_config
    from jaxinfer.training.distill import check_models

    target_config = read_config(directory)
    check_models(draft.config, target_config, _settings(options, "float32"))  # before JAX starts
    if options.k < 1:
        raise ValueError(f"-k {options.k}: expected at least 1 guess")
    model = ModelOptions(options.target, None, options.dtype, None, 0.9, "auto")
    how = _settings(options, choose_dtype(model))
    asked = _asked(options, how, directory, draft)
    if (done := _finished(options, asked)) is not None:
        return done
    begun = _begun(options, asked)
    context = min(draft.config.max_position, target_config.max_position)
    text = _read(options, directory, how, context)
    run = Run(options, how, directory, target_config, draft, text, context, asked)
    return _train(run, begun, progress)


# --- what is asked for ----------------------------------------------------------------------------


def _target(name: str) -> Path:
    """A target's directory; its weights may be quantised."""
    from jaxinfer.loading import is_gguf

    directory = resolve_model(name)
    if is_gguf(directory):
        raise UnsupportedModel(
            f"{directory} has no tokenizer files for the draft: give a Hugging Face directory"
        )
    return directory


def _draft(name: str) -> Draft:
    """A `config.json`, or a dense model's directory."""
    from checkpoints.safetensors_reader import read_json
    from jaxinfer.models.families import parse_config, read_config

    path = Path(name).expanduser()
    if not path.is_file():
        directory = dense_model(name)
        hf = read_json(directory / "config.json")
        return Draft(read_config(directory), hf, directory, model_digest(directory))
    hf = read_json(path)
    if "quantization_config" in hf:
        raise UnsupportedModel(f"{path} is of a quantised model: give that of a dense one")
    digest = hashlib.sha256(json.dumps(hf, sort_keys=True).encode()).hexdigest()
    return Draft(parse_config(hf), hf, None, digest)


def _check_installed() -> None:
    try:
        import jaxinfer.training.distill  # noqa: F401
    except ModuleNotFoundError as error:
        raise JaxinferError(f"{error.name} is missing: pip install 'jaxinfer[train]'") from error


def _settings(options: DistillOptions, dtype: Any) -> DistillConfig:
    """Raises ValueError for a value out of its range."""
    from jaxinfer.training.distill import DistillConfig

    return DistillConfig(
        steps=options.steps, batch_size=options.batch_size,
        sequence_length=options.sequence_length, learning_rate=options.learning_rate,
        cross_entropy=options.cross_entropy, seed=options.seed, save_every=options.save_every,
        dtype=dtype,
    )  # fmt: skip


def _asked(
    options: DistillOptions, how: DistillConfig, directory: Path, draft: Draft
) -> dict[str, Any]:
    """What the result depends on, of JSON types."""
    settings = {name: value for name, value in asdict(how).items() if name != "save_every"}
    held_out = options.held_out
    return {
        "jaxinfer": jaxinfer.__version__,
        "target": model_digest(directory),
        "draft": draft.digest,
        "data": _file_digest(options.data, "--data"),
        "held_out": None if held_out is None else _file_digest(held_out, "--held-out"),
        **settings,
        "k": options.k,
    }


def _file_digest(path: Path, option: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be read: {error.strerror}") from error


def _finished(options: DistillOptions, asked: dict[str, Any]) -> Found | None:
    """What an earlier run found, if it was the same and is done; None if OUT is not there."""
    from checkpoints.safetensors_reader import read_json

    if not options.out.exists():
        return None
    if not (options.out / REPORT).is_file():
        raise CheckpointError(f"{options.out} exists already, and holds no {REPORT}")
    report = read_json(options.out / REPORT)
    _check_same(options.out, report["asked"], asked)
    note(f"{options.out} is done already")
    shutil.rmtree(options.training, ignore_errors=True)
    return report["found"]


def _begun(options: DistillOptions, asked: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """The last checkpoint of the same run, and what was said with it."""
    from checkpoints.steps import latest_step

    found = latest_step(options.training)
    if found is not None:
        _check_same(options.training, found[1]["asked"], asked)
        note(f"{found[0]} of {options.steps} steps are in {options.training} already")
    return found


def _check_same(path: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises ValueError where another run lies at `path`: with what differs."""
    if different := differences(found, asked):
        raise ValueError(
            f"--out: {path} is of another run, and is left as it is; {different}. "
            "Ask for the same again, or name another directory"
        )


def _read(options: DistillOptions, directory: Path, how: DistillConfig, context: int) -> Text:
    """The text, split. Raises ValueError where either part is too short."""
    import numpy as np

    from jaxinfer.training.distill import check_text

    ids = read_tokens(options.data, directory, "--data")
    if options.held_out is None:
        split = len(ids) - len(ids) // HELD_OUT
        ids, rest = ids[:split], ids[split:]
    else:
        rest = read_tokens(options.held_out, directory, "--held-out")
    check_text(len(ids), how)
    length = min(PROMPT, context // 2)
    prompts = pieces(rest, length, PROMPTS)
    if not prompts:
        raise ValueError(
            f"{len(rest)} tokens of held-out text: expected at least {length}, a prompt; "
            "give a longer --data, or --held-out"
        )
    return Text(np.asarray(ids, np.int32), prompts)


# --- the run --------------------------------------------------------------------------------------


def _train(run: Run, begun: tuple[int, dict[str, Any]] | None, progress: Progress | None) -> Found:
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
        state = create(params)
    else:
        first, before = begun[0], begun[1]["before"]
        like = jax.eval_shape(create, abstract_params(draft.config, jnp.float32))
        state = restore_step(options.training, first, like)
    said = {"asked": run.asked, "before": before}
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

    step, configs = prepare({"target": run.target_config, "draft": run.draft.config})
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
