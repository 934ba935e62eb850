"""The kernel behind `threshold`: a row's cut-off found in one launch, a block a row.

Apart from `threshold`, because importing Mosaic changes the environment of the process.

Radix selection with histograms in shared memory: for each digit of a key, the highest first, the
tokens that share the digits found so far are counted (or weighed) by their next digit, and the
digit is found at which there is enough. Three digits make a key, so that a row is read three times
for top-k and three times for top-p, from L2 mostly. Everything added is an integer: no order of
additions shows. Each warpgroup adds into a histogram of its own; all of them then add up a share of
the bins each, and find the digit, each for itself.

Letters: S rows, P tokens of a padded row, W warpgroups of a block, N numbers a bin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

NOTHING = 0x7F800000  # the key of -inf
LIGHTEST = 0x41A80000  # the key of -21: what is less likely has no mass
DIGITS = ((20, 11), (10, 10), (0, 10))  # (lowest bit, number of bits), the highest digit first
BINS = 2048  # of the widest digit
LANES = plgpu.Layout.TILED(  # each of the four warps holds everything: sums need no shared memory
    plgpu.Tiling(((128,), (4,))), (plgpu.Replicated(4),), (-2,), -1
)

Sums = tuple[Any, ...]
inline_mgpu: Any = plgpu.inline_mgpu  # pyright takes what it decorates for the undecorated


@dataclass(frozen=True)
class Config:
    """How a block goes about it; nothing here changes a result.

    Attributes:
        warpgroups: W, a power of two up to 8 (8: a few bytes of spills).
        tile: tokens that a warpgroup reads at once, a multiple of 512.
        interpret: for the GPU interpreter, which has no atomic additions.
    """

    warpgroups: int = 4
    tile: int = 2048
    interpret: bool = False

    @property
    def granule(self) -> int:
        """P is a multiple of this."""
        return self.warpgroups * self.tile


def find(
    keys: jax.Array,
    masses: jax.Array,
    wanted: jax.Array,
    highest: jax.Array,
    top_p: jax.Array,
    *,
    limb: int,
    config: Config,
) -> jax.Array:
    """The key at which each row is cut off: what has at most this is kept.

    Args:
        keys: int32 [S, P], at least 0, likeliest first; NOTHING where there is no token.
        masses: uint32 [S, P], of at most 2 * limb bits; 0 where there is no token.
        wanted: int32 [S], how many are kept, the likeliest; 0 keeps all.
        highest: int32 [S], the highest key that min-p keeps.
        top_p: float32 [S]; 1 keeps all.

    Returns:
        int32 [S].
    """
    W = config.warpgroups
    return plgpu.kernel(
        partial(_block, limb=limb, config=config),
        out_type=jax.ShapeDtypeStruct(keys.shape[:1], jnp.int32),
        grid=keys.shape[:1],
        grid_names=("row",),
        num_threads=W,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((W, 2, BINS), jnp.uint32),
            plgpu.SMEM((2, BINS), jnp.uint32),
            plgpu.SMEM((2, W), jnp.uint32),
            plgpu.Barrier(num_arrivals=W),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="threshold",
    )(keys, masses, wanted, highest, top_p)


def _block(
    keys: Any, masses: Any, wanted: Any, highest: Any, top_p: Any, out: Any,
    own: Any, merged: Any, totals: Any, barrier: Any,
    *, limb: int, config: Config,
) -> None:  # fmt: skip
    """Refs of `find`'s arrays. own [W, 2, BINS]: histograms; merged [2, BINS]: their sums;
    totals [2, W]: the sums of each warpgroup's share of the bins."""
    row = lax.axis_index("row")
    search = partial(_search, keys.at[row], own, merged, totals, barrier, config)
    count, share = wanted[row].astype(jnp.uint32), top_p[row]

    def by_count() -> Any:
        key, (found,) = search(None, NOTHING - 1, lambda _: lambda sums: sums[0] < count, limb)
        return jnp.where(found < count, NOTHING, key)

    cut = lax.cond(count > 0, by_count, lambda: jnp.int32(NOTHING))
    cut = jnp.minimum(cut, highest[row])

    def short(all_of_it: Sums) -> Callable[[Sums], Any]:
        enough = share * _as_float(all_of_it, limb)
        return lambda sums: _as_float(sums, limb) < enough

    def by_mass() -> Any:
        return jnp.minimum(cut, search(masses.at[row], jnp.minimum(cut, LIGHTEST), short, limb)[0])

    cut = lax.cond(share < 1, by_mass, lambda: cut)

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _() -> None:
        out[row] = cut


def _search(
    keys: Any,  # [P]
    own: Any,
    merged: Any,
    totals: Any,
    barrier: Any,
    config: Config,
    masses: Any,  # [P]; None: tokens are counted
    highest: Any,
    short_of: Callable[[Sums], Callable[[Sums], Any]],
    limb: int,
) -> tuple[Any, Sums]:
    """(key, sums of all): the highest key such that the tokens likelier than it are not enough.

    Tokens above `highest` are not looked at. `short_of` takes the sums of all others, and returns
    whether some sums are not enough.
    """
    W, N = config.warpgroups, 1 if masses is None else 2
    me = lax.axis_index("warpgroup")
    key, below = jnp.int32(0), (jnp.uint32(0),) * N
    all_of_it, short = below, None
    for shift, bits in DIGITS:
        for n in range(N):
            own[me, n] = jnp.zeros((BINS,), jnp.uint32)
        _meet(barrier, config)  # all have cleared before one adds
        # At least 0: where a row has too few tokens, what is looked for is beyond them.
        span = jnp.maximum(jnp.minimum(highest - key, 2 ** (shift + bits) - 1), 0)
        _add_all(keys, masses, own.at[me], key, span, shift, limb, config)
        _meet(barrier, config)
        _merge(own, merged, totals, N, config)
        _meet(barrier, config)
        upto = [below]  # what is likelier than each share of the bins, and at last than none
        for w in range(W):
            upto.append(tuple(s + totals[n, w] for n, s in enumerate(upto[-1])))
        if short is None:
            all_of_it = upto[-1]
            short = short_of(all_of_it)
        digit, below = _find_digit(merged, upto[:-1], short)
        key = key + (digit << shift)
    return key, all_of_it


def _merge(own: Any, merged: Any, totals: Any, numbers: int, config: Config) -> None:
    """Sums this warpgroup's share of the bins over all histograms, and the share itself."""
    me, share = lax.axis_index("warpgroup"), BINS // config.warpgroups
    mine = pl.ds(me * share, share)
    for n in range(numbers):

        def add(w: Any, part: Any, n: int = n) -> Any:
            return part + plgpu.load(own.at[w, n, mine], layout=LANES, optimized=False)

        part = plgpu.load(own.at[0, n, mine], layout=LANES, optimized=False)
        part = lax.fori_loop(1, config.warpgroups, add, part)
        merged[n, mine] = part
        totals[n, me] = jnp.sum(part, dtype=jnp.uint32)


def _find_digit(merged: Any, upto: list[Sums], short: Callable[[Sums], Any]) -> tuple[Any, Sums]:
    """(digit, sums of what is likelier): the highest bin of merged [2, BINS] such that what is
    likelier than it is not enough. Every warp finds it for itself.

    Args:
        upto: the sums of what is likelier than each of the shares that the bins are cut into.
    """
    share = BINS // len(upto)
    start, below = jnp.int32(0), upto[0]
    for w, sums in enumerate(upto[1:], 1):
        start, below = _where(short(sums), (jnp.int32(w * share), sums), (start, below))
    some = pl.ds(start, share)
    numbers = range(len(below))
    bins = [plgpu.load(merged.at[n, some], layout=LANES, optimized=False) for n in numbers]
    bin_of = plgpu.broadcasted_iota(jnp.int32, (share,), 0, layout=LANES)
    digit, likelier = jnp.int32(0), below
    for bit in reversed(range(share.bit_length() - 1)):
        higher = digit + (1 << bit)
        masked = (jnp.where(bin_of < higher, x, jnp.uint32(0)) for x in bins)
        sums = tuple(s + jnp.sum(x, dtype=jnp.uint32) for s, x in zip(below, masked, strict=True))
        digit, likelier = _where(short(sums), (higher, sums), (digit, likelier))
    return start + digit, likelier


def _where(condition: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _add_all(
    keys: Any, masses: Any, own: Any, key: Any, span: Any, shift: int, limb: int, config: Config
) -> None:
    """Adds this warpgroup's tokens from `key` to `key + span` to its histogram own [2, BINS]."""
    tile = config.tile
    layout = plgpu.Layout.WG_STRIDED((tile,), vec_size=4)
    me = lax.axis_index("warpgroup")
    tiles = keys.shape[0] // config.granule

    def load(i: Any) -> Sums:
        some = pl.ds((i * config.warpgroups + me) * tile, tile)
        refs = (keys,) if masses is None else (keys, masses)
        return tuple(plgpu.load(ref.at[some], layout=layout, optimized=False) for ref in refs)

    def body(i: Any, loaded: Sums) -> Sums:
        following = load(jnp.minimum(i + 1, tiles - 1))  # on its way during the additions
        x, *mass = loaded
        values = tuple(v for m in mass for v in (m >> np.uint32(limb), m & np.uint32(2**limb - 1)))
        # Keys are int32 throughout: Mosaic compares arrays of uint32 as if they had a sign.
        distance = x - key
        inside = (distance >= 0) & (distance <= span)
        _add(own, jnp.where(inside, distance >> shift, -1), values, layout, config)
        return following

    lax.fori_loop(0, tiles, body, load(0))


def _add(own: Any, digit: Any, values: Sums, layout: Any, config: Config) -> None:
    """own[n, digit] += values[n], or own[0, digit] += 1 without values; nothing where digit < 0."""
    if config.interpret:
        at = jnp.where(digit < 0, BINS, digit)
        for n, value in enumerate(values or (jnp.uint32(1),)):
            own[n] = own[n].at[at].add(value, mode="drop")
        return

    @inline_mgpu(arg_types=(plgpu.RefType(), layout, *[layout] * len(values)))
    def add(ctx: Any, own: Any, digit: Any, *values: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        base = llvm.ptrtoint(i32, utils.memref_ptr(own))
        for r, digits in enumerate(digit.registers.flat):
            for i in range(4):
                at = _element(digits, i)
                address = arith.addi(base, arith.shli(at, utils.c(2, i32)))
                numbers = [_element(v.registers.flat[r], i) for v in values] or [utils.c(1, i32)]
                for n, number in enumerate(numbers):
                    utils.inline_ptx(
                        "{ .reg .pred p; setp.ge.s32 p, $0, 0;"
                        f" @p red.shared.add.u32 [$1+{4 * BINS * n}], $2; }}",
                        at, address, number, has_side_effects=True,
                    )  # fmt: skip

    add(own, digit, *values)


def _element(x: Any, i: int) -> Any:
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _meet(barrier: Any, config: Config) -> None:
    """Every thread sees what the others have written to shared memory."""
    if config.interpret:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return

    @inline_mgpu()
    def synchronise(ctx: Any) -> None:
        gpu.barrier()

    synchronise()


def _as_float(sums: Sums, limb: int) -> Any:
    """As in `threshold`."""
    high, low = sums
    high = high + (low >> np.uint32(limb))
    return high.astype(jnp.float32) + (low & np.uint32(2**limb - 1)).astype(
        jnp.float32
    ) * np.float32(2.0**-limb)
