"""GPTQ (Frantar et al. 2023) as AutoGPTQ, GPTQModel and AutoRound write it, and AWQ (Lin et al.
2024) in the GEMM layout of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.formats.common import (
    Arrays,
    Format,
    field,
    groups,
    integers,
    only,
    unpack,
)
from jaxinfer.quant import QuantisedMatrix

INT32 = ("int32",)
# AWQ packs the columns 0 to 7 of eight in this order, lowest bits first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)


def read_gptq(config: Mapping[str, Any], where: str) -> Format:
    """The format of every matrix of a GPTQ checkpoint.

    Raises:
        CheckpointError: a variant that is not read.
    """
    bits = only(config, "bits", 4, 8, where=where)
    size = only(config, "group_size", *GROUP_SIZES, where=where)
    kind = only(config, "checkpoint_format", None, "gptq", "gptq_v2", where=where)
    only(config, "dynamic", None, {}, where=where)
    per = 32 // bits

    def fields(N: int, K: int):
        G = groups(K, size, where)
        return {
            "qweight": field((K // per, N), dtypes=INT32),
            "qzeros": field((G, -(-N // per)), dtypes=INT32),
            "scales": field((G, N)),
            "g_idx": field((K,), dtypes=INT32, optional=True),
        }

    def decode(arrays: Arrays, N: int, K: int) -> QuantisedMatrix:
        codes = unpack(arrays["qweight"].T, bits)
        zeros = unpack(arrays["qzeros"], bits)[:, :N]
        if kind != "gptq_v2":  # version 1 stores one less
            zeros = (zeros + 1) & ((1 << bits) - 1)
        scales = np.ascontiguousarray(arrays["scales"].T)
        zeros = np.ascontiguousarray(zeros.T)
        return integers(codes, scales, zeros, bits, arrays.get("g_idx"))

    return Format("GPTQ", fields, decode)


def read_awq(config: Mapping[str, Any], where: str) -> Format:
    """The format of every matrix of an AWQ checkpoint.

    Raises:
        CheckpointError: a variant that is not read.
    """
    only(config, "bits" if "bits" in config else "w_bit", 4, where=where)
    size = only(
        config, "group_size" if "group_size" in config else "q_group_size", *GROUP_SIZES,
        where=where,
    )  # fmt: skip
    only(config, "version", None, "gemm", "GEMM", where=where)
    place = np.argsort(AWQ_ORDER)  # of each column among its eight

    def fields(N: int, K: int):
        G = groups(K, size, where)
        return {
            "qweight": field((K, N // 8), dtypes=INT32),
            "qzeros": field((G, N // 8), dtypes=INT32),
            "scales": field((G, N)),
        }

    def unpack_awq(words: np.ndarray) -> np.ndarray:
        eights = unpack(words, 4).reshape(len(words), -1, 8)[..., place]
        return np.ascontiguousarray(eights.reshape(len(words), -1).T)

    def decode(arrays: Arrays, N: int, K: int) -> QuantisedMatrix:
        codes, zeros = unpack_awq(arrays["qweight"]), unpack_awq(arrays["qzeros"])
        return integers(codes, np.ascontiguousarray(arrays["scales"].T), zeros, 4)

    return Format("AWQ", fields, decode)
