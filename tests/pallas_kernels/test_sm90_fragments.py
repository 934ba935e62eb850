"""Which lane gets which value of a quantised tile: the addresses and registers of `sm90_fragments`,
followed in Python for all 128 threads, against what PTX says of `ldmatrix` and wgmma's operands.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sm90_fragments as fragments
from pallas_kernels import sm90_ir
from pallas_kernels.attention_common import kv_tile


def replace_names(monkeypatch: pytest.MonkeyPatch, names: dict[str, Any]) -> None:
    """What the compiler's words are for arrays."""
    for name, value in names.items():
        for module in (fragments, sm90_ir):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


class Threads:
    """Runs a function that emits instructions as numpy on all threads of a warpgroup at once."""

    def __init__(self, memory: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory = memory
        self.operand: Any = None
        numbers = SimpleNamespace(
            addi=np.add, muli=np.multiply, divui=np.floor_divide, andi=np.bitwise_and,
            xori=np.bitwise_xor,
        )  # fmt: skip
        replaced = {
            "arith": numbers,
            "ir": SimpleNamespace(Value=np.ndarray),
            "utils": SimpleNamespace(thread_idx=lambda: np.arange(128)),
            "const": lambda x: np.int64(x),
            "shared_address": lambda ref: np.int64(0),
            "load_matrices": self.load_matrices,
            "_widen": lambda s, word: (word[:, [0, 2]], word[:, [1, 3]]),
            "_wgmma_operand": self.keep,
            "_inlined": lambda s, shape: lambda f: lambda tile: f(None, tile),
        }
        replace_names(monkeypatch, replaced)

    def load_matrices(self, address: np.ndarray, transposed: bool) -> list[np.ndarray]:
        """Four registers of each thread, [128, 4] bytes each: PTX, `ldmatrix ... .x4.b16`."""
        rows = self.memory[address[:, None] + np.arange(16)]  # the row that each lane points at
        rows = rows.reshape(4, 4, 8, 8, 2)  # warp, matrix, row, column, byte
        if transposed:
            rows = rows.swapaxes(2, 3)
        # Lane 4 i + j gets columns 2 j and 2 j + 1 of row i.
        registers = rows.reshape(4, 4, 8, 4, 4)
        return [registers[:, matrix].reshape(128, 4) for matrix in range(4)]

    def keep(self, registers: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The operand that registers make up: PTX, "Register fragments for wgmma.m64nNk16"."""
        operand = np.zeros(shape, self.memory.dtype)
        thread = np.arange(128)
        warp, row, pair = thread // 32, thread % 32 // 4, thread % 4
        for block, octet, half in np.ndindex(*registers.shape):
            for odd in (0, 1):
                at = (block * 64 + warp * 16 + half * 8 + row, octet * 8 + 2 * pair + odd)
                operand[at] = registers[block, octet, half][:, odd]
        return operand


def in_memory(tile: np.ndarray) -> np.ndarray:
    """A tile [tokens, D] as TMA leaves it: (8, width) tiles, chunks of 16 bytes swizzled."""
    tokens, D = tile.shape
    width = min(D, 128)
    tiles = tile.reshape(tokens // 8, 8, D // width, width).swapaxes(1, 2).reshape(-1, 16)
    chunk = np.arange(len(tiles))
    # The bits of an address above 7 are xored into those above 4: 3 bits of them, or 2.
    swizzled = chunk ^ ((chunk >> 3) & (width // 16 - 1))
    made = np.empty_like(tiles)
    made[swizzled] = tiles
    return made.reshape(-1)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_keys_and_values_reach_the_right_lanes(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = kv_tile(D)
    tile = np.arange(tokens * D).reshape(tokens, D)
    Threads(in_memory(tile), monkeypatch)
    s: Any = SimpleNamespace(D=D, tile=tokens, on_gpu=True)

    keys = np.concatenate([fragments.keys(s, None, part) for part in range(D // 64)], 1)
    order = np.asarray(fragments.permuted(jnp.arange(D)))
    assert sorted(order) == list(range(D))
    np.testing.assert_array_equal(keys, tile[:, order])

    values = np.concatenate([fragments.values(s, None, half) for half in range(tokens // 64)], 1)
    # Rows i and i + 8 of 16 are columns 2 i and 2 i + 1: what `turned` undoes.
    order = np.arange(D).reshape(-1, 8, 2).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(values, tile.T[order])


def emulated_ptx(ptx: str, *args: np.ndarray, result_types: Any) -> np.ndarray:
    """The three instructions that `_widen` uses, on arrays of words."""
    if ptx.startswith("prmt.b32 $0, $1, 0, 0x4341"):
        return (args[0] >> 8) & 0x00FF00FF
    dtype = jnp.bfloat16 if "bf16x2" in ptx else np.float16
    words = np.broadcast_arrays(*args)
    halves = [np.array(x, np.uint32).view(dtype).astype(np.float64) for x in words]
    exact = halves[0] * halves[1] + (halves[2] if ptx.startswith("fma") else 0)
    rounded = exact.astype(dtype)
    np.testing.assert_array_equal(rounded.astype(np.float64), exact)
    return rounded


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv", ["int8", "float8_e4m3fn"])
def test_every_byte_is_widened_exactly(
    kv: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = SimpleNamespace(
        andi=np.bitwise_and, ori=np.bitwise_or, xori=np.bitwise_xor, shrui=np.right_shift,
        shli=np.left_shift,
    )  # fmt: skip
    utils = SimpleNamespace(
        inline_ptx=emulated_ptx, bitcast=lambda x, kind: x, dtype_to_ir_type=lambda x: x
    )
    types = SimpleNamespace(
        Value=np.ndarray,
        IntegerType=SimpleNamespace(get_signless=lambda bits: bits),
        VectorType=SimpleNamespace(get=lambda shape, dtype: dtype),
    )
    names = {"arith": numbers, "utils": utils, "ir": types, "const": np.uint32}
    replace_names(monkeypatch, names)
    s: Any = SimpleNamespace(dtype=jnp.dtype(dtype), kv_dtype=jnp.dtype(kv))
    every = np.arange(256, dtype=np.uint8)
    x = every.view(jnp.dtype(kv)).astype(np.float64)
    want = np.where(np.isnan(x), np.copysign(480, np.where(every < 128, 1, -1)), x)
    for byte in range(4):
        word = np.full((256, 4), 0x5A, np.uint8)
        word[:, byte] = every
        halves = fragments._widen(s, word.view(np.uint32)[:, 0])[byte % 2]
        got = halves.reshape(256, 2)[:, byte // 2].astype(np.float64)
        np.testing.assert_array_equal(got, want * fragments.widened_by(s))
