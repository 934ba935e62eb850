"""The random requests of `bench.soak`, and whether what came of one is right. No jax, no clock."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.workloads import Prompt, Scale
from jaxinfer.types import RequestOutput, SamplingParams

FAMILIES = 8
IN_FAMILY, CANCELLED, SEVERAL, SCORED, AGAIN = 0.4, 0.08, 0.2, 0.2, 0.1  # shares of the requests


@dataclass(frozen=True)
class Ask:
    """A request of the soak.

    Attributes:
        cancel_after: it is given up once so many tokens have come; None: never.
        expected: its tokens, where they are known beforehand.
    """

    prompt: Prompt
    params: SamplingParams
    priority: int = 0
    cancel_after: int | None = None
    expected: tuple[int, ...] | None = None

    @property
    def most_tokens(self) -> int:
        """That all its samples may come to, prompts included."""
        assert self.params.max_tokens is not None
        return self.params.n * (len(self.prompt) + self.params.max_tokens)


def asks(scale: Scale, vocab_size: int, seed: int) -> Iterator[Ask]:
    """Endless random requests: greedy and sampled, some with n > 1, priorities, log-probabilities,
    stop tokens, a prefix that others have too; some are to be cancelled."""
    r = random.Random(seed)

    def ids(n: int) -> Prompt:
        return [r.randrange(vocab_size) for _ in range(n)]

    def length(mean: int) -> int:
        return max(1, min(scale.soak_longest, round(r.lognormvariate(math.log(mean) - 0.5, 1))))

    families = [ids(r.randrange(1, 1 + scale.soak_longest // 2)) for _ in range(FAMILIES)]
    while True:
        own = ids(length(scale.soak_prompt))
        prompt = r.choice(families) + own if r.random() < IN_FAMILY else own
        tokens = length(scale.soak_tokens)
        params = SamplingParams(
            max_tokens=tokens,
            seed=r.randrange(1 << 31),
            ignore_eos=True,
            logprobs=0 if r.random() < SCORED else None,
            stop_token_ids=ids(r.choice((0, 0, 4, 20))),
            temperature=0,
        )
        if r.random() < 0.5:
            several = r.random() < SEVERAL  # of greedy ones there can be no more than one
            params = replace(
                params,
                n=r.randrange(2, 5) if several else 1,
                temperature=r.uniform(0.5, 1.2),
                top_k=r.choice((0, 50)),
                top_p=r.choice((1.0, 0.9)),
            )
        yield Ask(
            prompt[: scale.soak_longest],
            params,
            priority=r.choice((-1, 0, 0, 0, 1)),
            cancel_after=r.randrange(tokens) if r.random() < CANCELLED else None,
        )


def again(ask: Ask, output: RequestOutput, r: random.Random) -> Ask:
    """The same request with one of its own tokens to stop at: its result is known."""
    tokens = output.outputs[0].token_ids
    stop = tokens[r.randrange(len(tokens))]
    params = replace(ask.params, n=1, stop_token_ids=(*ask.params.stop_token_ids, stop))
    expected = tokens[: tokens.index(stop) + 1]
    return Ask(ask.prompt, params, ask.priority, expected=expected)


def wrong(ask: Ask, output: RequestOutput) -> str | None:
    """What is wrong with the result of a request that was not cancelled; None: nothing."""
    params = ask.params
    if not output.finished or len(output.outputs) != params.n:
        return f"finished={output.finished}, {len(output.outputs)} of {params.n} samples"
    for one in output.outputs:
        ids, last = one.token_ids, len(one.token_ids) - 1
        stops = [i for i, token in enumerate(ids) if token in params.stop_token_ids]
        full = len(ids) == params.max_tokens and stops in ([], [last])
        if one.finish_reason == "length" and not full:
            return f"ended with {len(ids)} of {params.max_tokens} tokens, stop tokens at {stops}"
        if one.finish_reason == "stop" and stops != [last]:
            return f"stopped with {len(ids)} tokens, stop tokens at {stops}"
        if one.finish_reason not in ("length", "stop"):
            return f"finish_reason={one.finish_reason!r}"
        if params.logprobs is not None and len(one.logprobs or ()) != len(ids):
            return f"{len(one.logprobs or ())} log-probabilities of {len(ids)} tokens"
    if ask.expected is not None and output.outputs[0].token_ids != ask.expected:
        return f"not the {len(ask.expected)} tokens that it had before, up to its stop token"
    return None
