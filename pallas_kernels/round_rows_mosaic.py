"""The kernel behind `round_rows`: a row's largest magnitude found, and the row rounded by it.

Apart from `round_rows`, because importing Mosaic changes the environment of the process.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_quantise import choose_scale, to_page_type
from pallas_kernels.row_layout import row_layout


@partial(jax.jit, static_argnames="dtype")  # so that a model's layers lower once
def round_rows(x: jax.Array, *, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """As `round_rows.round_rows`, whose checks have passed."""
    E = x.shape[-1]
    rows, layout = row_layout(E, x.dtype.itemsize)
    flat = x.reshape(-1, E)
    count = flat.shape[0]
    if count % rows:
        flat = jnp.pad(flat, ((0, -count % rows), (0, 0)))
    codes, scales = plgpu.kernel(
        partial(_block, rows=rows, layout=layout),
        out_type=[
            jax.ShapeDtypeStruct(flat.shape, dtype),
            jax.ShapeDtypeStruct(flat.shape[:1], jnp.float32),
        ],
        grid=(flat.shape[0] // rows,),
        grid_names=("block",),
        kernel_name="round_rows",
    )(flat)
    return codes[:count].reshape(x.shape), scales[:count].reshape(x.shape[:-1])


def _block(x_ref: Any, codes: Any, scales: Any, *, rows: int, layout: Any) -> None:
    """x [T, E]; codes [T, E] and scales [T]."""
    some = pl.ds(lax.axis_index("block") * rows, rows)
    x = plgpu.load(x_ref.at[some], layout=layout, optimized=False).astype(jnp.float32)
    scale = choose_scale(jnp.max(jnp.abs(x), axis=1), codes.dtype)
    scales[some] = scale
    spread = plgpu.layout_cast(lax.broadcast_in_dim(scale, x.shape, (0,)), layout)
    codes[some] = to_page_type(x / spread, codes.dtype)
