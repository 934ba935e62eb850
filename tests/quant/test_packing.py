"""Matrices packed for a GPU's kernels: which are, and that they stay what they were."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.models.weights import init_params
from jaxinfer.quant import Parts, QuantisedMatrix, dequantise, matmul, pack_params, packing
from jaxinfer.quant.arrays import Ordered
from jaxinfer.quant.make import Recipe, round_to_nearest
from jaxinfer.quant.packing import can_pack, pack_matrix
from jaxinfer.quantise import Method, quantise_params
from pallas_kernels.quant_packing import PackedMatrix

RECIPES = [
    Recipe("int", 4, 32),
    Recipe("int", 4, 128, symmetric=False),
    Recipe("int", 8, -1),
    Recipe("nf4", 4, 64),
    Recipe("fp8", 8, -1),
]


def made(recipe: Recipe = RECIPES[0], N: int = 512, K: int = 256) -> QuantisedMatrix:
    w = np.random.default_rng(0).normal(size=(N, K)).astype(np.float32)
    return round_to_nearest(jnp.asarray(w), recipe, jnp.bfloat16)


def close(got: Any, want: Any) -> None:
    """Up to what bfloat16 rounds, twice."""
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.abs(got - want).max() <= 2**-7 * np.abs(want).max()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_packed_matrix_stands_for_the_same(recipe: Recipe) -> None:
    matrix = made(recipe)
    packed = pack_matrix(matrix)
    assert isinstance(packed, PackedMatrix)
    assert packed.shape == matrix.shape
    close(dequantise(packed), dequantise(matrix))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 256)), jnp.bfloat16)
    close(matmul(x, packed), matmul(x, matrix))


def test_columns_in_another_order() -> None:
    order = jnp.asarray(np.random.default_rng(2).permutation(256), jnp.int32)
    matrix = made()
    matrix = QuantisedMatrix(matrix.scheme, matrix.codes, matrix.scales, order=order)
    packed = pack_matrix(matrix)
    assert isinstance(packed, Ordered)
    close(dequantise(packed), dequantise(matrix))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 256)), jnp.bfloat16)
    close(matmul(x, packed), matmul(x, matrix))


def test_parts_are_packed_one_by_one() -> None:
    dense = jnp.ones((64, 256), jnp.bfloat16)
    packed = pack_matrix(Parts((made(), dense, made(RECIPES[2]))))
    kinds = [type(part) for part in packed.parts]
    assert kinds[0] is kinds[2] is PackedMatrix
    assert packed.parts[1] is dense


@pytest.mark.parametrize(
    "matrix",
    [
        made(N=96),
        made(K=192),
        made(Recipe("int", 4, 8)),
        made(Recipe("fp8", 8, 128, rows=128, activations="group")),
    ],
    ids=["rows", "columns", "groups", "activations"],
)
def test_what_has_no_kernel_stays(matrix: QuantisedMatrix) -> None:
    assert not can_pack(matrix)
    assert pack_matrix(matrix) is matrix


def test_scales_of_rounded_activations_have_the_type_that_is_read() -> None:
    matrix = made(Recipe("fp8", 8, -1, activations="token"))
    packed = pack_matrix(matrix)
    assert isinstance(packed, QuantisedMatrix)
    assert (matrix.scales.dtype, packed.scales.dtype) == (jnp.bfloat16, jnp.float32)
    assert packed.codes is matrix.codes
    x = jnp.ones((2, 256), jnp.bfloat16)
    np.testing.assert_array_equal(matmul(x, packed), matmul(x, matrix))


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H100, but multiplied by the definition."""
    monkeypatch.setattr(packing, "capability", lambda: 9.0)


def test_only_where_there_is_a_kernel(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"layers": [{"o": made()}]}
    assert pack_params(params, jnp.float32, consume=False) is params
    packed = pack_params(params, jnp.bfloat16, consume=False)
    assert isinstance(packed["layers"][0]["o"], PackedMatrix)
    assert isinstance(params["layers"][0]["o"], QuantisedMatrix)
    pack_params(params, jnp.bfloat16, consume=True)
    assert params["layers"][0]["o"] is None
    monkeypatch.setattr(packing, "capability", lambda: None)
    params = {"layers": [{"o": made()}]}
    assert pack_params(params, jnp.bfloat16, consume=True) is params


def test_an_llm_packs_and_is_updated(on_hopper: None, tiny: Any) -> None:
    """What is given to it, and given anew, is not packed; what it multiplies by is."""
    config = replace(tiny.config, hidden_size=128, intermediate_size=256, num_heads=8)
    dense = [init_params(config, jax.random.key(seed), jnp.bfloat16) for seed in (0, 1)]
    method = Method(Recipe("int", 4, 32))
    one, two = (quantise_params(params, config, method) for params in dense)
    sizes: dict[str, Any] = {
        "max_num_seqs": 2, "max_model_len": 64, "kv_cache_bytes": 1 << 22, "dtype": "bfloat16",
        "max_num_batched_tokens": 32, "max_steps": 1,
    }  # fmt: skip
    ask = partial(
        LLM.generate, prompts=[[1, 2, 3]], params=SamplingParams(temperature=0, max_tokens=4)
    )
    with LLM.from_params(one, config, **sizes) as llm:
        assert isinstance(llm.params["layers"][0]["down"], PackedMatrix)
        assert isinstance(one["layers"][0]["down"], QuantisedMatrix)
        before = ask(llm)[0].outputs[0].token_ids
        llm.update_params(two)
        after = ask(llm)[0].outputs[0].token_ids
    with LLM.from_params(two, config, **sizes) as llm:
        assert ask(llm)[0].outputs[0].token_ids == after != before
