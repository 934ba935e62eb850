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
    "take_rows",
    "unpack4",
]
