"""bitsandbytes: LLM.int8() (Dettmers et al. 2022), NF4 and FP4 (Dettmers et al. 2023).

int8 matrices are multiplied by unrounded activations: nothing is split off as an outlier.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.formats.common import Arrays, Format, field, only
from jaxinfer.errors import CheckpointError
from jaxinfer.quant import QuantisedMatrix, Scheme

STATE = "weight.quant_state.bitsandbytes__"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LONGEST = 4096  # bytes of a matrix's quant_state


def read_bitsandbytes(config: Mapping[str, Any], where: str) -> Format:
    """The format of every quantised matrix of a bitsandbytes checkpoint.

    Raises:
        CheckpointError: a variant that is not read.
    """
    if config.get("load_in_8bit"):
        return INT8
    if not config.get("load_in_4bit"):
        raise CheckpointError(f"{where}: neither load_in_4bit nor load_in_8bit is true")
    kind = only(config, "bnb_4bit_quant_type", "nf4", "fp4", where=where)
    only(config, "bnb_4bit_quant_storage", None, "uint8", where=where)
    double = bool(config.get("bnb_4bit_use_double_quant"))
    return _four_bits(kind, double)


def _fields_int8(N: int, K: int):
    return {
        "weight": field((N, K), dtypes=("int8",)),
        "SCB": field((N,), dtypes=("float32",)),
        "weight_format": field((), dtypes=("uint8",), optional=True),
    }


def _decode_int8(arrays: Arrays, N: int, K: int) -> QuantisedMatrix:
    if arrays.get("weight_format", 0) != 0:
        raise ValueError(f"weight_format {arrays['weight_format']}: only 0, row-major, is read")
    return QuantisedMatrix(Scheme("int", 8), arrays["weight"], arrays["SCB"][:, None] / 127)


INT8 = Format("bitsandbytes int8", _fields_int8, _decode_int8)


def _four_bits(kind: str, double: bool) -> Format:
    def fields(N: int, K: int):
        # How many scales there are depends on the block's size, which the tensors themselves give.
        scales = [(-(-N * K // block),) for block in BLOCKS]
        nested = [(-(-n // 256),) for (n,) in scales]
        found = {
            "weight": field((N * K // 2, 1), dtypes=("uint8",)),
            "weight.absmax": field(*scales, dtypes=("uint8",) if double else ("float32",)),
            "weight.quant_map": field((16,), dtypes=("float32",)),
            STATE + kind: field(*((n,) for n in range(2, LONGEST)), dtypes=("uint8",)),
        }
        if double:
            found["weight.nested_absmax"] = field(*nested, dtypes=("float32",))
            found["weight.nested_quant_map"] = field((256,), dtypes=("float32",))
        return found

    def decode(arrays: Arrays, N: int, K: int) -> QuantisedMatrix:
        try:
            state = json.loads(arrays[STATE + kind].tobytes())
            block, shape = state["blocksize"], state["shape"]
            offset = float(state["nested_offset"]) if double else 0.0
            nested_block = state["nested_blocksize"] if double else 256
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"its quant_state is not what bitsandbytes writes: {error}") from None
        if block not in BLOCKS or shape != [N, K] or nested_block != 256:
            raise ValueError(f"its quant_state, {state}, is not of a {[N, K]} matrix")
        scales = arrays["weight.absmax"]
        if len(scales) != -(-N * K // block):
            raise ValueError(f"{len(scales)} scales for blocks of {block} of a {[N, K]} matrix")
        if double:
            means = np.repeat(arrays["weight.nested_absmax"], 256)[: len(scales)]
            scales = arrays["weight.nested_quant_map"][scales] * means + np.float32(offset)
        # Blocks go on from row to row: where they do not divide K, groups are what divides both.
        size = math.gcd(block, K)
        each = np.repeat(scales, block // size)[: N * K // size].reshape(N, K // size)
        pairs = arrays["weight"].reshape(N, K // 2)
        codes = (pairs >> 4) | (pairs << 4)  # the even column's comes in the high half
        table = tuple(float(v) for v in arrays["weight.quant_map"])
        return QuantisedMatrix(Scheme("table", 4, table), codes, each.astype(np.float32))

    return Format(f"bitsandbytes {kind}", fields, decode)
