"""States and steps as values: the engine's tokens without its loop; forks, maps, what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import restore, save
from jaxinfer import LLM, CapacityError, InvalidRequest, LogitsFn, SamplingParams
from jaxinfer.functional import Functional, Out, State, fork
from tests.conftest import TinyModel, small_llm

PROMPTS = [[5, 6, 7], [300], [*range(9, 40)], [*range(50, 66)]]  # the last: two whole pages
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
RANDOM = SamplingParams(seed=3, top_p=0.95, max_tokens=9, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    with small_llm(tiny, max_num_seqs=8) as llm:
        yield llm


def run(llm: LLM, made: Functional, steps: int) -> tuple[State, list[Out]]:
    state, found = made.state, []
    for _ in range(steps):
        state, out = made.step(llm.params, state)
        found.append(jax.tree.map(np.asarray, out))
    return state, found


def tokens(found: Sequence[Out]) -> list[tuple[int, ...]]:
    """Of each row, those before it stopped."""
    rows = np.array([out.tokens for out in found]).T
    return [tuple(int(t) for t in row if t >= 0) for row in rows]


def test_tokens_are_those_of_generate(llm: LLM) -> None:
    params = [GREEDY, RANDOM, replace(RANDOM, max_tokens=4), replace(RANDOM, ignore_eos=False)]
    outputs = llm.generate(PROMPTS, params)
    _, found = run(llm, llm.functional(PROMPTS, params), 10)
    assert tokens(found) == [o.outputs[0].token_ids for o in outputs]
    for row, output in enumerate(outputs[1:], 1):
        entries = output.outputs[0].logprobs or ()
        want = [e[t].logprob for t, e in zip(output.outputs[0].token_ids, entries, strict=True)]
        got = [out.logprobs.logprob[row] for out in found[: len(want)]]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_it_is_a_value(llm: LLM) -> None:
    """The same state gives the same again; `scan` is the loop; a run can begin in the middle."""
    made = llm.functional(PROMPTS, RANDOM)
    middle, first = run(llm, made, 3)
    _, second = run(llm, made._replace(state=middle), 4)
    assert tokens(first + second) == tokens(run(llm, made, 7)[1])

    def body(state: State, _: None) -> tuple[State, jax.Array]:
        state, out = made.step(llm.params, state)
        return state, out.tokens

    _, scanned = jax.lax.scan(body, made.state, length=7)
    assert np.array_equal(np.asarray(scanned), [out.tokens for out in first + second])


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_forks_are_the_samples_of_one_request(llm: LLM, prompt: list[int]) -> None:
    (output,) = llm.generate([prompt], replace(RANDOM, n=5))
    made = llm.functional([prompt], RANDOM, rows=5, num_pages=32)  # one program for all prompts
    state = jax.jit(fork)(made.state, 0, jnp.array([1, 2, 4, 3]))
    _, found = run(llm, made._replace(state=state), 9)
    got = tokens(found)
    assert [got[i] for i in (0, 1, 2, 4, 3)] == [s.token_ids for s in output.outputs]
    # Full pages are shared, and a page that is not full is copied.
    count, size = len(prompt) - 1, llm.memory_plan.page_size
    full, partly = divmod(count, size)
    pages = np.asarray(state.seq.page_table)[0]
    assert (pages[:, :full] == pages[0, :full]).all()
    assert int(state.next_page) == 1 + full + (5 if partly else 0)


@pytest.mark.slow
def test_a_fork_in_the_middle_goes_on_alone(llm: LLM) -> None:
    made = llm.functional([PROMPTS[2]], RANDOM, rows=2)
    middle, before = run(llm, made, 4)
    _, after = run(llm, made._replace(state=fork(middle, 0, jnp.array([1]))), 5)
    one, other = tokens(after)
    assert tokens(before)[0] + one == tokens(run(llm, made, 9)[1])[0]
    assert one != other
    # As if it had drawn as sample 1 from there on.
    forced = [*PROMPTS[2], *tokens(before)[0]]
    again = llm.functional([forced], replace(RANDOM, max_tokens=5), rows=2)
    state = fork(again.state, 0, jnp.array([1]))
    assert tokens(run(llm, again._replace(state=state), 5)[1]) == [one, other]


def test_vmap_over_seeds(llm: LLM) -> None:
    made = llm.functional(PROMPTS[:2], RANDOM)
    seeds = jnp.array([[0, 3], [0, 4], [7, 1]], jnp.uint32)

    def sampled(seed: jax.Array) -> jax.Array:
        rows = made.state.seq.rows
        rows = rows._replace(seed=jnp.broadcast_to(seed, rows.seed.shape))
        state = made.state._replace(seq=made.state.seq._replace(rows=rows))

        def body(state: State, _: None) -> tuple[State, jax.Array]:
            state, out = made.step(llm.params, state)
            return state, out.tokens

        return jax.lax.scan(body, state, length=6)[1].T

    found = np.asarray(jax.jit(jax.vmap(sampled))(seeds))
    for seed, rows in zip((3, 4, (7 << 32) + 1), found.tolist(), strict=True):
        outputs = llm.generate(PROMPTS[:2], replace(RANDOM, seed=seed, max_tokens=6))
        assert [tuple(row) for row in rows] == [o.outputs[0].token_ids for o in outputs]


def test_a_state_is_kept_on_disk(llm: LLM, tmp_path: Path) -> None:
    made = llm.functional(PROMPTS, RANDOM)
    middle, _ = run(llm, made, 3)
    save(tmp_path / "state", middle, {})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), middle)
    kept = restore(tmp_path / "state", like)
    want = tokens(run(llm, made._replace(state=middle), 5)[1])
    assert tokens(run(llm, made._replace(state=kept), 5)[1]) == want


@pytest.mark.slow
def test_rows_may_be_mixed(llm: LLM) -> None:
    """Guidance by a second prompt: tokens drawn from logits of both rows, and given to both."""

    def guided(logits: jax.Array, rows: Any, aux: Any) -> jax.Array:
        wanted, other = logits[0::2], logits[1::2]
        return jnp.repeat(other + aux[0::2, None] * (wanted - other), 2, axis=0)

    def run_at(scale: float) -> tuple[int, ...]:
        step, state = llm.functional(
            PROMPTS[:2], RANDOM, logits_fn=LogitsFn(guided, np.float32(scale))
        )
        found = []
        for _ in range(8):
            state, out = step(llm.params, state)
            found.append(int(out.tokens[0]))
            drawn = jnp.repeat(state.seq.tokens[0::2], 2)
            state = state._replace(seq=state.seq._replace(tokens=drawn))
        return tuple(found)

    plain = tokens(run(llm, llm.functional(PROMPTS[:2], RANDOM), 8)[1])[0]
    assert run_at(1.0) == plain
    assert run_at(3.0) != plain
    # Guided by the second prompt alone: as if its logits had been sampled at the first's positions.
    assert run_at(0.0) != plain


@pytest.mark.slow
def test_activations_of_each_step(llm: LLM) -> None:
    made = llm.functional(PROMPTS, GREEDY, capture=("layers.1.resid",))
    _, found = run(llm, made, 4)
    want = llm.generate(PROMPTS, replace(GREEDY, max_tokens=4), capture=("layers.1.resid",))
    for row, output in enumerate(want):
        last = (output.outputs[0].activations or {})["layers.1.resid"][-4:]
        got = [out.activations["layers.1.resid"][row] for out in found]
        np.testing.assert_allclose(got, last, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_donated_state_is_used_up(llm: LLM) -> None:
    made = llm.functional(PROMPTS[:1], GREEDY, donate=True)
    made.step(llm.params, made.state)
    assert made.state.cache.k[0].is_deleted()


def test_rows_stop_where_pages_end(llm: LLM) -> None:
    """Two rows of a page each, one page left: one gets it, the other stops and says so."""
    made = llm.functional([[1, 2, 3, 4, 5, 6], [2, 3, 4]], GREEDY, num_pages=4)
    state, found = run(llm, made, 9)
    whole = [o.outputs[0].token_ids for o in llm.generate([[1, 2, 3, 4, 5, 6], [2, 3, 4]], GREEDY)]
    got = tokens(found)
    assert got[0] == whole[0]
    assert got[1] == whole[1][: len(got[1])]
    assert len(got[1]) == 6  # eight tokens in its page, two of them before the first step
    assert np.asarray(state.starved).tolist() == [False, True]
    assert not np.asarray(state.seq.active).any()
    none = fork(state, 0, jnp.array([1]))
    assert np.asarray(none.starved).tolist() == [False, True]


def test_refusals(llm: LLM) -> None:
    for params in (replace(RANDOM, n=2), replace(RANDOM, presence_penalty=0.5)):
        with pytest.raises(InvalidRequest, match="fork rows"):
            llm.functional(PROMPTS, params)
    with pytest.raises(InvalidRequest, match="empty"):
        llm.functional([[]], GREEDY)
    with pytest.raises(InvalidRequest, match="names no site"):
        llm.functional(PROMPTS, GREEDY, capture=("layers.7.resid",))
    with pytest.raises(InvalidRequest, match="it returns"):
        llm.functional(PROMPTS, GREEDY, logits_fn=lambda logits, rows, aux: logits[:1])
    sizes: dict[str, int]
    for sizes in ({"rows": 3}, {"num_pages": 3}):
        with pytest.raises(CapacityError, match=r"4 prompts need a row each, and 7 pages"):
            llm.functional(PROMPTS, GREEDY, **sizes)  # type: ignore[arg-type]
