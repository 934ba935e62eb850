"""`write_hf` writes what the safetensors library, and `load_params`, read back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from checkpoints import load_params, open_checkpoint, write_hf
from checkpoints.safetensors_reader import INDEX, SINGLE
from jaxinfer.errors import CheckpointError
from jaxinfer.models.weights import Piece, Weight, declare


def assert_round_trip(directory, params, weights, **options):
    write_hf(directory, params, weights, {"a": 1}, **options)
    loaded = load_params(directory, weights, dtype="bfloat16")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_one_file(tmp_path, config, params, shards):
    """The one KV head is repeated in each shard, and is written once."""
    write_hf(tmp_path / "whole", params, declare(config), {})
    fused = load_params(tmp_path / "whole", declare(config, shards), dtype="bfloat16")
    assert_round_trip(tmp_path / "again", fused, declare(config, shards))
    whole, again = ((tmp_path / d / SINGLE).read_bytes() for d in ("whole", "again"))
    assert whole == again
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {"a": 1}
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["config.json", SINGLE]


@pytest.mark.parametrize("max_shard_bytes", [1, 500])
def test_an_index_and_its_shards(tmp_path, params, weights, max_shard_bytes):
    assert_round_trip(tmp_path, params, weights, max_shard_bytes=max_shard_bytes)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert files == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    if max_shard_bytes == 1:
        assert len(files) == len(index["weight_map"])


def test_the_safetensors_library_reads_it(tmp_path, params, weights):
    write_hf(tmp_path, params, weights, {})
    with safe_open(tmp_path / SINGLE, "numpy") as f:
        assert f.metadata() == {"format": "pt"}
        assert set(f.keys()) == open_checkpoint(tmp_path).tensors.keys()
        embed = f.get_tensor("model.embed_tokens.weight")
    np.testing.assert_array_equal(embed, np.asarray(params["embed"]))


def test_weights_that_are_there_are_kept_unless_told(tmp_path, params, weights):
    (tmp_path / "tokenizer.json").touch()
    write_hf(tmp_path, params, weights, {}, max_shard_bytes=500)
    with pytest.raises(CheckpointError, match="holds weights already"):
        write_hf(tmp_path, params, weights, {})
    assert_round_trip(tmp_path, params, weights, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {SINGLE, "config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("param", "pieces"),
    [
        (jnp.zeros((3, 2)), (Piece("x", (4, 2), 0, 4),)),
        (jnp.zeros((4, 2), "int4"), (Piece("x", (4, 2), 0, 4),)),
        (jnp.zeros((4, 2)), (Piece("x", (5, 2), 0, 4),)),
        (jnp.zeros((4, 2)), (Piece("x", (5, 2), 0, 2), Piece("x", (5, 2), 3, 5))),
    ],
    ids=["shape", "dtype", "end missing", "middle missing"],
)
def test_what_cannot_be_written_is_refused_before_writing(tmp_path, param, pieces):
    with pytest.raises(ValueError, match=r"cannot be written|the pieces of x"):
        write_hf(tmp_path / "new", {"w": param}, {"w": Weight((4, 2), (None,) * 2, pieces)}, {})
    assert not (tmp_path / "new").exists()
