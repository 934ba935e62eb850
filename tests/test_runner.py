"""Shape buckets, and how often steps are compiled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import LLM, SamplingParams
from jaxinfer.batch import MIN_ROWS
from jaxinfer.runner import bucket, chunk_bucket, row_bucket
from tests.conftest import TinyModel


@given(n=st.integers(1, 100_000), minimum=st.integers(1, 64))
def test_buckets_hold_what_they_are_for(n: int, minimum: int) -> None:
    wanted = max(n, minimum)
    assert wanted <= bucket(n, minimum=minimum) < 2 * wanted
    for size, least in ((chunk_bucket(n), 2 * MIN_ROWS), (row_bucket(n), 1)):
        assert max(n, least) <= size < 2 * max(n, least)
        assert size & (size - 1) == 0


def test_page_buckets() -> None:
    assert sorted({bucket(n) for n in range(1, 49)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]


def test_steps_are_compiled_once(tiny: TinyModel) -> None:
    options = {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 128, "max_chunk": 16}
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    with LLM.from_params(tiny.params, tiny.config, max_steps=4, **options) as llm:
        compiler = llm.engine.compiler
        llm.generate([[1, 2]], greedy)
        assert compiler.count == 2  # a chunk and a decode step
        llm.generate([[3, 4, 5]], greedy)
        llm.generate([list(range(1, 30))], greedy)  # two chunks, of the same size
        assert compiler.count == 2
        llm.generate([[1]], SamplingParams(seed=1, max_tokens=6))  # other kinds of sampling
        assert compiler.count == 4
        seconds = compiler.compile_seconds
        llm.generate([[2]], SamplingParams(temperature=0.5, seed=1, max_tokens=6))
        assert (compiler.count, compiler.compile_seconds) == (4, seconds)
