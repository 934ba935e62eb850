"""`threshold`: its kernel and the split rows against the definition, what `auto` chooses, and what
is refused.

What the definition keeps is compared with float64 in `tests/test_sampling.py`; what the kernel
compiles to in `test_aot.py`.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import threshold as op
from pallas_kernels.threshold import BACKENDS, threshold
from pallas_kernels.threshold_mosaic import Config
from tests.pallas_kernels.gpu_check import checks
from tests.pallas_kernels.threshold_problems import compare, compare_split, problem

SMALL = Config(warpgroups=2, tile=512, interpret=True)


@pytest.mark.parametrize(
    ("V", "every"),
    # A fourth of a problem has every kind of row and every setting, if not each with each.
    [(37, 4), *(pytest.param(n, 1, marks=pytest.mark.slow) for n in (37, 1024, 3000))],
)
def test_the_kernel_finds_what_the_definition_finds(V, every):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        compare(tuple(a[::every] for a in problem(V)), SMALL)


def test_ties_across_the_whole_range_of_float32():
    x = np.array([[0, -1e-30, -1, -1, -1.00000012, -20.5, -3e38, -np.inf]], np.float32)
    k = jnp.arange(1, 9, dtype=jnp.int32)
    args = (jnp.tile(jnp.asarray(x), (8, 1)), k, jnp.ones(8), jnp.zeros(8))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        compare(args, SMALL)
        compare((args[0], 0 * k, jnp.linspace(0.1, 0.99, 8), jnp.zeros(8)), SMALL)


@pytest.mark.parametrize(("V", "devices"), [(48, 2), (48, 8), (3000, 5)])
def test_split_rows_are_cut_as_whole_ones(V, devices):
    compare_split(problem(V), devices)


def few_bits(V: int) -> tuple[jax.Array, ...]:
    """Rows of V tokens, and of 2**18 more: with masses of fewer bits."""
    x, *how = (a[7:14] for a in problem(V))
    return jnp.pad(x, ((0, 0), (0, 2**18)), constant_values=-3.0), *how


@pytest.mark.slow
def test_split_rows_of_the_largest_vocabulary():
    compare_split(few_bits(40), 8)


@pytest.mark.slow
def test_a_vocabulary_with_masses_of_fewer_bits():
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        compare(few_bits(37), Config(warpgroups=1, tile=8192, interpret=True))


@pytest.mark.gpu
@pytest.mark.parametrize("check", list(checks("threshold")), ids=lambda check: check.name)
def test_on_a_gpu(check):
    print(check.run())


@pytest.mark.parametrize(
    ("capability", "kernel"), [(None, False), (7.5, False), (8.0, True), (9.0, True)]
)
def test_auto_takes_the_kernel_where_it_runs(capability, kernel, monkeypatch):
    monkeypatch.setattr(op, "capability", lambda: capability)
    jaxpr = str(jax.make_jaxpr(lambda *args: threshold(*args))(*problem(37)))
    assert ("name=threshold" in jaxpr or "core_map" in jaxpr or "mpmd_map" in jaxpr) == kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, f"backend='triton': expected one of {BACKENDS}"),
        ({"x": jnp.zeros((2, 8), jnp.bfloat16)}, "x is bfloat16 (2, 8): expected float32 [S, V]"),
        ({"x": jnp.zeros((2, 0))}, "x is float32 (2, 0): expected float32 [S, V], not empty"),
        ({"top_k": jnp.zeros(2)}, "top_k is float32 (2,): expected int32 [2]"),
        ({"top_p": jnp.zeros(3)}, "top_p is float32 (3,): expected float32 [2]"),
        ({"min_p": jnp.zeros((2, 1))}, "min_p is float32 (2, 1): expected float32 [2]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = {
        "x": jnp.zeros((2, 8)), "top_k": jnp.zeros(2, jnp.int32), "top_p": jnp.ones(2),
        "min_p": jnp.zeros(2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r".") as raised:
        threshold(**(args | change))
    assert message in str(raised.value)
