"""GRPO (Shao et al. 2024) with the engine that samples; the reward: prompt and completion parse.

Log-probabilities that come with tokens are used as they are: the gradient's forward has the same.
"""

import ast
from contextlib import suppress
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfer import LLM, SamplingParams, models

PROMPTS = ["def add(a, b):\n", "for name in names:\n", "class Point:\n", "if value is None:\n"]


def parses(text):
    with suppress(SyntaxError, ValueError):
        return float(bool(ast.parse(text)))
    return 0.0


def main(steps=24, group=16, tokens=24, rate=3e-5):
    llm, optimiser, history = LLM("demo", dtype="float32"), optax.adam(rate), []
    state, width = optimiser.init(llm.params), 16 + tokens  # no prompt has more than 16

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, ids, sampled, advantage):
        drawn, scores = ~jnp.isnan(sampled), models.apply(params, llm.config, ids[:, :-1]).logits
        now = jnp.take_along_axis(jax.nn.log_softmax(scores), ids[:, 1:, None], -1)[..., 0]
        moved = jnp.where(drawn, now - sampled, 0.0)  # 0 but for rounding: nothing to clip
        gain = jnp.exp(moved) * advantage * drawn
        return -gain.sum() / drawn.sum(), jnp.abs(moved).max()

    for step in range(steps):
        how = SamplingParams(n=group, seed=step, max_tokens=tokens, logprobs=0)
        samples = [(o, s) for o in llm.generate(PROMPTS, how) for s in o.outputs]
        reward = np.array([parses(o.prompt + s.text) for o, s in samples]).reshape(-1, group)
        advantage = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True) + 1e-4)
        ids = np.zeros((len(samples), width), int)
        sampled = np.full((len(samples), width - 1), np.nan)  # until a token was drawn
        for row, (o, s) in enumerate(samples):
            start, end = len(o.prompt_token_ids), len(o.prompt_token_ids + s.token_ids)
            ids[row, :end] = o.prompt_token_ids + s.token_ids
            sampled[row, start - 1 : end - 1] = [next(iter(e.values())).logprob for e in s.logprobs]
        (_, error), gradient = loss(llm.params, ids, sampled, advantage.reshape(-1, 1))
        updates, state = optimiser.update(gradient, state)
        llm.update_params(optax.apply_updates(llm.params, updates), version=step + 1)
        history.append((float(reward.mean()), float(error)))
        print(f"step {step}: {reward.mean():.0%} parse; log-probabilities differ by {error:.0e}")
    return history


if __name__ == "__main__":
    main()
