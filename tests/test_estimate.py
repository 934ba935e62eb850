"""Sizing before you buy: memory, speed, what fits, and every refusal. No GPU, nothing allocated."""

from __future__ import annotations

from dataclasses import astuple, replace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.estimate import estimate, prefill_time
from jaxinfer.hardware import DEVICE_KINDS, GPUS, find_gpu, gpu_of
from jaxinfer.known_models import HF_CONFIGS
from jaxinfer.models.families import parse_config
from jaxinfer.models.weights import abstract_params, count_params
from jaxinfer.placement import (
    KV_CHOICES,
    Setting,
    can_split,
    check_setting,
    decode_time,
    largest_batch,
    memory_of,
    search,
)
from jaxinfer.roofline import (
    PRECISIONS,
    all_reduce_bytes,
    all_reduce_time,
    count_sizes,
    prefill_steps,
    shard,
)

CONFIGS = {name: parse_config(config) for name, config in HF_CONFIGS.items()}
SMALL, BIG = CONFIGS["llama-3.1-8b"], CONFIGS["llama-3.1-70b"]
H100 = GPUS["h100"]

# Billions, as the models' makers publish them.
PUBLISHED = {
    "llama-3.2-1b": 1.236, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "llama-3.1-405b": 405.85,
    "llama-2-7b": 6.74, "llama-2-70b": 68.98, "mistral-7b": 7.25, "qwen2.5-7b": 7.62,
    "qwen2.5-72b": 72.71, "qwen3-8b": 8.19, "qwen3-32b": 32.76, "gemma-2-9b": 9.24,
    "gemma-3-27b": 27.01,
}  # fmt: skip


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_parameters_are_those_published(name):
    assert count_params(CONFIGS[name]) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)
    sizes = count_sizes(CONFIGS[name])
    counted = sizes.matrices + sizes.others + sizes.vocabularies * sizes.vocabulary
    assert counted == count_params(CONFIGS[name])


def test_kv_of_a_70b_with_grouped_heads():
    found = estimate(BIG, Setting(H100, context=8192))
    assert found.kv_bytes_per_token == 327_680
    assert found.kv_bytes_per_sequence == 8192 * 327_680
    assert found.kv_bytes_per_sequence / 2**30 == 2.5


@pytest.mark.parametrize(
    ("precision", "gb", "within"),
    # bf16 by count; the others as they were on an H100 (bench/results, 2026-11-27)
    [("bf16", 16.06, 0.001), ("int4", 5.706, 0.03), ("fp8", 9.08, 0.03), ("int8", 9.19, 0.03)],
)
def test_weights_of_8b(precision, gb, within):
    assert count_sizes(SMALL).bytes(PRECISIONS[precision]) / 1e9 == pytest.approx(gb, rel=within)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b", "gemma-2-9b"])
def test_dense_weights_are_what_would_be_allocated(name):
    tree = abstract_params(CONFIGS[name], jnp.bfloat16)
    want = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert memory_of(CONFIGS[name], Setting(H100)).weights == want


@given(
    name=st.sampled_from(sorted(HF_CONFIGS)), tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_shares_add_up_to_at_least_the_model(name, tp, pp):
    config = CONFIGS[name]
    if not can_split(config, tp):
        return
    whole, part = count_sizes(config), count_sizes(shard(config, tp, pp))
    assert part.matrices * tp * pp >= whole.matrices
    assert part.matrices <= whole.matrices
    if pp == 1 and config.num_kv_heads % tp == 0:
        assert part.matrices * tp == whole.matrices


SETTINGS = st.builds(
    Setting,
    gpu=st.sampled_from([gpu for gpu in GPUS.values() if gpu.bfloat16]),
    precision=st.sampled_from(sorted(PRECISIONS)),
    kv_dtype=st.sampled_from(KV_CHOICES),
    batch=st.integers(1, 400),
    context=st.integers(1, 8192),
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 5]),
    dp=st.sampled_from([1, 3]),
)
MODELS = st.sampled_from(["llama-3.1-8b", "llama-3.1-70b", "gemma-2-9b"])


@settings(max_examples=60)
@given(name=MODELS, setting=SETTINGS, more=st.integers(1, 100))
def test_more_to_do_never_takes_less(name, setting, more):
    config = CONFIGS[name]
    fuller = replace(setting, batch=setting.batch + more)
    for larger in (fuller, replace(setting, context=min(8192, setting.context + more))):
        assert memory_of(config, larger).needed >= memory_of(config, setting).needed
        assert decode_time(config, larger)[0] >= decode_time(config, setting)[0]
        assert prefill_time(config, larger)[0] >= prefill_time(config, setting)[0]
    assert memory_of(config, replace(setting, dp=9)).kv <= memory_of(config, setting).kv
    split = replace(setting, tp=setting.tp * 2)
    if can_split(config, split.tp):
        assert memory_of(config, split).needed <= memory_of(config, setting).needed


@settings(max_examples=30)
@given(name=MODELS, setting=SETTINGS)
def test_the_largest_batch_fits_and_one_more_does_not(name, setting):
    config = CONFIGS[name]
    most = largest_batch(config, setting)
    assert most % setting.dp == 0
    if most:
        assert memory_of(config, replace(setting, batch=most)).fits
    assert not memory_of(config, replace(setting, batch=most + 1)).fits
    timed = largest_batch(config, setting, tpot_ms=20)
    assert timed <= most
    if timed:
        assert decode_time(config, replace(setting, batch=timed))[0] <= 0.020
    if timed < most:
        assert decode_time(config, replace(setting, batch=timed + 1))[0] > 0.020


def test_the_search_takes_as_few_as_fit():
    found = search(BIG, Setting(H100, batch=16, context=4096))
    assert found is not None
    assert (found.gpus, found.tp) == (4, 4)
    assert memory_of(BIG, found).fits
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        assert not memory_of(BIG, replace(found, tp=tp, pp=pp)).fits
    assert search(SMALL, Setting(H100)) == Setting(H100)
    copies = search(BIG, Setting(H100, batch=32, dp=2))
    assert copies is not None
    assert copies.gpus == 8
    assert search(CONFIGS["llama-3.1-405b"], Setting(GPUS["l4"]), most=16) is None


def test_heads_that_do_not_divide_leave_stages():
    qwen = CONFIGS["qwen2.5-7b"]  # 28 heads of 4
    assert [n for n in range(1, 9) if can_split(qwen, n)] == [1, 2, 4]
    found = search(qwen, Setting(GPUS["t4"], "fp16", batch=64, context=16384))
    assert found is not None
    assert found.tp in (1, 2, 4)


def test_what_would_fit_instead():
    found = estimate(BIG, Setting(H100, "int4", batch=64))
    assert not found.memory.fits
    assert found.nearest[0] == f"batch {found.max_batch}"
    assert memory_of(BIG, replace(found.setting, batch=found.max_batch)).fits
    (context,) = (int(x.split()[1]) for x in found.nearest if x.startswith("context"))
    assert memory_of(BIG, replace(found.setting, context=context)).fits
    assert found.nearest[-1] == "tp 2 (2 GPUs)"
    assert estimate(BIG, Setting(H100)).nearest == ("precision fp8", "tp 2 (2 GPUs)")
    eight_bits = estimate(SMALL, Setting(H100, batch=190))
    assert "kv-dtype fp8" in eight_bits.nearest
    assert memory_of(SMALL, replace(eight_bits.setting, kv_dtype="fp8")).fits
    assert estimate(SMALL, Setting(H100)).nearest == ()


def test_cost_is_the_price_over_the_tokens():
    found = estimate(SMALL, Setting(H100, batch=32, dp=2), price=3.6)
    hours = 1e6 / found.decode_tok_s / 3600
    assert found.cost_per_million_output == pytest.approx(2 * 3.6 * hours)
    assert found.cost_per_million_input == pytest.approx(2 * 3.6 * 1e6 / found.prefill_tok_s / 3600)
    assert estimate(SMALL, Setting(H100)).cost_per_million_output is None


def test_copies_share_the_batch_and_stages_wait():
    one, two = (estimate(SMALL, Setting(H100, batch=8 * dp, dp=dp)) for dp in (1, 2))
    assert two.decode_ms == one.decode_ms
    assert two.decode_tok_s == pytest.approx(2 * one.decode_tok_s)
    assert two.communication_bytes == 0
    staged, alone = (estimate(SMALL, Setting(H100, batch=1, pp=pp, context=4096)) for pp in (4, 1))
    assert staged.decode_bubble == 0.75
    # Two chunks of 2048, the second of which takes a little longer.
    assert staged.prefill_bubble == pytest.approx(3 / (2 + 3), abs=0.02)
    assert staged.decode_ms > alone.decode_ms


def test_all_reduces():
    assert all_reduce_bytes(8e6, 4) == 12e6
    assert all_reduce_time(8e6, H100, 1) == 0
    assert all_reduce_time(8e6, GPUS["l40s"], 4) > all_reduce_time(8e6, H100, 4)
    found = estimate(BIG, Setting(H100, batch=16, tp=4))
    assert found.communication_bytes == 2 * 80 * 1.5 * 16 * 8192 * 2
    assert H100.link_bandwidth(8) == 450e9
    assert GPUS["h100-pcie"].link_bandwidth(2) == 300e9
    assert GPUS["h100-pcie"].link_bandwidth(4) == 64e9  # bridges join two


def test_windows_are_read_no_further_back():
    gemma = CONFIGS["gemma-2-9b"]
    far, near = (prefill_steps(gemma, PRECISIONS["bf16"], n) for n in (8192, 4096))
    whole = [replace(x, window=None) for x in gemma.layers]
    flops = prefill_steps(replace(gemma, layers=tuple(whole)), PRECISIONS["bf16"], 8192)
    assert far[-1].attention_flops < flops[-1].attention_flops
    assert near[-1].attention_flops == flops[1].attention_flops


def test_a_gpu_without_a_rate_takes_the_one_of_16_bits():
    fp8, bf16 = (
        prefill_time(SMALL, Setting(GPUS["a100-80g"], precision))[0]
        for precision in ("fp8", "bf16")
    )
    assert fp8 == pytest.approx(bf16, rel=0.02)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=str)
def test_the_table_is_plausible(gpu):
    assert gpu.source.startswith("https://")
    assert gpu.efficiency.source
    assert all(0 < share <= 1 for share in astuple(gpu.efficiency)[:3])
    assert 14e9 < gpu.visible_bytes < gpu.memory_bytes < 200e9
    assert 200e9 < gpu.memory_bandwidth < 10e12
    for rate in (gpu.flops_fp8, gpu.ops_int8):
        assert rate is None or gpu.flops_16bit < rate < 5 * gpu.flops_16bit
    assert (gpu.nvlink_bandwidth is None) == (gpu.nvlink_gpus == 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int3"}, "precision='int3': expected one of bf16, fp16"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4': expected one of auto, int8"),
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"context": 131073}, "context=131073: .* sequences of up to 131072"),
        ({"prompt": 5000}, "prompt=5000: expected 1 to 4096"),
        ({"utilization": 1.5}, "utilization=1.5: expected above 0"),
        ({"tp": 3}, r"tp=3: .* 8 KV heads .* nearest that works: 2 \(of 1, 2, 4, 8\)"),
        ({"tp": 16}, "tp=16: expected at most 8"),
        ({"pp": 33}, r"pp=33: .* share 32 layers evenly.* works: 32 \(of 1, 2, 4, 8, 16, 32\)"),
        ({"gpu": GPUS["t4"]}, "precision='bf16': t4 has no bfloat16; take fp16"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        check_setting(SMALL, replace(Setting(H100), **changes))


def test_devices_are_found_by_what_drivers_call_them():
    assert gpu_of("NVIDIA H100 80GB HBM3") is H100
    assert gpu_of("cpu") is None
    assert set(DEVICE_KINDS.values()) == set(GPUS)


def test_an_unknown_gpu_and_a_wrong_price():
    assert find_gpu("H100") is H100
    with pytest.raises(ValueError, match="gpu='h99': expected one of t4, a10, a10g"):
        find_gpu("h99")
    with pytest.raises(ValueError, match="price=-1"):
        estimate(SMALL, Setting(H100), price=-1)
