"""One prompt, read once, and sixteen continuations that share its pages.

`llm.functional` gives the engine as a value: a state, and a pure step from one state to the next.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import LLM, SamplingParams
from jaxinfer.functional import fork


def main(
    prompt="import os\n\n\ndef remove_all(paths):\n    for path in paths:\n        ", count=16
):
    with LLM("demo", dtype="float32", page_size=8) as llm:
        params = SamplingParams(temperature=0.8, seed=1, max_tokens=24, ignore_eos=True)
        step, state = llm.functional(prompt, params, rows=count)
        read = int(state.next_page) - 1
        state = jax.jit(fork)(state, 0, jnp.arange(1, count))
        shared = int(state.next_page) - 1

        def body(state, _):
            state, out = step(llm.params, state)
            return state, (out.tokens, out.logprobs.logprob)

        state, (tokens, logprobs) = jax.lax.scan(body, state, length=24)
        total = np.asarray(logprobs).sum(axis=0)
        for row in np.argsort(-total):
            text = llm.tokenizer.decode(np.asarray(tokens)[:, row].tolist())
            print(f"{total[row]:7.1f}  {text!r}")
        print(f"{shared} pages for {count} prompts of {read} pages")
        return np.asarray(tokens).T, read, shared


if __name__ == "__main__":
    main()
