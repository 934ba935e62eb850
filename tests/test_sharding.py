"""`forward` and `logits` under tensor parallelism, on simulated CPU devices.

The number of devices is fixed when jax starts, so this file runs itself as a child process.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.batch import Batch, Ragged
from jaxinfer.cache import PagedCache, init_cache
from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.models.decoder import apply, forward, logits
from jaxinfer.models.weights import Weight, declare
from jaxinfer.sharding import TENSOR, partition_spec, shardings
from tests.conftest import env_of_devices

BASE = ModelConfig(
    family="llama", vocab_size=64, hidden_size=24, intermediate_size=40, num_heads=4,
    num_kv_heads=4, head_dim=8, layers=(LayerConfig(), LayerConfig(window=5)), max_position=64,
)  # fmt: skip

BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
# name -> (config, shards); fewer KV heads than shards are replicated.
CASES = {
    "2 shards of 4 KV heads": (BASE, 2),
    "2 shards of 1 KV head": (replace(BASE, num_kv_heads=1, qk_norm=True), 2),
    "4 shards of 4 KV heads": (replace(BASE, **BIASES), 4),
    "4 shards of 2 KV heads": (replace(BASE, num_kv_heads=2, tie_embeddings=True), 4),
}
PAGE_SIZE, PAGES = 8, 4
SIZE, SPANS = 16, [(0, 11), (11, 15)]  # tokens of a step, and a sequence's two chunks


def on_disk(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random tensors under the names that a checkpoint has, whatever the sharding."""
    rng = np.random.default_rng(0)
    leaves = jax.tree.leaves(declare(config))
    shapes = {piece.name: piece.shape for weight in leaves for piece in weight.pieces}
    scales = {name: shape[-1] ** -0.5 if len(shape) > 1 else 1 for name, shape in shapes.items()}
    return {n: (rng.normal(size=s) * scales[n]).astype(np.float32) for n, s in shapes.items()}


def lay_out(config: ModelConfig, shards: int) -> dict:
    disk = on_disk(config)

    def weight(declared: Weight) -> np.ndarray:
        parts = [disk[piece.name][piece.start : piece.stop] for piece in declared.pieces]
        return np.concatenate(parts).reshape(declared.shape)

    return jax.tree.map(weight, declare(config, shards))


def chunk(start: int, stop: int) -> Batch:
    tokens, positions, slots = (np.zeros(SIZE, np.int32) for _ in range(3))
    pages = np.array([3, 1])
    at = np.arange(start, stop)
    tokens[: stop - start] = at * 7 % BASE.vocab_size
    positions[: stop - start] = at
    slots[: stop - start] = pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
    arrays = (tokens, positions, slots, pages[None, None], [0, stop - start], [stop], range(SIZE))
    tokens, positions, slots, *ragged, rows = (jnp.asarray(np.array(a, np.int32)) for a in arrays)
    return Batch(tokens, positions, slots, None, Ragged(*ragged), rows)


def both_chunks(params, cache: PagedCache, *, config: ModelConfig, axis: str | None):
    """Hidden states and logits of every token of two chunks, and the cache."""
    found = []
    for span in SPANS:
        out, cache = forward(params, config, chunk(*span), cache, axis=axis)
        count = span[1] - span[0]
        found.append((out.hidden[:count], logits(params, config, out.hidden, axis=axis)[:count]))
    hidden, scores = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    return hidden, scores, cache


def applied(params, *, config: ModelConfig, axis: str | None):
    """Logits of `apply` on the whole sequence, and how they change with the final norm's weight."""
    tokens = jnp.arange(SPANS[-1][1]) * 7 % config.vocab_size
    found = apply(params, config, tokens, axis=axis, capture=("layers.1.mlp_hidden",))

    def loss(scale):
        scaled = {**params, "final_norm": params["final_norm"] * scale}
        return apply(scaled, config, tokens, axis=axis).logits[:, 3].sum()

    return found.logits, jax.grad(loss)(1.0)


def sharded(config: ModelConfig, shards: int):
    """`both_chunks` and `applied` on `shards` devices, twice; results have an axis of shards."""
    mesh = Mesh(np.array(jax.devices()[:shards]), (TENSOR,))
    declared = declare(config, shards)
    params = jax.device_put(lay_out(config, shards), shardings(declared, mesh))
    cache = init_cache(
        replace(config, num_kv_heads=max(config.num_kv_heads, shards)),
        PAGES, PAGE_SIZE, jnp.float32,
    )  # fmt: skip
    heads, each = PartitionSpec(None, TENSOR), PartitionSpec(TENSOR)
    cache = jax.device_put(cache, NamedSharding(mesh, heads))

    def local(params, cache):
        hidden, scores, cache = both_chunks(params, cache, config=config, axis=TENSOR)
        whole, gradient = applied(params, config=config, axis=TENSOR)
        return hidden[None], scores[None], cache, whole[None], gradient[None]

    run = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(jax.tree.map(partition_spec, declared), heads),
            out_specs=(each, each, heads, each, each),
            check_vma=False,  # the point is to look at what each shard has
        )
    )
    return run(params, cache), run(params, cache)


def main(path: str) -> None:
    assert jax.device_count() == 4
    arrays = {}
    for name, case in CASES.items():
        for turn, (hidden, scores, cache, whole, gradient) in enumerate(sharded(*case)):
            found = {"hidden": hidden, "logits": scores, "k": cache.k[1], "v": cache.v[1]}
            found |= {"applied": whole, "gradient": gradient}
            arrays |= {f"{name}/{turn}/{key}": np.asarray(x) for key, x in found.items()}
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharding") / "results.npz"
    command, env = [sys.executable, __file__, str(path)], env_of_devices(4)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", CASES)
def test_sharded_equals_unsharded(results, name):
    config, shards = CASES[name]
    run = jax.jit(partial(both_chunks, config=config, axis=None))
    cache = init_cache(config, PAGES, PAGE_SIZE, jnp.float32)
    hidden, scores, cache = run(lay_out(config, 1), cache)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(results[f"{name}/0/hidden"][0], hidden, **close)
    np.testing.assert_allclose(results[f"{name}/0/logits"][0], scores, **close)
    whole, gradient = applied(lay_out(config, 1), config=config, axis=None)
    np.testing.assert_allclose(whole, scores, **close)
    np.testing.assert_allclose(results[f"{name}/0/applied"][0], whole, **close)
    # Each shard's own part of it; together they are of the sum of what all shards return.
    total = results[f"{name}/0/gradient"].sum()
    np.testing.assert_allclose(total, shards * gradient, rtol=1e-4)
    copies = max(1, shards // config.num_kv_heads)
    for key, pages in (("k", cache.k[1]), ("v", cache.v[1])):
        want = np.repeat(np.asarray(pages), copies, axis=1)[1:]  # without the trash page
        np.testing.assert_allclose(results[f"{name}/0/{key}"][1:], want, **close)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("key", ["hidden", "logits"])
def test_every_shard_and_every_run_has_the_same_bits(results, name, key):
    first, second = (results[f"{name}/{turn}/{key}"] for turn in (0, 1))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, np.broadcast_to(first[:1], first.shape))


def test_weights_are_split_where_their_axes_say():
    layer = declare(replace(BASE, **BIASES), shards=2)["layers"][0]
    specs = {name: tuple(partition_spec(weight)) for name, weight in layer.items()}
    assert specs == {
        "attn_norm": (None,), "mlp_norm": (None,),
        "qkv": (TENSOR, None), "qkv_bias": (TENSOR,), "o": (None, TENSOR), "o_bias": (None,),
        "gate_up": (TENSOR, None), "gate_up_bias": (TENSOR,),
        "down": (None, TENSOR), "down_bias": (None,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "shards", "message"),
    [
        ({}, 3, r"3 must divide num_heads \(4\) and intermediate_size \(40\)"),
        ({"intermediate_size": 42}, 4, r"4 must divide .* intermediate_size \(42\)"),
        ({"num_heads": 6, "num_kv_heads": 3}, 2, "2 and 3 KV heads do not divide"),
    ],
)
def test_shards_that_do_not_divide(change, shards, message):
    with pytest.raises(ValueError, match=message):
        declare(replace(BASE, **change), shards)


if __name__ == "__main__":
    main(sys.argv[1])
