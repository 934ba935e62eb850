"""ggml's blocks → quantised matrices, without rounding anything anew.

Block layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Scales of K-quants
are products of two numbers, computed in float32 as ggml does.

Letters: B blocks, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from checkpoints.gguf.reader import BlockType
from jaxinfer.quant import QuantisedMatrix, Scheme, pack4

PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
INT4, INT8 = Scheme("int", 4), Scheme("int", 8)
IQ4 = Scheme("table", 4, tuple(float(v) for v in IQ4_TABLE))


class Blocks(NamedTuple):
    """`codes` [B, values]: of 4 bits unsigned, of 8 signed. `scales`, `mins`: [B, groups]."""

    scheme: Scheme
    codes: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None = None


def decode(raw: np.ndarray, kind: BlockType) -> QuantisedMatrix:
    """Rows of blocks, uint8 [N, bytes] → a matrix [N, K] of NumPy arrays."""
    N = len(raw)
    found = READ[kind.name](np.ascontiguousarray(raw).reshape(-1, kind.size))
    codes = found.codes.reshape(N, -1)
    return QuantisedMatrix(
        found.scheme,
        pack4(codes.astype(np.uint8)) if found.scheme.bits == 4 else codes.astype(np.int8),
        np.ascontiguousarray(found.scales.reshape(N, -1)),
        mins=None if found.mins is None else np.ascontiguousarray(found.mins.reshape(N, -1)),
    )


def _half(x: np.ndarray) -> np.ndarray:
    """Two bytes a number, [B, 2n] → float16 [B, n]."""
    return np.ascontiguousarray(x).view("<f2")


def _nibbles(x: np.ndarray, run: int) -> np.ndarray:
    """[B, n] → [B, 2n]: of every `run` bytes the low halves, then the high ones."""
    runs = x.reshape(len(x), -1, 1, run) >> np.array([[0], [4]], np.uint8)
    return (runs & 15).reshape(len(x), -1)


def _bits(x: np.ndarray, width: int, run: int) -> np.ndarray:
    """[B, n] → [B, n * 8/width]: of every `run` bytes their lowest `width` bits, then the next."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = x.reshape(len(x), -1, 1, run) >> shifts
    return (runs & ((1 << width) - 1)).reshape(len(x), -1)


def _fifth_bits(x: np.ndarray) -> np.ndarray:
    """Four bytes a block → 32 bits, the lowest first."""
    return np.unpackbits(x, axis=1, bitorder="little") << 4


def _q4_0(b: np.ndarray) -> Blocks:
    return Blocks(INT4, _nibbles(b[:, 2:], 16), _half(b[:, :2]))


def _q4_1(b: np.ndarray) -> Blocks:
    return Blocks(INT4, _nibbles(b[:, 4:], 16), _half(b[:, :2]), -_half(b[:, 2:4]))


def _q5_0(b: np.ndarray) -> Blocks:
    codes = (_nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6])).astype(np.int8) - 16
    return Blocks(INT8, codes, _half(b[:, :2]))


def _q5_1(b: np.ndarray) -> Blocks:
    codes = _nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8])
    return Blocks(INT8, codes, _half(b[:, :2]), -_half(b[:, 2:4]))


def _q8_0(b: np.ndarray) -> Blocks:
    return Blocks(INT8, np.ascontiguousarray(b[:, 2:]).view(np.int8), _half(b[:, :2]))


def _float(x: np.ndarray) -> np.ndarray:
    return _half(x).astype(np.float32)


def _six_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twelve bytes → eight scales and eight mins of 6 bits (Q4_K, Q5_K)."""
    low, high, both = x[:, :4], x[:, 4:8], x[:, 8:]
    scales = np.concatenate([low & 63, (both & 15) | ((low >> 6) << 4)], axis=1)
    mins = np.concatenate([high & 63, (both >> 4) | ((high >> 6) << 4)], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _q2_k(b: np.ndarray) -> Blocks:
    d, least = _float(b[:, 80:82]), _float(b[:, 82:84])
    scales, mins = (b[:, :16] & 15).astype(np.float32), (b[:, :16] >> 4).astype(np.float32)
    return Blocks(INT4, _bits(b[:, 16:80], 2, 32), d * scales, least * mins)


def _q3_k(b: np.ndarray) -> Blocks:
    packed = b[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    scales = (low | (_bits(packed[:, 8:], 2, 4) << 4)).astype(np.int8) - 32
    # A bit that is set adds 4; codes are stored with 8 in the middle.
    codes = _bits(b[:, 32:96], 2, 32) + (_bits(b[:, :32], 1, 32) << 2) + 4
    return Blocks(INT4, codes, _float(b[:, 108:110]) * scales.astype(np.float32))


def _q4_k(b: np.ndarray) -> Blocks:
    scales, mins = _six_bits(b[:, 4:16])
    d, least = _float(b[:, :2]), _float(b[:, 2:4])
    return Blocks(INT4, _nibbles(b[:, 16:], 32), d * scales, least * mins)


def _q5_k(b: np.ndarray) -> Blocks:
    scales, mins = _six_bits(b[:, 4:16])
    d, least = _float(b[:, :2]), _float(b[:, 2:4])
    codes = _nibbles(b[:, 48:], 32) | (_bits(b[:, 16:48], 1, 32) << 4)
    return Blocks(INT8, codes, d * scales, least * mins)


def _q6_k(b: np.ndarray) -> Blocks:
    codes = _nibbles(b[:, :128], 64) | (_bits(b[:, 128:192], 2, 32) << 4)
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return Blocks(INT8, codes.astype(np.int8) - 32, _float(b[:, 208:]) * scales)


def _iq4_nl(b: np.ndarray) -> Blocks:
    return Blocks(IQ4, _nibbles(b[:, 2:], 16), _half(b[:, :2]))


def _iq4_xs(b: np.ndarray) -> Blocks:
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = np.stack([(b[:, 2:4] >> s) & 3 for s in (0, 2, 4, 6)], axis=2).reshape(-1, 8)
    scales = (low | (high << 4)).astype(np.int8) - 32
    return Blocks(IQ4, _nibbles(b[:, 8:], 16), _float(b[:, :2]) * scales.astype(np.float32))


READ: dict[str, Callable[[np.ndarray], Blocks]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
