"""Requests in the middle of their answers, on disk beside the engine's state; see `LLM.save`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer import sampling
from jaxinfer.detokenizer import DetokState
from jaxinfer.errors import CheckpointError
from jaxinfer.requests import Request, Sample
from jaxinfer.state import (
    EngineState,
    from_plain,
    plain,
    plain_params,
    read_params,
    record,
    to_plain,
)
from jaxinfer.types import Logprob


@dataclass(frozen=True)
class Saved:
    """What goes on after a restart.

    Attributes:
        engine: its sequences are samples of `requests`.
        next_id: of the request that comes next.
        seeds: state of the generator that draws seeds, of `random.Random.getstate`.
    """

    engine: EngineState
    requests: list[Request]
    next_id: int
    seeds: tuple[Any, ...]


def save(directory: str | Path, saved: Saved) -> None:
    """Writes a directory, whole or not at all. Raises as `checkpoints.engine_state.save_state`."""
    from checkpoints.engine_state import save_state

    engine, arrays = to_plain(saved.engine)
    host = {
        "engine": engine,
        "requests": [_plain_request(request) for request in saved.requests],
        "next_id": saved.next_id,
        "seeds": saved.seeds,
    }
    save_state(directory, host, arrays)


def load(directory: str | Path) -> Saved:
    """Reads what `save` wrote.

    Raises:
        CheckpointError: it is not whole, not of this version, or something else.
    """
    from checkpoints.engine_state import load_state

    host, arrays = load_state(directory)
    try:
        version, words, gauss = host["seeds"]
        saved = Saved(
            from_plain(host["engine"], arrays),
            [_request(fields) for fields in host["requests"]],
            host["next_id"],
            (version, tuple(words), gauss),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{directory}: not what was saved: {type(error).__name__}: {error}"
        ) from error
    owned = {s.sequence for r in saved.requests for s in r.samples if s.finish_reason is None}
    live = {one.id for one in saved.engine.live}
    if owned != live:
        raise CheckpointError(
            f"{directory}: sequences {sorted(live)} of the engine are not those of the requests, "
            f"{sorted(owned, key=str)}"
        )
    return saved


def distinct(requests: Iterable[Request]) -> list[Request]:
    """Each once, in the order in which they come first."""
    return list({id(request): request for request in requests}.values())


def _plain_request(request: Request) -> dict[str, Any]:
    return {
        "id": request.id,
        "prompt": request.prompt,
        "prompt_ids": [int(i) for i in request.prompt_ids],
        "params": plain_params(request.params),
        "seed": plain(request.seed),
        "limit": request.limit,
        "eos_ids": list(request.eos_ids),
        "priority": request.priority,
        "cached": request.cached,
        "scores": [plain(scores) for scores in request.scores],
        "samples": [_plain_sample(sample) for sample in request.samples],
    }


def _plain_sample(sample: Sample) -> dict[str, Any]:
    positions = [
        [[token, one.logprob, one.rank, one.decoded_token] for token, one in entries.items()]
        for entries in sample.logprobs
    ]
    return vars(sample) | {"logprobs": positions}


def _request(fields: Mapping[str, Any]) -> Request:
    request = Request(
        id=fields["id"],
        prompt=fields["prompt"],
        prompt_ids=tuple(fields["prompt_ids"]),
        params=read_params(fields["params"]),
        seed=fields["seed"],
        limit=fields["limit"],
        eos_ids=tuple(fields["eos_ids"]),
        samples=[_sample(sample) for sample in fields["samples"]],
        scores=[record(sampling.Logprobs, scores) for scores in fields["scores"]],
        priority=fields["priority"],
        cached=fields["cached"],
    )
    request.unfinished = sum(s.finish_reason is None for s in request.samples)
    return request


def _sample(fields: Mapping[str, Any]) -> Sample:
    positions = [
        {token: Logprob(*rest) for token, *rest in entries} for entries in fields["logprobs"]
    ]
    detok = fields["detok"]
    if detok is not None:
        detok = DetokState(tuple(detok[0]), *detok[1:])
    return Sample(**{**fields, "logprobs": positions, "detok": detok})
