"""A tiny model's declaration and parameters."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.models.weights import declare, init_params


@pytest.fixture(scope="session")
def config():
    return ModelConfig(
        family="llama",
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_heads=4,
        num_kv_heads=1,
        head_dim=2,
        layers=(LayerConfig(), LayerConfig()),
        max_position=32,
        qkv_bias=True,
    )


@pytest.fixture(scope="session")
def weights(config):
    return declare(config)


@pytest.fixture(scope="session")
def params(config):
    return init_params(config, jax.random.key(0), jnp.bfloat16)
