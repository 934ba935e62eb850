"""From kernels to a table: whose time is whose, what adds up, and what nothing is known about."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.cli.plotting import _labels, _shown
from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.known_models import HF_CONFIGS, RECIPES
from jaxinfer.models.families import parse_config
from jaxinfer.profiling.ceilings import Ceilings
from jaxinfer.profiling.engine_times import LEAST_CONTEXT, window
from jaxinfer.profiling.report import GROUPS, MATMULS, OTHER, SCOPES, make_phase, own_times
from jaxinfer.profiling.trace import Event, op_paths
from jaxinfer.profiling.weights import find_precision, random_params
from jaxinfer.roofline import (
    PRECISIONS,
    Work,
    chunk_shape,
    decode_shape,
    decode_step,
    make_step,
    op_work,
    prefill_steps,
)

CEILINGS = Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s=1e12, dtype="bfloat16")
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (a: f32[8], b: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %add.1 = f32[8]{0} add(%a, %a), metadata={op_name="jit(step)/norm/add" stack_frame_id=1}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %copy.1 = f32[8]{0} copy(%p)
  %fusion.3 = f32[8]{0} fusion(%copy.1, %p), kind=kLoop, calls=%fused
  %custom-call.2 = (f32[8]{0}, s8[64]{0}) custom-call(%fusion.3), custom_call_target="gemm", \
metadata={op_name="jit(step)/while/body/o/dot" stack_frame_id=2}, backend_config={"alpha":{"a":1}}
  %sum = f32[8]{0} custom-call(%fusion.3), metadata={op_name="jit(step)/o/collectives/add"}
  ROOT %end.9 = f32[8]{0} scatter(%sum), metadata={op_name="jit(step)/scatter"}
}
"""


def phase(events, **changes):
    given = {
        "steps": 1, "rows": (8, 2), "work": {}, "wanted": {}, "ceilings": CEILINGS,
        "step_s": 1e-6, "engine_s": 2e-6,
    }  # fmt: skip
    return make_phase("decode", events, op_paths(PROGRAM), **(given | changes))


def kernel(start, duration, op, name="", module="jit_step", path=""):
    return Event(start, duration, name, op, module, path)


def test_of_several_at_a_time_the_last_has_the_time():
    events = [
        kernel(0, 100, "while.1"),  # around the next two
        kernel(10, 20, "a"),
        kernel(40, 50, "b"),
        kernel(80, 40, "c"),  # on another stream: begins within b, ends after all
        kernel(300, 10, "d"),  # after a gap
        kernel(300, 4, "e"),  # begins with d: the shorter one
    ]
    assert own_times(events) == [10 + 10, 20, 40, 40, 6, 4]


EVENTS = st.lists(
    st.builds(kernel, st.integers(0, 50), st.integers(0, 20), st.sampled_from(["sum", "x"])),
    min_size=1, max_size=12,
)  # fmt: skip


@given(EVENTS)
def test_own_times_are_all_the_time_that_anything_runs(events):
    busy = {t for e in events for t in range(int(e.start_ns), int(e.end_ns))}
    assert sum(own_times(events)) == len(busy)


@given(EVENTS, st.integers(1, 3))
def test_everything_adds_up(events, steps):
    work = {"o": Work(40, 1e4), "attention": Work(100, 0)}
    wanted = {"o": Work(40, 2e3), "attention": Work(100, 0)}
    found = phase(events, steps=steps, work=work, wanted=wanted)
    assert math.isclose(sum(found.parts.values()), found.engine_s, rel_tol=1e-9, abs_tol=1e-15)
    assert math.isclose(sum(op.seconds for op in found.ops), found.busy_s, abs_tol=1e-15)
    assert found.busy_s <= found.profiled_s * (1 + 1e-9)
    assert sum(op.kernels for op in found.ops) == pytest.approx(len(events) / steps)
    assert [op.name for op in found.ops] == list(GROUPS)


def test_whose_kernels_are_whose():
    events = [
        kernel(0, 1, "copy.1"),  # made by the compiler, for what uses it
        kernel(1, 2, "fusion.3"),  # says nothing itself
        kernel(3, 4, "custom-call.2"),
        kernel(7, 8, "sum"),  # within `o`, but the innermost scope counts
        kernel(15, 16, "", name="fusion_3"),  # as XLA calls kernels
        kernel(31, 32, "", name="cudnn", module="", path="jit(step)/attention/x"),
        kernel(63, 64, "custom-call.2", module="jit_other"),
        kernel(127, 128, "end.9"),
        kernel(255, 256, "", name="memset", module=""),
        *(kernel(511 + i, 1, "", name=f"k{i}", module="") for i in range(9)),
    ]
    found = phase(events)
    spent = {op.name: round(op.seconds * 1e9) for op in found.ops if op.seconds}
    assert spent == {
        "o": 4, "collectives": 8, "elementwise": 1 + 2 + 16, "attention": 32,
        OTHER: 64 + 128 + 256 + 9,
    }  # fmt: skip
    names = [name for name, _ in found.unknown]
    assert names[:3] == ["memset", "end.9", "custom-call.2"]
    assert len(names) == 5


def test_ceilings_and_padding():
    # A group limited by each: 1 GB/s, 1 TFLOP/s. Of 8 rows that are computed, 2 are wanted.
    work = {"o": Work(100, 400e3), "attention": Work(100, 1e3)}
    wanted = {"o": Work(100, 100e3), "attention": Work(100, 1e3)}
    events = [kernel(0, 500, "custom-call.2"), kernel(600, 400, "", path="attention/x")]
    found = phase(events, work=work, wanted=wanted)
    ops = {op.name: op for op in found.ops}
    assert (ops["o"].bound, ops["o"].share) == ("compute", pytest.approx(0.8))
    assert (ops["attention"].bound, ops["attention"].share) == ("memory", pytest.approx(0.25))
    assert ops["sampling"].share is None
    assert {name: round(1e9 * s) for name, s in found.parts.items() if abs(s) > 1e-12} == {
        "roofline": 200, "padding": 300, "matmul": 100, "attention": 300, "between kernels": 100,
        "host": 1000,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "gemma-2-9b"])
@pytest.mark.parametrize("precision", ["bf16", "int4", "w8a8"])
def test_ops_add_up_to_what_an_estimate_takes(name, precision):
    config, stored = parse_config(HF_CONFIGS[name]), PRECISIONS[precision]
    steps = {
        decode_shape(config, 3, 5000): decode_step(
            config, stored, rows=3, context=5000, kv_dtype="bfloat16"
        ),
        chunk_shape(config, 2048, 4000): prefill_steps(config, stored, 4000)[1],
    }
    for shape, step in steps.items():
        assert make_step(config, stored, shape, kv_dtype="bfloat16") == step
        work = op_work(config, stored, shape, kv_dtype="bfloat16")
        assert set(MATMULS) <= set(work) <= set(GROUPS)
        moved = step.matrix_bytes + step.other_bytes + step.kv_bytes + step.small_bytes
        computed = step.matrix_flops + step.head_flops + step.attention_flops
        assert sum(op.bytes for op in work.values()) == pytest.approx(moved)
        assert sum(op.flops for op in work.values()) == pytest.approx(computed)
        assert step.small_bytes > 0


def test_every_part_of_the_model_bears_its_scope(tiny):
    """Nothing but the state's small change is without one."""
    from jaxinfer.batch import init_state
    from jaxinfer.buckets import make_buckets
    from jaxinfer.cache import init_cache
    from jaxinfer.config import BatcherConfig
    from jaxinfer.packing import unpack
    from jaxinfer.profiling.steps import decode_task
    from jaxinfer.runner import run_step

    limits = BatcherConfig(8, 8, 2, 40, 64)
    task = decode_task(tiny.config, limits, make_buckets(limits, gpu=False), batch=2, context=40)
    cache = jax.eval_shape(lambda: init_cache(tiny.config, 8, 8, jnp.float32))
    state = jax.eval_shape(lambda: init_state(2, 5))

    def step(params, cache, seq, plan):
        return run_step(params, cache, seq, unpack(plan), config=tiny.config, key=task.key)

    lowered = jax.jit(step).lower(tiny.params, cache, state, task.plan)
    text = lowered.as_text(debug_info=True)
    found = {scope for scope in SCOPES if f"/{scope}/" in text}
    assert found == set(SCOPES) - {"collectives"}  # of several devices


SMALL = ModelConfig(
    family="llama", vocab_size=64, hidden_size=128, intermediate_size=128, num_heads=2,
    num_kv_heads=2, head_dim=64, layers=(LayerConfig(),), max_position=64, eos_token_ids=(0,),
)  # fmt: skip


@pytest.mark.parametrize("precision", ["auto", *RECIPES])
def test_what_matrices_are_stored_in_is_found(precision):
    params = random_params(SMALL, precision, "float32")
    name, stored = find_precision(params, "float32")
    assert name == ("fp32" if precision == "auto" else precision)
    assert (stored.dtype, stored.rate) == ("float32", PRECISIONS[name].rate)
    mixed = params["layers"][0] | {"o": params["embed"].astype(jnp.bfloat16)}
    name, stored = find_precision(params | {"layers": [mixed]}, "float32")
    assert name == "mixed"
    assert stored.weight_bytes > 0


@given(st.integers(LEAST_CONTEXT, 1 << 17))
def test_decode_is_timed_at_the_end_of_a_context(context):
    at = window(context)
    assert at.prompt >= 1
    assert at.prompt + at.long == context
    assert (at.long - at.short) % 8 == 0
    assert at.prompt < at.context < context


def test_a_bar_is_as_high_as_the_time_in_the_engine():
    """What is below 0 closes the gaps between kernels first, the largest part but the roofline."""
    parts = {"roofline": 40, "matmul": -1, "attention": 4, "between kernels": 21, "graphs": -20.5}
    found = _shown(parts)
    assert found == {
        "roofline": 40,
        "matmul": 0,
        "attention": 3.5,
        "between kernels": 0,
        "graphs": 0,
    }
    assert sum(found.values()) == sum(parts.values())


def test_points_that_would_cover_each_other_share_a_label():
    labels = _labels(["qkv", "o", "attention"], [8, 8.1, 3], [3e13, 3.2e13, 1e12])
    assert labels == [("qkv, o", (8, 3e13)), ("attention", (3, 1e12))]
