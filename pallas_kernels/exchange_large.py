"""The kernel behind `exchange` of large messages: one launch, there and back.

Apart from `exchange`, because importing Mosaic changes the environment of the process.

Every device sums one slice of the message: it is sent the others' parts of that, and sends them the
sums. Block b of each device works on the same tiles of every slice, and says in words of the
others' memory how far it has come: with parts that it sent, and with sums. Memory is free again
when a block begins its next exchange: it has all sums of the one before, which the others sent when
they had read its parts; and it sends them nothing new before it has read their sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import exchange_ir as xi
from pallas_kernels.exchange_layout import (
    LARGE_BLOCKS,
    VECTOR,
    large_counters,
    large_flags,
    large_slices,
    slice_vectors,
)
from pallas_kernels.sm90_ir import add, const, inline_mgpu, mul

EACH = 4  # vectors of a tile that a thread handles
TILE = EACH * xi.THREADS  # vectors
BYTES = 16  # of a vector
STEPS = 64  # that a counter has room for in an exchange: more than there are tiles of a block
PARTS, SUMS = 0, 1


def exchange(x: jax.Array, link: jax.Array, *, devices: int) -> jax.Array:
    """As `exchange.exchange`, whose checks have passed."""
    body = partial(_block, devices=devices, vectors=x.size // VECTOR, op=xi.ADD[x.dtype])
    return xi.launch(body, x, link, blocks=LARGE_BLOCKS, name="exchange_large")


def _block(x_ref: Any, link_ref: Any, y_ref: Any, *, devices: int, vectors: int, op: str) -> None:
    share, room = -(-vectors // devices), slice_vectors(devices)
    tiles = -(-share // (TILE * LARGE_BLOCKS))
    assert tiles < STEPS

    @inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def run(ctx: Any, x: Any, link: Any, y: Any) -> None:
        del ctx
        x, link, y = (xi.address_of(ref) for ref in (x, link, y))
        block, thread = xi.block_and_thread()
        own = xi.pair(link, const(devices))
        (me,) = xi.load(xi.plus(link, None, 8 * (devices + 1)), 1)
        number = xi.count_up(xi.plus(own, mul(block, 4), 4 * large_counters(devices)), thread)
        base = mul(number, STEPS)

        def other(k: Any) -> Any:
            """The k-th of the others, each device beginning with another."""
            return arith.remui(add(add(me, 1), k), const(devices))

        def for_others(work: Callable[[Any], None]) -> None:
            @utils.fori(const(devices - 1), [])
            def each(k: Any, _: Any) -> list[Any]:
                work(other(k))
                return []

        def places(tile: Any) -> list[Any]:
            """This thread's vectors of a slice."""
            first = add(mul(add(mul(tile, LARGE_BLOCKS), block), TILE), thread)
            return [add(first, xi.THREADS * j) for j in range(EACH)]

        def in_message(device: Any, place: Any) -> tuple[Any, Any]:
            """Bytes before a vector of a device's slice, and whether there is one."""
            at = add(mul(device, share), place)
            valid = arith.andi(xi.below(place, const(share)), xi.below(at, const(vectors)))
            return mul(arith.select(valid, at, const(vectors - 1)), BYTES), valid

        def in_memory(kind: int, device: Any, place: Any) -> Any:
            """Bytes before a vector that `device` sent. One beyond the slice lies there too."""
            place = arith.minui(place, const(room - 1))
            start = 4 * large_slices(devices) + kind * devices * room * BYTES
            return add(mul(add(mul(device, room), place), BYTES), start)

        def flag(kind: int, device: Any) -> Any:
            start = large_flags(devices) + kind * devices * LARGE_BLOCKS
            return mul(add(add(mul(device, LARGE_BLOCKS), block), start), 4)

        def say(kind: int, tile: Any) -> None:
            """That this block has sent a tile to all others."""
            utils.warpgroup_barrier()
            is_first = xi.equal(thread, const(0))
            with utils.when(is_first):
                utils.inline_ptx("fence.acq_rel.sys;", has_side_effects=True)
                come = [add(add(base, tile), 1)]
                for_others(
                    lambda r: xi.store(
                        xi.plus(xi.pair(link, r), flag(kind, me)), come, is_first, ".relaxed.sys"
                    )
                )

        def wait(kind: int, tile: Any) -> None:
            """Until all others have sent a tile to this block."""
            wanted = add(add(base, tile), 1)
            with utils.when(xi.below(thread, const(devices - 1))):
                where = xi.plus(own, flag(kind, other(thread)))  # a thread for each of them

                def behind() -> list[Any]:
                    (now,) = xi.load(where, 1, ".acquire.sys")
                    left = arith.subi(now, wanted)
                    return [arith.cmpi(arith.CmpIPredicate.slt, left, const(0))]

                xi.until(behind)
            utils.warpgroup_barrier()

        def send_parts(tile: Any) -> None:
            def to(r: Any) -> None:
                peer, where = xi.pair(link, r), [in_message(r, place) for place in places(tile)]
                words = [xi.load(xi.plus(x, at), 4) for at, _ in where]
                for place, part, (_, valid) in zip(places(tile), words, where, strict=True):
                    xi.store(xi.plus(peer, in_memory(PARTS, me, place)), part, valid)

            for_others(to)
            say(PARTS, tile)

        def sum_up(tile: Any) -> None:
            wait(PARTS, tile)
            at_once = max(1, 2 * EACH // devices)  # more does not fit the registers
            for first in range(0, EACH, at_once):
                some = places(tile)[first : first + at_once]
                where = [in_message(me, place) for place in some]
                parts = [
                    [
                        # In the order of the devices, whoever sums.
                        xi.load(
                            arith.select(
                                xi.equal(me, const(r)),
                                xi.plus(x, at),
                                xi.plus(own, in_memory(PARTS, const(r), place)),
                            ),
                            4,
                            ".volatile",
                        )
                        for r in range(devices)
                    ]
                    for place, (at, _) in zip(some, where, strict=True)
                ]
                sums = [xi.total(op, of_place) for of_place in parts]

                def to(r: Any, some: Any = some, where: Any = where, sums: Any = sums) -> None:
                    peer = xi.pair(link, r)
                    for place, total, (_, valid) in zip(some, sums, where, strict=True):
                        xi.store(xi.plus(peer, in_memory(SUMS, me, place)), total, valid)

                for_others(to)
                for total, (at, valid) in zip(sums, where, strict=True):
                    xi.store(xi.plus(y, at), total, valid)
            say(SUMS, tile)

        def take_sums(tile: Any) -> None:
            wait(SUMS, tile)

            def of(r: Any) -> None:
                where = [in_message(r, place) for place in places(tile)]
                words = [
                    xi.load(xi.plus(own, in_memory(SUMS, r, place)), 4, ".volatile")
                    for place in places(tile)
                ]
                for total, (at, valid) in zip(words, where, strict=True):
                    xi.store(xi.plus(y, at), total, valid)

            for_others(of)

        @utils.fori(const(tiles + 2), [])
        def step(i: Any, _: Any) -> list[Any]:
            """A tile is sent while the one before is summed, and sums of the one before that are
            taken."""
            for late, work in enumerate((send_parts, sum_up, take_sums)):
                tile = arith.subi(i, const(late))
                with utils.when(xi.below(tile, const(tiles))):  # unsigned: not before the first
                    work(tile)
            return []

    run(x_ref, link_ref, y_ref)
