"""How often steps are compiled."""

from __future__ import annotations

from jaxinfer import LLM, SamplingParams
from tests.conftest import TinyModel


def test_steps_are_compiled_once(tiny: TinyModel) -> None:
    options = {
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_model_len": 128,
        "max_num_batched_tokens": 16,
    }
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    with LLM.from_params(tiny.params, tiny.config, max_steps=4, **options) as llm:
        compiler = llm.engine.compiler
        llm.generate([[1, 2]], greedy)
        assert compiler.count == 3  # a chunk, four decode steps at once, and one for the last
        llm.generate([[3, 4, 5]], greedy)
        llm.generate([list(range(1, 30))], greedy)  # two chunks, of the same size
        assert compiler.count == 3
        llm.generate([[1]], SamplingParams(seed=1, max_tokens=6))  # other kinds of sampling
        assert compiler.count == 6
        seconds = compiler.compile_seconds
        llm.generate([[2]], SamplingParams(temperature=0.5, seed=1, max_tokens=6))
        assert (compiler.count, compiler.compile_seconds) == (6, seconds)
