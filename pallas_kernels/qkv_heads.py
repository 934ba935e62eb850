"""What queries, keys and values still need between the product that makes them and attention.

`prepare` is the definition, in plain jnp and differentiable; `qkv_write` does the same in a kernel.

Shapes: T tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pallas_kernels import rms_norm


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heads:
    """What is done to queries, keys and values; what is None is left out. A pytree of its arrays.

    Attributes:
        bias: [(H + 2K) * D], as qkv; added to all three.
        q_norm, k_norm: [D], as qkv: weights of an RMS norm of every head; both or neither.
        eps, plus_one: of those norms, see `rms_norm`; static under `jit`.
        rope: cos and sin, float32 [T, D/2]: dimension i is rotated with i + D/2 (Su et al. 2021).
    """

    bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    eps: float = field(default=0.0, metadata={"static": True})
    rope: tuple[jax.Array, jax.Array] | None = None
    plus_one: bool = field(default=False, metadata={"static": True})


def prepare(
    qkv: jax.Array, num_heads: int, num_kv_heads: int, heads: Heads
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """qkv [..., (H + 2K) * D] → q [..., H, D], k and v [..., K, D], ready for attention."""
    x = qkv if heads.bias is None else qkv + heads.bias
    H, K = num_heads, num_kv_heads
    q, k, v = jnp.split(x.reshape(*x.shape[:-1], H + 2 * K, -1), [H, H + K], axis=-2)
    if heads.q_norm is not None and heads.k_norm is not None:
        q = rms_norm.reference(q, heads.q_norm, heads.eps, plus_one=heads.plus_one)[1]
        k = rms_norm.reference(k, heads.k_norm, heads.eps, plus_one=heads.plus_one)[1]
    return (q, k, v) if heads.rope is None else (rotate(q, *heads.rope), rotate(k, *heads.rope), v)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., heads, D] by cos and sin [..., D/2]; dimension i is paired with i + D/2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
