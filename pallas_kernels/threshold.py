"""Where min-p, top-k and top-p cut a row off, found without sorting it.

`threshold` is the op: it checks its arguments and picks a backend. `reference` is the definition,
in plain jnp; `threshold_mosaic` is one kernel, a block a row; `split_threshold` is for rows of
which each device has some columns. All find the same numbers.

The reference searches in the order of float32's bit patterns, several bits a pass, the highest
first: a pass gathers, for each value that the next bits may take, what the tokens likelier than it
hold (how many there are for top-k, their mass for top-p), and goes on below the first with which
it is enough. Everything summed is an integer, so that a row's threshold is a function of that row
alone, whatever the order of a sum. Passes are unrolled on a GPU, where a loop may wait for the host
in every round; elsewhere they are a loop, which compiles in a third of the time.

Radix selection: Alabi et al. 2012, Fast k-selection algorithms for GPUs. Letters: S rows, V
vocabulary, C chunks of it, n devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.device import capability, has_kernels

Backend = Literal["auto", "reference", "mosaic"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "mosaic")

BITS = 3  # of a key a pass
SPLIT_BITS = 8  # the same of `split_threshold`: a pass is an exchange, of so many bins a row
KEY_BITS = 31  # a float32 without its sign
CHUNK = 1024  # tokens that are summed at once: enough chunks to occupy a GPU at S = 1
LIMB = 14  # bits of half a mass
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1

Sums = tuple[Array, ...]
Axis = str | tuple[str, ...]  # of a mesh


def threshold(
    x: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    *,
    backend: Backend = "auto",
    config: Any = None,
) -> Array:
    """The lowest of x that each row keeps: min-p, then top-k, then top-p of what is kept.

    Ties at a threshold are kept. Top-p keeps the fewest of the likeliest tokens whose mass reaches
    its share of all that min-p and top-k keep, the likeliest in any case. Masses are rounded to
    2**-28 of the likeliest's (2**-26 beyond 2**18 tokens) and summed exactly; their sum and the
    share are compared as float32, to 2**-24 of the sum. Tokens below 2**-29 of the likeliest's mass
    count as nothing: of 128 256 they hold at most 2**-12 of it together.

    Args:
        x: float32 [S, V]; at most 0, which is the likeliest; no NaN.
        top_k: int32 [S]; 0 keeps all.
        top_p, min_p: float32 [S]; 1 and 0 keep all. Not checked: min_p is at most 1.
        backend: `mosaic`: one kernel launch, on a GPU from sm_80 on (or in Pallas's GPU
            interpreter, which `config` must say). `auto` is that where it can run, and `reference`
            elsewhere; both return the same numbers (but for the sign of zero).
        config: `threshold_mosaic.Config`; None is its default. No value changes a result.

    Returns:
        float32 [S]; -inf where a row keeps all.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit, named with what would.
    """
    _check(x, top_k, top_p, min_p, backend)
    if backend == "auto":
        backend = "mosaic" if has_kernels(capability()) else "reference"
    if backend == "reference":
        return reference(x, top_k, top_p, min_p)
    from pallas_kernels import threshold_mosaic  # importing Mosaic changes the environment

    config = config or threshold_mosaic.Config()
    V = x.shape[-1]
    # One pass makes keys and masses; what x is padded with is as unlikely as can be.
    x = jnp.pad(x, ((0, 0), (0, -V % config.granule)), constant_values=-jnp.inf)
    limb = limb_bits(V)
    wanted = jnp.where((top_k > 0) & (top_k < V), top_k, 0)
    keys, mass, highest = _keys(x), _mass(jnp.exp(x), limb), _keys(jnp.log(min_p))
    found = threshold_mosaic.find(keys, mass, wanted, highest, top_p, limb=limb, config=config)
    return -lax.bitcast_convert_type(found, jnp.float32)


def reference(x: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """The definition of `threshold`; same arguments."""
    V = x.shape[-1]
    C = math.ceil(V / CHUNK)
    x = jnp.pad(x, ((0, 0), (0, C * CHUNK - V)), constant_values=-jnp.inf)
    x = lax.optimization_barrier(x.reshape(-1, C, CHUNK))  # computed once, not in every pass
    keys = _keys(x)
    wanted = jnp.clip(top_k, 1, V).astype(jnp.uint32)
    by_count = _search(keys, (jnp.ones_like(x, jnp.uint32),), lambda sums: sums[0] < wanted)
    by_count = jnp.where((top_k > 0) & (top_k < V), by_count, -jnp.inf)
    cut = jnp.maximum(jnp.log(min_p), by_count)

    limb = limb_bits(V)
    mass = _mass(jnp.where(x >= cut[:, None, None], jnp.exp(x), 0.0), limb)
    mass = lax.optimization_barrier(mass)  # computed once, not in every pass
    limbs = mass >> limb, mass & (2**limb - 1)
    share = top_p * _as_float(tuple(_sum(limbs)), limb)
    by_mass = _search(keys, limbs, lambda sums: _as_float(sums, limb) < share)
    return jnp.where(top_p < 1, jnp.maximum(cut, by_mass), cut)


def split_threshold(x: Array, top_k: Array, top_p: Array, min_p: Array, axis: Axis) -> Array:
    """`threshold` of rows whose columns lie on n devices, under `shard_map`: the same numbers.

    Devices exchange, for each row and pass, the sums of 2**SPLIT_BITS bins: four passes for top-k
    and four for top-p. What is summed are integers, so that it does not matter who adds what.

    Args:
        x: float32 [S, V / n], this device's columns; see `threshold`.
        top_k, top_p, min_p: of whole rows, the same on all devices.
        axis: mesh axes over which the columns are split.

    Raises:
        ValueError: see `threshold`.
    """
    _check(x, top_k, top_p, min_p, "auto")
    V = x.shape[1] * lax.axis_size(axis)
    x = lax.optimization_barrier(x)  # computed once, not in every pass
    keys, wanted = _keys(x), jnp.clip(top_k, 1, V).astype(jnp.uint32)[:, None]
    ones = (jnp.ones_like(x, jnp.uint32),)
    by_count = _search_split(keys, ones, lambda sums, _: sums[0] < wanted, axis)
    by_count = jnp.where((top_k > 0) & (top_k < V), by_count, -jnp.inf)
    cut = jnp.maximum(jnp.log(min_p), by_count)

    limb = limb_bits(V)
    mass = _mass(jnp.where(x >= cut[:, None], jnp.exp(x), 0.0), limb)

    def short(sums: Sums, all_of_it: Sums) -> Array:
        return _as_float(sums, limb) < top_p[:, None] * _as_float(all_of_it, limb)

    by_mass = _search_split(keys, (mass >> limb, mass & (2**limb - 1)), short, axis)
    return jnp.where(top_p < 1, jnp.maximum(cut, by_mass), cut)


def limb_bits(vocab_size: int) -> int:
    """Bits of half a mass, such that a sum over the vocabulary stays below 2**32."""
    return min(LIMB, 32 - (vocab_size - 1).bit_length())


def _search(keys: Array, weights: Sums, short: Callable[[Sums], Array]) -> Array:
    """The highest of x such that it and what is likelier weigh enough, float32 [S].

    Args:
        keys: int32 [S, C, CHUNK], of x.
        weights: uint32 [S, C, CHUNK] each.
        short: whether the sums of the weights of some tokens are not enough, bool [S].
    """
    n = len(weights)

    def refine(key: Array, shift: Array | int, bits: int) -> Array:
        higher = [key + (digit << shift) for digit in range(1, 1 << bits)]
        likelier = [keys < k[:, None, None] for k in higher]
        sums = _sum([jnp.where(tokens, w, 0) for tokens in likelier for w in weights])
        digits = [short(tuple(sums[i : i + n])) for i in range(0, len(sums), n)]
        return key + (sum(digit.astype(jnp.int32) for digit in digits) << shift)

    whole, rest = divmod(KEY_BITS, BITS)
    key = lax.fori_loop(
        0, whole, lambda i, key: refine(key, KEY_BITS - BITS * (i + 1), BITS),
        jnp.zeros(keys.shape[0], jnp.int32), unroll=capability() is not None,
    )  # fmt: skip
    key = refine(key, 0, rest) if rest else key
    return -lax.bitcast_convert_type(key, jnp.float32)


def _search_split(
    keys: Array, weights: Sums, short: Callable[[Sums, Sums], Array], axis: Axis
) -> Array:
    """`_search` in the columns of all devices, by histograms of each digit.

    Args:
        keys: int32 [S, V / n].
        weights: uint32 [S, V / n] each.
        short: of sums [S, bins] each, and those of all tokens [S, 1]: which are not enough.
    """
    rows = jnp.arange(keys.shape[0])[:, None]
    key, below = jnp.zeros_like(rows, jnp.int32), [jnp.zeros_like(rows, jnp.uint32)] * len(weights)
    all_of_it: Sums = ()
    for shift, bits in _passes(SPLIT_BITS):
        bins = 1 << bits
        bin_of = (keys - key) >> shift
        bin_of = jnp.where((bin_of >= 0) & (bin_of < bins), bin_of, bins)  # out of bounds: dropped
        none = jnp.zeros((len(keys), bins), jnp.uint32)
        mine = [none.at[rows, bin_of].add(w, mode="drop") for w in weights]
        found = jnp.cumsum(lax.psum(jnp.stack(mine), axis), axis=-1)
        # What is likelier than each digit; and than the first of the next.
        upto = [jnp.concatenate([b, b + f], axis=1) for b, f in zip(below, found, strict=True)]
        all_of_it = all_of_it or tuple(sums[:, -1:] for sums in upto)
        digit = short(tuple(sums[:, 1:-1] for sums in upto), all_of_it).sum(
            axis=1, keepdims=True, dtype=jnp.int32
        )
        key = key + (digit << shift)
        below = [jnp.take_along_axis(sums, digit, axis=1) for sums in upto]
    return -lax.bitcast_convert_type(key[:, 0], jnp.float32)


def _passes(width: int) -> list[tuple[int, int]]:
    """(lowest bit, number of bits) of each pass over a key, `width` bits at a time, the highest
    first."""
    return [(max(end - width, 0), min(width, end)) for end in range(KEY_BITS, 0, -width)]


def _keys(x: Array) -> Array:
    """Integers in the order of likelihood; the likeliest's is 0."""
    return lax.bitcast_convert_type(x, jnp.int32) & (2**KEY_BITS - 1)


def _mass(share: Array, limb: int) -> Array:
    """float32 in [0, 1] as an integer of 2 * `limb` bits, uint32: rounded; 1, which would need one
    bit more, down."""
    mass = jnp.round(jnp.minimum(share, BELOW_ONE) * 2.0 ** (2 * limb)).astype(jnp.uint32)
    return jnp.minimum(mass, np.uint32(2 ** (2 * limb) - 1))  # with less than 24 bits it is again 1


def _as_float(sums: Sums, limb: int) -> Array:
    """Sums of limbs in units of the high one, float32: rounded, but never out of order."""
    high, low = sums
    high = high + (low >> limb)
    return high.astype(jnp.float32) + (low & (2**limb - 1)).astype(jnp.float32) * 2.0**-limb


def _sum(terms: Sequence[Array]) -> list[Array]:
    """uint32 [S, C, CHUNK] each, summed to [S]. One variadic reduction, of which XLA makes one
    kernel; of separate sums it makes many."""

    def add(a: Sums, b: Sums) -> Sums:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    found = tuple(terms)
    for axis in (2, 1):
        found = lax.reduce(found, (np.uint32(0),) * len(found), add, (axis,))
    return list(found)


def _check(x: Array, top_k: Array, top_p: Array, min_p: Array, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    if x.ndim != 2 or x.dtype != jnp.float32 or 0 in x.shape:
        raise ValueError(f"x is {x.dtype} {x.shape}: expected float32 [S, V], not empty")
    S = x.shape[0]
    kinds = (("top_k", top_k, "int32"), ("top_p", top_p, "float32"), ("min_p", min_p, "float32"))
    for name, value, dtype in kinds:
        if value.shape != (S,) or value.dtype != dtype:
            raise ValueError(f"{name} is {value.dtype} {value.shape}: expected {dtype} [{S}]")
