"""KV pages in the host's memory: what comes back holds the bits that left, and says the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, CapacityError, SamplingParams, memory
from jaxinfer.batcher import Move
from jaxinfer.cache import PagedCache, init_cache, page_bytes, resolve_kv_dtype
from jaxinfer.cli import main as cli
from jaxinfer.config import EngineOptions, Speculative
from jaxinfer.eventlog import describe, replay
from jaxinfer.offload import on_host
from jaxinfer.page_copies import AHEAD, GROUP, STAGED, PageCopies
from tests.conftest import TinyModel, small_llm

SIZE = 8  # tokens a page
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = [[*range(start, start + 30)] for start in (10, 50, 90)]  # four pages each


def tier_llm(tiny: TinyModel, *, pages: int, slots: int, **options: Any) -> LLM:
    """With so many pages on the device, and on the host."""
    dtype = resolve_kv_dtype(options.get("kv_cache_dtype", "auto"), jnp.float32)
    one = page_bytes(tiny.config, SIZE, dtype)
    if "speculative" in options:
        one += 4 * SIZE
    drafts = page_bytes(tiny.config, SIZE, dtype) if "draft" in options else 0
    sizes: dict[str, Any] = {
        "kv_cache_bytes": (pages + 1) * (one + drafts), "kv_host_bytes": slots * one,
        "max_model_len": 48,
    }  # fmt: skip
    llm = small_llm(tiny, **sizes | options)
    limits = llm.engine.limits
    assert (limits.num_pages - 1, limits.host_slots) == (pages, slots)
    return llm


def said(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]


# -- the copies -----------------------------------------------------------------------------------


def random_cache(config: Any, pages: int, dtype: Any, *, tokens: bool) -> PagedCache:
    rng = np.random.default_rng(0)

    def filled(x: jax.Array) -> jax.Array:
        return jnp.asarray(rng.normal(0, 9, x.shape)).astype(x.dtype)

    return jax.tree.map(filled, init_cache(config, pages, SIZE, dtype, with_tokens=tokens))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
def test_the_bits_come_back(tiny: TinyModel, dtype: Any) -> None:
    """More than a group at once, into other pages; the other pages keep theirs."""
    count = (AHEAD + 1) * GROUP + 3
    cache = random_cache(tiny.config, 2 * count + 2, dtype, tokens=dtype == jnp.int8)
    before = jax.tree.map(np.array, cache)
    copies = PageCopies(cache)
    pages, slots = np.arange(1, count + 1), np.arange(count)[::-1]
    none = np.empty((0, 2), np.int32)
    cache = copies.move(Move(np.stack([pages, slots], 1), none), cache)
    assert all(on_host(x) for page in copies._slots.values() for x in jax.tree.leaves(page))
    cache = copies.move(Move(none, np.stack([slots, pages + count], 1)), cache)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        new = np.array(new)
        assert new[pages + count].tobytes() == old[pages].tobytes()
        others = np.delete(np.arange(1, len(old)), pages + count - 1)  # the trash page may change
        assert new[others].tobytes() == old[others].tobytes()


# -- the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_dtype": "int8"},
        {"speculative": "lookup,tokens=2,adapt=false"},
        pytest.param({"kv_cache_dtype": "fp8"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "int8", "lookup", "fp8"],
)
def test_prompts_that_return(tiny: TinyModel, options: dict[str, Any]) -> None:
    """Pages for one of them at a time."""
    with tier_llm(tiny, pages=6, slots=20, **options) as llm:
        first = [said(llm, [prompt]) for prompt in PROMPTS]
        assert llm.metrics.summary().loaded_pages == 0
        (again,) = llm.generate([PROMPTS[0]], GREEDY)
        assert [list(again.outputs[0].token_ids)] == first[0]
        assert again.num_cached_tokens == 24  # the last page's end is computed in any case
        found = llm.metrics.summary()
        assert 0 < found.loaded_pages <= 3
        assert sum(s.stored for s in llm.metrics.steps) >= 6
        assert [said(llm, [prompt]) for prompt in PROMPTS] == first


@pytest.mark.slow
def test_a_draft_reads_again_what_comes_back(tiny: TinyModel) -> None:
    """It guesses as well as ever: it is the model itself, so that every guess holds."""
    how = Speculative("draft", tokens=2, adapt=False)
    options: dict[str, Any] = {"speculative": how, "draft": (tiny.params, tiny.config)}
    with tier_llm(tiny, pages=6, slots=20, **options) as llm:
        first = [said(llm, [prompt]) for prompt in PROMPTS]
        assert [said(llm, [prompt]) for prompt in PROMPTS] == first
        found = llm.metrics.summary()
        assert found.loaded_pages > 0
        assert found.acceptance == 1


def test_without_room_on_the_host_nothing_is_copied(tiny: TinyModel) -> None:
    with tier_llm(tiny, pages=6, slots=0) as llm:
        for prompt in (*PROMPTS, *PROMPTS):
            llm.generate([prompt], GREEDY)
        assert sum(s.stored + s.loaded for s in llm.metrics.steps) == 0


def test_what_was_preempted_returns(tiny: TinyModel, tmp_path: Path) -> None:
    """The first one grows into the pages of the second, which then has to wait for it."""
    log, prompts = tmp_path / "events.jsonl", [[5, 6, 7], PROMPTS[0]]
    params = [replace(GREEDY, max_tokens=n) for n in (45, 18)]
    with tier_llm(tiny, pages=7, slots=20, event_log=str(log)) as llm:
        together = said(llm, prompts, params)
        found = llm.metrics.summary()
        assert found.preemptions > 0
        assert found.loaded_pages > 0
        alone = [said(llm, [x], p)[0] for x, p in zip(prompts, params, strict=True)]
        assert together == alone
    told = "\n".join(describe(step) for step in replay(log))
    assert "1 preempted" in told
    assert " from it" in told


def test_other_weights_find_nothing_there(tiny: TinyModel) -> None:
    with tier_llm(tiny, pages=6, slots=20) as llm:
        for prompt in PROMPTS:
            llm.generate([prompt], GREEDY)
        llm.update_params(tiny.params)
        (again,) = llm.generate([PROMPTS[0]], GREEDY)
        assert again.num_cached_tokens == 0


@pytest.mark.parametrize("pages", [False, True])
def test_a_state_goes_on_with_another_tier(tiny: TinyModel, tmp_path: Path, pages: bool) -> None:
    with tier_llm(tiny, pages=6, slots=20) as llm:
        first = [said(llm, [prompt]) for prompt in PROMPTS]
        llm.save(tmp_path / "state", pages=pages)
    with tier_llm(tiny, pages=6, slots=5) as llm:
        for prompt in PROMPTS[1:]:
            llm.generate([prompt], GREEDY)
        llm.load(tmp_path / "state")
        assert [said(llm, [prompt]) for prompt in PROMPTS] == first


def test_after_a_reset_nothing_is_found(tiny: TinyModel) -> None:
    with tier_llm(tiny, pages=6, slots=20) as llm:
        llm.warm_up([GREEDY])
        first = [said(llm, [prompt]) for prompt in PROMPTS]
        llm.engine.reset()
        (again,) = llm.generate([PROMPTS[0]], GREEDY)
        assert (again.num_cached_tokens, [list(again.outputs[0].token_ids)]) == (0, first[0])


# -- what is refused ------------------------------------------------------------------------------


def test_what_is_refused(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    one = page_bytes(tiny.config, SIZE, jnp.float32)
    with pytest.raises(CapacityError, match=rf"kv_host_bytes={one - 1}: a page of 8 .* {one} byte"):
        small_llm(tiny, kv_host_bytes=one - 1)
    with pytest.raises(CapacityError, match=r"kv_host_bytes=\d+ for each of 1 device"):
        small_llm(tiny, kv_host_bytes=1 << 60)
    with pytest.raises(ValueError, match=r"kv_host_bytes=-1: expected an integer of at least 0"):
        small_llm(tiny, kv_host_bytes=-1)
    with pytest.raises(ValueError, match="kv_host_bytes=99 with prefix_caching=False"):
        small_llm(tiny, kv_host_bytes=99, prefix_caching=False)
    assert cli(["generate", "a", "--kv-host-bytes", "9"]) != 0
    assert "kv_host_bytes=9: a page of 32 tokens takes" in capsys.readouterr().err


def test_the_plan_says_how_much_is_on_the_host(tiny: TinyModel) -> None:
    one = page_bytes(tiny.config, SIZE, jnp.float32)
    with tier_llm(tiny, pages=6, slots=3) as llm:
        plan = llm.memory_plan
        assert (plan.host_pages, plan.host_cache) == (3, 3 * one)
        assert llm.engine.limits.host_slots == 3
        assert "on the host (3 pages)" in str(plan)


def test_copies_under_way_are_planned_for(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda _: (1 << 34, 0))
    one = page_bytes(tiny.config, SIZE, jnp.float32)

    def steps(**options: Any) -> int:
        chosen = EngineOptions(dtype="float32", page_size=SIZE, **options)
        return memory.plan(tiny.config, chosen, loaded=False, weights=0).steps

    assert steps(kv_host_bytes=one) == steps() + STAGED * one
