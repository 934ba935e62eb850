"""Paged attention for Hopper: TMA brings pages to shared memory, wgmma multiplies them.

A persistent grid walks the work list of `attention_plan`. In each block one warpgroup issues
copies, far ahead; the others compute, 64 query rows each, on the same keys and values.

What fixes a row's bits, in decode, chunk, verification and whole prompt alike: KV tiles and splits
cut at fixed positions; one matrix instruction shape; a running maximum that is an integer power of
two, so that every rescaling is exact; splits merged left to right.

Letters: T new tokens, S sequences, H query heads, K key/value heads, G = H / K, D head dim, N
pages, P pages a sequence, U units of work, R rows of a unit in scratch memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention_plan as ap
from pallas_kernels import sm90_quantised, sm90_rows
from pallas_kernels.attention_common import LOG2E, ROWS
from pallas_kernels.attention_plan import Work
from pallas_kernels.sm90_block import consume, produce
from pallas_kernels.sm90_config import (
    Config,
    default_config,
    planned_tokens,
    scratch_rows,
    tile_tokens,
    unit_rows,
)
from pallas_kernels.sm90_fragments import permuted
from pallas_kernels.sm90_overlap import attend_overlapped
from pallas_kernels.sm90_shapes import (
    BITS16,
    Refs,
    Shape,
    Swizzle,
    Tile,
    bytes_of,
)
from pallas_kernels.sm90_sums import attend_in_turn
from pallas_kernels.sm90_tiles import FEWEST_SMS, consumer_registers


def make_plan(
    query_starts: jax.Array, kv_lengths: jax.Array, *, T: int, H: int, K: int, D: int,
    max_kv: int, max_query: int, window: int | None, quantised: bool = False,
    config: Config | None = None, into: bool = False,
) -> Work:  # fmt: skip
    """The work list that `attend` walks; the layers of a step with the same window share one."""
    G = H // K
    config = config or default_config(max_query, G, D, quantised)
    T = planned_tokens(T, kv_lengths.shape[0], max_query, into)
    return ap.plan(
        query_starts, kv_lengths, T=T, max_kv=max_kv,
        tile_tokens=tile_tokens(max_query, G, quantised, config),
        window=window, walked=ap.splits_walked(T, K), rest=not into,
    )  # fmt: skip


@partial(
    jax.jit,
    static_argnames=(
        "max_query",
        "scale",
        "window",
        "softcap",
        "invariant",
        "config",
        "sm_count",
        "on_gpu",
    ),
)
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
    plan: Work | None = None,
    invariant: bool = True,
    into: jax.Array | None = None,
    config: Config | None = None,
    sm_count: int = FEWEST_SMS,
    on_gpu: bool = True,
) -> jax.Array:
    """As `paged_attention`, whose checks have passed.

    Args:
        plan: of `make_plan`, for these lengths, `max_query`, window and whether there is an
            `into`; built here if None.
        invariant: False lets a unit of several splits run through them without merging.
        config: tuning; by the shapes if None.
        sm_count: multiprocessors of the device, at most: units wait for each other, so that all
            blocks must be resident at once.
        on_gpu: False runs what the interpreter can: one block, no semaphores.
    """
    _, H, D = q.shape
    T = planned_tokens(q.shape[0], kv_lengths.shape[0], max_query, into is not None)
    _, K, page_size, _ = k_pages.shape
    P = page_table.shape[1]
    G = H // K
    quantised = k_pages.dtype != q.dtype
    config = config or default_config(max_query, G, D, quantised)
    if quantised and config.overlap:
        raise ValueError(f"{config}: overlap is not for 8-bit pages")
    if not on_gpu:  # without semaphores one team must walk all units in order
        config = replace(config, teams=1)
        if quantised:  # plain products want host threads, of which consumers block one each
            config = replace(config, consumers=1)
    rows = unit_rows(max_query, G, quantised, config)
    tokens = tile_tokens(max_query, G, quantised, config)
    if plan is None:
        plan = make_plan(
            query_starts, kv_lengths, T=T, H=H, K=K, D=D, max_kv=P * page_size,
            max_query=max_query, window=window, quantised=quantised, config=config,
            into=into is not None,
        )  # fmt: skip
    units = plan.units.shape[0]
    shape = Shape(
        T=T, H=H, K=K, D=D, page_size=page_size, columns=P, max_units=units,
        max_tiles=T // tokens + page_table.shape[0] + 1,
        scratch_rows=scratch_rows(max_query, G, P * page_size, tokens, config),
        dtype=q.dtype, kv_dtype=k_pages.dtype, scale=scale, window=window, softcap=softcap,
        sinks=sinks is not None, token_scales=k_scales is not None and k_scales.ndim == 3,
        rows=rows, box=min(max_query, rows // G, T), whole=max_query > tokens,
        merge=invariant and (max_query > tokens or ap.splits_walked(T, K) > 1),
        blocks=min(sm_count, -(-units * K // config.teams)) if on_gpu else 1,
        config=config, on_gpu=on_gpu, into=into is not None,
    )  # fmt: skip
    if quantised and on_gpu:
        q = permuted(q)
    inputs = [*plan, page_table, q, k_pages, v_pages]
    if k_scales is not None and v_scales is not None:
        inputs += [k_scales, v_scales]
    if sinks is not None:  # one a row, in units of log2
        of_row = jnp.arange(ROWS) % G
        inputs.append((sinks * LOG2E).reshape(K, G)[:, of_row].astype(jnp.float32))
    if into is None:
        return _kernel(shape)(*inputs)[0]
    out = jax.new_ref(into)  # written in place
    _kernel(shape)(*inputs, out)
    return jax.freeze(out)


def _box(s: Shape) -> list[Any]:
    """A box of q's tokens, and what is left of the 64 matrix rows of 128 bytes where it lands."""
    box = plgpu.SMEM((s.tokens, s.G, 64), s.dtype, transforms=(Swizzle(128),))
    return [box, plgpu.SMEM((s.padding,), jnp.int8)] if s.padding else [box]


def _staging(s: Shape, workers: int) -> list[Any]:
    """What passes through a consumer's part of shared memory, by turns: parts, rows, their boxes.

    One consumer may be done while another still needs what it has put there: a consumer's bytes
    must be the same in every form. Half of them stay unused where values have 16 bits.
    """
    twice = 2 * (s.D // 64)
    forms = [
        plgpu.SMEM((workers, s.rows, s.D), jnp.float32, transforms=(Tile((8, 32)), Swizzle(128))),
        plgpu.SMEM((workers, 2 * s.rows, s.D), s.dtype),
        plgpu.SMEM((workers, twice, s.rows, 64), s.dtype, transforms=BITS16),
        _box(s) * (workers * twice),
    ]
    if s.quantised and s.merge:  # of columns: what splits were merged to waits as wgmma has it
        columns = (Tile((8, 8)), Swizzle(32))
        forms.append(plgpu.SMEM((workers, s.D, s.rows), jnp.float32, transforms=columns))
    return forms


def _kernel(s: Shape) -> Any:
    c = s.config
    out_type = [] if s.into else [jax.ShapeDtypeStruct((s.T, s.H, s.D), s.dtype)]
    if s.scratch_rows:
        slots = (s.max_units, s.K)
        out_type += [
            jax.ShapeDtypeStruct((*slots, s.scratch_rows, s.D), jnp.float32),
            jax.ShapeDtypeStruct((*slots, 2, c.consumers * ROWS), jnp.float32),
        ]
    tiles = plgpu.SMEM(
        (c.teams * c.stages, s.tile, s.D),
        s.kv_dtype,
        transforms=bytes_of(s.D) if s.quantised else BITS16,
    )
    scales = plgpu.SMEM((c.teams * c.stages, s.tile), jnp.float32)
    workers = c.teams * c.consumers
    copier = 56 if s.quantised and workers == c.teams else 40  # registers of a copying thread
    arrivals = s.copies * (2 if s.token_scales else 1)
    filled = plgpu.Barrier(num_arrivals=arrivals, num_barriers=c.teams * c.stages)
    freed = plgpu.Barrier(num_arrivals=c.consumers, num_barriers=c.teams * c.stages)
    matrices = plgpu.SMEM((workers, s.D // 64, s.rows, 64), s.dtype, transforms=BITS16)
    boxes = _box(s) * (workers * (s.D // 64))
    scratch: dict[str, Any] = {
        # The same bytes as matrix rows, and as the tokens and heads that are copied there.
        "queries": plgpu.RefUnion(matrices, boxes),
        "k_smem": tiles,
        "v_smem": tiles,
        "staging": plgpu.RefUnion(*_staging(s, workers)),
        "q_full": plgpu.Barrier(num_arrivals=c.consumers * (s.D // 64), num_barriers=c.teams),
        "q_free": plgpu.Barrier(num_arrivals=c.consumers, num_barriers=c.teams),
        "k_full": filled,
        "v_full": filled,
        "k_free": freed,
        "v_free": freed,
    }
    if c.overlap:
        scratch["pins"] = plgpu.SMEM((workers, 16), jnp.float32)
    if s.quantised:
        scratch["weights"] = plgpu.SMEM((workers, s.rows, s.tile), s.dtype, transforms=BITS16)
        scratch["merged_rows"] = plgpu.SMEM((workers, 2, s.rows), jnp.float32)
        scratch["exchange"] = plgpu.SMEM((workers, s.rows, 4), jnp.float32)
    if s.token_scales:
        scratch |= {"k_scale_smem": scales, "v_scale_smem": scales}

    way = sm90_quantised if s.quantised else sm90_rows
    attend = attend_overlapped if c.overlap else partial(attend_in_turn, way)

    def body(*refs: Any, **scoped: Any) -> None:
        names = ["units", "counts", "columns", "page_table", "q", "k_pages", "v_pages"]
        names += ["k_scales", "v_scales"] if s.quantised else []
        names += ["sinks"] if s.sinks else []
        names += ["out"]
        names += ["o_parts", "ml_parts"] if s.scratch_rows else []
        r = Refs(dict(zip(names, refs, strict=True)) | scoped)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup >= workers)
        def _copy() -> None:
            if workers > 1:  # what it gives up, the others take
                plgpu.set_max_registers(copier, action="decrease")
            produce(s, r, warpgroup - workers)

        @pl.when(warpgroup < workers)
        def _compute() -> None:
            if workers > 1:
                plgpu.set_max_registers(
                    consumer_registers(workers, c.teams, copier), action="increase"
                )
            consume(s, r, warpgroup, attend)

    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(s.blocks,),
        grid_names=("block",),
        num_threads=workers + c.teams,
        thread_name="warpgroup",
        # Rows are reduced within a warp: hardly any scratch memory is needed for it.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=256),
        kernel_name="paged_attention",
    )
