"""x · wᵀ for packed weights: 4- or 8-bit codes with scales, 16-bit activations.

`quant_matmul` is the op: it checks its arguments and picks a backend. `reference` is the
definition, in plain jnp, over all of the matrix at once; the kernels, in `quant_matmul_sm90` and
`quant_matmul_sm80`, dequantise in registers and never hold a dense copy. `quant_packing` says what
packed weights are.

Letters: N rows of the matrix (out), K its columns (in).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.device import capability, has_kernels, sm_count
from pallas_kernels.quant_packing import DTYPE, PackedMatrix, unpack

Backend = Literal["auto", "reference", "mosaic"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "mosaic")


def quant_matmul(x: jax.Array, packed: PackedMatrix, *, backend: Backend = "auto") -> jax.Array:
    """x [..., K] · packed [N, K] → [..., N].

    Args:
        x: bfloat16.
        packed: of `quant_packing.pack`.
        backend: `mosaic`: one kernel launch, on a GPU from sm_80 on (or in Pallas's GPU
            interpreter); the bits of a row of x's result depend on that row alone. `auto` is that
            where it can run, and `reference` elsewhere. The gradient, of x alone, is that of
            `reference`.

    Returns:
        As x, summed in float32.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit, named with what would.
    """
    _check(x, packed, backend)
    if backend == "auto":
        backend = "mosaic" if has_kernels(capability()) else "reference"
    if backend == "reference":
        return reference(x, packed)
    return _kernel(x.reshape(-1, x.shape[-1]), packed).reshape(*x.shape[:-1], packed.shape[0])


@jax.custom_vjp
def _kernel(x: jax.Array, packed: PackedMatrix) -> jax.Array:
    return _rows(x, packed)


@jax.custom_batching.custom_vmap
def _rows(x: jax.Array, packed: PackedMatrix) -> jax.Array:
    # Imported here: importing Mosaic changes the environment.
    from pallas_kernels import quant_matmul_sm80, quant_matmul_sm90

    of_gpu = capability()
    if of_gpu is not None and of_gpu < 9:
        return quant_matmul_sm80.matmul(x, packed)
    return quant_matmul_sm90.matmul(x, packed, sms=sm_count(), on_gpu=of_gpu is not None)


@_rows.def_vmap
def _rows_of_batch(
    size: int, batched: Any, x: jax.Array, packed: PackedMatrix
) -> tuple[jax.Array, bool]:
    """More rows, which is what a batch of them is; one matrix for all."""
    x_batched, matrix_batched = batched
    if any(jax.tree.leaves(matrix_batched)):
        raise ValueError("quant_matmul: vmap over x only, not over packed weights")
    x = x if x_batched else jnp.broadcast_to(x, (size, *x.shape))
    out = _rows(x.reshape(-1, x.shape[-1]), packed)
    return out.reshape(*x.shape[:-1], -1), True


def _forward(x: jax.Array, packed: PackedMatrix) -> tuple[jax.Array, PackedMatrix]:
    return _rows(x, packed), packed


def _backward(packed: PackedMatrix, out: jax.Array) -> tuple[jax.Array, Any]:
    """Of x alone: codes have no gradient."""
    scaled = (out * packed.row_scale).astype(out.dtype)
    x = lax.dot(scaled, unpack(packed), preferred_element_type=jnp.float32).astype(out.dtype)
    return x, jax.tree.map(_no_gradient, packed)


def _no_gradient(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


_kernel.defvjp(_forward, _backward)


def reference(x: jax.Array, packed: PackedMatrix) -> jax.Array:
    """The definition of `quant_matmul`; same arguments."""
    sums = lax.dot_general(
        x, unpack(packed), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return (sums * packed.row_scale).astype(x.dtype)


def _check(x: jax.Array, packed: PackedMatrix, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    if x.dtype != DTYPE or x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"x is {x.dtype} {x.shape}: expected bfloat16 [..., K], not empty")
    if x.shape[-1] != packed.shape[1]:
        raise ValueError(
            f"x is {x.shape}, the matrix {packed.shape}: expected x [..., K] for [N, K]"
        )
