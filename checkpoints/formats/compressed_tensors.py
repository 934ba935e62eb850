"""compressed-tensors, as llm-compressor writes it, and Hugging Face's and DeepSeek's FP8.

https://github.com/vllm-project/compressed-tensors: `pack-quantized`, `int-quantized`,
`naive-quantized` and `float-quantized`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from checkpoints.formats.common import (
    Arrays,
    Field,
    Format,
    field,
    groups,
    integers,
    only,
    per_row,
    unpack,
)  # fmt: skip
from jaxinfer.errors import CheckpointError
from jaxinfer.quant import QuantisedMatrix, Scheme

E4M3 = ("float8_e4m3fn",)
PACKED, PLAIN = ("pack-quantized",), ("int-quantized", "naive-quantized", "float-quantized")
Activations = Literal["token", "tensor", "group"] | None


def read_compressed(config: Mapping[str, Any], where: str) -> Callable[[str], Format | None]:
    """How each module of a compressed-tensors checkpoint is stored.

    Raises:
        CheckpointError: a scheme that is not read.
    """
    only(config, "kv_cache_scheme", None, where=where)
    for key in ("sparsity_config", "transform_config"):
        only(config, key, None, {}, where=where)
    given = config.get("config_groups")
    if not isinstance(given, dict) or not given:
        raise CheckpointError(f"{where}: config_groups = {given!r} must name at least one group")
    chosen = []
    for name, group in given.items():
        at = f"{where}: config_groups.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CheckpointError(f"{at}: no `weights`, an object, there")
        kind = group.get("format") or config.get("format")
        chosen.append((_names(group, "targets", at), _group(group, str(kind), at)))
    ignored = _names(config, "ignore", where)

    def format_of(module: str) -> Format | None:
        if any(_matches(module, one) for one in ignored):
            return None
        # What is named by itself goes before what is named by its class.
        exact = [f for targets, f in chosen if any(_matches(module, t) for t in targets)]
        of_class = [f for targets, f in chosen if "Linear" in targets]
        return next(iter(exact + of_class), None)

    return format_of


def _names(config: Mapping[str, Any], key: str, where: str) -> list[str]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise CheckpointError(f"{where}: {key} = {names!r} is not a list of names")
    for name in names:
        try:
            re.compile(name.removeprefix("re:"))
        except re.error as error:
            raise CheckpointError(f"{where}: {key}: {name!r} is no expression: {error}") from None
    return names


def _matches(module: str, name: str) -> bool:
    if name.startswith("re:"):
        return re.match(name[3:], module) is not None
    return module == name


def _group(group: Mapping[str, Any], kind: str, where: str) -> Format:
    weights = group["weights"]
    at = f"{where}.weights"
    type_ = only(weights, "type", "int", "float", where=at)
    bits = only(weights, "num_bits", *((4, 8) if type_ == "int" else (8,)), where=at)
    only(weights, "dynamic", None, False, where=at)
    only(group, "output_activations", None, where=where)
    strategy = only(weights, "strategy", "tensor", "channel", "group", "block", where=at)
    activations = _activations(group.get("input_activations"), type_, bits, where)
    symmetric = only(weights, "symmetric", True, *([False] if type_ == "int" else []), where=at)
    if kind in PACKED and type_ == "int" and activations is None and strategy != "block":
        size = weights.get("group_size") if strategy == "group" else -1
        if type(size) is not int or size == 0 or size < -1:
            raise CheckpointError(f"{at}: group_size = {size!r} is not a number of columns")
        return _packed(bits, size, symmetric, at)
    if kind in PLAIN and bits == 8 and strategy != "group":
        if strategy == "block" and activations not in ("group", None):
            raise CheckpointError(f"{at}: strategy block, with activations by {activations}")
        if activations == "group" and strategy != "block":
            raise CheckpointError(f"{at}: activations by group, with strategy {strategy}")
        if not symmetric and activations is not None:
            raise CheckpointError(f"{at}: zero points are not read where activations are rounded")
        block = weights.get("block_structure") if strategy == "block" else None
        return plain(type_, _block(block, at), activations, symmetric)
    raise CheckpointError(
        f"{where}: format {kind!r} with {bits}-bit {type_} weights by {strategy} and activations "
        f"{'unrounded' if activations is None else 'by ' + activations} is not read; these are: "
        "pack-quantized of int4 and int8, int-quantized of int8, float-quantized of FP8"
    )


def _activations(given: Any, type_: str, bits: int, where: str) -> Activations:
    if given is None:
        return None
    at = f"{where}.input_activations"
    if not isinstance(given, dict):
        raise CheckpointError(f"{at} = {given!r} is not an object")
    only(given, "type", type_, where=at)
    only(given, "num_bits", bits if bits == 8 else None, where=at)
    only(given, "symmetric", True, where=at)
    dynamic = only(given, "dynamic", True, False, where=at)
    if not dynamic:
        only(given, "strategy", "tensor", where=at)
        return "tensor"
    return only(given, "strategy", "token", "group", where=at)


def _block(given: Any, where: str) -> tuple[int, int] | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2:
        raise CheckpointError(f"{where}: block_structure = {given!r} is not [rows, columns]")
    for size in given:
        if type(size) is not int or not 1 <= size <= 1 << 20:
            raise CheckpointError(f"{where}: block_structure = {given!r} is not [rows, columns]")
    return given[0], given[1]


def _packed(bits: int, size: int, symmetric: bool, where: str) -> Format:
    per = 32 // bits

    def fields(N: int, K: int) -> dict[str, Field]:
        G = groups(K, size, where)
        found = {
            "weight_packed": field((N, -(-K // per)), dtypes=("int32",)),
            "weight_scale": field((N, G)),
            "weight_shape": field((2,), dtypes=("int64", "int32")),
            "weight_g_idx": field((K,), dtypes=("int32",), optional=True),
        }
        if not symmetric:
            found["weight_zero_point"] = field((-(-N // per), G), dtypes=("int32",))
        return found

    def decode(arrays: Arrays, N: int, K: int) -> QuantisedMatrix:
        if arrays["weight_shape"].tolist() != [N, K]:
            raise ValueError(f"weight_shape {arrays['weight_shape'].tolist()}, not {[N, K]}")
        codes = np.ascontiguousarray(unpack(arrays["weight_packed"], bits)[:, :K])
        zeros = arrays.get("weight_zero_point")
        if zeros is not None:  # packed along N
            zeros = np.ascontiguousarray(unpack(zeros.T, bits)[:, :N].T)
        return integers(codes, arrays["weight_scale"], zeros, bits, arrays.get("weight_g_idx"))

    return Format(f"W{bits}A16", fields, decode)


def plain(
    type_: Literal["int", "float"],
    block: tuple[int, int] | None,
    activations: Activations,
    symmetric: bool = True,
    scale: str = "weight_scale",
) -> Format:
    """A matrix of 8-bit numbers as they are, with scales of its own, of its rows or of blocks."""

    def fields(N: int, K: int) -> dict[str, Field]:
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (N,), (N, 1))
        if block is not None:
            shapes = ((-(-N // block[0]), -(-K // block[1])),)
        found = {
            "weight": field((N, K), dtypes=("int8",) if type_ == "int" else E4M3),
            scale: field(*shapes),
        }
        if activations == "tensor":
            found["input_scale"] = field((), (1,))
            found["input_zero_point"] = field((), (1,), dtypes=("int8", *E4M3), optional=True)
        if not symmetric:
            found["weight_zero_point"] = field(*shapes, dtypes=("int8",))
        return found

    def decode(arrays: Arrays, N: int, K: int) -> QuantisedMatrix:
        scales = arrays[scale]
        scales = _column(scales, N) if block is None else per_row(scales, N, K, block)
        zeros = arrays.get("weight_zero_point")
        if arrays.get("input_zero_point", np.zeros(1)).astype(np.float32).any():
            raise ValueError("input_zero_point is not 0")
        static = arrays.get("input_scale")
        return QuantisedMatrix(
            Scheme("int" if type_ == "int" else "float", 8, activations=activations),
            arrays["weight"],
            scales,
            None if zeros is None or not zeros.any() else _column(zeros, N),
            input_scale=None if static is None else static.reshape(()).astype(np.float32),
        )

    return Format(f"{'int8' if type_ == 'int' else 'FP8'}", fields, decode)


def _column(values: np.ndarray, N: int) -> np.ndarray:
    """One value, or one a row, → [N, 1]."""
    return np.ascontiguousarray(np.broadcast_to(values.reshape(-1, 1), (N, 1)))


def read_fp8(config: Mapping[str, Any], where: str) -> Callable[[str], Format | None]:
    """How each module of a checkpoint with `quant_method: fp8` is stored.

    With `weight_block_size`: `weight_scale_inv`, which despite its name is multiplied by
    (DeepSeek-V3). Without: `weight_scale` of the tensor.

    Raises:
        CheckpointError: a variant that is not read.
    """
    only(config, "fmt", None, "e4m3", where=where)
    scheme = only(config, "activation_scheme", None, "dynamic", "static", where=where)
    block = _block(config.get("weight_block_size"), where)
    if block is not None:
        if scheme == "static":
            raise CheckpointError(f"{where}: activation_scheme static, with weight_block_size")
        found = plain("float", block, "group", scale="weight_scale_inv")
    else:
        found = plain("float", None, "tensor" if scheme == "static" else "token")
    dense = _names(config, "modules_to_not_convert", where)

    def format_of(module: str) -> Format | None:
        parts = module.split(".")
        skipped = any(module == n or n in parts or module.startswith(n + ".") for n in dense)
        return None if skipped or parts[-1] in ("lm_head", "embed_tokens") else found

    return format_of
