"""How many of a proposer's guesses hold, over some prompts.

Counts alone: nothing of it depends on the machine's speed.

Letters: S sequences, k guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig, Speculative
from jaxinfer.drafting import Drafter, proposer
from jaxinfer.models.decoder import Params
from jaxinfer.sampling import pack_row, stack_rows
from jaxinfer.speculate import Accepted, Drawing, State, step
from jaxinfer.types import SamplingParams
from jaxinfer.windows import begin, model_forward

PAGE = 32  # tokens; of the caches that are made here
AT_ONCE = 16  # sequences

Step = Callable[[State, Mapping[str, Params]], tuple[State, Accepted]]


class Counts(NamedTuple):
    """Over all sequences.

    Attributes:
        taken: guesses that hold.
        attempted: guesses up to and including the first of each step that was refused.
        steps: of each sequence, summed.
    """

    taken: int
    attempted: int
    steps: int

    @property
    def acceptance(self) -> float:
        """Of attempted guesses, the share that holds; 0 where there was none."""
        return self.taken / max(self.attempted, 1)

    @property
    def mean_added(self) -> float:
        """Tokens that a step adds, from 1 to k + 1."""
        return 1 + self.taken / max(self.steps, 1)


def prepare(
    configs: Mapping[str, ModelConfig], how: Speculative, temperature: float = 0.0
) -> tuple[Step, dict[str, ModelConfig]]:
    """(The compiled step, whose state is donated; configs of the models that it runs).

    Args:
        configs: of `target`, and of `draft` where that is the proposer.
        how: what guesses; its `draft` and `tokens` are not looked at.
        temperature: 0, or anything else: what `Drawing` is specialised to.
    """
    target = configs["target"]
    used = {"target": target}
    if how.method == "draft":
        used["draft"] = configs["draft"]
    run = partial(
        step, draft=proposer(Drafter(how, used.get("draft")), target),
        target=model_forward("target", target),
        drawing=Drawing(truncated=False, random=temperature > 0), rule=how.rule,
    )  # fmt: skip
    return jax.jit(run, donate_argnums=0), used


def count(
    run: Step,
    params: Mapping[str, Params],
    configs: Mapping[str, ModelConfig],
    prompts: Sequence[Sequence[int]],
    *,
    more: int,
    k: int,
    dtype: Any,
    temperature: float = 0.0,
) -> Counts:
    """Goes on from each prompt for `more` tokens, past tokens that would end it.

    Args:
        run, configs: of `prepare`, for the same temperature.
        params: by name, like `configs`.
        prompts: of one token at least; prompt i is drawn with seed i.
        more: tokens; with the prompt no more than either model's context.
        k: guesses of a step.
        dtype: of the caches.
        temperature: 0 is greedy.
    """
    totals = np.zeros(3, np.int64)
    sampling = SamplingParams(temperature=temperature)
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first : first + AT_ONCE]
        how = [
            pack_row(sampling, seed=first + i, sample=0, stop_ids=(), min_length=0)
            for i in range(len(some))
        ]
        rows = jax.tree.map(jnp.asarray, stack_rows(how))
        limits = [len(p) + more for p in some]
        state = begin(params, configs, some, rows, limits, k=k, page_size=PAGE, dtype=dtype)
        while np.any(np.asarray(state.active)):
            state, accepted = run(state, params)
            added, attempted = np.asarray(accepted.added), np.asarray(accepted.attempted)
            totals += (added - 1).clip(0).sum(), attempted.sum(), (added > 0).sum()
    return Counts(*totals.tolist())
