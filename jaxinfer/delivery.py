"""Requests into the engine, and its updates back to the requests whose sequences they are of.

`owners` says which sequence of the engine belongs to which sample of which request, until it ends;
the functions here change it as they go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxinfer.engine import Engine
from jaxinfer.errors import FunctionFault, JaxinferError, QueueFull
from jaxinfer.observe import Update
from jaxinfer.replicas import Replicas
from jaxinfer.requests import Request, Sample, sequences, take

if TYPE_CHECKING:
    from jaxinfer.tokenizer import Tokenizer

Owners = dict[int, tuple[Request, Sample]]


def queue(
    engine: Engine | Replicas, owners: Owners, requests: Sequence[Request], max_waiting: int
) -> None:
    """Has the engine run requests, a sequence for each sample.

    Raises:
        QueueFull: more than `max_waiting` sequences would wait; all of them were left out.
    """
    wanted = sum(len(r.samples) for r in requests)
    if engine.waiting + wanted > max_waiting:
        raise QueueFull(
            f"{wanted} sequences do not fit in the queue: {engine.waiting} of "
            f"{max_waiting} wait already"
        )
    pairs = [(request, sample) for request in requests for sample in request.samples]
    ids = engine.submit([s for request in requests for s in sequences(request)])
    for sequence, (request, sample) in zip(ids, pairs, strict=True):
        sample.sequence = sequence
        owners[sequence] = (request, sample)


def deliver(
    update: Update,
    engine: Engine | Replicas,
    owners: Owners,
    *,
    tokenizer: Tokenizer | None,
    keep: Callable[[Request], None],
) -> None:
    """Gives an update to the request it belongs to, if that has not been given up meanwhile.

    What goes wrong with a request's own function or its text fails that request alone.

    Args:
        tokenizer: makes text of tokens; None: there is none.
        keep: is told of a request after each of its updates.
    """
    if update.id not in owners:
        return
    request, sample = owners[update.id]
    if update.fault is not None:
        request.failed = FunctionFault(update.fault, index=request.index, request_id=request.id)
        give_up(engine, owners, [request])
        return
    try:
        take(request, sample, update, tokenizer)
        keep(request)
    except Exception as error:
        request.failed = JaxinferError(f"{type(error).__name__}: {error}")
        give_up(engine, owners, [request])
        return
    if sample.finish_reason:
        del owners[update.id]
        engine.cancel(update.id, complete=True)


def give_up(engine: Engine | Replicas, owners: Owners, requests: Sequence[Request]) -> None:
    """Cancels what is left of requests; nothing where they have finished."""
    for sample in (s for request in requests for s in request.samples):
        if sample.sequence is not None and owners.pop(sample.sequence, None):
            engine.cancel(sample.sequence)


def fail_all(owners: Owners, error: JaxinferError) -> None:
    """Every request that has not ended has failed; the engine is not told."""
    for request, _ in owners.values():
        request.failed = error
    owners.clear()
