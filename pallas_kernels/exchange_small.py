"""The kernel behind `exchange` of small messages: one launch, one way.

Apart from `exchange`, because importing Mosaic changes the environment of the process.

Each device writes its part straight into a slot of its own in every other device's memory, by
addresses that it is given, and reads the others' from its own memory. Words of data go with a word
that says which exchange they are of, in one store (NCCL's protocol LL does so): who waits for them
polls the data itself, and there is neither a barrier nor a fence. Slots are used in turns, two of a
device: who begins exchange i + 2 has the others' parts of i + 1, which they sent when done with i.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import exchange_ir as xi
from pallas_kernels.exchange_layout import LINE, SMALL_BLOCKS, message_lines, small_counters
from pallas_kernels.sm90_ir import add, bits_and, const, inline_mgpu, mul

LINE_BYTES = 16  # of four numbers, with what says which exchange they are of
AT_ONCE = 16  # lines that a thread waits for together, of all devices
ROUND = SMALL_BLOCKS * xi.THREADS  # lines; all blocks take part in each exchange, and count it


def exchange(x: jax.Array, link: jax.Array, *, devices: int) -> jax.Array:
    """As `exchange.exchange`, whose checks have passed."""
    body = partial(_block, devices=devices, count=x.size, op=xi.ADD[x.dtype])
    return xi.launch(body, x, link, blocks=SMALL_BLOCKS, name="exchange_small")


def _block(x_ref: Any, link_ref: Any, y_ref: Any, *, devices: int, count: int, op: str) -> None:
    lines = count // LINE
    rounds = -(-lines // ROUND)

    @inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def run(ctx: Any, x: Any, link: Any, y: Any) -> None:
        del ctx
        x, link, y = (xi.address_of(ref) for ref in (x, link, y))
        block, thread = xi.block_and_thread()
        own = xi.pair(link, const(devices))
        (me,) = xi.load(xi.plus(link, None, 8 * (devices + 1)), 1)
        number = xi.count_up(xi.plus(own, mul(block, 4), 4 * small_counters(devices)), thread)
        turn = mul(bits_and(number, 1), devices)
        is_me = [xi.equal(me, const(r)) for r in range(devices)]

        def slot(device: Any) -> Any:
            """The first line of a device's slot."""
            return mul(add(turn, device), message_lines())

        def line(index: Any) -> tuple[Any, Any]:
            """This thread's in a round, and whether there is one. What is beyond the end waits for
            the last line, and is thrown away."""
            at = add(mul(add(mul(index, SMALL_BLOCKS), block), xi.THREADS), thread)
            inside = xi.below(at, const(lines))
            return arith.select(inside, at, const(lines - 1)), inside

        peers = [xi.pair(link, const(r)) for r in range(devices)]

        @utils.fori(const(rounds), [])
        def send(i: Any, _: Any) -> list[Any]:
            at, inside = line(i)
            a, b = xi.load(xi.plus(x, mul(at, 2 * LINE)), 2)
            there = mul(add(slot(me), at), LINE_BYTES)
            for peer, mine in zip(peers, is_me, strict=True):
                valid = arith.andi(inside, xi.equal(mine, _no()))
                xi.store(xi.plus(peer, there), [a, number, b, number], valid, ".volatile")
            return []

        step = min(rounds, max(1, AT_ONCE // devices))

        @utils.fori(const(-(-rounds // step)), [])
        def receive(i: Any, _: Any) -> list[Any]:
            at = [line(add(mul(i, step), j)) for j in range(step)]
            starts = [slot(const(r)) for r in range(devices)]

            def stale() -> list[Any]:
                found, again = [], _no()
                for place, _ in at:
                    for start, mine in zip(starts, is_me, strict=True):
                        where = xi.plus(own, mul(add(start, place), LINE_BYTES))
                        a, f, b, g = xi.load(where, 4, ".volatile")
                        new = arith.andi(xi.equal(f, number), xi.equal(g, number))
                        again = arith.ori(again, xi.equal(arith.ori(new, mine), _no()))
                        found += [a, b]
                return [again, *found]

            words = iter(xi.until(stale, 2 * step * devices))
            for place, inside in at:
                kept = xi.load(xi.plus(x, mul(place, 2 * LINE)), 2)
                parts = [
                    [arith.select(mine, k, next(words)) for k in kept] for mine in is_me
                ]  # in the order of the devices, whoever sums
                xi.store(xi.plus(y, mul(place, 2 * LINE)), xi.total(op, parts), inside)
            return []

    run(x_ref, link_ref, y_ref)


def _no() -> Any:
    return xi.below(const(0), const(0))
