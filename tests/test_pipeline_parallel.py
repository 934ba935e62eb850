"""The engine as a pipeline on several simulated CPU devices: the same tokens as on one.

As `test_tensor_parallel`, this file runs itself as a child process that has 8 devices.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints.load_matrices import unlike_stages
from jaxinfer import LLM, SamplingParams
from jaxinfer.batch import MIN_ROWS, Batch, Ragged
from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.models.weights import Weight, declare
from jaxinfer.parallel import arrange, declared_on, device_bytes, replica_meshes
from jaxinfer.pipeline import _dealt, _slice
from jaxinfer.placement import can_stage
from jaxinfer.quant import QuantisedMatrix, Scheme, stack_stages
from jaxinfer.sharding import STAGE, TENSOR, partition_spec, shardings
from tests.test_tensor_parallel import (
    CONFIG,
    DRAWN,
    GREEDY,
    HF,
    PENALISED,
    PROMPTS,
    ROOT,
    SAMPLED,
    child,
    decoding,
    exchanges,
    guessing_by,
    kept,
    kinds,
    main,
    note_error,
    streamed,
    tokens_of,
    weights,
)

FOUR = replace(CONFIG, layers=CONFIG.layers * 2)
ALIKE = replace(CONFIG, layers=(LayerConfig(),) * 4)
SCORED = replace(GREEDY, max_tokens=8, logprobs=0)
MANY = [[*range(i, i + 3 + i % 5)] for i in range(20)]


def make(size: int, stages: int, config: ModelConfig = FOUR, **options: Any) -> LLM:
    """Prompts of more than a step, and so few pages that some give way."""
    heads = max(config.num_kv_heads // size, 1)
    page = 8 * 2 * heads * 8 * 4 * (config.num_layers // max(stages, 1))
    sizes: dict[str, Any] = {
        "max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 12 * page, "max_steps": 1,
        "max_num_batched_tokens": 16, "page_size": 8,
    }  # fmt: skip
    return LLM.from_params(
        weights(config), config, dtype="float32", tensor_parallel_size=size,
        pipeline_parallel_size=stages, **sizes | options,
    )  # fmt: skip


def said(llm: LLM, prompts: Any, params: SamplingParams | list[SamplingParams]) -> list[Any]:
    """Of each prompt the tokens and their log-probabilities."""
    found = []
    for output in llm.generate(prompts, params):
        sample = output.outputs[0]
        pairs = zip(sample.logprobs or (), sample.token_ids, strict=True)
        found.append([list(sample.token_ids), [float(at[i].logprob) for at, i in pairs]])
    return found


# -- what the child finds -------------------------------------------------------------------------


def greedy(_: Path) -> dict[str, Any]:
    """Long prompts, steps that read and decode, shared beginnings, preemption; where KV heads are
    split, pages on the host too."""
    found: dict[str, Any] = {}
    for size, stages in ((1, 1), (1, 2), (2, 2)):
        with make(size, stages, kv_host_bytes=0 if size == 1 else 1 << 15) as llm:
            found[f"{size} {stages}"] = tokens_of(llm)
            found[f"{size} {stages} again"] = tokens_of(llm)
            cache = llm.engine._cache.k
            local = cache[0].sharding.shard_shape(cache[0].shape)
            found[f"{size} {stages} said"] = {
                "collectives": decoding(llm, random=False),
                "summary": llm.metrics.summary()._asdict(),
                "cache": [len(cache), cache[0].shape, local],
                "plan": [llm.memory_plan.weights, llm.memory_plan.num_pages],
            }
    return found


def together(_: Path) -> dict[str, Any]:
    """Three steps a dispatch, of parts of 8 rows and of 16; and what each request gets alone."""
    with make(1, 1, ALIKE, kv_cache_bytes=1 << 16) as llm:
        want = said(llm, MANY, SCORED)
    with make(
        1, 4, ALIKE, max_num_seqs=40, max_steps=3, max_num_batched_tokens=64,
        kv_cache_bytes=1 << 16,
    ) as llm:  # fmt: skip
        got = said(llm, MANY, SCORED)
        alone = [said(llm, [prompt], SCORED)[0] for prompt in MANY[:3]]
        keys = [key for key, _ in llm.engine.compiler._compiled]
    rows = sorted({key.rows for key in keys if key.steps > 1})
    return {"want": want, "got": got, "alone": alone, "rows": rows}


def errors(folder: Path) -> dict[str, str]:
    """What is refused, and in which words; none of it reads weights."""
    found: dict[str, str] = {}
    refuse = partial(note_error, found)
    lists = ([[1, 2]], GREEDY)
    small = replace(CONFIG, layers=CONFIG.layers[:1])
    many = replace(CONFIG, layers=(LayerConfig(),) * 16)
    refuse("devices", lambda: make(2, 8, many))
    refuse("layers", lambda: make(1, 3))
    refuse("windows", lambda: make(1, 4))
    refuse("vocabulary", lambda: make(2, 2, replace(FOUR, vocab_size=66)))
    refuse("size", lambda: make(1, 0))
    refuse("draft", lambda: make(1, 2, speculative="draft", draft=(weights(small), small)))
    refuse("skip", lambda: make(1, 2, speculative="skip=1"))
    (folder / "config.json").write_text(json.dumps(HF))
    refuse("directory", lambda: LLM(folder, pipeline_parallel_size=4))  # there are no weights in it
    with make(2, 2) as llm:
        refuse("capture", lambda: llm.generate(*lists, capture=["layers.0.resid"]))
        refuse("logits_fn", lambda: llm.generate(*lists, logits_fn=lambda *_: None))  # type: ignore
        refuse("functional", lambda: llm.functional([[1, 2]]))
    return found


def every_kind(folder: Path) -> dict[str, Any]:
    """Sampled and scored, and what is kept over a restart; programs that are warmed up."""
    found: dict[str, Any] = {}
    for size, stages in ((1, 1), (2, 2)):
        with make(size, stages) as llm:
            found[f"{size} {stages}"] = [
                said(llm, PROMPTS, SAMPLED), tokens_of(llm), tokens_of(llm, PENALISED),
                tokens_of(llm, DRAWN),
                [np.asarray(x.logprobs).tolist() for x in llm.logprobs(PROMPTS[:2])],
            ]  # fmt: skip
            if stages > 1:
                found["collectives"] = [decoding(llm, random=r) for r in (False, True)]
                found["kept"] = kept(llm, folder)
    with make(1, 2, kv_cache_dtype="int8", max_num_seqs=12, kv_cache_bytes=1 << 16) as llm:
        found["unequal"] = [str(key) for key in llm.warm_up().unequal]
    return found


def speculated(_: Path) -> dict[str, Any]:
    """Guesses by each method, of two stages of two devices."""
    small = replace(CONFIG, num_kv_heads=1, layers=ALIKE.layers[:2])
    found: dict[str, Any] = {}
    for name, how in guessing_by(small, skip="1+3").items():
        with make(2, 2, kv_cache_bytes=1 << 16, **how) as llm:
            found[name] = [tokens_of(llm), tokens_of(llm, DRAWN)]
            if name in ("none", "lookup"):
                found[name].append(said(llm, PROMPTS, SAMPLED))
            keys = [key for key, _ in llm.engine.compiler._compiled]
            found[f"{name} guesses"] = any(key.guesses for key in keys)
    return found


def twice(config: ModelConfig) -> ModelConfig:
    return replace(config, layers=config.layers * 2)


def from_one(weight: Weight) -> Weight:
    """A weight of two stages, the second's layer being the first's on disk."""
    first = re.compile(r"layers\.1\.")
    pieces = tuple(replace(p, name=first.sub("layers.0.", p.name)) for p in weight.pieces)
    return replace(weight, pieces=pieces)


def quantised(_: Path) -> dict[str, Any]:
    """Quantised matrices read for two stages, of one device and of two: those of one, twice."""
    from checkpoints import load_params
    from checkpoints.gguf import load_gguf, open_gguf, read_config
    from jaxinfer.models import families
    from jaxinfer.quant import dequantise

    goldens = ROOT / "tests" / "goldens"
    is_leaf = lambda x: not isinstance(x, dict | list)  # noqa: E731

    def dense(mesh: Any, leaf: Any) -> Any:
        """What the devices' own matrices stand for, one after the other."""
        if isinstance(leaf, jax.Array):
            return np.asarray(leaf)
        specs = jax.tree.map(lambda x: x.sharding.spec, leaf)
        out = jax.tree.leaves(specs)[0]  # of the codes
        run = jax.shard_map(
            dequantise, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False
        )
        return np.asarray(jax.jit(run)(leaf))

    def compare(config: ModelConfig, load: Any, size: int) -> str:
        mesh = replica_meshes(size, 2)[0]
        split = jax.tree.map(from_one, declared_on(twice(config), mesh))
        places = shardings(split, mesh)
        for name in ("embed", "lm_head"):  # of 139 tokens
            if name in places:
                places[name] = NamedSharding(mesh, PartitionSpec())
        whole = jax.tree.map(
            lambda x: np.asarray(dequantise(x)), load(declare(config), None), is_leaf=is_leaf
        )
        try:
            found = load(split, places)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        got = jax.tree.map(partial(dense, mesh), found, is_leaf=is_leaf)
        want = arrange(whole | {"layers": whole["layers"] * 2}, twice(config), mesh)
        close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)  # fused, or not
        jax.tree.map(close, got, want)
        return "same"

    found = {}
    paths = sorted((goldens / "quantised").iterdir())
    for path in (p for p in paths if families.read_config(p).num_layers == 1):
        load = partial(load_params, path, dtype="float32", allowed_extra=["lm_head.weight"])
        for size in (1, 2):
            found[f"{path.name} {size}"] = compare(
                families.read_config(path), lambda w, s, load=load: load(w, shardings=s), size
            )
    for path in sorted((goldens / "gguf").glob("*.gguf")):
        gguf = open_gguf(path)
        config = read_config(gguf)
        load = partial(load_gguf, gguf, dtype="float32", head_dim=config.head_dim)
        if config.num_layers == 1:
            found[path.name] = compare(config, lambda w, s, load=load: load(w, shardings=s), 1)
    return found


def packed(_: Path) -> dict[str, float]:
    """Matrices of two stages, of two devices each: how far each's products are from the dense."""
    from jaxinfer.quant import dequantise, matmul, partition
    from jaxinfer.quant.packing import pack_shards

    mesh = replica_meshes(2, 2)[0]
    assert mesh is not None
    rng = np.random.default_rng(0)
    N, K, found = 256, 512, {}
    x = jnp.asarray(rng.normal(size=(8, K)), jnp.bfloat16)
    for name, spec in {"rows": (TENSOR, None), "columns": (None, TENSOR)}.items():
        stages = [
            QuantisedMatrix(
                Scheme(), rng.integers(0, 256, (N, K // 2), dtype=np.uint8),
                rng.uniform(0.01, 0.02, (N, K // 64)).astype(np.float32),
            )
            for _ in range(2)
        ]  # fmt: skip
        specs = partition(stages[0], PartitionSpec(*spec), 2, STAGE)
        places = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        made = pack_shards(jax.device_put(stack_stages(stages), places), mesh)

        def local(x: Any, w: Any, name: str = name) -> Any:
            y = matmul(x, w).astype(jnp.float32)
            return y[None] if name == "rows" else jax.lax.psum(y, TENSOR)[None]

        y = jax.shard_map(
            local, mesh=mesh, check_vma=False,
            in_specs=(PartitionSpec(None, spec[1]), jax.tree.map(lambda a: a.sharding.spec, made)),
            out_specs=PartitionSpec(STAGE, None, spec[0]),
        )(x, made)  # fmt: skip
        want = np.stack([x.astype(np.float32) @ dequantise(m, jnp.float32).T for m in stages])
        found[name] = float(abs(np.asarray(y) - want).max() / abs(want).max())
    return found


def from_disk(folder: Path) -> dict[str, Any]:
    """A directory, dense and quantised by `jaxinfer quantize`, on 1, 2 and 4 devices."""
    from checkpoints.write import write_hf
    from jaxinfer.cli import main as cli

    config = replace(FOUR, intermediate_size=64)
    dense, made = folder / "dense", folder / "made"
    hf = HF | {"intermediate_size": 64, "num_hidden_layers": 4}
    config = replace(config, layers=(LayerConfig(),) * 4)
    write_hf(dense, weights(config), declare(config), hf)
    sizes = ["--group-size", "16", "--method", "rtn"]
    assert cli(["quantize", str(dense), "--out", str(made), *sizes]) == 0
    found: dict[str, Any] = {}
    for path in (dense, made):
        for size, stages in ((1, 1), (1, 2), (2, 2)):
            with LLM(
                path, dtype="float32", tensor_parallel_size=size, pipeline_parallel_size=stages,
                max_num_seqs=4, page_size=8, max_model_len=64, max_num_batched_tokens=16,
                max_steps=1, kv_cache_bytes=1 << 16,
            ) as llm:  # fmt: skip
                found[f"{path.name} {size * stages}"] = [tokens_of(llm), device_bytes(llm.params)]
                if path == made and stages > 1:
                    note_error(found, "update", lambda llm=llm: llm.update_params(weights(config)))
    return found


QUICK, SLOW = (greedy, together, errors), (every_kind, speculated, quantised, packed, from_disk)
PARTS = {f.__name__: f for f in (*QUICK, *SLOW)}
PARTS["streamed"] = partial(streamed, config=FOUR, size=2, stages=2)

# -- the tests ------------------------------------------------------------------------------------

run = partial(child, file=__file__)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("quick"), "greedy", "together", "errors", "streamed")


def test_greedy_tokens_are_those_of_one_device(quick):
    found = quick["greedy"]
    assert found["1 2"] == found["2 2"] == found["1 1"]
    assert len({tuple(tokens) for tokens in found["1 1"]}) == len(PROMPTS)
    for name in ("1 1", "1 2", "2 2"):
        summary = found[f"{name} said"]["summary"]
        assert summary["preemptions"] > 0
        assert summary["prefix_hit_share"] > 0
    assert found["2 2 again"] == found["1 1"]
    assert found["2 2 said"]["summary"]["loaded_pages"] > 0


def test_each_device_holds_its_part(quick):
    one, two, four = (quick["greedy"][f"{name} said"] for name in ("1 1", "1 2", "2 2"))
    assert one["cache"] == [4, [12, 2, 8, 8], [12, 2, 8, 8]]
    assert two["cache"] == [2, [24, 2, 8, 8], [12, 2, 8, 8]]
    assert four["cache"] == [2, [24, 2, 8, 8], [12, 1, 8, 8]]
    assert two["plan"][0] < 0.51 * one["plan"][0]  # but for the last norm
    assert four["plan"][0] < 0.26 * one["plan"][0]
    assert one["plan"][1] == two["plan"][1] == four["plan"][1]


@pytest.mark.parametrize(("name", "sums"), [("1 2", 0), ("2 2", 2)])
def test_a_tick_has_the_collectives_expected_and_no_others(quick, name, sums):
    """Of 8 rows: the embedding's sum, those of a stage's layers, what is handed on, the last
    stage's hidden states, and who has the likeliest. The text of a loop is there once."""
    found = kinds(quick["greedy"][f"{name} said"]["collectives"])
    devices = int(name[0]) * int(name[2])
    hidden = "f32[8,32]"
    layers = [f"all-reduce {hidden}"] * sums * (FOUR.num_layers // 2)
    assert found[: len(layers) + 1] == [f"all-reduce {hidden}", *layers]
    rest = [f"all-reduce {hidden}", f"collective-permute {hidden}"]
    assert sorted(found[len(layers) + 1 :]) == [f"all-gather s32[{devices},2,8]", *rest]


def test_a_request_gets_the_same_bits_alone(quick):
    """In parts of 16 rows beside others, and of 8 alone; with steps of three decode steps."""
    found = quick["together"]
    assert found["rows"] == [8, 40]
    assert found["alone"] == found["got"][:3]
    for (tokens, logprobs), (want, likely) in zip(found["got"], found["want"], strict=True):
        assert tokens == want
        np.testing.assert_allclose(logprobs, likely, atol=1e-4)


def test_weights_stream_to_their_stages(quick):
    found = quick["streamed"]
    assert found["same"]
    assert found["each"] == found["share"] < 0.26 * found["whole"]
    assert max(found["most"]) <= found["each"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "devices",
            r"tensor_parallel_size=2 \* pipeline_parallel_size=8: .* 8 device.* 1 to 8",
        ),
        ("layers", r"pipeline_parallel_size=3: .* 4 layers .* works: 2 \(of 1, 2\)"),
        ("windows", r"pipeline_parallel_size=4: .* windows .* works: 2 \(of 1, 2\)"),
        ("vocabulary", r"pipeline_parallel_size=2: .* 66 tokens evenly.* works: 1 \(of 1\)"),
        ("directory", r"pipeline_parallel_size=4: .* 2 layers .* works: 2 \(of 1, 2\)"),
        ("size", r"pipeline_parallel_size=0: expected an integer of at least 1"),
        ("draft", r"pipeline_parallel_size=2: the draft given: .* 1 layers .* works: 1 \(of 1\)"),
        ("skip", r"skip=\(1,\) with pipeline_parallel_size=2: .* 2 layers.* skip=1\+3"),
        (
            "capture",
            r"request 0, capture: not with tensor_parallel_size=2, pipeline_parallel_size=2",
        ),
        ("logits_fn", r"request 0, logits_fn: not with tensor_parallel_size=2, pipeline"),
        ("functional", r"request 0, functional: not with tensor_parallel_size=2, pipeline"),
    ],
)
def test_what_does_not_work_is_refused(quick, name, message):
    assert re.search(message, quick["errors"].get(name, "nothing")), quick["errors"].get(name)


@pytest.mark.slow
def test_every_kind_of_request(tmp_path):
    found = run(tmp_path, "every_kind")["every_kind"]
    one, four = found["1 1"], found["2 2"]
    assert [tokens for tokens, _ in four[0]] == [tokens for tokens, _ in one[0]]
    assert four[1:4] == one[1:4]
    assert one[3] == [tokens for tokens, _ in one[0]]  # with log-probabilities or without
    greedy, drawing = map(kinds, found["collectives"])
    winner, *more = exchanges(8, 4)
    assert winner in greedy
    assert sorted(drawing) == sorted([*greedy, *more])
    pairs = [(a, b) for (_, a), (_, b) in zip(four[0], one[0], strict=True)]
    for got, want in (*pairs, *zip(four[4], one[4], strict=True)):
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert found["kept"]["resumed"] == found["kept"]["want"] == found["kept"]["back"] == one[1]
    assert found["kept"]["other"] != one[1]
    assert found["kept"]["compiled"] == 0
    assert found["unequal"] == []


@pytest.mark.slow
def test_speculation_changes_no_token(tmp_path):
    found = run(tmp_path, "speculated")["speculated"]
    *plain, sampled = found["none"]
    for name in ("lookup", "skip", "draft"):
        assert found[name][:2] == plain, name
        assert found[f"{name} guesses"], name
    assert found["lookup"][-1] == sampled
    assert not found["none guesses"]


@pytest.mark.slow
def test_quantised_matrices_are_split_as_dense_ones(tmp_path):
    both = run(tmp_path, "quantised", "packed")
    assert max(both["packed"].values()) < 0.01, both["packed"]
    found = both["quantised"]
    refused = {name: text for name, text in found.items() if text != "same"}
    assert len(found) - len(refused) >= 30
    for name, text in refused.items():  # only where two devices share a layer
        assert name.endswith(" 2"), (name, text)
        assert re.search("CheckpointError: .*degrees? 1", text), (name, text)


@pytest.mark.slow
def test_directories_of_dense_and_of_quantised_weights(tmp_path):
    found = run(tmp_path, "from_disk")["from_disk"]
    for name in ("dense", "made"):
        (one, whole), (two, half), (four, quarter) = (found[f"{name} {n}"] for n in "124")
        assert two == four == one
        assert half < 0.51 * whole
        assert quarter < 0.27 * whole
    assert found["made 1"][0] != found["dense 1"][0]
    message = "CheckpointError: quantised weights with .*pipeline_parallel_size=2"
    assert re.search(message, found["update"])


# -- in this process: how a step is cut, and what is declared -------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rows that decode, some of which stand for nothing, then chunks, then padding."""
    R = draw(st.integers(0, 20))
    count = draw(st.integers(0, R))
    chunks = draw(st.lists(st.integers(1, 30), max_size=4))
    used = count + sum(chunks)
    T = max(R, used, MIN_ROWS) + draw(st.integers(0, 9))
    ends = count + np.cumsum([0, *chunks])
    starts = draw(st.lists(st.integers(0, 50), min_size=len(chunks), max_size=len(chunks)))
    positions = np.zeros(T, np.int32)
    positions[:count] = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
    for start, stop, first in zip(ends[:-1], ends[1:], starts, strict=True):
        positions[start:stop] = first + np.arange(stop - start)
    lengths = np.zeros(R, np.int32)
    lengths[:count] = positions[:count] + 1
    tables = np.arange(max(R, 1 + len(chunks)))[None, :, None]
    of_rows = Ragged(tables[:, :R], np.minimum(np.arange(R + 1), count), lengths)
    sums = np.array([s + n for s, n in zip(starts, chunks, strict=True)], int)
    of_chunks = Ragged(
        tables[:, : 1 + len(chunks)], np.concatenate([[0], ends]), np.concatenate([[0], sums])
    )
    return Batch(
        tokens=np.arange(T), positions=positions, kv_index=1 + np.arange(T),
        decode=jax.tree.map(jnp.asarray, of_rows) if R else None,
        chunks=jax.tree.map(jnp.asarray, of_chunks) if chunks or not R else None,
        logit_rows=np.zeros(1),
    )  # fmt: skip


@settings(max_examples=25)
@given(batches(), st.sampled_from([8, 16]), st.integers(-2, 9))
def test_slices_have_what_they_must_of_each_sequence(batch, size, item):
    """Tokens of a slice belong to whom they belonged, who is as long as the token's place says."""
    batch = jax.tree.map(jnp.asarray, batch)
    T, first = len(batch.tokens), item * size
    part = _slice(batch, size, jnp.int32(item))
    real = max(0, min(size, T - first)) if item >= 0 else 0
    np.testing.assert_array_equal(part.kv_index[:real], 1 + np.arange(first, first + real))
    assert not part.kv_index[real:].any()
    for whole, cut in ((batch.decode, part.decode), (batch.chunks, part.chunks)):
        if whole is None:
            assert cut is None
            continue
        owners = {}  # by table, which no two sequences share
        for ragged, shift in ((whole, 0), (cut, first)):
            starts = np.asarray(ragged.query_starts)
            assert (np.diff(starts) >= 0).all()
            owners[shift, ragged is cut] = {
                int(t) + shift: int(ragged.page_table[0, s, 0])
                for s in range(len(starts) - 1)
                for t in range(starts[s], starts[s + 1])
            }
        mine = owners[first, True]
        assert mine == {t: s for t, s in owners[0, False].items() if first <= t < first + real}
        starts, lengths = np.asarray(cut.query_starts), np.asarray(cut.kv_lengths)
        for s in range(len(lengths)):
            beside = batch.decode is not None and whole is batch.chunks and s == 0
            if starts[s + 1] > starts[s] and not beside:
                assert lengths[s] == batch.positions[first + starts[s + 1] - 1] + 1
            else:
                assert lengths[s] == 0


@settings(max_examples=25)
@given(st.integers(1, 70), st.data(), st.sampled_from([1, 2, 3, 4]))
def test_rows_are_dealt_out_evenly(R, data, stages):
    count = data.draw(st.integers(0, R))
    plan: Any = SimpleNamespace(rows=np.arange(R), count=count)
    rows, counts = map(np.asarray, _dealt(plan, stages, none=99))
    assert rows.shape[1] % MIN_ROWS == 0
    assert rows.size < R + stages * MIN_ROWS
    assert sorted(rows[rows < 99]) == [*range(R)]
    assert counts.sum() == count
    assert counts.max() - counts.min() <= 1
    for part, some in zip(rows, counts, strict=True):  # those that decode come first
        assert (part[:some] < count).all()
        assert (part[some:] >= count).all()


def test_stages_are_declared_one_behind_the_other():
    declared = declare(FOUR, 2, 2)
    assert len(declared["layers"]) == 2
    second = declared["layers"][1]
    assert {p.name.split(".")[2] for p in second["qkv"].pieces} == {"1", "3"}
    assert second["o"].shape == (64, 32)
    specs = {name: partition_spec(weight) for name, weight in second.items()}
    assert specs["qkv"] == PartitionSpec((STAGE, TENSOR), None)
    assert specs["o"] == PartitionSpec(STAGE, TENSOR)
    assert specs["attn_norm"] == PartitionSpec(STAGE)
    assert partition_spec(declared["embed"]) == PartitionSpec((STAGE, TENSOR), None)
    assert partition_spec(declared["final_norm"]) == PartitionSpec(None)
    with pytest.raises(ValueError, match="3 stages must divide the layers"):
        declare(FOUR, 1, 3)


def test_stages_must_be_alike():
    assert can_stage(FOUR, 2, 2)
    assert not can_stage(FOUR, 1, 4)  # windows
    assert not can_stage(replace(FOUR, vocab_size=66), 2, 2)
    assert can_stage(ALIKE, 1, 4)
    four, eight = (
        QuantisedMatrix(Scheme(bits=bits), np.zeros((4, 8), np.uint8), np.ones((4, 1)))
        for bits in (4, 8)
    )
    with pytest.raises(ValueError, match="not stored alike in the layers of all stages"):
        stack_stages([four, eight])
    assert stack_stages([four, four]).codes.shape == (8, 8)
    staged = declare(FOUR, 1, 2)["layers"]
    kind = lambda piece: "int4" if "layers.3.mlp" in piece.name else "dense"  # noqa: E731
    name = "model.layers.{}.mlp.down_proj.weight {}"
    assert unlike_stages([staged[0]["down"], staged[1]["o"]], kind) == []
    found = unlike_stages([staged[1]["down"]], kind)
    assert found == [f"{name.format(1, 'dense')}, {name.format(3, 'int4')}"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], PARTS)
