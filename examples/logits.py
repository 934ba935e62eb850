"""Functions of logits: tokens that are banned, and a contrast with an earlier layer, chained.

Decoding by contrasting layers (DoLa, Chuang et al. 2023) takes from the logits those of an early
exit, where tokens are plausible at all. The functions run inside the compiled step; sampling
follows them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import LLM, Chain, LogitsFn, SamplingParams
from jaxinfer.models.decoder import logits as project
from pallas_kernels.rms_norm import reference as rms_norm

EARLY = "layers.3.resid"


def ban(logits, rows, aux):
    """logits [S, V]; `aux` [S, n]: each request's own list."""
    banned = jnp.any(jnp.arange(logits.shape[1]) == aux[:, :, None], axis=1)
    return jnp.where(banned, -jnp.inf, logits)


def main(prompts=("import ", "def main(", "for i in "), tokens=16):
    with LLM("demo", dtype="float32") as llm:
        weights, eps = llm.params, llm.config.norm_eps  # constants of the program: a small model's

        def contrast(logits, rows, aux):
            _, hidden = rms_norm(rows.activations[EARLY], weights["final_norm"], eps)
            late, early = (jax.nn.log_softmax(x) for x in (logits, project(weights, hidden)))
            plausible = late >= late.max(axis=1, keepdims=True) + jnp.log(0.1)
            return jnp.where(plausible, late - aux[:, None] * early, -jnp.inf)

        banned = np.array(
            [llm.tokenizer.encode(word)[0] for word in ("os", "sys", "self", "range")]
        )
        params = SamplingParams(temperature=0, max_tokens=tokens)
        functions = {
            "plain": None,
            "banned": LogitsFn(ban, banned),
            "contrast": LogitsFn(contrast, np.float32(0.5), sites=(EARLY,)),
            "both": LogitsFn(Chain((contrast, ban)), (np.float32(0.5), banned), sites=(EARLY,)),
        }
        found = {}
        for name, function in functions.items():
            outputs = llm.generate(list(prompts), params, logits_fn=function)
            found[name] = [output.outputs[0].token_ids for output in outputs]
            print(f"{name:<9}", *(repr(o.prompt + o.outputs[0].text) for o in outputs))
        return found, set(banned.tolist())


if __name__ == "__main__":
    main()
