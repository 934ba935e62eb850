"""How kernels that work row by row lay their rows out in registers.

It depends on a row's length and type alone, never on how many rows there are: so neither does the
order in which a row is summed.
"""

from __future__ import annotations

import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.row_backend import LANES

WARPS = 4
SHORT = 1024  # elements: a row up to here lies in one warp
LOAD_BYTES = 16  # the most that a thread loads at once


def row_layout(E: int, itemsize: int) -> tuple[int, Any]:
    """Rows of a block of 128 threads, and the registers that hold them: a short row in each warp,
    or a long one in all four. Neighbouring lanes load neighbouring pieces of up to 16 bytes.

    Args:
        E: elements of a row, a multiple of 32 up to `LONGEST`.
        itemsize: bytes of each in memory.
    """
    warps = WARPS if E > SHORT and E % (WARPS * LANES) == 0 else 1
    piece = math.gcd(E // (warps * LANES), LOAD_BYTES // itemsize)
    rows, span = WARPS // warps, LANES * piece
    if warps > 1:  # tiled: rows, E // (4 * span), 4, LANES, piece
        tiles, warp_dim = ((rows, E), (warps * span,), (span,), (piece,)), -3
    elif span < E:  # tiled: rows, E // span, LANES, piece
        tiles, warp_dim = ((rows, E), (span,), (piece,)), -4
    else:
        tiles, warp_dim = ((rows, E), (piece,)), -3
    return rows, plgpu.Layout.TILED(plgpu.Tiling(tiles), (warp_dim,), (-2,), -1)
