"""Makes the demo pair: a target and a draft language model of Python source.

    python -m checkpoints.demo.train prepare --data DIR
    python -m checkpoints.demo.train fit --data DIR --out DIR
    python -m checkpoints.demo.evaluate --data DIR --out DIR

`prepare` needs CPython 3.12.1 and no GPU: it reads the standard library, trains the tokenizer and
writes token arrays. `fit` needs a GPU. The corpus is small enough to be learnt by heart, so the
target learns in part from the mean of `members` models like itself with other seeds (Hinton et al.
2015), and the draft in part from the target; each keeps its checkpoint with the lowest loss on the
validation files.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import shutil
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from checkpoints.demo import corpus
from checkpoints.demo.evaluate import bits_per_byte
from checkpoints.write import write_hf, write_json
from jaxinfer.config import ModelConfig
from jaxinfer.loading import load_weights
from jaxinfer.models.decoder import Params
from jaxinfer.models.families import parse_config, read_config
from jaxinfer.models.weights import count_params, declare
from jaxinfer.training import lm

PYTHON = "3.12.1"
MAX_LENGTH = 2048
EVALUATIONS = 40  # of the validation loss, in one training run


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        minutes: bound on the time in steps; fewer epochs are run where they would not fit.
        epochs: passes over the corpus.
        batch: sequences a step.
        length: tokens a sequence.
        warmup: share of the steps in which the learning rate rises.
        distill: share of the teachers in the target distribution.
        members: models trained first, with the seeds that follow, to be the teachers.
        dispatch: steps in one dispatch.
    """

    seed: int = 0
    minutes: float = 1.35
    epochs: float = 16.0
    batch: int = 16
    length: int = MAX_LENGTH
    optimizer: lm.Optimizer = "muon"
    learning_rate: float = 3e-3
    weight_decay: float = 0.6
    warmup: float = 0.02
    distill: float = 0.7
    members: int = 1
    dispatch: int = 20


RECIPES = {
    "target": Recipe(),
    "draft": Recipe(
        minutes=0.5, epochs=16.0, learning_rate=5e-3, weight_decay=0.05, distill=0.9, members=0
    ),
}
SHAPES = {
    "target": {
        "hidden_size": 320,
        "intermediate_size": 640,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "draft": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


# --- prepare ------------------------------------------------------------------------------------


def prepare(data: Path, stdlib: Path) -> None:
    """Writes `tokenizer.json`, `train.npy`, `validation.npy`, `held_out.npy` and `corpus.json`.

    Raises:
        RuntimeError: this is not CPython 3.12.1.
    """
    from checkpoints.demo.tokenizer import encode_files, save_tokenizer, train_tokenizer

    if (platform.python_implementation(), platform.python_version()) != ("CPython", PYTHON):
        raise RuntimeError(f"the corpus is the standard library of CPython {PYTHON}; run that")
    files = corpus.collect(stdlib)
    tokenizer = train_tokenizer(text for _, text in files.train)
    save_tokenizer(tokenizer, data, MAX_LENGTH)
    manifest: dict[str, Any] = {
        "python": PYTHON,
        "end_of_text": tokenizer.token_to_id("<|endoftext|>"),
    }
    for part in ("train", "validation", "held_out"):
        named = getattr(files, part)
        ids = encode_files(tokenizer, [text for _, text in named])
        np.save(data / f"{part}.npy", ids)
        manifest[part] = {
            "sha256": corpus.digest(named),
            "bytes": sum(len(text.encode()) for _, text in named),
            "tokens": len(ids),
            "files": [name for name, _ in named],
        }
    write_json(data / "corpus.json", manifest | {"left_out": files.left_out})


# --- fit ----------------------------------------------------------------------------------------


def fit(
    data: Path,
    out: Path,
    recipes: dict[str, Recipe],
    shapes: dict[str, Any],
    teacher: Path | None = None,
) -> None:
    """Trains the models of `recipes` in order; the first, or the model in `teacher`, teaches.

    Writes a Hugging Face directory for each, `corpus.json` and `training.json` under `out`; what
    `training.json` says there of other models is kept.
    """
    manifest = json.loads((data / "corpus.json").read_text())
    arrays = {part: np.load(data / f"{part}.npy") for part in ("train", "validation", "held_out")}
    tokens = jnp.asarray(arrays["train"])
    attention = "cudnn" if jax.default_backend() == "gpu" else "xla"
    report: dict[str, Any] = {}
    if (out / "training.json").exists():
        report = json.loads((out / "training.json").read_text())
    teachers: tuple[Params, ...] = ()
    teacher_config = None
    if teacher is not None:
        teacher_config = read_config(teacher)
        teachers = (load_weights(teacher, teacher_config, jnp.bfloat16),)
    for role, recipe in recipes.items():
        hf = model_config(shapes[role], manifest["end_of_text"])
        config = parse_config(hf)
        optimizer = lm.make_optimizer(config, recipe.optimizer, weight_decay=recipe.weight_decay)

        def run(name: str, recipe: Recipe, config=config, optimizer=optimizer, **teaching: Any):
            return _fit_one(
                name, config, optimizer, recipe, tokens, arrays["validation"],
                attention=attention, **teaching,
            )  # fmt: skip

        members = [
            run(f"{role} member {i}", dataclasses.replace(recipe, seed=recipe.seed + i + 1))
            for i in range(recipe.members)
        ]
        if members:
            teachers, teacher_config = tuple(params for params, _ in members), config
        params, figures = run(role, recipe, teachers=teachers, teacher_config=teacher_config)
        if not teachers or members:  # from here on, this model alone is the teacher
            teachers, teacher_config = (params,), config
        bpb = bits_per_byte(
            params, config, arrays["held_out"], manifest["held_out"]["bytes"], attention=attention
        )
        report[role] = {
            **_environment(),
            "parameters": count_params(config),
            "recipe": dataclasses.asdict(recipe),
            "held_out_bits_per_byte": bpb,
            **figures,
            "members": [figures for _, figures in members],
        }
        print(f"{role}: held-out bits per byte {bpb:.4f}", flush=True)
        write_model(out / role, params, config, hf, data)
        write_json(out / "training.json", report)
    shutil.copyfile(data / "corpus.json", out / "corpus.json")


def _fit_one(
    name: str,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    tokens: jax.Array,
    validation: np.ndarray,
    *,
    teachers: Sequence[Params] = (),
    teacher_config: ModelConfig | None = None,
    attention: lm.Attention,
) -> tuple[Params, dict[str, Any]]:
    """Returns the bfloat16 parameters with the lowest validation loss, and the run's figures."""
    K, B, T = recipe.dispatch, recipe.batch, recipe.length
    key = jax.random.key(recipe.seed)
    windows = lm.window_starts(np.random.default_rng(recipe.seed), len(tokens), T)
    taught = lm.Teachers(tuple(teachers), jnp.float32(recipe.distill)) if teachers else None

    def advance(state: Any, rates: np.ndarray) -> tuple[Any, lm.Metrics]:
        starts = np.fromiter(windows, np.int32, K * B).reshape(K, B)
        return lm.train_steps(
            state, tokens, jnp.asarray(starts), jnp.asarray(rates), config=config, length=T,
            teachers=taught, teacher_config=teacher_config, attention=attention,
        )  # fmt: skip

    def validate(params: Any) -> float:
        nats = lm.score(lm.half(params), config, validation, length=T, attention=attention)
        return float(nats.mean())

    # A throw-away state compiles and tells the speed; the number of steps follows from it.
    seconds = []
    state = lm.create_state(config, key, optimizer)
    validate(state.params)
    for _ in range(3):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(advance(state, np.zeros(K, np.float32)))
        seconds.append(time.perf_counter() - start)
    per_dispatch = min(seconds[1:])
    wanted = recipe.epochs * len(tokens) / (K * B * T)
    dispatches = max(1, round(min(wanted, recipe.minutes * 60 / per_dispatch)))
    steps = dispatches * K
    print(
        f"{name}: {count_params(config):,} parameters, {steps} steps of {B}×{T} tokens = "
        f"{steps * B * T / len(tokens):.1f} epochs, {K * B * T / per_dispatch:,.0f} tokens/s, "
        f"compiled in {seconds[0]:.0f} s",
        flush=True,
    )

    state = lm.create_state(config, key, optimizer)
    rates = lm.learning_rates(steps, recipe.learning_rate, max(1, round(recipe.warmup * steps)))
    every = max(1, dispatches // EVALUATIONS)
    best: Params = {}
    best_loss, curve = np.inf, []
    start = time.perf_counter()
    for i in range(dispatches):
        state, metrics = advance(state, rates[i * K : (i + 1) * K])
        if (i + 1) % every and i + 1 < dispatches:
            continue
        train_loss, loss = float(metrics.loss.mean()), validate(state.params)
        curve.append(
            {"step": (i + 1) * K, "train": round(train_loss, 4), "validation": round(loss, 4)}
        )
        print(
            f"{name}: step {(i + 1) * K:6d}  epoch {(i + 1) * K * B * T / len(tokens):5.1f}  "
            f"train {train_loss:.4f}  validation {loss:.4f}  "
            f"gradient {float(metrics.grad_norm.mean()):.2f}",
            flush=True,
        )
        if not np.isfinite(loss):
            raise FloatingPointError(f"{name}: the validation loss is {loss} at step {(i + 1) * K}")
        if loss < best_loss:
            best_loss = loss
            best = lm.half(state.params)
    figures = {
        "steps": steps,
        "epochs": steps * B * T / len(tokens),
        "seconds": round(time.perf_counter() - start, 1),
        "tokens_per_second": round(K * B * T / per_dispatch),
        "validation_nats_per_token": best_loss,
        "curve": curve,
    }
    return best, figures


def model_config(shape: dict[str, int], end_of_text: int, vocab_size: int = 4096) -> dict[str, Any]:
    """The contents of a Qwen3 `config.json`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        **shape,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "eos_token_id": end_of_text,
        "dtype": "bfloat16",
    }


def write_model(
    directory: Path, params: Params, config: ModelConfig, hf: dict[str, Any], data: Path
) -> None:
    """Writes a Hugging Face directory, with the tokenizer that lies in `data`."""
    write_hf(directory, params, declare(config), hf, overwrite=True)
    write_json(directory / "generation_config.json", {"eos_token_id": hf["eos_token_id"]})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, directory / name)


def _environment() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, np)},
    }


# --- command line -------------------------------------------------------------------------------


def override(recipes: dict[str, Recipe], settings: Sequence[str]) -> dict[str, Recipe]:
    """Applies settings such as `target.learning_rate=2e-3`.

    Raises:
        ValueError: a role or field that does not exist.
    """
    recipes = dict(recipes)
    for setting in settings:
        path, _, value = setting.partition("=")
        role, _, name = path.partition(".")
        if role not in recipes or name not in Recipe.__dataclass_fields__:
            fields = ", ".join(Recipe.__dataclass_fields__)
            raise ValueError(f"{setting}: ROLE.FIELD=VALUE of {', '.join(recipes)} and {fields}")
        kind = type(getattr(recipes[role], name))
        recipes[role] = dataclasses.replace(recipes[role], **{name: kind(value)})
    return recipes


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the demo pair of models.")
    parser.add_argument("step", choices=["prepare", "fit"])
    parser.add_argument("--data", type=Path, required=True, help="what prepare writes, fit reads")
    parser.add_argument("--out", type=Path, help="fit: where the models go")
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--teacher", type=Path, help="a target made before, for the draft alone")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="ROLE.FIELD=VALUE", help="change a recipe"
    )
    args = parser.parse_args()
    if args.step == "prepare":
        prepare(args.data, Path(sysconfig.get_paths()["stdlib"]))
        return
    if args.out is None:
        parser.error("fit needs --out")
    recipes = override(RECIPES, args.set)
    chosen = {role: recipes[role] for role in args.models}
    fit(args.data, args.out, chosen, SHAPES, args.teacher)


if __name__ == "__main__":
    main()
