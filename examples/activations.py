"""The logit lens (nostalgebraist 2020): what each layer would say next, had it the last word.

Captures the residual stream after every layer while a prompt is completed, and sends it through
the final norm and the output projection.
"""

import jax.numpy as jnp

from jaxinfer import LLM, SamplingParams
from jaxinfer.models.decoder import logits
from pallas_kernels.rms_norm import reference as rms_norm


def main(prompt="import os\n\nclass File:\n    def __init__(self, path):\n        self."):
    with LLM("demo", dtype="float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=1)
        (output,) = llm.generate(prompt, params, capture=("layers.*.resid",))
        (sample,) = output.outputs
        said = []
        for site, x in sample.activations.items():  # [tokens, hidden size] each
            _, hidden = rms_norm(jnp.asarray(x), llm.params["final_norm"], llm.config.norm_eps)
            scores = logits(llm.params, llm.config, hidden)[-1]
            said.append([llm.tokenizer.decode([int(i)]) for i in jnp.argsort(-scores)[:5]])
            print(f"{site:<16}", *(f"{token!r:<12}" for token in said[-1]))
        print(f"{'the model says':<16} {sample.text!r}")
        return said, sample.text


if __name__ == "__main__":
    main()
