"""Paged attention for Ampere: cp.async copies and the warp-level `mma` instruction. Forward only.

One block of 128 threads (4 warps along the rows) serves one KV head, one tile of at most 64 rows,
and either one split of the KV axis (few rows a sequence: splits run in parallel, their partial
results are folded in jnp) or all of the tile's splits in order (long chunks: folded here, through
the block's own output). Both give the same bits: every row sees the same blocks of the KV axis in
the same order, and partial results are folded left to right either way.

Shapes as in `paged_attention`: T new tokens, S sequences, H query heads, K KV heads, G = H / K,
D head dim, N pages, P pages a sequence. M = 64 rows a tile, B tokens a block of the KV axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_common import (
    LOG2E,
    ROWS,
    SCRATCH_BYTES,
    SPLIT,
    Partial,
    RowTiles,
    finish,
    fold,
    kv_range,
    most_splits,
    power_of_two,
    row_tiles,
)
from pallas_kernels.device import capability

FLOOR = -(2.0**30)  # the running maximum's start: below every score, and an exact int32
CHUNK = 64  # columns of a 128-byte swizzled 16-bit tile: the grain of the head dim
LAYOUT = plgpu.Layout
ACC = LAYOUT.MMA_ACC(jnp.bfloat16)  # of [M, n] float32; the same for float16
PER_ROW, PER_COLUMN = ACC.reduce(1), ACC.reduce(0)
Ref = Any  # Pallas refs have no public type
Arch = Literal["sm80", "sm90"]
Quantized = Literal["", "int8", "fp8"]


@dataclass(frozen=True)
class Config:
    """Tuning, and what a target can do. `block` and `split` are part of a result's bits.

    Attributes:
        split: KV tokens of a split.
        block: KV tokens a step at most; a block never spans two pages.
        stages: blocks of K and V in flight or in use.
        scratch_bytes: parallel splits are given up where their partial results would take more.
        arch: "sm80" copies with cp.async; "sm90" with TMA, which Hopper insists on.
        interpret: run in the GPU interpreter, with a stand-in for `mma`; needs arch "sm90".
    """

    split: int = SPLIT
    block: int = 64
    stages: int = 3
    scratch_bytes: int = SCRATCH_BYTES
    arch: Arch = "sm80"
    interpret: bool = False


def default_config(head_dim: int, arch: Arch | None = None) -> Config:
    """The values for a head dim: chosen by what fits, not by measurement on an A100.

    Up to head_dim 128 shared memory stays under 80 KB and registers under 240, so that two blocks
    share an SM. At 256 the sums alone take 128 registers a thread: one block an SM.

    `arch`: of `Config`; by default what the default device is.
    """
    if arch is None:
        arch = "sm80" if (capability() or 9.0) < 9 else "sm90"
    return Config(block=64 if head_dim <= 64 else 32, arch=arch)


def _quantized(dtype: Any) -> Quantized:
    return "int8" if dtype == jnp.int8 else "fp8" if dtype == jnp.float8_e4m3fn else ""


class _Static(NamedTuple):
    """What the kernel is specialised on."""

    config: Config
    group: int
    block: int
    page_size: int
    slots: int  # splits in parallel; 1: a block walks all of its tile's splits
    rows: int  # of a tile that can hold a token, rounded up: what is written
    scale: float
    window: int | None
    softcap: float | None
    quantized: Quantized
    dynamic_scales: bool
    q_dtype: Any
    head_dim: int

    @property
    def v_dtype(self) -> Any:
        """Of P and V. Scales go into P, which float16 might not hold: then it is bfloat16."""
        return jnp.bfloat16 if self.quantized else self.q_dtype


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    kv_lengths: jax.Array,
    *,
    max_query: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    config: Config | None = None,
) -> jax.Array:
    """`paged_attention` by this backend; arguments as there, checked already. [T, H, D].

    head_dim a multiple of 64 up to 256, page size a multiple of 32, at most 64 query heads a KV
    head, 16-bit q; pages of q's dtype, or int8 or float8_e4m3fn with scales.
    """
    T, H, D = q.shape
    _, K, page_size, _ = k_pages.shape
    config = config or default_config(D)
    G = H // K
    tile_tokens = ROWS // G
    block = min(config.block, page_size)
    tiles = row_tiles(query_starts, kv_lengths, T=T, tile_tokens=tile_tokens, max_query=max_query)
    n_tiles = tiles.sequence.shape[0]
    rows = -(-min(max_query, tile_tokens) * G // 8) * 8
    slots = _parallel_splits(
        page_table.shape[1] * page_size, tile_tokens, window, max_query * G,
        tile_bytes=K * n_tiles * (rows * D + 2 * ROWS) * 4, config=config,
    )  # fmt: skip
    static = _Static(
        config=config, group=G, block=block, page_size=page_size, slots=slots,
        rows=ROWS if slots == 1 else rows, scale=scale, window=window, softcap=softcap,
        quantized=_quantized(k_pages.dtype),
        dynamic_scales=k_scales is not None and k_scales.ndim == 3, q_dtype=q.dtype, head_dim=D,
    )  # fmt: skip
    if static.quantized == "fp8":  # sm80 knows no such type: it is decoded from the bits
        k_pages, v_pages = (lax.bitcast_convert_type(x, jnp.int8) for x in (k_pages, v_pages))

    meta, row_positions = _describe(tiles, kv_lengths, static)
    packed = _pack(q.reshape(T, K, G, D), tiles.token, min(max_query, tile_tokens))
    scales = () if k_scales is None else (k_scales, v_scales)
    partial = _call(static, n_tiles, packed, k_pages, v_pages, page_table, meta, row_positions,
                    scales)  # fmt: skip
    return _unpack(partial, tiles, meta, sinks, static).astype(q.dtype)


def _pack(q: jax.Array, first: jax.Array, tokens: int) -> jax.Array:
    """[T, K, G, D] → the rows of each tile, [K, tiles, rows, D], rows a multiple of 32.

    A copy into SMEM tiles of 8 rows must start at a multiple of 8 rows: TMA fills up with zeros.
    cp.async wants four such tiles at once.
    """
    T, K, G, D = q.shape
    token = jnp.minimum(first[:, None] + jnp.arange(tokens), T - 1)
    packed = jnp.moveaxis(q[token], 2, 0).reshape(K, len(first), tokens * G, D)
    return jnp.pad(packed, ((0, 0), (0, 0), (0, -tokens * G % 32), (0, 0)))


def _parallel_splits(
    max_kv: int,
    tile_tokens: int,
    window: int | None,
    max_rows: int,
    *,
    tile_bytes: int,
    config: Config,
) -> int:
    """Splits that run side by side; 1 where tiles are many already or memory would be too much."""
    slots = most_splits(max_kv, tile_tokens, window, config.split)
    if max_rows > ROWS or slots * tile_bytes > config.scratch_bytes:
        return 1
    return slots


# Columns of the tiles' descriptions.
SEQUENCE, LOW, HIGH, LENGTH, FIRST_SPLIT, END_SPLIT = range(6)


def _describe(
    tiles: RowTiles, kv_lengths: jax.Array, static: _Static
) -> tuple[jax.Array, jax.Array]:
    """int32 [tiles, 8], columns as above, and the positions of their rows, [tiles, ROWS].

    LOW to HIGH are the KV positions that some row of the tile sees; none for a tile without tokens.
    Rows without a token have position -1: they see nothing.
    """
    split = static.config.split
    low, high = kv_range(tiles, static.window)
    meta = jnp.stack(
        [
            tiles.sequence, low, high, kv_lengths[tiles.sequence], low // split, -(-high // split),
            jnp.zeros_like(low), jnp.zeros_like(low),
        ],
        axis=1,
    )  # fmt: skip
    token = jnp.arange(ROWS, dtype=jnp.int32) // static.group
    positions = jnp.where(token < tiles.tokens[:, None], tiles.position[:, None] + token, -1)
    return meta.astype(jnp.int32), positions.astype(jnp.int32)


def _unpack(
    partial: Partial, tiles: RowTiles, meta: jax.Array, sinks: jax.Array | None, static: _Static
) -> jax.Array:
    """Folds the slots, and picks each token's rows: float32 [T, H, D]."""
    K = partial.peak.shape[0]
    G, T = static.group, tiles.token_tile.shape[0]
    rows = tiles.token_offset[:, None] * G + jnp.arange(G)  # [T, G]
    live = (meta[:, END_SPLIT] - meta[:, FIRST_SPLIT])[tiles.token_tile]  # [T]

    def slot(i: jax.Array | int) -> Partial:
        taken = (x[:, tiles.token_tile[:, None], i, rows] for x in partial)  # [K, T, G, ...]
        taken = (jnp.moveaxis(x, 0, 1).reshape(T, K * G, *x.shape[3:]) for x in taken)
        # Slots past a tile's last split were never written.
        return Partial(*(_keep(i < live, *x) for x in zip(taken, (FLOOR, 0, 0), strict=True)))

    total = slot(0)
    if static.slots > 1:
        total, _ = lax.scan(
            lambda total, i: (fold(total, slot(i)), None),
            total, jnp.arange(1, static.slots), unroll=min(static.slots - 1, 8),
        )  # fmt: skip
    return jnp.where(tiles.owned[:, None, None], finish(total, sinks), 0)


def _keep(mask: jax.Array, x: jax.Array, empty: float) -> jax.Array:
    return jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, empty)


def _call(
    static: _Static,
    n_tiles: int,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    meta: jax.Array,
    row_positions: jax.Array,
    scales: tuple[jax.Array | None, ...],
) -> Partial:
    """The kernel: [K, tiles, slots, ROWS], and the values [K, tiles, slots, rows, D]."""
    K = k_pages.shape[1]
    shape = (K, n_tiles, static.slots)
    out = (
        jax.ShapeDtypeStruct((*shape, ROWS), jnp.float32),
        jax.ShapeDtypeStruct((*shape, ROWS), jnp.float32),
        jax.ShapeDtypeStruct((*shape, static.rows, static.head_dim), jnp.float32),
    )

    inputs = (q, k_pages, v_pages, page_table, meta, row_positions, *scales)

    def body(*refs: Ref) -> None:
        n = len(inputs)
        _kernel(static, _Inputs(*refs[:n]), _Outputs(*refs[n : n + 3]), _Scratch(**refs[n + 3]))

    run = plgpu.kernel(
        body, out_type=out, scratch_types=[_scratch(static)],
        grid=(static.slots, n_tiles, K), grid_names=("slot", "tile", "head"),
        interpret=plgpu.InterpretGPUParams() if static.config.interpret else None,
        # exp2.approx is exact at integers; tanh.approx is not good enough for a soft cap.
        compiler_params=plgpu.CompilerParams(
            approx_math=static.softcap is None, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )  # fmt: skip
    return Partial(*run(*inputs))


class _Inputs(NamedTuple):
    """GMEM refs."""

    q: Ref  # [K, tiles, rows, D]
    k: Ref  # [N, K, page_size, D]
    v: Ref
    table: Ref  # [S, P]
    meta: Ref  # [tiles, 8]
    positions: Ref  # [tiles, ROWS]
    k_scales: Ref = None  # [N, K, page_size] or [K]
    v_scales: Ref = None


class _Outputs(NamedTuple):
    """GMEM refs of a `Partial`."""

    peak: Ref
    total: Ref
    values: Ref


class _Scratch(NamedTuple):
    """SMEM refs, and barriers where copies need them."""

    q: Ref  # [M, D]
    p: Ref  # [M, B]
    # ((K, V) rings [stages, B, D], values [M, D] float32): these are staged in idle rings.
    shared: Ref
    k16: Ref = None  # [B, D]: a block of quantised pages, decoded
    v16: Ref = None
    q_ready: Ref = None
    ready: Ref = None  # [stages]


def _scratch(static: _Static) -> dict[str, Any]:
    B, D, stages = static.block, static.head_dim, static.config.stages
    raw = jnp.int8 if static.quantized else static.q_dtype
    ring = _tiled((stages, B, D), raw)
    out = plgpu.SMEM((ROWS, D), jnp.float32)
    scratch: dict[str, Any] = {
        "q": _tiled((ROWS, D), static.q_dtype),
        "p": _tiled((ROWS, B), static.v_dtype),
        "shared": plgpu.RefUnion((ring, ring), out),
    }
    if static.quantized:
        scratch["k16"] = _tiled((B, D), static.q_dtype)
        scratch["v16"] = _tiled((B, D), static.v_dtype)
    if static.config.arch == "sm90":
        scratch["q_ready"] = plgpu.Barrier()
        scratch["ready"] = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    return scratch


def _swizzle(columns: int, dtype: Any) -> int:
    """Bytes of a row of an SMEM tile; 128 unless the array is narrower."""
    return min(128, columns * jnp.dtype(dtype).itemsize)


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """SMEM in tiles of 8 rows, swizzled: no bank conflicts, and what ldmatrix reads fastest."""
    swizzle = _swizzle(shape[-1], dtype)
    tiling = (8, swizzle // jnp.dtype(dtype).itemsize)
    transforms = (
        plgpu.TilingTransform(tiling),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


# What differs between targets: the next four functions, and nothing else.


def _start_copy(config: Config, source: Ref, target: Ref, barrier: Ref) -> None:
    if config.arch == "sm80":
        plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
    else:
        plgpu.copy_gmem_to_smem(source, target, barrier)


def _wait_copy(config: Config, barrier: Ref, pending: int) -> None:
    """Waits for the oldest copies, all but the `pending` last ones (or those of `barrier`)."""
    if config.arch == "sm80":
        plgpu.wait_gmem_to_smem(pending)
    else:
        plgpu.barrier_wait(barrier)


def _fence(config: Config) -> None:
    """Lets TMA overwrite SMEM that was read, or written, until here."""
    if config.arch == "sm90":
        plgpu.commit_smem()


def _mma(config: Config, acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    if config.interpret:
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
    return plgpu.mma(acc, a, b)


def _kernel(static: _Static, x: _Inputs, out: _Outputs, smem: _Scratch) -> None:
    slot, tile, head = (lax.axis_index(name) for name in ("slot", "tile", "head"))
    first, end = x.meta[tile, FIRST_SPLIT], x.meta[tile, END_SPLIT]
    if static.slots > 1:  # this block's one split; none past the tile's last
        first = first + slot
        end = jnp.minimum(first + 1, end)

    @pl.when(first < end)
    def _() -> None:
        barrier = smem.q_ready
        into = smem.q.at[pl.ds(0, x.q.shape[2])]  # whatever is in rows after these, none is used
        _start_copy(static.config, x.q.at[head, tile], into, barrier)
        _wait_copy(static.config, barrier, 0)

        @pl.loop(first, end)
        def _(split: jax.Array) -> None:
            peak, total, values = _attend_split(static, x, smem, head, tile, split)
            at = (head, tile, slot)
            if static.slots > 1:
                _write_rows(static, smem, out.values.at[at], values)
                out.peak[at], out.total[at] = peak, total
            else:
                _fold_into(
                    _Outputs(*(ref.at[at] for ref in out)), peak, total, values, split == first
                )


def _write_rows(static: _Static, smem: _Scratch, out: Ref, values: tuple[jax.Array, ...]) -> None:
    """The first `rows` rows, through SMEM: registers cannot be cut inside a tile of 64 rows."""
    _, staged = smem.shared
    for i, part in enumerate(values):
        staged[:, i * CHUNK : (i + 1) * CHUNK] = part
    out[...] = staged[: static.rows]


def _fold_into(
    out: _Outputs,
    peak: jax.Array,
    total: jax.Array,
    values: tuple[jax.Array, ...],
    is_first: jax.Array,
) -> None:
    """Folds a split into what this block wrote before: each thread reads its own elements."""

    @pl.when(is_first)
    def _() -> None:
        out.peak[...], out.total[...] = peak, total
        for i, part in enumerate(values):
            out.values[:, i * CHUNK : (i + 1) * CHUNK] = part

    @pl.when(jnp.logical_not(is_first))
    def _() -> None:
        old_peak = plgpu.load(out.peak, layout=PER_ROW, optimized=False)
        old_total = plgpu.load(out.total, layout=PER_ROW, optimized=False)
        new_peak = jnp.maximum(old_peak, peak)
        left, right = power_of_two(old_peak - new_peak), power_of_two(peak - new_peak)
        out.peak[...], out.total[...] = new_peak, old_total * left + total * right
        left, right = _across(left, CHUNK), _across(right, CHUNK)
        for i, part in enumerate(values):
            ref = out.values.at[:, i * CHUNK : (i + 1) * CHUNK]
            before = plgpu.load(ref, layout=ACC, optimized=False)
            ref[...] = before * left + part * right


def _across(x: jax.Array, columns: int) -> jax.Array:
    """A value a row, [M] → [M, columns]."""
    spread = lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))
    return plgpu.layout_cast(spread, ACC)


def _down(x: jax.Array) -> jax.Array:
    """A value a column, [B] → [M, B]."""
    spread = lax.broadcast_in_dim(x, (ROWS, x.shape[0]), (1,))
    return plgpu.layout_cast(spread, ACC)


def _attend_split(
    static: _Static,
    x: _Inputs,
    smem: _Scratch,
    head: jax.Array,
    tile: jax.Array,
    split: jax.Array,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """(peak [M], total [M], values as D / 64 arrays [M, 64]) over the blocks of one split."""
    config, B = static.config, static.block
    stages = config.stages
    (k_ring, v_ring), _ = smem.shared
    low, high = x.meta[tile, LOW], x.meta[tile, HIGH]
    length, sequence = x.meta[tile, LENGTH], x.meta[tile, SEQUENCE]
    begin = jnp.maximum(low, split * config.split) // B
    last = (jnp.minimum(high, (split + 1) * config.split) - 1) // B
    per_page = static.page_size // B

    def page_of(block: jax.Array) -> jax.Array:
        return x.table[sequence, jnp.minimum(block, last) // per_page]

    def start(block: jax.Array, page: jax.Array) -> None:
        """Past the last block the last one is copied again: how many copies is static."""
        at = lax.rem(block - begin, stages)
        rows = pl.ds(lax.rem(jnp.minimum(block, last), per_page) * B, B)
        barrier = None if smem.ready is None else smem.ready.at[at]
        _fence(config)
        _start_copy(config, x.k.at[page, head, rows], k_ring.at[at], barrier)
        _start_copy(config, x.v.at[page, head, rows], v_ring.at[at], barrier)

    def wait(block: jax.Array, pending: int) -> jax.Array:
        at = lax.rem(block - begin, stages)
        _wait_copy(config, None if smem.ready is None else smem.ready.at[at], pending)
        return at

    for i in range(stages - 1):
        start(begin + i, page_of(begin + i))

    def step(block: jax.Array, carry: Any) -> Any:
        state, page, here = carry
        ahead = block + stages - 1
        at = wait(block, 2 * (stages - 2))
        next_page = page_of(ahead + 1)  # a step early: its latency hides behind this block
        start(ahead, page)
        state = _attend_block(
            static, x, smem, state, block * B, low, length,
            k_ring.at[at], v_ring.at[at], head, tile, here,
        )  # fmt: skip
        return state, next_page, page_of(block + 1)

    state = (
        plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), PER_ROW),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW),
        tuple(
            plgpu.layout_cast(jnp.zeros((ROWS, CHUNK), jnp.float32), ACC)
            for _ in range(static.head_dim // CHUNK)
        ),
    )
    carry = (state, page_of(begin + stages - 1), page_of(begin))
    (peak, total, values), _, _ = lax.fori_loop(begin, last + 1, step, carry)
    for i in range(stages - 1):  # the copies past the last block
        wait(last + 1 + i, 0)
    if static.quantized and not static.dynamic_scales:
        v_scale = x.v_scales[head]
        values = tuple(part * v_scale for part in values)
    return peak, total, values


def _attend_block(
    static: _Static,
    x: _Inputs,
    smem: _Scratch,
    state: Any,
    start: jax.Array,
    low: jax.Array,
    length: jax.Array,
    k: Ref,
    v: Ref,
    head: jax.Array,
    tile: jax.Array,
    page: jax.Array,
) -> Any:
    """One step of the online softmax: KV positions `start` to `start` + B, in page `page`."""
    config, B = static.config, static.block
    peak, total, values = state
    if static.quantized:
        _decode(static, k, smem.k16)
        _decode(static, v, smem.v16)
        k, v = smem.k16, smem.v16
    else:
        _zero_unread(static, v, start, low, length)

    s = _scores(static, smem.q, k)
    factor = static.scale
    if static.quantized and not static.dynamic_scales:
        factor = factor * x.k_scales[head]
    seen = _seen(static, x.positions.at[tile], start)
    if static.dynamic_scales:
        s = s * _down(_block_scales(static, x.k_scales, page, head, start))
    if static.softcap is not None:
        s = jnp.tanh(s * (factor / static.softcap)) * (static.softcap * LOG2E)
    else:
        s = s * (factor * LOG2E)
    # The select stands between this product and the subtraction below: fused in one program and
    # not in another they would differ.
    s = jnp.where(seen, s, -jnp.inf)

    new_peak = jnp.maximum(peak, _ceil(jnp.maximum(jnp.max(s, axis=1), FLOOR)))
    alpha = power_of_two(peak - new_peak)
    p = jnp.exp2(s - _across(new_peak, B))
    total = total * alpha + jnp.sum(p, axis=1)
    if static.dynamic_scales:
        p = p * _down(_block_scales(static, x.v_scales, page, head, start))
        p = jnp.where(seen, p, 0.0)  # the scale of a slot that nobody wrote may be NaN
    smem.p[...] = p.astype(static.v_dtype)
    alpha = _across(alpha, CHUNK)
    p16 = plgpu.load(smem.p, layout=LAYOUT.MMA_LHS(static.v_dtype))
    values = tuple(_add_values(config, p16, v, part * alpha, i) for i, part in enumerate(values))
    return new_peak, total, values


def _seen(static: _Static, positions: Ref, start: jax.Array) -> jax.Array:
    """bool [M, B]: which KV positions from `start` on each row sees."""
    shape = (ROWS, static.block)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ACC) + start
    at = _across(plgpu.load(positions, layout=PER_ROW, optimized=False), static.block)
    seen = column <= at
    if static.window is not None:
        seen &= column > at - static.window
    return seen


def _scores(static: _Static, q: Ref, k: Ref) -> jax.Array:
    """q kᵀ, float32 [M, B]."""
    s = plgpu.layout_cast(jnp.zeros((ROWS, static.block), jnp.float32), ACC)
    for i in range(static.head_dim // CHUNK):
        columns = slice(i * CHUNK, (i + 1) * CHUNK)
        a = plgpu.load(q.at[:, columns], layout=LAYOUT.MMA_LHS(static.q_dtype))
        b = plgpu.load(k.at[:, columns].transpose((1, 0)), layout=LAYOUT.MMA_RHS(static.q_dtype))
        s = _mma(static.config, s, a, b)
    return s


def _add_values(config: Config, p: jax.Array, v: Ref, acc: jax.Array, i: int) -> jax.Array:
    """acc + p v, for columns 64 i to 64 i + 64 of v."""
    v = v.at[:, i * CHUNK : (i + 1) * CHUNK]
    b = plgpu.load(v, layout=LAYOUT.MMA_RHS(p.dtype))
    return _mma(config, acc, p, b)


def _ceil(x: jax.Array) -> jax.Array:
    """For values within int32: Mosaic GPU has no ceil."""
    down = x.astype(jnp.int32).astype(jnp.float32)
    return jnp.where(down < x, down + 1.0, down)


def _block_scales(
    static: _Static, scales: Ref, page: jax.Array, head: jax.Array, start: jax.Array
) -> jax.Array:
    """float32 [B]: a scale a column."""
    rows = pl.ds(lax.rem(start, static.page_size), static.block)
    return plgpu.load(scales.at[page, head, rows], layout=PER_COLUMN, optimized=False)


def _copy_layout(static: _Static) -> Any:
    """Of [B, D] 16-bit values: 16 bytes a thread, in the order of the SMEM tiles."""
    return LAYOUT.SMEM_GMEM_COPY((static.block, static.head_dim), jnp.bfloat16, 128)


def _decode(static: _Static, source: Ref, target: Ref) -> None:
    """int8 or e4m3 → 16 bits, exactly. Scales come later."""
    raw = plgpu.load(source, layout=_copy_layout(static), optimized=False)
    if static.quantized == "int8":
        # Ampere converts integers to no 16-bit float that LLVM would let us name: float32 between.
        target[...] = raw.astype(jnp.float32).astype(target.dtype)
        return
    # The e4m3 bits are those of a wider float, but for the exponent's bias. NaN becomes 480.
    shift, bias = (4, 120) if target.dtype == jnp.bfloat16 else (7, 8)
    bits = raw.astype(jnp.int16)
    bits = (bits & -(2**15)) | ((bits & 0x7F) << shift)
    target[...] = lax.bitcast_convert_type(bits, target.dtype) * 2.0**bias


def _zero_unread(
    static: _Static, v: Ref, start: jax.Array, low: jax.Array, length: jax.Array
) -> None:
    """Slots outside `low` to `length` may hold NaN, and 0 * NaN is NaN."""

    @pl.when(jnp.logical_or(start < low, start + static.block > length))
    def _() -> None:
        layout = _copy_layout(static)
        slot = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=layout) + start
        values = plgpu.load(v, layout=layout, optimized=False)
        v[...] = jnp.where((slot >= low) & (slot < length), values, 0)
