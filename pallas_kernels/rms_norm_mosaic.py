"""The kernel behind `rms_norm`: a residual added and a row normalised, in one launch.

Apart from `rms_norm`, because importing Mosaic changes the environment of the process.

What a block does depends on E and the dtype alone, never on how many rows there are: so neither
does the order in which a row is summed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_layout import row_layout


@partial(
    jax.jit, static_argnames=("eps", "plus_one")
)  # so that a model's layers, which are alike, lower once
def norm(
    x: jax.Array, weight: jax.Array, delta: jax.Array | None, *, eps: float, plus_one: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `rms_norm`, whose checks have passed."""
    E = x.shape[-1]
    rows, layout = row_layout(E, x.dtype.itemsize)
    inputs = [a.reshape(-1, E) for a in (x, delta) if a is not None]
    count = inputs[0].shape[0]
    if count % rows:
        inputs = [jnp.pad(a, ((0, -count % rows), (0, 0))) for a in inputs]
    out = jax.ShapeDtypeStruct(inputs[0].shape, x.dtype)
    found = plgpu.kernel(
        partial(_block, rows=rows, layout=layout, eps=eps, plus_one=plus_one),
        out_type=[out] * len(inputs),
        grid=(out.shape[0] // rows,),
        grid_names=("block",),
        kernel_name="rms_norm",
    )(weight, *inputs)
    normed, *total = (a[:count].reshape(x.shape) for a in found)
    return (total[0] if total else x), normed


def _block(weight: Any, *refs: Any, rows: int, layout: Any, eps: float, plus_one: bool) -> None:
    """weight [E]; x, and if there is one delta; then the norm, and with delta the sum: [T, E]."""
    inputs, (normed, *total) = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    some = pl.ds(lax.axis_index("block") * rows, rows)
    # All are loaded before anything is computed: none then waits for another.
    scale = plgpu.load(weight, layout=layout.reduce(0), optimized=False)
    x, *delta = [plgpu.load(ref.at[some], layout=layout, optimized=False) for ref in inputs]
    if delta:
        x = x + delta[0]
        total[0][some] = x

    def spread(vector: Any, axis: int) -> Any:
        return plgpu.layout_cast(lax.broadcast_in_dim(vector, x.shape, (axis,)), layout)

    y = x.astype(jnp.float32)
    mean = jnp.sum(y * y, axis=1) / x.shape[1]
    y = y * spread(lax.rsqrt(mean + eps), 0)
    if plus_one:
        normed[some] = (y * spread(scale.astype(jnp.float32) + 1, 1)).astype(x.dtype)
    else:
        normed[some] = y.astype(x.dtype) * spread(scale, 1)
