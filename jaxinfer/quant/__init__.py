"""Quantised matrices: what they are (`arrays`), and how they multiply (`matmul`)."""

from jaxinfer.quant.arrays import (
    Matrix,
    Parts,
    QuantisedMatrix,
    Scheme,
    dequantise,
    join_rows,
    join_shards,
    pack4,
    stack_stages,
    take_rows,
    unpack4,
)
from jaxinfer.quant.matmul import matmul
from jaxinfer.quant.packing import pack_params
from jaxinfer.quant.partition import partition

__all__ = [
    "Matrix",
    "Parts",
    "QuantisedMatrix",
    "Scheme",
    "dequantise",
    "join_rows",
    "join_shards",
    "matmul",
    "pack4",
    "pack_params",
    "partition",
    "stack_stages",
    "take_rows",
    "unpack4",
]
