"""How memory is divided: sums that add up, caps, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.cache import init_cache, page_bytes
from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.errors import CapacityError
from jaxinfer.models.weights import abstract_params
from jaxinfer.sizing import (
    CPU_CACHE_BYTES,
    GIB,
    SPARE_BYTES,
    device_memory,
    most_step_bytes,
    plan_memory,
)

CONFIG = ModelConfig(
    family="llama", vocab_size=100, hidden_size=32, intermediate_size=64, num_heads=4,
    num_kv_heads=2, head_dim=8, layers=(LayerConfig(),) * 3, max_position=128,
)  # fmt: skip
STEPS = {"rows": 4, "tokens": 2048, "dtype": jnp.float32}
STEP_BYTES = sum(most_step_bytes(CONFIG, max_kv=128, **STEPS))
PAGE = 2 * 3 * 2 * 8 * 16 * 4  # k and v, layers, KV heads, head dim, tokens, bytes


def plan(config=CONFIG, **changes):
    options = {
        "dtype": jnp.float32, "page_size": 16, "max_num_seqs": 4, "max_model_len": None,
        "kv_cache_bytes": None, "limit": None,
    }  # fmt: skip
    return plan_memory(config, **(options | changes))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_and_cache_are_what_is_allocated(tied, dtype):
    config = replace(CONFIG, tie_embeddings=tied)
    got = plan(config, dtype=dtype)
    tree = abstract_params(config, dtype)
    assert got.weights == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    cache = init_cache(config, got.num_pages, got.page_size, dtype)
    assert got.cache == sum(x.nbytes for x in jax.tree.leaves(cache))


@pytest.mark.parametrize("kv_dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_a_quantised_cache_is_counted_with_its_scales(kv_dtype):
    got, plain = (plan(kv_dtype=t, kv_cache_bytes=50 * PAGE) for t in (kv_dtype, None))
    cache = init_cache(CONFIG, got.num_pages, got.page_size, kv_dtype)
    assert got.cache == sum(x.nbytes for x in jax.tree.leaves(cache))
    assert got.weights == plain.weights
    assert got.num_pages == 4 * 128 // 16 + 1 or got.num_pages > 2 * plain.num_pages


def test_tied_embeddings_are_counted_once():
    saved = plan().weights - plan(replace(CONFIG, tie_embeddings=True)).weights
    assert saved == CONFIG.vocab_size * CONFIG.hidden_size * 4


def test_cpu_takes_no_more_than_can_be_used():
    got = plan()
    assert (got.limit, got.steps) == (None, 0)
    assert page_bytes(CONFIG, 16, jnp.float32) == PAGE
    assert got.num_pages == 4 * 128 // 16 + 1  # and the trash page
    assert (got.cache, got.max_model_len) == (got.num_pages * PAGE, 128)


def test_cpu_has_a_modest_default():
    got = plan(replace(CONFIG, max_position=1 << 24), max_num_seqs=1 << 10)
    assert got.num_pages == CPU_CACHE_BYTES // PAGE
    assert got.max_model_len == (got.num_pages - 1) * 16


def test_gpu_takes_what_is_left():
    model = replace(CONFIG, max_position=1 << 24)
    got = plan(model, limit=2 * GIB, in_use=1 << 20)
    left = 2 * GIB - (1 << 20) - got.weights - got.steps
    assert got.num_pages == left // PAGE
    assert got.max_model_len == (got.num_pages - 1) * 16


def test_kv_cache_bytes_are_kept():
    assert plan(kv_cache_bytes=5 * PAGE - 1).num_pages == 4
    assert plan(kv_cache_bytes=5 * PAGE, limit=2 * GIB).num_pages == 5


@given(
    limit=st.none() | st.integers(0, 2 * GIB),
    in_use=st.integers(0, GIB // 4),
    kv_cache_bytes=st.none() | st.integers(1, GIB),
    max_model_len=st.none() | st.integers(1, 200),
    page_size=st.sampled_from([8, 64]),
    max_num_seqs=st.integers(1, 300),
)
def test_a_plan_fits_or_is_refused(limit, in_use, page_size, max_model_len, **options):
    try:
        got = plan(
            limit=limit, in_use=in_use, page_size=page_size, max_model_len=max_model_len, **options
        )
    except CapacityError:
        return
    assert got.num_pages >= 2
    assert got.cache == got.num_pages * page_bytes(CONFIG, page_size, jnp.float32)
    assert 1 <= got.max_model_len <= (got.num_pages - 1) * page_size
    assert max_model_len in (None, got.max_model_len)
    if limit is not None:
        assert in_use + got.weights + got.steps + got.cache <= limit


def test_the_plan_in_words():
    words = str(plan(limit=2 * GIB, max_model_len=64))
    assert words == (
        "memory 2.00 GiB: weights 0.00 GiB, KV cache 0.00 GiB (16 pages of 16 tokens), "
        "steps 0.28 GiB; sequences of up to 64 tokens"
    )
    assert str(plan()).startswith("memory not limited: ")


def test_kv_cache_bytes_beyond_the_limit():
    with pytest.raises(CapacityError, match=rf"kv_cache_bytes={GIB} does not fit: {GIB} bytes"):
        plan(kv_cache_bytes=GIB, limit=GIB)


def test_what_steps_may_take_is_kept_free():
    got = plan(limit=2 * GIB)
    most, margin = most_step_bytes(CONFIG, max_kv=128, **STEPS)
    assert (got.steps, got.margin) == (most + margin, margin)
    assert margin > SPARE_BYTES
    for change in ({"max_num_seqs": 1 << 12}, {"max_num_batched_tokens": 1 << 16}):
        assert plan(limit=2 * GIB, **change).steps > got.steps
    # A row and four guesses are five rows of logits.
    guessing = {"max_num_seqs": 64, "max_num_batched_tokens": 64}
    alone = plan(limit=2 * GIB, **guessing).steps
    assert plan(limit=2 * GIB, guessing=(64, 4), **guessing).steps > alone


def test_partial_results_of_long_sequences_are_kept_free():
    long = replace(CONFIG, max_position=1 << 20, head_dim=64)
    short, whole = (plan(long, limit=8 * GIB, max_model_len=n) for n in (1 << 10, 1 << 18))
    assert whole.steps > short.steps
    # No more than for sequences that the cache could hold.
    small = plan(long, limit=GIB)
    held = most_step_bytes(long, max_kv=small.max_model_len, **STEPS)
    assert sum(held) <= small.steps < GIB


def test_weights_that_do_not_fit():
    with pytest.raises(CapacityError, match=r"the weights do not fit: they take \d+ bytes"):
        plan(limit=STEP_BYTES)


@pytest.mark.parametrize("budget", [1, PAGE, 2 * PAGE - 1])
def test_no_room_for_one_page(budget):
    message = rf"no memory for one page of 16 tokens: a page takes {PAGE} bytes .* {budget} bytes"
    with pytest.raises(CapacityError, match=message):
        plan(kv_cache_bytes=budget)


def test_max_model_len_beyond_the_cache():
    message = rf"max_model_len=49 needs 4 pages of {PAGE} bytes, the cache holds 3: lower .* to 48"
    with pytest.raises(CapacityError, match=message):
        plan(kv_cache_bytes=4 * PAGE, max_model_len=49)
    assert plan(kv_cache_bytes=4 * PAGE, max_model_len=48).max_model_len == 48


def test_device_memory_of_this_device():
    limit, in_use = device_memory(jax.devices()[0])
    if jax.default_backend() == "cpu":
        assert (limit, in_use) == (None, 0)
    else:
        assert limit is not None
        assert np.isscalar(in_use)
        assert 0 <= in_use <= limit
