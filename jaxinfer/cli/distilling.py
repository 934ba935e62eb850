"""`jaxinfer distill`: trains a draft model for a target, in a run that may be stopped anywhere.

Here all is read and checked that needs no weights; then `distill_run` works.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxinfer
from jaxinfer.cli.distill_run import (
    REPORT,
    Bar,
    DistillOptions,
    Draft,
    Found,
    Run,
    Text,
    train,
)
from jaxinfer.cli.model import ModelOptions, choose_dtype, model_digest
from jaxinfer.cli.output import note
from jaxinfer.cli.quantizing import dense_model, pieces, read_tokens
from jaxinfer.cli.results import differences
from jaxinfer.errors import CheckpointError, JaxinferError, UnsupportedModel
from jaxinfer.hub import resolve_model
from jaxinfer.progress import training_bar

if TYPE_CHECKING:
    from jaxinfer.training.distill import DistillConfig

HELD_OUT = 20  # one token in so many, the last of the text, is held out
PROMPTS, PROMPT = 16, 64  # how many, and tokens of each


def distill(options: DistillOptions, bar: Bar = training_bar) -> Found:
    """Writes `options.out`, whole or not at all, going on where the same run was stopped.

    `bar`: yields what is told of every step, or None.

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
    return train(run, begun, bar)


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
