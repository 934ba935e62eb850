"""Everything that an engine may need to run, compiled before it serves; and checked.

Which programs there are follows from the buckets and from the kinds of sampling that are wanted.
Each is then run once on a probe: a few tokens whose keys and values, and the token after them, must
come out with the same bits from every program, which is what `invariant` promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np

from jaxinfer import batcher
from jaxinfer.batch import Plan
from jaxinfer.buckets import Buckets
from jaxinfer.cache import PagedCache
from jaxinfer.config import BatcherConfig
from jaxinfer.pages import pages_for
from jaxinfer.plans import Kind, SequenceSpec, make_plan, together, top_bucket
from jaxinfer.runner import Sampled, StepKey
from jaxinfer.types import SamplingParams

PROBE_TOKENS = 12  # with one more, no more than the smallest program takes
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9)


class WarmUp(NamedTuple):
    """What a warm-up did.

    Attributes:
        programs: compiled, by this call.
        seconds: that it took.
        step_bytes: temporary device memory of the hungriest program; 0 if the backend does not say.
        unequal: programs in which the probe's bits were not those of the others; none if all is
            well, or without `invariant`.
    """

    programs: int
    seconds: float
    step_bytes: int
    unequal: tuple[StepKey, ...]


def variants(params: Iterable[SamplingParams]) -> tuple[Kind, ...]:
    """The kinds of sampling that steps of such requests, in any company, may need."""
    kinds = {Kind.of(p) for p in params}
    subsets = chain.from_iterable(combinations(kinds, n) for n in range(1, len(kinds) + 1))
    return tuple(sorted({together(some) for some in subsets}, key=_size))


def covering(kinds: Sequence[Kind], wanted: Kind) -> Kind:
    """The first of `kinds` whose programs can do all that `wanted` needs; itself if none can."""
    return next((kind for kind in kinds if together((kind, wanted)) == kind), wanted)


def step_keys(
    params: Sequence[SamplingParams],
    *,
    limits: BatcherConfig,
    buckets: Buckets,
    invariant: bool,
    guesses: Sequence[int] = (),
) -> list[StepKey]:
    """Every program that requests with such parameters may need.

    Args:
        guesses: numbers of tokens that a step may guess for a row.
    """
    scores = {None} | {top_bucket(p.prompt_logprobs) for p in params}
    guessing = [
        (rows, 0, steps, None, k)
        for k in guesses
        for rows in buckets.guessing
        for steps in {1, limits.most_steps(k)}
    ]
    decode = [(rows, 0, steps, None, 0) for rows in buckets.rows for steps in {1, limits.max_steps}]
    mixed = [
        (rows, tokens, 1, score, 0)
        for score in scores
        for tokens in buckets.tokens
        for rows in buckets.mixed_rows(tokens)
    ]
    return [
        StepKey(
            rows=rows, tokens=tokens, chunks=limits.max_chunks if tokens else 0, pages=pages,
            page_size=limits.page_size, steps=steps, invariant=invariant, random=kind.random,
            truncated=kind.truncated, top=kind.top, score=score, guesses=k,
        )
        for kind in variants(params)
        for pages in buckets.pages
        for rows, tokens, steps, score, k in (*mixed, *decode, *guessing)
    ]  # fmt: skip


class Probe(NamedTuple):
    """A short prompt in row 0, and a longer one in row 1 that comes before it in the same step, so
    that the probe lies at the end of whatever a program computes.

    `tokens`, `others`: int32. `pages`, `other_pages`: where they are read into, by an engine that
    runs nothing.
    """

    tokens: np.ndarray
    others: np.ndarray
    pages: np.ndarray
    other_pages: np.ndarray


def probe(limits: BatcherConfig, vocab_size: int) -> Probe:
    """The probe of an engine; a token of output fits behind it."""
    count = min(PROBE_TOKENS, limits.max_model_len - 2, limits.max_num_batched_tokens - 1)
    tokens = (np.arange(count, dtype=np.int32) * 7 + 3) % vocab_size
    own = pages_for(count + 2, limits.page_size)
    room = (limits.num_pages - 1 - own) * limits.page_size
    others = max(0, min(limits.max_num_batched_tokens, limits.max_model_len - 1, room))
    if limits.max_num_seqs < 2 or limits.max_chunks < 2:
        others = 0
    pages = np.arange(1, 1 + own + pages_for(others, limits.page_size), dtype=np.int32)
    filler = (np.arange(others, dtype=np.int32) * 13 + 5) % vocab_size
    return Probe(tokens, filler, pages[:own], pages[own:])


def probing(of: Probe, key: StepKey, limits: BatcherConfig) -> batcher.Run:
    """Reads the probe into row 0, after as much of the others as fits, and samples the next token;
    a program that only decodes adds a token to what is there, as the last of its rows."""
    M, W = limits.max_num_seqs, batcher.granted_columns(limits)
    chunks, rows = [], np.arange(0)
    if key.chunks:
        rest = min(key.tokens - len(of.tokens), len(of.others))
        if rest > 0:
            pages = of.other_pages[: pages_for(rest, limits.page_size)]
            chunks.append(batcher.Prefill(1, 1, 0, rest, True, False, limits.max_model_len, pages))
        count = len(of.tokens)
        chunks.append(batcher.Prefill(0, 0, 0, count, True, True, limits.max_model_len, of.pages))
    else:
        rows = np.append(np.arange(1, min(key.rows, M)), 0)
    longest = max([len(of.tokens) + 1, *(chunk.stop for chunk in chunks)])
    return batcher.Run(
        steps=1, guesses=key.guesses, rows=rows, ids=rows, tokens=longest,
        columns=np.zeros(M, np.int32), pages=np.zeros((M, W), np.int32),
        chunks=tuple(chunks), released=np.full(M, bool(key.chunks)),
    )  # fmt: skip


def probe_plan(of: Probe, key: StepKey, limits: BatcherConfig) -> Plan:
    """What `probing` asks for, in the shapes of a key."""
    known = {0: of.tokens, 1: of.others}
    longest, size = limits.max_model_len, limits.page_size
    specs = {i: SequenceSpec(x, GREEDY, longest, seed=0) for i, x in known.items()}
    action = probing(of, key, limits)
    return make_plan(action, key, specs, known, table_width=pages_for(longest, size))


def probed(
    keys: Sequence[StepKey],
    of: Probe,
    limits: BatcherConfig,
    *,
    run: Callable[[StepKey, Plan], Sampled],
    cache: Callable[[], PagedCache],
) -> dict[StepKey, bytes]:
    """What each program makes of the probe: keys and values, those that lie in this process, and
    the token that follows.

    Programs that read prompts are given a token more, which the others decode.

    Args:
        keys: of the programs, some of which read prompts.
        of, limits: of an engine that runs nothing.
        run: runs a step of it.
        cache: its cache, as the last step left it.
    """
    read = next(key for key in keys if key.chunks)

    def said(key: StepKey, of: Probe) -> np.ndarray:
        plan = probe_plan(of, key, limits)
        place = int(plan.count) - 1
        if plan.chunks is not None:
            place = key.rows + int(np.argmax(plan.chunks.last))
        return np.asarray(run(key, plan).tokens)[0, place]

    longer = np.append(of.tokens, said(read, of)).astype(np.int32)
    found = {}
    for key in keys:
        if not key.chunks:
            said(read, of)
        following = said(key, of._replace(tokens=longer) if key.chunks else of)
        last = (cache().k[-1], cache().v[-1])  # layers, of each stage its own
        parts = (part for x in last for part in x.addressable_shards)
        written = (np.asarray(part.data[of.pages]) for part in parts)
        found[key] = b"".join([following.tobytes(), *(x.tobytes() for x in written)])
    return found


def _size(kind: Kind) -> tuple[int, int, int]:
    return int(kind.random), int(kind.truncated), -1 if kind.top is None else kind.top
