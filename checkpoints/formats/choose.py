"""From a `quantization_config` to the format of each module."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from checkpoints.formats.bitsandbytes import STATE, read_bitsandbytes
from checkpoints.formats.common import Format
from checkpoints.formats.compressed_tensors import read_compressed, read_fp8
from checkpoints.formats.gptq import read_awq, read_gptq
from checkpoints.safetensors_reader import read_json
from jaxinfer.errors import CheckpointError, UnsupportedModel

# Of a module and all tensors' names: how it is stored, None where it is dense.
Quantisation = Callable[[str, Collection[str]], Format | None]

READ = ("gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes")


def read_quantisation(directory: str | Path) -> Quantisation | None:
    """What the `config.json` of `directory` says of its weights; None: nothing, or no such file.

    Raises:
        UnsupportedModel: a method that is not read; it is named.
        CheckpointError: a variant of one that is not read, or a config that is no config.
    """
    path = Path(directory) / "config.json"
    config = read_json(path).get("quantization_config") if path.exists() else None
    if config is None:
        return None
    where = "config.json: quantization_config"
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} = {config!r} is not an object")
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # as older versions wrote it
    if method not in READ:
        raise UnsupportedModel(
            f"{where}: quant_method = {method!r} is not read; these are: {', '.join(READ)}"
        )
    if method == "compressed-tensors":
        return _by_name(read_compressed(config, where))
    if method == "fp8":
        return _by_name(read_fp8(config, where))
    if method == "bitsandbytes":
        return _by_tensors(read_bitsandbytes(config, where), ("SCB", STATE + "nf4", STATE + "fp4"))
    one = read_gptq(config, where) if method == "gptq" else read_awq(config, where)
    return _by_tensors(one, ("qweight",))


def _by_name(format_of: Callable[[str], Format | None]) -> Quantisation:
    return lambda module, names: format_of(module)


def _by_tensors(one: Format, marks: Collection[str]) -> Quantisation:
    """For methods whose configs do not say which modules are left dense: the tensors do."""
    return lambda module, names: one if any(f"{module}.{m}" in names for m in marks) else None
