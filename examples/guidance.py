"""Classifier-free guidance for text (Sanchez et al. 2023), by the engine as a value.

Two rows of one state, the prompt and a prompt without what is wanted; a function of logits mixes
them, and each step's token goes to both.
"""

import jax.numpy as jnp
import numpy as np

from jaxinfer import LLM, LogitsFn, SamplingParams

PROMPT = '"""Reads numbers from a file and returns their sum."""\n\ndef total(path):\n'
WITHOUT = "def total(path):\n"


def guided(logits, rows, aux):
    """logits [2, V]: those of the second row, and `aux` times what the first makes of them."""
    wanted, without = logits
    mixed = without + aux[0] * (wanted - without)
    return jnp.stack([mixed, mixed])


def main(scales=(1.0, 1.5, 3.0), tokens=48):
    found = []
    with LLM("demo", dtype="float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for scale in scales:
            fn = LogitsFn(guided, np.float32(scale))
            step, state = llm.functional([PROMPT, WITHOUT], params, logits_fn=fn)
            said = []
            for _ in range(tokens):
                state, out = step(llm.params, state)
                said.append(int(out.tokens[0]))
                both = jnp.full(2, said[-1], jnp.int32)
                state = state._replace(seq=state.seq._replace(tokens=both))
            found.append(tuple(said))
            print(f"--- scale {scale}\n{llm.tokenizer.decode(said)}")
        return found, llm.generate(PROMPT, params)[0].outputs[0].token_ids


if __name__ == "__main__":
    main()
