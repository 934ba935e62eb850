"""Requests sent to an asyncio engine when they are due, and the times of what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from bench.engines import Output, Request

# A request and its number to the tokens that are new, piece by piece.
Pieces = Callable[[Request, int], AsyncIterator[Sequence[int]]]


async def serve(pieces: Pieces, requests: Sequence[Request]) -> list[Output]:
    """All requests, each by a client of its own; a piece's tokens come together."""
    began = time.perf_counter()

    async def client(number: int, request: Request) -> Output:
        await asyncio.sleep(max(0.0, began + request.due - time.perf_counter()))
        output = Output([], [])
        async for tokens in pieces(request, number):
            now = time.perf_counter() - began
            output.tokens.extend(tokens)
            output.times.extend([now] * len(tokens))
        return output

    return await asyncio.gather(*(client(i, r) for i, r in enumerate(requests)))
