"""How a model's matrices are stored, and models without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.known_models import RECIPES
from jaxinfer.models.weights import MATRICES, init_params
from jaxinfer.parallel import device_bytes
from jaxinfer.quant import Parts, QuantisedMatrix
from jaxinfer.quant.arrays import Ordered
from jaxinfer.quant.make import Recipe
from jaxinfer.quantise import Method, quantise_params
from jaxinfer.roofline import PRECISIONS, Precision
from pallas_kernels.quant_packing import PackedMatrix

DENSE = {PRECISIONS[name].dtype: name for name in ("bf16", "fp16", "fp32")}
MIXED = "mixed"
# (kind of a code, bits, whether activations are rounded too) → a key of `PRECISIONS`
KINDS = {
    ("int", 4, False): "int4",
    ("int", 8, False): "int8",
    ("int", 8, True): "w8a8",
    ("table", 4, False): "nf4",
    ("float", 8, True): "fp8",
}


def random_params(config: ModelConfig, precision: str, dtype: Any) -> dict[str, Any]:
    """Random weights on the device, of `dtype`; the layers' matrices rounded where `precision` is a
    key of `RECIPES`.

    Raises:
        ValueError: groups do not divide a matrix's columns.
    """
    params = init_params(config, jax.random.key(0), jnp.dtype(dtype))
    if precision in RECIPES:
        params = quantise_params(params, config, Method(Recipe(**RECIPES[precision])))
    return jax.block_until_ready(params)


def find_precision(params: dict[str, Any], dtype: Any) -> tuple[str, Precision]:
    """What the layers' matrices are stored in: a key of `PRECISIONS` and its value, or `mixed` and
    one with as many bytes a weight as they take; `dtype`: of activations."""
    matrices = [layer[name] for layer in params["layers"] for name in MATRICES]
    kinds = {kind for matrix in matrices for kind in _kinds(matrix)}
    if len(kinds) == 1 and (name := kinds.pop()) in PRECISIONS:
        return name, replace(PRECISIONS[name], dtype=dtype)
    count = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    return MIXED, Precision(device_bytes(matrices) / count, dtype)


def _kinds(matrix: Any) -> Iterator[str]:
    if isinstance(matrix, Parts):
        for part in matrix.parts:
            yield from _kinds(part)
    elif isinstance(matrix, Ordered):
        yield from _kinds(matrix.matrix)
    elif isinstance(matrix, PackedMatrix):
        yield KINDS.get((matrix.format.kind, matrix.format.bits, False), MIXED)
    elif isinstance(matrix, QuantisedMatrix):
        scheme = matrix.scheme
        yield KINDS.get((scheme.kind, scheme.bits, scheme.activations is not None), MIXED)
    else:
        yield DENSE[matrix.dtype.name]
