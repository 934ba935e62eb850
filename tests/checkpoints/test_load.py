"""Loading: values, blocks, shardings, and one error for all that does not fit."""

import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints.load
from checkpoints import load_params, write_hf
from checkpoints.safetensors_reader import SINGLE
from jaxinfer.errors import CheckpointError
from jaxinfer.models.weights import declare


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


@pytest.fixture
def directory(tmp_path, params, weights):
    write_hf(tmp_path, params, weights, {})
    return tmp_path


@pytest.mark.parametrize("block_bytes", [checkpoints.load.BLOCK_BYTES, 48, 1])
def test_values_do_not_depend_on_the_block(directory, params, weights, monkeypatch, block_bytes):
    monkeypatch.setattr(checkpoints.load, "BLOCK_BYTES", block_bytes)
    assert_equal_trees(load_params(directory, weights, dtype="bfloat16"), params)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parameters_are_cast(directory, params, weights, dtype):
    loaded = load_params(directory, weights, dtype=dtype)
    assert_equal_trees(loaded, jax.tree.map(lambda x: x.astype(dtype), params))


def test_float64_on_disk_is_cast(directory, params, weights):
    tensors = load_file(directory / SINGLE)
    save_file({n: x.astype(np.float64) for n, x in tensors.items()}, directory / SINGLE)
    assert_equal_trees(load_params(directory, weights, dtype="bfloat16"), params)


def test_fused_rows_are_those_of_the_tensors_on_disk(directory, config):
    """Two shards of two query heads each share the one KV head: it is there twice."""
    disk = load_file(directory / SINGLE)
    q, k, v = (disk[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkv")
    gate, up = (disk[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up"))
    layers = load_params(directory, declare(config, 2), dtype="bfloat16")["layers"]
    np.testing.assert_array_equal(
        np.asarray(layers[0]["qkv"]), np.concatenate([q[:4], k, v, q[4:], k, v])
    )
    np.testing.assert_array_equal(
        np.asarray(layers[1]["gate_up"]), np.concatenate([gate[:6], up[:6], gate[6:], up[6:]])
    )


def test_progress_ends_at_the_total(directory, params, weights):
    calls = []
    load_params(directory, weights, dtype="bfloat16", progress=lambda *call: calls.append(call))
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)


def rewrite(directory, **changes):
    tensors = load_file(directory / SINGLE)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, directory / SINGLE)


def test_all_that_does_not_agree_is_in_one_error(directory, weights, monkeypatch):
    bf16 = ml_dtypes.bfloat16
    rewrite(
        directory,
        **{
            "model.norm.weight": None,
            "model.layers.0.self_attn.q_proj.weight": None,
            "lm_head.weight": np.zeros((24, 9), bf16),
            "model.layers.1.mlp.down_proj.weight": np.zeros((8, 12), np.int8),
            "model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
            "score.weight": np.zeros(4, np.float32),
        },
    )
    monkeypatch.setattr(checkpoints.load, "read_rows", None)  # no tensor is read
    with pytest.raises(CheckpointError) as e:
        load_params(
            directory, weights, dtype="bfloat16", allowed_extra=[r".*\.rotary_emb\.inv_freq"]
        )
    assert str(e.value).splitlines() == [
        f"{directory}: config.json and the weights do not agree.",
        "2 missing: model.layers.0.self_attn.q_proj.weight; model.norm.weight",
        "1 not part of the model: score.weight",
        "2 of another shape or dtype: lm_head.weight [24, 9], not [24, 8]; "
        "model.layers.1.mlp.down_proj.weight int8, not "
        "bfloat16 or float16 or float32 or float64",
    ]


def test_a_long_list_is_abbreviated(directory, weights):
    rewrite(directory, **{f"extra.{i:02}": np.zeros(1, np.float32) for i in range(25)})
    with pytest.raises(CheckpointError, match=r"\n25 not part .*extra\.19; and 5 more$") as e:
        load_params(directory, weights, dtype="bfloat16")
    assert "extra.20" not in str(e.value)


def test_fp8_weights_are_refused(directory, weights):
    rewrite(directory, **{"model.norm.weight": np.zeros(8, ml_dtypes.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=r"norm\.weight float8_e4m3fn"):
        load_params(directory, weights, dtype="bfloat16")


def test_a_flipped_header_bit_is_refused_or_harmless(directory, params, weights):
    """Every 35th bit, for time: no factor in common with 8, so all positions in a byte occur."""
    content = (directory / SINGLE).read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    for bit in range(0, 8 * header_end, 35):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (directory / SINGLE).write_bytes(flipped)
        try:
            loaded = load_params(directory, weights, dtype="bfloat16")
        except CheckpointError:
            continue
        assert_equal_trees(loaded, params)


def run_python(program, *args, timeout=120):
    """Runs `program` in a process of its own, on the CPU; its stdout, or its stderr raised."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SHARDED = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file
import checkpoints.load
from checkpoints import load_params
from jaxinfer.models.weights import Piece, Weight
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
w = Weight((8, 6), (None, None), (Piece("a", (9, 6), 4, 9), Piece("a", (9, 6), 0, 3)))
a = load_file(sys.argv[1] + "/model.safetensors")["a"]
expected = np.concatenate([a[4:9], a[:3]])
for block in (1, 36, 2**20):
    checkpoints.load.BLOCK_BYTES = block
    for spec in (P(), P("model"), P(None, "model"), P("data", "model"), P(("model", "data"))):
        sharding = NamedSharding(mesh, spec)
        tree = load_params(sys.argv[1], {"w": w}, dtype="float32", shardings={"w": sharding})
        assert tree["w"].sharding == sharding
        np.testing.assert_array_equal(np.asarray(tree["w"]), expected)
        for shard in tree["w"].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
"""


def test_shards_arrive_on_their_devices(tmp_path):
    save_file({"a": np.arange(54, dtype=np.float32).reshape(9, 6)}, tmp_path / SINGLE)
    run_python(SHARDED, tmp_path)


MEMORY = """
import sys, jax
import checkpoints.load
from checkpoints import load_params
from jaxinfer.models.weights import Piece, Weight

def status(key):  # bytes
    line = next(l for l in open("/proc/self/status") if l.startswith(key + ":"))
    return int(line.split()[1]) * 1024

def load(names, rows):
    weights = {n: Weight((rows, 1024), (None, None), (Piece(n, (rows, 1024), 0, rows),))
               for n in names}
    return load_params(sys.argv[1], weights, dtype="bfloat16", allowed_extra=[".*"])

checkpoints.load.BLOCK_BYTES = 2**24
load(["warm"], 10240)
before = status("VmRSS")
small = load([f"w{i:02}" for i in range(24)], 5120)
large = load(["large"], 32768)
print(status("VmHWM") - before - sum(x.nbytes for x in jax.tree.leaves((small, large))))
"""


def test_host_memory_stays_at_a_few_blocks(tmp_path):
    """24 weights of 10 MiB and one of 64 MiB, in blocks of 16 MiB, above the arrays themselves.

    On the CPU the arrays are host memory as well: their size is subtracted from the peak.
    """
    rows = {"warm": 10240, "large": 32768} | {f"w{i:02}": 5120 for i in range(24)}
    header, end = {}, 0
    for name, count in rows.items():
        size = count * 1024 * 2
        header[name] = {
            "dtype": "BF16",
            "shape": [count, 1024],
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / SINGLE).open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)  # sparse: zeros that take no room on disk
    assert int(run_python(MEMORY, tmp_path)) < 3 * 2**24
