"""`jaxinfer quantize`: from a dense model's directory to a quantised one's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxinfer.errors import CheckpointError, InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    from jaxinfer.quality import Quality

FORMS = ("compressed-tensors", "orbax")
SCALES = {"row": 1, "block": 128, "tensor": -1}  # rows that share one
COPIED = ("generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
          "chat_template*", "added_tokens.json", "tekken.json")  # fmt: skip


@dataclass(frozen=True)
class QuantizeOptions:
    """What the command line says."""

    model: str
    out: Path
    method: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    data: Path | None
    samples: int
    length: int
    form: str = "compressed-tensors"
    report: Path | None = None
    scales: str = "row"
    activations: str = "dynamic"


def quantize(
    options: QuantizeOptions, progress: Callable[[int, int], None] | None
) -> Quality | None:
    """Writes `options.out`, whole or not at all; with a report, its quality, which `quality.json`
    there holds too.

    Raises:
        CheckpointError: `out` exists, or the model cannot be read.
        UnsupportedModel: the model is quantised already.
        InvalidRequest: the calibration text is missing or too short.
        ValueError: a recipe that cannot be made, or written.
    """
    import jax
    import jax.numpy as jnp

    from checkpoints.formats.export import Writer, quantization_config
    from checkpoints.load import load_params
    from checkpoints.model_store import save_model
    from checkpoints.safetensors_reader import read_json
    from checkpoints.store import write_whole
    from checkpoints.write import write_atomically
    from jaxinfer import quality
    from jaxinfer.models.families import read_config
    from jaxinfer.models.weights import declare
    from jaxinfer.quantise import check_columns, only_layer, quantise_layers

    method = choose(options)
    if options.form not in FORMS:
        raise ValueError(f"--format {options.form}: expected {' or '.join(FORMS)}")
    if options.out.exists():
        raise CheckpointError(f"{options.out} exists already")
    directory = dense_model(options.model)
    config, hf = read_config(directory), read_json(directory / "config.json")
    weights = declare(config)
    check_columns(config, method.recipe)
    orbax = options.form == "orbax"
    if not orbax:
        said = quantization_config(method.recipe, act_order=method.act_order)
        hf = {**hf, "quantization_config": said}
    tokens = read_text(options, directory, "data") if method.needs_text else None
    held_out = None if options.report is None else read_text(options, directory, "report")

    def load(tree: Any) -> Any:
        return load_params(directory, tree, dtype=jnp.bfloat16, allowed_extra=[".*"])

    def layers() -> Iterator[Any]:
        for one in weights["layers"]:
            yield load(one)

    rest = {name: weight for name, weight in weights.items() if name != "layers"}
    others = load(rest)
    dense, again = tee(layers())
    made = quantise_layers(dense, config, method, others["embed"], tokens, progress=progress)
    streams = None if held_out is None else quality.begin(others["embed"], held_out, config)

    def done() -> Iterator[Any]:
        nonlocal streams
        for index, (before, layer) in enumerate(zip(again, made, strict=True)):
            if streams is not None:
                streams = quality.through(streams, before, layer, only_layer(config, index))
            yield layer

    files = [file for pattern in COPIED for file in directory.glob(pattern)]
    hf = {**hf, "torch_dtype": "bfloat16"}
    if orbax:
        kept = [jax.device_get(layer) for layer in done()]  # one on the device at a time
        save_model(options.out, {**others, "layers": kept}, hf, files)

    def write(path: Path) -> None:
        writer = Writer(path)
        writer.write(others, rest)
        for one, weight in zip(done(), weights["layers"], strict=True):
            writer.write(one, weight)
        for file in files:
            shutil.copy(file, path / file.name)
        writer.close(hf)

    if not orbax:
        write_whole(options.out, write)
    if held_out is None or streams is None:
        return None
    found = quality.finish(streams, others, config, held_out)
    text = json.dumps(found._asdict(), indent=1).encode()
    write_atomically(options.out / "quality.json", lambda file: file.write(text))
    return found


def dense_model(name: str) -> Path:
    """The directory of a model that is not quantised. Raises UnsupportedModel for another."""
    from checkpoints.formats import read_quantisation
    from checkpoints.model_store import is_saved_model
    from jaxinfer.hub import resolve_model
    from jaxinfer.loading import is_gguf

    directory = resolve_model(name)
    saved = is_gguf(directory) or is_saved_model(directory)
    if saved or read_quantisation(directory) is not None:
        raise UnsupportedModel(f"{directory} is quantised already: give the dense model")
    return directory


def choose(options: QuantizeOptions) -> Any:
    """The `Method` that the options mean. Raises ValueError for those that mean none."""
    from jaxinfer.quant.make import Recipe
    from jaxinfer.quantise import Method

    if options.scales not in SCALES or options.activations not in ("dynamic", "static"):
        raise ValueError(
            f"--scales {options.scales}, --activations {options.activations}: expected"
            f" {', '.join(SCALES)}; dynamic or static"
        )
    if options.method in ("fp8", "int8", "smoothquant"):  # W8A8
        kind: Any = "fp8" if options.method == "fp8" else "int"
        rounded: Any = "tensor" if options.activations == "static" else "token"
        algorithm = "smoothquant" if options.method == "smoothquant" else "rtn"
        if options.scales != "block":
            rows = SCALES[options.scales]
            return Method(Recipe(kind, 8, -1, activations=rounded, rows=rows), algorithm)
        if options.activations == "static":
            raise ValueError(
                "--scales block: activations are scaled by group, not --activations static"
            )
        size = SCALES["block"]
        return Method(Recipe(kind, 8, size, activations="group", rows=size), algorithm)
    if options.scales != "row" or options.activations != "dynamic":
        raise ValueError(f"--scales and --activations are of W8A8, not of {options.method}")
    if options.method == "nf4":
        return Method(Recipe("nf4", 4, options.group_size))
    if options.method not in ("rtn", "gptq", "awq"):
        raise ValueError(
            f"--method {options.method}: expected rtn, gptq, awq, nf4, smoothquant, int8 or fp8"
        )
    recipe = Recipe("int", options.bits, options.group_size, options.symmetric)
    return Method(recipe, options.method, options.act_order)  # type: ignore[arg-type]


def read_text(
    options: QuantizeOptions, directory: Path, field: Literal["data", "report"]
) -> list[list[int]]:
    """`samples` pieces of `length` tokens of a file of text, evenly from all of it.

    Raises:
        InvalidRequest: there is no file, or it is too short for one piece.
    """
    path = getattr(options, field)
    if path is None:
        raise InvalidRequest(f"{options.method} needs a calibration text", field="--data")
    ids = read_tokens(path, directory, f"--{field}")
    whole = pieces(ids, options.length, options.samples)
    if not whole:
        raise InvalidRequest(
            f"{path} holds {len(ids)} tokens, not one piece of {options.length}",
            field=f"--{field}",
        )
    return whole


def pieces(ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Up to `count` whole pieces of `length` tokens, evenly from all of `ids`."""
    whole = [list(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]
    return whole[:: max(1, len(whole) // count)][:count]


def read_tokens(path: Path, directory: Path, option: str) -> list[int]:
    """Token ids of a file of text, by the tokenizer of the model in `directory`.

    Raises:
        InvalidRequest: the model has no tokenizer, or the file, UTF-8, cannot be read.
    """
    from jaxinfer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer", field=option)
    try:
        return tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", field=option) from error
