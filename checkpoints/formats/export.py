"""Writes quantised models as compressed-tensors directories, which PyTorch engines read.

https://github.com/vllm-project/compressed-tensors: `pack-quantized`, `int-quantized` and
`float-quantized`. One file a layer, each written as soon as its layer is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from checkpoints.safetensors_reader import INDEX
from checkpoints.write import write_json
from jaxinfer.models.weights import Weight
from jaxinfer.quant import QuantisedMatrix, take_rows, unpack4
from jaxinfer.quant.make import Recipe


def quantization_config(recipe: Recipe, *, act_order: bool = False) -> dict[str, Any]:
    """What `config.json` says of matrices of this recipe.

    Raises:
        ValueError: the format cannot say it.
    """
    if recipe.kind == "nf4":
        raise ValueError("compressed-tensors has no NF4; int and fp8 can be written")
    kind = "float" if recipe.kind == "fp8" else "int"
    name = "pack-quantized" if recipe.kind == "int" else "float-quantized"
    if recipe.kind == "int" and recipe.activations is not None:
        name = "int-quantized"
    block = recipe.activations == "group"
    if recipe.kind == "fp8" and recipe.group != -1 and not block:
        raise ValueError("compressed-tensors has no FP8 in groups of columns; -1 can be written")
    weights: dict[str, Any] = {
        "num_bits": recipe.bits, "type": kind, "symmetric": recipe.symmetric, "dynamic": False,
        "strategy": "block" if block else "channel" if recipe.group == -1 else "group",
        "group_size": None if recipe.group == -1 or block else recipe.group,
        "block_structure": [recipe.rows, recipe.group] if block else None,
        "actorder": "weight" if act_order else None,
    }  # fmt: skip
    inputs = None
    if recipe.activations is not None:
        inputs = {
            "num_bits": 8, "type": kind, "symmetric": True, "strategy": recipe.activations,
            "dynamic": recipe.activations != "tensor",
            "group_size": recipe.group if block else None,
        }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | {"format": name}},
    }


def tensors_of(value: Any, weight: Weight) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that one weight of a model is stored as: name, contents."""
    first = 0
    value = jax.tree.map(np.asarray, value)
    for piece in weight.pieces:
        rows = slice(first, first + piece.stop - piece.start)
        first = rows.stop
        if (piece.start, piece.stop) != (0, piece.shape[0]):
            raise ValueError(f"{piece.name}: only weights that are whole are written")
        part = take_rows(value, rows)
        if isinstance(part, QuantisedMatrix):
            for suffix, x in _fields(part):
                yield f"{piece.name.removesuffix('.weight')}.{suffix}", x
        else:
            yield piece.name, part


def _fields(m: QuantisedMatrix) -> Iterator[tuple[str, np.ndarray]]:
    N, K = m.shape
    yield "weight_scale", _blocks(m) if m.scheme.activations == "group" else m.scales
    if m.input_scale is not None:
        yield "input_scale", np.asarray(m.input_scale, np.float32).reshape(1)
    if m.scheme.kind == "float" or m.scheme.activations is not None:
        yield "weight", m.codes
        return
    assert m.order is None, "nothing of ours reorders columns"
    codes = unpack4(m.codes) if m.scheme.bits == 4 else m.codes.view(np.uint8) ^ 128
    yield "weight_packed", _words(codes, m.scheme.bits)
    yield "weight_shape", np.array([N, K], np.int64)
    if m.zeros is not None:
        zeros = m.zeros if m.scheme.bits == 4 else m.zeros.view(np.uint8) ^ 128
        yield "weight_zero_point", np.ascontiguousarray(_words(zeros.T, m.scheme.bits).T)


def _blocks(m: QuantisedMatrix) -> np.ndarray:
    """One scale for each square block; in memory each row has its own."""
    scales = m.scales[:: m.group]
    if not np.array_equal(np.repeat(scales, m.group, axis=0)[: len(m.scales)], m.scales):
        raise ValueError(
            f"blocks of {m.group} rows lie across the matrices that are fused in memory; those of"
            " the model must have multiples of it"
        )
    return scales


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, K] → int32 [N, ⌈K * bits/32⌉], lowest bits first."""
    per = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    groups = padded.reshape(len(codes), -1, per).astype(np.uint32)
    shifts = np.arange(per, dtype=np.uint32) * bits
    return np.bitwise_or.reduce(groups << shifts, axis=-1).view(np.int32)


class Writer:
    """Files of one directory, in the order in which they come; `close` writes index and config."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._files = directory, 0
        self._where: dict[str, str] = {}
        self._bytes = 0

    def write(self, values: Any, weights: Any) -> None:
        """One file with all that a tree of weights is stored as."""
        tensors: dict[str, np.ndarray] = {}
        leaves, treedef = jax.tree.flatten(weights)
        for value, weight in zip(treedef.flatten_up_to(values), leaves, strict=True):
            tensors |= {n: np.ascontiguousarray(x) for n, x in tensors_of(value, weight)}
        self._files += 1
        name = f"model-{self._files:05}.safetensors"
        save_file(tensors, self._directory / name, {"format": "pt"})
        self._where |= dict.fromkeys(tensors, name)
        self._bytes += sum(x.nbytes for x in tensors.values())

    def close(self, config: dict[str, Any]) -> None:
        """Ends the directory. `config`: what `config.json` shall hold."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._where}
        write_json(self._directory / INDEX, index)
        write_json(self._directory / "config.json", config)
