"""Steering: a direction in the residual stream, found from examples and added while generating.

The direction is the mean activation of prompts of one kind less that of another (Turner et al.
2023). Each request has a scale of its own, all in one call.
"""

import numpy as np

from jaxinfer import LLM, Intervention, SamplingParams

SITE = "layers.4.resid"
TESTS = [
    "class TestParser(unittest.TestCase):\n    def test_",
    "        self.assertEqual(",
    "mock.",
]
OTHERS = ["class Parser:\n    def parse_", "        self.position = ", "return "]


def steer(where, x, aux):
    """x [T, E]; `aux` has each token's own request's values: [T] and [T, E]."""
    return x + aux["scale"][:, None] * aux["direction"]


def main(prompt="class Reader:\n    def ", scales=(0.0, 0.3, 0.6, -0.3), tokens=24):
    with LLM("demo", dtype="float32") as llm:

        def mean(prompts):
            found = llm.logprobs(prompts, capture=(SITE,))
            return np.mean([one.activations[SITE][-1] for one in found], axis=0)

        direction = mean(TESTS) - mean(OTHERS)
        each = [
            Intervention(steer, (SITE,), {"scale": np.float32(scale), "direction": direction})
            for scale in scales
        ]
        params = SamplingParams(temperature=0, max_tokens=tokens)
        outputs = llm.generate([prompt] * len(scales), params, intervene=each)
        for scale, output in zip(scales, outputs, strict=True):
            print(f"--- scale {scale}\n{prompt}{output.outputs[0].text}")
        plain = llm.generate(prompt, params)[0].outputs[0].text
        return [output.outputs[0].text for output in outputs], plain


if __name__ == "__main__":
    main()
