"""GGUF: every block type against the gguf package, models against transformers, hostile files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from checkpoints.gguf import load_gguf, open_gguf, read_config, stored_sizes, tokenizer_fields
from checkpoints.gguf.blocks import READ, decode
from checkpoints.gguf.model import gguf_name
from checkpoints.gguf.reader import OTHERS, TYPES
from checkpoints.load_matrices import read_tensor
from checkpoints.safetensors_reader import open_checkpoint
from jaxinfer import LLM, SamplingParams, models
from jaxinfer.config import RopeConfig
from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.loading import model_tokenizer
from jaxinfer.models.weights import declare
from jaxinfer.quant import Parts, QuantisedMatrix, dequantise
from jaxinfer.rope import rope_frequencies
from jaxinfer.tokenizer import load_tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens" / "gguf"
NAMES = sorted(p.stem for p in GOLDENS.glob("*.gguf"))
DEMO = Path(__file__).parents[2] / "checkpoints" / "demo" / "target"
IDS = {t.name: i for i, t in TYPES.items()}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


# -- blocks ---------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_package() -> None:
    for i, kind in TYPES.items():
        known = package.GGMLQuantizationType(i)
        assert known.name == kind.name
        assert package.GGML_QUANT_SIZES[known] == (kind.values, kind.size)
    for i, name in OTHERS.items():
        assert package.GGMLQuantizationType(i).name == name


@pytest.mark.parametrize("name", sorted(READ))
def test_blocks_are_the_packages(name: str) -> None:
    """Any bytes: but for scales that are no numbers, which no tool writes."""
    kind = TYPES[IDS[name]]
    draw = np.random.default_rng(0)
    raw = draw.integers(0, 256, (6, 2 * kind.size), np.uint8)
    want = package.quants.dequantize(raw, package.GGMLQuantizationType[name])
    matrix = decode(raw, kind)
    assert matrix.shape == (6, 2 * kind.values)
    got = np.asarray(dequantise(matrix))
    finite = np.isfinite(want) & (np.abs(want) < 1e6)
    assert finite.mean() > 0.5
    np.testing.assert_allclose(got[finite], want[finite], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_package_quantises(name: str) -> None:
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    raw = package.quants.quantize(values, package.GGMLQuantizationType[name])
    error = np.abs(np.asarray(dequantise(decode(raw, TYPES[IDS[name]]))) - values).max()
    assert error < {"Q4": 0.3, "Q5": 0.15, "Q8": 0.02}[name[:2]]


# -- models ---------------------------------------------------------------------------------------


def test_all_variants_have_goldens() -> None:
    assert len(NAMES) == 10


def loaded(path: Path) -> tuple[Any, Any]:
    config = read_config(path)
    weights = declare(config)
    params = load_gguf(path, weights, dtype=jnp.float32, head_dim=config.head_dim)
    return config, params


@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str) -> None:
    golden = load_file(GOLDENS / f"{name}.safetensors")
    config, params = loaded(GOLDENS / f"{name}.gguf")
    logits = models.apply(params, config, jnp.asarray(golden["tokens"])).logits
    error = np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max()
    assert error < 1e-4
    for layer in params["layers"]:
        assert isinstance(layer["qkv"], QuantisedMatrix | Parts)
    actual = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    sizes = stored_sizes(GOLDENS / f"{name}.gguf", declare(config), jnp.float32)
    expected = sum(jax.tree.leaves(sizes))
    assert expected == actual


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a GGUF file of float32, tokenizer included, as llama.cpp writes it."""
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    hf = json.loads((DEMO / "config.json").read_text())
    spec = json.loads((DEMO / "tokenizer.json").read_text())
    heads, kv = hf["num_attention_heads"], hf["num_key_value_heads"]
    w = package.GGUFWriter(path, "qwen3")
    w.add_context_length(hf["max_position_embeddings"])
    w.add_embedding_length(hf["hidden_size"])
    w.add_block_count(hf["num_hidden_layers"])
    w.add_feed_forward_length(hf["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    w.add_rope_freq_base(hf.get("rope_theta") or hf["rope_parameters"]["rope_theta"])
    if hf.get("head_dim"):
        w.add_key_length(hf["head_dim"])
    vocab = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    extra = {t["id"]: t["content"] for t in spec["added_tokens"]}
    tokens = vocab + [extra[i] for i in range(len(vocab), len(vocab) + len(extra)) if i in extra]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list(tokens)
    w.add_token_types([3 if i in extra else 1 for i in range(len(tokens))])
    merges = spec["model"]["merges"]
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    if hf.get("eos_token_id") is not None:
        eos = hf["eos_token_id"]
        w.add_eos_token_id(eos if isinstance(eos, int) else eos[0])
    checkpoint = open_checkpoint(DEMO)
    for name, tensor in checkpoint.tensors.items():
        w.add_tensor(gguf_name("llama", name), read_tensor(tensor).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_the_demo_as_gguf(demo: Path) -> None:
    """The same tokens and text come out as from the directory."""
    sizes: dict[str, Any] = {
        "max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 1 << 24, "dtype": "float32",
        "max_num_batched_tokens": 32, "max_steps": 1,
    }  # fmt: skip
    prompt = [514, 616, 534]
    with LLM(demo, **sizes) as llm, LLM("demo", **sizes) as other:
        got, want = (m.generate(prompt, GREEDY)[0].outputs[0] for m in (llm, other))
    assert got.token_ids == want.token_ids
    assert got.text == want.text


def test_a_tokenizer_of_gguf(demo: Path) -> None:
    theirs, ours = load_tokenizer(DEMO), model_tokenizer(demo)
    assert theirs is not None
    assert ours is not None
    # The demo's own way of cutting texts into words has no name in GGUF: the tokens have.
    for text in ("import os\n\n\nclass A:\n    x = 1  # ü → 語\n", "  two", ""):
        assert ours.decode(theirs.encode(text)) == text
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == theirs.vocab_size
    assert ours.encode("a<|endoftext|>")[-1] == ours.eos_token_id
    assert ours.eos_token_id == theirs.eos_token_id


def test_no_tokenizer() -> None:
    assert tokenizer_fields(GOLDENS / "llama-legacy.gguf") is None
    assert model_tokenizer(GOLDENS / "llama-legacy.gguf") is None


def test_a_tokenizer_that_contradicts_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    w = package.GGUFWriter(path, "llama")
    w.add_tokenizer_model("gpt2")
    w.add_token_list(["a", "b"])
    w.add_token_merges([])
    w.add_eos_token_id(7)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    with pytest.raises(CheckpointError, match="cannot build its tokenizer"):
        model_tokenizer(path)


# -- configs --------------------------------------------------------------------------------------


def small(path: Path, arch: str = "llama", **keys: Any) -> Path:
    """A file of one tensor, the embedding, and a whole set of keys."""
    w = package.GGUFWriter(path, arch)
    found = {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    } | keys  # fmt: skip
    for key, value in found.items():
        if value is None:
            continue
        add = w.add_float32 if isinstance(value, float) else w.add_uint32
        add(f"{arch}.{key}", value) if not isinstance(value, str) else w.add_string(
            f"{arch}.{key}", value
        )
    w.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize(
    ("arch", "blocks", "full", "width"),
    [
        ("gemma2", 46, range(1, 46, 2), 16),
        ("gemma3", 62, range(5, 62, 6), 16),
        ("gemma3", 8, [5], 8),
    ],
)
def test_gemmas_layers(tmp_path: Path, arch: str, blocks: int, full: Any, width: int) -> None:
    """Which layers see everything, and what scores are scaled by: the files do not say."""
    keys: dict[str, Any] = {"block_count": blocks, "attention.sliding_window": 7}
    keys |= {"attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8}
    config = read_config(small(tmp_path / "x.gguf", arch, **keys))
    assert [i for i, layer in enumerate(config.layers) if layer.window is None] == list(full)
    assert {layer.window for layer in config.layers} == {None, 7}
    assert config.attention_scale == width**-0.5
    thetas = {layer.window: layer.rope.theta for layer in config.layers if layer.rope}
    assert thetas == ({None: 1e4, 7: 1e4} if arch == "gemma2" else {None: 1e6, 7: 1e4})
    assert config.attention_softcap == (50.0 if arch == "gemma2" else None)


@pytest.mark.parametrize(
    ("arch", "keys", "error", "message"),
    [
        ("gemma4", {}, UnsupportedModel, "general.architecture = 'gemma4'.*llama, qwen2, qwen3"),
        ("llama", {"block_count": None}, CheckpointError, "no key llama.block_count"),
        ("llama", {"attention.sliding_window": 8}, UnsupportedModel, "sliding_window = 8"),
        ("llama", {"rope.dimension_count": 8}, UnsupportedModel, "rope.dimension_count = 8"),
        ("llama", {"attention.value_length": 8}, UnsupportedModel, "value_length = 8"),
        ("llama", {"attention.head_count": 0}, UnsupportedModel, "num_attention_heads = 0"),
        ("llama", {"embedding_length": "x"}, UnsupportedModel, "hidden_size = 'x'"),
    ],
)
def test_configs_that_are_refused(
    tmp_path: Path, arch: str, keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_config(small(tmp_path / "x.gguf", arch, **keys))


def test_llama3_ropes_are_recognised(tmp_path: Path) -> None:
    """As llama.cpp writes them: factors that divide the frequencies."""
    rope = RopeConfig(500000.0, "llama3", 32.0, 8192, 1.0, 4.0)
    factors = rope_frequencies(RopeConfig(500000.0), 16)[0] / rope_frequencies(rope, 16)[0]

    def write(name: str, freqs: np.ndarray) -> Path:
        path = tmp_path / name
        w = package.GGUFWriter(path, "llama")
        w.add_context_length(131072)
        w.add_embedding_length(32)
        w.add_block_count(1)
        w.add_feed_forward_length(32)
        w.add_head_count(2)
        w.add_layer_norm_rms_eps(1e-5)
        w.add_rope_freq_base(500000.0)
        w.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
        w.add_tensor("rope_freqs.weight", freqs.astype(np.float32))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return path

    assert read_config(write("a.gguf", factors)).layers[0].rope == rope
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        read_config(write("b.gguf", factors * 1.5))


def test_tensors_that_do_not_agree(tmp_path: Path) -> None:
    path = small(tmp_path / "x.gguf")
    config = read_config(path)
    with pytest.raises(CheckpointError, match=r"10 missing: blk\.0\.attn_k\.weight"):
        load_gguf(path, declare(config), dtype=jnp.float32, head_dim=config.head_dim)


# -- hostile files --------------------------------------------------------------------------------


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def info(dims: list[int], kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    packed = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + packed + struct.pack("<IQ", kind, offset)


ALIGN = text(b"general.alignment") + struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "goes past the end"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (header(version=1), "version 1"),
        (header(version=3 << 24), "big-endian"),
        (header(keys=2**32), "no room for so many"),
        (header(tensors=2**63), "no room for so many"),
        (header(text(b"x", 2**63) + bytes(64), keys=1), "a key of .* at most"),
        (
            header(text(b"k") + struct.pack("<IQ", 8, 2**62) + bytes(64), keys=1),
            "past the end|most",
        ),
        (header(text(b"k") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(64), keys=1), "no room"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), keys=1), "array of type 9"),
        (header(text(b"k") + struct.pack("<I", 99) + bytes(64), keys=1), "99 is no type"),
        (header(2 * (text(b"k") + struct.pack("<IB", 0, 1)), bytes(64), keys=2), "comes twice"),
        (header(ALIGN + struct.pack("<I", 0), keys=1), "alignment = 0"),
        (header(ALIGN + struct.pack("<I", 12), keys=1), "alignment = 12"),
        (header(info([]), bytes(64), tensors=1), "0 dimensions"),
        (header(info([1] * 5), bytes(64), tensors=1), "5 dimensions"),
        (header(info([32], kind=39), bytes(64), tensors=1), "type MXFP4, which is not read"),
        (header(info([32], kind=77), bytes(64), tensors=1), "type 77, which is not read"),
        (header(info([33], kind=2), bytes(64), tensors=1), "in blocks of 32"),
        (header(info([0]), bytes(64), tensors=1), "in blocks"),
        (header(info([2**40, 2**20]), bytes(64), tensors=1), "truncated"),
        (header(info([2**62, 2**62, 2**62]), bytes(64), tensors=1), "truncated"),
        (header(info([4], offset=2**62), bytes(64), tensors=1), "truncated"),
        (header(info([4], offset=1), bytes(64), tensors=1), "no multiple of 32"),
        (header(info([4]), info([4], name=b"u"), bytes(99), tensors=2), "overlaps"),
        (header(info([4]), info([4], offset=32), bytes(99), tensors=2), "comes twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(path)


def test_a_part_of_a_split_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header(text(b"split.count") + struct.pack("<IH", 2, 3), keys=1))
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        open_gguf(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_gguf(tmp_path / "none.gguf")


WHOLE = (GOLDENS / "llama-k-tied.gguf").read_bytes()[:4096]
edits = st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=9)), max_size=4)


def check_any(path: Path, data: bytes) -> None:
    """Whatever the bytes: opened, or one error of ours."""
    path.write_bytes(data)
    try:
        read_config(path)
    except (CheckpointError, UnsupportedModel):
        return


@settings(max_examples=300)
@given(edits=edits, stop=st.integers(0, 4096))
def test_damaged_files(tmp_path_factory: Any, edits: list[tuple[int, bytes]], stop: int) -> None:
    data = bytearray(WHOLE + bytes(400_000))
    for at, what in edits:
        data[at : at + len(what)] = what
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    check_any(path, bytes(data) if stop > 2500 else bytes(data[:stop]))


@given(st.binary(max_size=300))
def test_any_bytes(tmp_path_factory: Any, data: bytes) -> None:
    check_any(tmp_path_factory.getbasetemp() / "any.gguf", b"GGUF\x03\0\0\0" + data)
