"""Dense matrices → quantised ones: rounding to nearest, and what is searched or solved for first.

Letters: N rows (out), K columns (in), G groups of columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxinfer.quant.arrays import QuantisedMatrix, Scheme, pack4
from jaxinfer.quant.matmul import FP8_MAX

# The sixteen values of NF4 (Dettmers et al. 2023): quantiles of a normal distribution, within ±1.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
TINY = 1e-10  # scales of groups of zeros
DAMPING = 0.01  # of GPTQ's Hessian, of its mean diagonal


@dataclass(frozen=True)
class Recipe:
    """What matrices are to become.

    Attributes:
        kind: `int`, `nf4` or `fp8`.
        bits: 4 or 8; 4 of NF4, 8 of FP8.
        group: columns that share a scale; -1: a whole row.
        symmetric: without zero points.
        activations: None, or how activations are rounded to 8 bits too: `token`, a scale for each
            token; `tensor`, one that calibration finds; `group`, a scale for each token and group.
        rows: that share their scales: 1; of W8A8, -1 for all, or of FP8 as many as a group has
            columns (blocks, with activations by group).

    Raises:
        ValueError: what cannot be made; it says what can.
    """

    kind: Literal["int", "nf4", "fp8"] = "int"
    bits: int = 4
    group: int = 128
    symmetric: bool = True
    activations: Literal["token", "tensor", "group"] | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        accepted = {"int": (4, 8), "nf4": (4,), "fp8": (8,)}
        if self.kind not in accepted or self.bits not in accepted[self.kind]:
            raise ValueError(f"{self}: int of 4 or 8 bits, nf4 of 4, fp8 of 8 can be made")
        if self.group != -1 and (self.group < 2 or self.group % 2):
            raise ValueError(f"{self}: group must be -1 or an even number of columns")
        if self.kind != "int" and not self.symmetric:
            raise ValueError(f"{self}: only int has zero points")
        by_group = self.activations == "group"
        if self.activations is not None and (self.bits != 8 or (self.group == -1) == by_group):
            raise ValueError(
                f"{self}: activations are rounded beside 8 bits and a scale a row, or by group"
                " beside FP8 in blocks"
            )
        if by_group and (self.kind != "fp8" or self.rows != self.group):
            raise ValueError(f"{self}: activations by group are for FP8 in blocks of rows = group")
        if self.rows != 1 and not by_group and (self.rows != -1 or self.activations is None):
            raise ValueError(f"{self}: rows is 1; of W8A8 -1; of FP8 in blocks the group")
        if self.activations is not None and not self.symmetric:
            raise ValueError(f"{self}: activations are rounded beside symmetric weights")

    def groups(self, columns: int) -> int:
        """How many groups `columns` make. Raises ValueError where they do not divide."""
        if self.group == -1:
            return 1
        if columns % self.group:
            works = [g for g in (16, 32, 64, 128, 256) if columns % g == 0]
            raise ValueError(f"groups of {self.group} do not divide {columns} columns; {works} do")
        return columns // self.group


def round_to_nearest(
    w: jax.Array, recipe: Recipe, scale_dtype: Any = jnp.float32
) -> QuantisedMatrix:
    """w [N, K] with each group's scale from its largest value. Raises ValueError as `Recipe`."""
    N, K = w.shape
    scales, zeros = find_scales(w.astype(jnp.float32).reshape(N, recipe.groups(K), -1), recipe)
    scales = _shared(scales, recipe.rows).astype(scale_dtype)
    return encode(w, scales, zeros, recipe)


def _shared(scales: jax.Array, rows: int) -> jax.Array:
    """Scales [N, G] of one row each, the largest of every so many rows for all of them."""
    N, G = scales.shape
    rows = N if rows == -1 else rows
    padded = jnp.pad(scales, ((0, -N % rows), (0, 0))).reshape(-1, rows, G)
    return jnp.repeat(padded.max(axis=1), rows, axis=0)[:N]


@functools.partial(jax.jit, static_argnames=("recipe", "scale_dtype", "grid"))
def round_clipped(
    w: jax.Array,
    hessian: jax.Array,
    recipe: Recipe,
    scale_dtype: Any = jnp.float32,
    grid: int = 11,
) -> QuantisedMatrix:
    """w [N, K] with each group's scale from a part of its range (the clipping of AWQ).

    A smaller range cuts off a group's largest values and has finer steps for the others. Of `grid`
    parts from the half to the whole, that which changes the group's products least.

    Args:
        w: [N, K].
        hessian: float32 [K, K]: the mean of x xᵀ.
        recipe: what w is to become.
        scale_dtype: of the scales.
        grid: how many parts are tried.
    """
    N, K = w.shape
    G = recipe.groups(K)
    groups = w.astype(jnp.float32).reshape(N, G, -1)
    # Of the columns of each group among themselves: [G, K/G, K/G].
    blocks = jnp.diagonal(hessian.reshape(G, K // G, G, K // G), axis1=0, axis2=2)
    blocks = jnp.moveaxis(blocks, -1, 0)

    def at(part: jax.Array) -> tuple[Any, jax.Array]:
        scales, zeros = find_scales(groups * part, recipe)
        scales = scales.astype(scale_dtype)
        wide = scales.astype(jnp.float32)[..., None], None if zeros is None else zeros[..., None]
        error = to_values(to_codes(groups, *wide, recipe), *wide, recipe) - groups
        loss = jnp.einsum("ngi,gij,ngj->ng", error, blocks, error, precision="highest")
        return (scales, zeros), loss

    def better(best: Any, part: jax.Array) -> tuple[Any, None]:
        new = at(part)
        smaller = new[1] < best[1]
        return jax.tree.map(lambda a, b: jnp.where(smaller, a, b), new, best), None

    parts = jnp.linspace(1.0, 0.5, grid)
    ((scales, zeros), _), _ = jax.lax.scan(better, at(parts[0]), parts[1:])
    return encode(w, scales, zeros, recipe)


def find_scales(groups: jax.Array, recipe: Recipe) -> tuple[jax.Array, jax.Array | None]:
    """Of float32 [..., columns]: the scale, and the zero point (a float) where there is one."""
    most = jnp.abs(groups).max(axis=-1)
    if recipe.kind == "nf4":
        return jnp.maximum(most, TINY), None
    if recipe.kind == "fp8":
        return jnp.maximum(most / FP8_MAX, TINY), None
    steps = 2**recipe.bits - 1
    if recipe.symmetric:
        return jnp.maximum(2 * most / steps, TINY), None
    low = jnp.minimum(groups.min(axis=-1), 0)
    high = jnp.maximum(groups.max(axis=-1), 0)
    scales = jnp.maximum((high - low) / steps, TINY)
    return scales, jnp.clip(jnp.round(-low / scales), 0, steps)


def to_codes(
    values: jax.Array, scales: jax.Array, zeros: jax.Array | None, recipe: Recipe
) -> jax.Array:
    """Values over their scales, rounded: int codes from 0, NF4's indices, FP8's values; float32."""
    scaled = values / scales
    if recipe.kind == "nf4":
        table = jnp.asarray(NF4, jnp.float32)
        return jnp.searchsorted((table[1:] + table[:-1]) / 2, scaled).astype(jnp.float32)
    if recipe.kind == "fp8":
        clipped = jnp.clip(scaled, -FP8_MAX, FP8_MAX)
        return clipped.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    middle = 2 ** (recipe.bits - 1) if zeros is None else zeros
    return jnp.clip(jnp.round(scaled) + middle, 0, 2**recipe.bits - 1)


def to_values(
    codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, recipe: Recipe
) -> jax.Array:
    """What codes of `to_codes` stand for, float32."""
    if recipe.kind == "nf4":
        return jnp.asarray(NF4, jnp.float32)[codes.astype(jnp.int32)] * scales
    if recipe.kind == "fp8":
        return codes * scales
    return (codes - (2 ** (recipe.bits - 1) if zeros is None else zeros)) * scales


def encode(
    w: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    recipe: Recipe,
) -> QuantisedMatrix:
    """w [N, K] by scales and zero points [N, G]."""
    N, K = w.shape
    grouped = w.astype(jnp.float32).reshape(N, scales.shape[1], -1)
    wide = scales.astype(jnp.float32)[..., None]
    codes = to_codes(grouped, wide, None if zeros is None else zeros[..., None], recipe)
    return _packed(codes.reshape(N, K), scales, zeros, recipe)


def _packed(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    recipe: Recipe,
) -> QuantisedMatrix:
    if recipe.kind == "fp8":
        scheme = Scheme("float", 8, activations=recipe.activations)
        return QuantisedMatrix(scheme, codes.astype(jnp.float8_e4m3fn), scales)
    if recipe.kind == "nf4":
        return QuantisedMatrix(Scheme("table", 4, NF4), pack4(codes.astype(jnp.uint8)), scales)
    if recipe.bits == 4:
        kept = None if zeros is None else zeros.astype(jnp.uint8)
        return QuantisedMatrix(Scheme("int", 4), pack4(codes.astype(jnp.uint8)), scales, kept)
    kept = None if zeros is None else (zeros - 128).astype(jnp.int8)
    scheme = Scheme("int", 8, activations=recipe.activations)
    return QuantisedMatrix(scheme, (codes - 128).astype(jnp.int8), scales, kept)


@functools.partial(jax.jit, static_argnames=("recipe", "act_order", "scale_dtype"))
def gptq(
    w: jax.Array,
    hessian: jax.Array,
    recipe: Recipe,
    *,
    act_order: bool = False,
    scale_dtype: Any = jnp.float32,
) -> QuantisedMatrix:
    """GPTQ (Frantar et al. 2023): columns are rounded one after the other, and each one's error is
    made up for by those that follow, for inputs like the calibration's.

    Args:
        w: [N, K].
        hessian: float32 [K, K]: the sum, or mean, of x xᵀ of inputs.
        recipe: symmetric or not.
        act_order: columns of the largest inputs first. Groups stay what they are, with scales from
            before any error is made up for: the matrix needs no `order` of its own.
        scale_dtype: of the scales.

    Raises:
        ValueError: groups do not divide K.
    """
    N, K = w.shape
    G = recipe.groups(K)
    size = K // G
    w = w.astype(jnp.float32)
    diagonal = jnp.diag(hessian)
    dead = diagonal <= 0  # inputs that are always 0
    w = jnp.where(dead, 0, w)
    static = find_scales(w.reshape(N, G, size), recipe)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(K)
    w, hessian = w[:, order], hessian[order][:, order]

    by_column = jax.tree.map(lambda x: jnp.repeat(x, size, axis=1)[:, order], static)
    damping = DAMPING * jnp.mean(diagonal) + jnp.where(dead[order], 1.0, 0.0)
    inverse = jnp.linalg.inv(hessian + jnp.diag(damping))
    # inverse = uᵀ u: row i says how much each later column makes up for the error of column i.
    u = jnp.linalg.cholesky((inverse + inverse.T) / 2).T

    def one_group(w: jax.Array, g: jax.Array) -> tuple[jax.Array, Any]:
        first = g * size
        block = jax.lax.dynamic_slice_in_dim(w, first, size, 1)
        rows = jax.lax.dynamic_slice_in_dim(u, first, size, 0)
        inner = jax.lax.dynamic_slice_in_dim(rows, first, size, 1)
        if act_order:
            own = None
            used = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, 1), by_column
            )
        else:
            own = find_scales(block, recipe)
            used = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (N, size)), own)
        scales = used[0].astype(scale_dtype).astype(jnp.float32)

        def one_column(i: jax.Array, carry: Any) -> Any:
            block, codes, errors = carry
            column = block[:, i]
            at = scales[:, i], None if used[1] is None else used[1][:, i]
            code = to_codes(column, *at, recipe)
            error = (column - to_values(code, *at, recipe)) / inner[i, i]
            later = jnp.where(jnp.arange(size) > i, inner[i], 0)
            block = block - error[:, None] * later
            return block, codes.at[:, i].set(code), errors.at[:, i].set(error)

        _, codes, errors = jax.lax.fori_loop(
            0, size, one_column, (block, jnp.zeros_like(block), jnp.zeros_like(block))
        )
        beyond = jnp.where(jnp.arange(K) >= first + size, rows, 0)
        w = w - jnp.matmul(errors, beyond, precision="highest")
        return w, (codes, own)

    _, (codes, own) = jax.lax.scan(one_group, w, jnp.arange(G))
    scales, zeros = static if act_order else jax.tree.map(jnp.transpose, own)
    codes = jnp.moveaxis(codes, 0, 1).reshape(N, K)[:, jnp.argsort(order)]
    return _packed(codes, scales.astype(scale_dtype), zeros, recipe)


@functools.partial(jax.jit, static_argnames=("recipe", "grid"))
def awq_scales(
    w: jax.Array, hessian: jax.Array, magnitude: jax.Array, recipe: Recipe, grid: int = 20
) -> jax.Array:
    """AWQ (Lin et al. 2024): by what to multiply the columns of w [N, K] before they are rounded.

    Columns with large inputs matter more and get finer steps. Of `grid` powers of the inputs'
    magnitude, that which changes the product least.

    Args:
        w: [N, K].
        hessian: float32 [K, K]: the mean of x xᵀ.
        magnitude: float32 [K]: the mean of |x|.
        recipe: what w is to become.
        grid: how many powers from 0 up to, but without, 1.

    Returns:
        float32 [K]; x has to be divided by it.
    """
    w = w.astype(jnp.float32)
    N, K = w.shape
    G = recipe.groups(K)

    def scaled(power: jax.Array) -> jax.Array:
        s = jnp.maximum(magnitude, 1e-4) ** power
        return s / jnp.sqrt(s.max() * s.min())

    def loss(power: jax.Array) -> jax.Array:
        s = scaled(power)
        groups = (w * s).reshape(N, G, -1)
        scales, zeros = (None if v is None else v[..., None] for v in find_scales(groups, recipe))
        assert scales is not None
        rounded = to_values(to_codes(groups, scales, zeros, recipe), scales, zeros, recipe)
        error = rounded.reshape(N, K) / s - w
        return jnp.sum(jnp.matmul(error, hessian, precision="highest") * error)

    powers = jnp.arange(grid, dtype=jnp.float32) / grid
    losses = jax.lax.map(loss, powers)
    return scaled(powers[jnp.argmin(losses)])


def smooth_scales(w: jax.Array, largest: jax.Array, power: float = 0.5) -> jax.Array:
    """SmoothQuant (Xiao et al. 2023): by what to multiply the columns of w [N, K].

    It moves what is hard to round from activations to weights: x has to be divided by it.

    Args:
        w: [N, K].
        largest: float32 [K]: the largest |x| of each column.
        power: how much is moved, from 0 to 1.
    """
    columns = jnp.abs(w.astype(jnp.float32)).max(axis=0)
    s = jnp.maximum(largest, 1e-5) ** power / jnp.maximum(columns, 1e-5) ** (1 - power)
    return jnp.maximum(s, 1e-5)
