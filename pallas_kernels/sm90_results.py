"""What the Hopper attention kernel does with a unit's results: stores them, or shares and folds."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention_plan as ap
from pallas_kernels import sm90_fragments as fragments
from pallas_kernels.attention_common import NEG, ROWS
from pallas_kernels.sm90_shapes import (
    COLUMN,
    FOLD,
    ROW,
    Place,
    Refs,
    Shape,
    along,
    box_of,
    widened_by,
)

# -- results -------------------------------------------------------------------------------------


def finish(s: Shape, r: Refs, at: Place, acc: Any, m: Any, total: Any) -> None:
    """Stores a unit's rows, or hands its part to the unit that folds the tile."""
    f = at.fields
    tokens = lax.min(f[ap.COUNT] - at.member * s.tokens, jnp.int32(s.tokens))

    def store_alone() -> None:
        layout = COLUMN if s.quantised else ROW
        factor = _normaliser(s, r, at.head, m, total, layout, s.rows)
        out = _as_rows(s, acc * along(s, factor)).astype(s.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if not (s.whole and s.on_gpu):
            r.staging[1].at[at.stage, pl.ds(0, s.rows)][...] = out
            _copy_out(s, r, at, tokens)
            return

        @pl.when(tokens == s.tokens)
        def _full() -> None:
            for part in range(s.D // 64):
                r.staging[2].at[at.stage, part][...] = out[:, part * 64 : (part + 1) * 64]
            plgpu.commit_smem()
            for worker in range(s.config.teams * s.config.consumers):
                pl.when(at.worker == worker)(partial(_copy_boxes, s, r, at, worker))

        @pl.when(tokens < s.tokens)
        def _partial() -> None:
            r.staging[1].at[at.stage, pl.ds(0, s.rows)][...] = out
            _copy_out(s, r, at, tokens)

    if not s.scratch_rows:
        pl.when(tokens > 0)(store_alone)
        return
    pl.when((f[ap.PARTS] == 1) & (tokens > 0))(store_alone)
    pl.when(f[ap.PARTS] > 1)(lambda: _share(s, r, at, tokens, acc, m, total))


def _as_rows(s: Shape, acc: Any) -> Any:
    return fragments.turned(s, acc) if s.quantised else acc


def _copy_boxes(s: Shape, r: Refs, at: Place, worker: int) -> None:
    """Staged rows of a full tile to the output at once."""
    tokens = pl.ds(at.fields[ap.TOKEN] + at.member * s.tokens, s.tokens)
    for part in range(s.D // 64):
        plgpu.copy_smem_to_gmem(
            box_of(s, r.staging[3], worker, part),
            r.out.at[tokens, pl.ds(at.head * s.G, s.G), pl.ds(part * 64, 64)],
            commit_group=False,
        )
    plgpu.commit_smem_to_gmem_group()


def _copy_out(s: Shape, r: Refs, at: Place, tokens: Any) -> None:
    """Staged rows to the output, a token at a time: the next rows are another sequence's."""
    plgpu.commit_smem()
    start = at.fields[ap.TOKEN] + at.member * s.tokens

    @pl.loop(0, tokens)
    def _token(t: Any) -> None:
        plgpu.copy_smem_to_gmem(
            r.staging[1].at[at.stage, pl.ds(t * s.G, s.G)],
            r.out.at[start + t, pl.ds(at.head * s.G, s.G)],
            commit_group=False,
        )

    plgpu.commit_smem_to_gmem_group()


# -- tiles shared by several units ---------------------------------------------------------------


def _share(s: Shape, r: Refs, at: Place, tokens: Any, acc: Any, m: Any, total: Any) -> None:
    """Writes this part to scratch memory and tells; the last one waits for the others and folds."""
    f, base, staged = at.fields, at.member * ROWS, r.staging[0].at[at.stage]
    slot = f[ap.SLOT] + f[ap.PART]
    rows = min(s.rows, s.scratch_rows)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staged[...] = _as_rows(s, acc)
    r.ml_parts.at[slot, at.head, 0, pl.ds(base, s.rows)][...] = m
    r.ml_parts.at[slot, at.head, 1, pl.ds(base, s.rows)][...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        r.staging[0].at[at.stage, pl.ds(0, rows)],
        r.o_parts.at[slot, at.head, pl.ds(base, rows)],
    )

    plgpu.wait_smem_to_gmem(0)
    last = f[ap.PART] == f[ap.PARTS] - 1

    # Without a GPU there are no counters: one team does the parts in order.
    @pl.when(~last)
    def _tell() -> None:
        if at.counters is not None:
            plgpu.semaphore_signal(at.counters.at[_counter(s, at)], 1, memory_scope="gpu")

    @pl.when(last)
    def _fold() -> None:
        if at.counters is not None:
            others = at.counters.at[_counter(s, at)]
            plgpu.semaphore_wait(others, f[ap.PARTS] - 1, memory_scope="gpu")

        @pl.when(tokens > 0)
        def _rows() -> None:
            _fold_rows(s, r, at)
            _copy_out(s, r, at, tokens)


def _counter(s: Shape, at: Place) -> Any:
    return (at.fields[ap.TILE_ID] * s.K + at.head) * s.config.consumers + at.member


def _fold_rows(s: Shape, r: Refs, at: Place) -> None:
    """Merges the parts of each row, left to right, into the staged output."""
    f, head = at.fields, at.head
    count = min(s.rows, s.scratch_rows)
    at_once = 8 if count <= 16 else 2  # parts in flight, to hide the latency of loads
    rows = pl.ds(at.member * ROWS, count)

    def spread(x: Any) -> Any:
        return lax.broadcast_in_dim(x, (count, s.D), (0,))

    def load(part: Any) -> tuple[Any, Any, Any]:
        slot = f[ap.SLOT] + part
        o = plgpu.load(r.o_parts.at[slot, head, rows], layout=FOLD, optimized=False)
        m, total = (
            plgpu.load(r.ml_parts.at[slot, head, i, rows], layout=FOLD.reduce(1), optimized=False)
            for i in range(2)
        )
        return o, m, total

    def fold(chunk: Any, carry: Any) -> Any:
        o, m, total = carry
        parts = [1 + chunk * at_once + u for u in range(at_once)]
        loaded = [load(lax.min(part, f[ap.PARTS] - 1)) for part in parts]
        for part, (o_now, m_now, total_now) in zip(parts, loaded, strict=True):
            # Past the last part: a weight of zero changes nothing.
            m_now = m_now + jnp.where(part < f[ap.PARTS], 0.0, 2 * NEG)
            m_before, m = m, jnp.maximum(m, m_now)
            before, now = jnp.exp2(m_before - m), jnp.exp2(m_now - m)
            o = o * spread(before) + o_now * spread(now)
            total = total * before + total_now * now
        return o, m, total

    chunks = lax.div(f[ap.PARTS] - 1 + at_once - 1, jnp.int32(at_once))
    o, m, total = lax.fori_loop(0, chunks, fold, load(0))
    factor = _normaliser(s, r, head, m, total, FOLD.reduce(1), count)
    r.staging[1].at[at.stage, pl.ds(0, count)][...] = (o * spread(factor)).astype(s.dtype)


def _normaliser(s: Shape, r: Refs, head: Any, m: Any, total: Any, layout: Any, count: int) -> Any:
    """What unnormalised rows are multiplied by in the end; 0 for rows that saw no key."""
    fade = None
    if s.sinks:  # a key without a value
        sink = plgpu.load(r.sinks.at[head, pl.ds(0, count)], layout=layout, optimized=False)
        m_sink = jnp.round(sink)
        top = jnp.maximum(m, m_sink)
        fade = jnp.exp2(m - top)
        total = total * fade + jnp.exp2(sink - m_sink) * jnp.exp2(m_sink - top)
    factor = jnp.where(total > 0, 1.0 / total, 0.0)
    if fade is not None:
        factor = factor * fade
    if s.quantised and (widened := widened_by(s)) != 1:
        factor = factor * (1 / widened)
    return factor * r.v_scales[head] if s.static_scales else factor
