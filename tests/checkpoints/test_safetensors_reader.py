"""Headers and indices: what is right is read, what is wrong is named."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from checkpoints.safetensors_reader import INDEX, SINGLE, open_checkpoint, read_rows
from jaxinfer.errors import CheckpointError

A = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)


def file_bytes(header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def good(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / SINGLE, metadata={"format": "pt"})
    return tmp_path


def write_index(directory, where):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_file_of_the_safetensors_library_is_read(good):
    tensors = open_checkpoint(good).tensors
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        "a": ((4, 3), A.dtype),
        "b": ((6,), B.dtype),
    }
    out = np.empty((2, 3), np.float32)
    read_rows(tensors["a"], 1, out)
    np.testing.assert_array_equal(out, A[1:3])
    cast = np.empty(3, np.float32)
    read_rows(tensors["b"], 2, cast)
    np.testing.assert_array_equal(cast, B[2:5].astype(np.float32))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16"])
def test_dtypes_of_the_safetensors_library(tmp_path, dtype):
    x = np.array([[0, 1], [1, 0]]).astype(dtype)
    save_file({"x": x, "scalar": np.array(x[0, 0])}, tmp_path / SINGLE)
    tensors = open_checkpoint(tmp_path).tensors
    out = np.empty((1, 2), dtype)
    read_rows(tensors["x"], 1, out)
    np.testing.assert_array_equal(out, x[1:])
    assert tensors["scalar"].shape == ()


def test_a_sharded_directory_is_read(tmp_path):
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert {n: t.file.name for n, t in open_checkpoint(tmp_path).tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_a_file_that_shrinks_after_it_was_opened(good):
    tensor = open_checkpoint(good).tensors["a"]
    (good / SINGLE).write_bytes((good / SINGLE).read_bytes()[: tensor.stop - 1])
    with pytest.raises(CheckpointError, match="ends at byte"):
        read_rows(tensor, 0, np.empty((4, 3), np.float32))


BAD_FILES = {
    "empty": (b"", "truncated: 0 bytes"),
    "short length": (b"\1\0\0", "truncated: 3 bytes"),
    "header longer than the file": (file_bytes(b"{}", length=3), "3 bytes is announced"),
    "huge header length": (b"\xff" * 64, "is announced"),
    "not JSON": (file_bytes(b"pickle!!"), "not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not JSON"),
    "deep JSON": (file_bytes(b"[" * 100_000), "not JSON"),
    "a list": (file_bytes([]), "an object is expected|object is expected"),
    "an entry that is a number": (file_bytes({"x": 1}), "'x': dtype, shape and data_offsets"),
    "an entry without shape": (
        file_bytes({"x": {"dtype": "F32", "data_offsets": [0, 4]}}),
        "'x': dtype, shape",
    ),
    "unknown dtype": (file_bytes({"x": entry("F4")}, b"\0" * 8), "dtype 'F4' is not supported"),
    "dtype that is no string": (file_bytes({"x": entry(["F32"])}, b"\0" * 8), "is not supported"),
    "negative size": (file_bytes({"x": entry(shape=(-2,))}, b"\0" * 8), "is not a shape"),
    "a size that is true": (
        file_bytes({"x": entry(shape=(True,), offsets=(0, 4))}, b"\0" * 4),
        "is not a shape",
    ),
    "fractional size": (file_bytes({"x": entry(shape=(2.0,))}, b"\0" * 8), "is not a shape"),
    "three offsets": (file_bytes({"x": entry(offsets=(0, 4, 8))}), "pair of byte offsets"),
    "offsets against the shape": (
        file_bytes({"x": entry(offsets=(0, 4))}, b"\0" * 4),
        r"F32 \[2\] takes 8 bytes, and data_offsets \[0, 4\] hold 4",
    ),
    "reversed offsets": (file_bytes({"x": entry(offsets=(8, 0))}, b"\0" * 8), "hold -8"),
    "a hole": (file_bytes({"x": entry(offsets=(4, 12))}, b"\0" * 12), "'x' leaves a hole"),
    "an overlap": (
        file_bytes({"x": entry(), "y": entry(offsets=(4, 12))}, b"\0" * 12),
        "'y' overlaps",
    ),
    "short data": (file_bytes({"x": entry()}, b"\0" * 7), "truncated: .* the header says"),
    "long data": (file_bytes({"x": entry()}, b"\0" * 9), "1 bytes more than the header says"),
    "a repeated name": (
        file_bytes(b'{"x": %s, "x": %s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
        "'x' is there twice",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, case):
    content, message = BAD_FILES[case]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as e:
        open_checkpoint(tmp_path)
    assert SINGLE in str(e.value)


BAD_INDICES = {
    "missing file": ({"a": "one.safetensors", "c": "three.safetensors"}, "three.* does not exist"),
    "tensor that the file lacks": ({"c": "one.safetensors"}, "'c' into one.* does not hold it"),
    "tensor of another file": (
        {"a": "two.safetensors", "b": "one.safetensors"},
        "'a' into two.* does not hold it",
    ),
    "path out of the directory": ({"a": "../one.safetensors"}, "is not a file name"),
    "number for a file": ({"a": 1}, "is not a file name"),
    "nothing": ({}, "no `weight_map`"),
    "list": (["a"], "no `weight_map`"),
    "tensor in two files": (
        {"a": "one.safetensors", "b": "two.safetensors", "x": "again.safetensors"},
        "'a' is in again.safetensors too",
    ),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_a_bad_index_is_named_with_what_is_wrong(tmp_path, case):
    where, message = BAD_INDICES[case]
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    save_file({"a": A, "x": A}, tmp_path / "again.safetensors")
    write_index(tmp_path, where)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {"a": "x", "a": "y"}}'])
def test_an_index_that_is_not_an_object(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(tmp_path)


def test_an_index_beside_a_single_file(good):
    save_file({"a": A}, good / "one.safetensors")
    write_index(good, {"a": "one.safetensors"})
    with pytest.raises(CheckpointError, match="holds both"):
        open_checkpoint(good)
    write_index(good, {"a": SINGLE, "b": SINGLE})
    assert open_checkpoint(good).tensors.keys() == {"a", "b"}


def test_directories_without_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pickle.*only safetensors are read"):
        open_checkpoint(tmp_path)


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)


def test_every_truncation_is_refused(good):
    content = (good / SINGLE).read_bytes()
    for size in range(len(content)):
        (good / SINGLE).write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=SINGLE):
            open_checkpoint(good)


def test_a_flipped_bit_is_refused_or_stays_inside_the_file(good):
    content = (good / SINGLE).read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for bit in range(0, 8 * header_end, 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (good / SINGLE).write_bytes(flipped)
        try:
            tensors = open_checkpoint(good).tensors
        except CheckpointError:
            refused += 1
            continue
        assert all(header_end <= t.start <= t.stop <= len(content) for t in tensors.values())
    assert refused > header_end  # letters of a name may change without anybody knowing


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {"dtype": json_values | st.just("U8"), "shape": json_values, "data_offsets": json_values}
)


@given(header=st.dictionaries(st.text(max_size=3), entries | json_values, min_size=1))
def test_any_json_for_a_header_is_read_or_refused(tmp_path_factory, header):
    directory = tmp_path_factory.getbasetemp()
    (directory / SINGLE).write_bytes(file_bytes(header, b"\0" * 4))
    try:
        tensors = open_checkpoint(directory).tensors
    except CheckpointError:
        return
    assert sum(t.stop - t.start for t in tensors.values()) == 4
