"""The engine on several simulated CPU devices: the same tokens as on one.

The number of devices is fixed when jax starts, so this file runs itself as a child process: each
function of `PARTS` there finds what a test here looks at.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer import LLM, SamplingParams, sampling
from jaxinfer.backend import default_cache_directory, use_compilation_cache
from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.models.weights import declare, init_params
from jaxinfer.parallel import arrange, declared_on, device_bytes, device_share, replica_meshes
from jaxinfer.sharding import TENSOR, mesh_axes, shardings
from tests.conftest import env_of_devices

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(
    family="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=4,
    num_kv_heads=2, head_dim=8, layers=(LayerConfig(), LayerConfig(window=9)), max_position=128,
)  # fmt: skip
HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_hidden_layers": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = [[5, 6, 7], [*range(9, 40)], [*range(9, 36), 3], [17, 18, 17, 18, 17]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
# Of one kind each, so that there are few programs.
SAMPLED = [
    SamplingParams(temperature=0.9, seed=1, max_tokens=9, top_p=0.9, logprobs=2),
    SamplingParams(temperature=0.8, seed=2, max_tokens=9, top_k=9, min_p=0.01, logprobs=2),
    SamplingParams(temperature=0.5, seed=3, max_tokens=9, top_p=0.99, logprobs=2),
    SamplingParams(temperature=0.7, seed=4, max_tokens=9, top_k=50, min_tokens=8, logprobs=2),
]
# Of the same kind, but without log-probabilities: nothing of them needs whole rows of logits.
DRAWN = [replace(params, logprobs=None) for params in SAMPLED]
PENALISED = replace(
    GREEDY, repetition_penalty=1.3, presence_penalty=0.2, stop_token_ids=(1, 2), min_tokens=9
)


def weights(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    params = init_params(config, jax.random.key(seed), jnp.float32)
    # Random embeddings are small: greedy output would not depend on them.
    return params | {"embed": params["embed"] * 50}


def make(size: int, config: ModelConfig = CONFIG, **options: Any) -> LLM:
    """Prompts of more than a step, and so few pages that some give way."""
    heads = max(config.num_kv_heads // max(size, 1), 1)
    page = 8 * 2 * heads * 8 * 4 * config.num_layers
    sizes: dict[str, Any] = {
        "max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 12 * page, "max_steps": 1,
        "max_num_batched_tokens": 16, "page_size": 8,
    }  # fmt: skip
    return LLM.from_params(
        weights(config), config, dtype="float32", tensor_parallel_size=size, **sizes | options
    )


def tokens_of(llm: LLM, params: Any = GREEDY) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params)]


def collectives(text: str) -> list[str]:
    """Of a compiled program, in order: the operation and its result."""
    names = (
        "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    )
    return [f"{op} {shape}" for shape, op in re.findall(rf"= (\S+) ({names})(?:-start)?\(", text)]


def kinds(found: Sequence[str]) -> list[str]:
    """Of `collectives`, without the order in which an array's axes lie in memory."""
    return [re.sub(r"\{[\d,]*\}", "", x) for x in found]


def exchanges(rows: int, devices: int) -> list[str]:
    """What `sampling.sample` takes where it truncates and draws: who has the likeliest; for each
    digit of a threshold the bins of top-k, and for each of the next those of top-p; who is drawn.
    None grows with the vocabulary."""
    bins = [256, 256, 256, 128]
    winner = f"all-gather s32[{devices},2,{rows}]"
    counts = [f"all-reduce u32[1,{rows},{n}]" for n in bins]
    masses = [f"all-reduce u32[2,{rows},{n}]" for n in bins]
    return [winner, *counts, *masses, winner]


def decoding(llm: LLM, *, random: bool, guesses: int = 0) -> list[str]:
    """`collectives` of the decode step that draws so, without log-probabilities."""
    wanted = 0, guesses, random, None
    programs = llm.engine.compiler._compiled.items()
    found = (p for (k, _), p in programs if (k.tokens, k.guesses, k.random, k.top) == wanted)
    return collectives(next(found).as_text())


def note_error(found: dict[str, str], name: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"


def bytes_on(device: Any) -> int:
    """Of all arrays, what lies on a device."""
    parts = (part.data for x in jax.live_arrays() for part in x.addressable_shards)
    mine = (x for x in parts if x.devices() == {device})
    # An array's part is an array of its own, of the same memory.
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in mine}.values())


# -- what the child finds -------------------------------------------------------------------------


def greedy(_: Path) -> dict[str, Any]:
    """A model of fewer KV heads than devices, on 1 and 4 of them; there with pages on the host.
    And drawn at random."""
    found: dict[str, Any] = {}
    for size in (1, 4):
        with make(size, kv_host_bytes=0 if size == 1 else 1 << 15) as llm:
            found[str(size)] = tokens_of(llm)
            found[f"{size} again"] = tokens_of(llm)
            far = [page.kv for page in llm.engine._copies._slots.values()]
            found[f"{size} far"] = [[x.shape, x.sharding.shard_shape(x.shape)] for x in far]
            summary = llm.metrics.summary()._asdict()
            found[f"{size} drawn"] = tokens_of(llm, DRAWN)
            cache = llm.engine._cache.k[0]
            found[f"{size} said"] = {
                "collectives": decoding(llm, random=False),
                "drawing": decoding(llm, random=True),
                "summary": summary,
                "cache": [cache.shape, cache.sharding.shard_shape(cache.shape)],
                "plan": [llm.memory_plan.weights, llm.memory_plan.num_pages],
            }
    return found


def sampled_rows(_: Path) -> dict[str, Any]:
    """`sampling.sample` on whole rows, and on rows split over devices of one axis and of two; and
    what eight devices exchange for rows of a large vocabulary."""
    meshes = [mesh for how in ((8, 1), (2, 2)) if (mesh := replica_meshes(*how)[0]) is not None]
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 4, (9, 64)).astype(np.float32)  # many equals
    logits[1, rng.random(64) < 0.5] = np.nan
    logits[2] = -np.inf
    logits[3] = np.nan
    logits[4, [7, 63]] = np.inf
    logits[5] = 0.0
    logits[6, 40], logits[6, :40] = 0.0, -0.0
    logits[6, 41:] = -1
    ids = tuple(int(i) for i in rng.permutation(64)[:5])
    held = {"repetition_penalty": 1.5, "frequency_penalty": 0.4}
    cuts: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 40}]
    told = sampling.PenaltyState(
        jnp.asarray(rng.random((9, 64)) < 0.3), jnp.asarray(rng.integers(0, 3, (9, 64)))
    )
    at = np.full(9, 4, np.int32)

    def rows(random: bool) -> sampling.SamplingRows:
        packed = [
            sampling.pack_row(
                SamplingParams(
                    temperature=random * (i + 1) / 4, **held if i % 2 else {}, **cuts[i % len(cuts)]
                ),
                seed=i, sample=i % 3, stop_ids=ids, min_length=i,
            )
            for i in range(9)
        ]  # fmt: skip
        return jax.tree.map(jnp.asarray, sampling.stack_rows(packed))

    def split(mesh: Any, draw: Callable[..., Any]) -> Any:
        axis = mesh_axes(mesh)
        run = jax.shard_map(
            partial(draw, axis=axis), mesh=mesh, out_specs=PartitionSpec(), check_vma=False,
            in_specs=(PartitionSpec(None, axis), *[PartitionSpec()] * 3),
        )  # fmt: skip
        return jax.jit(run)

    found: dict[str, Any] = {}
    cases = [
        ("float32", None, False, False), ("bfloat16", told, False, False),
        ("float32", None, True, False), ("bfloat16", told, True, True),
    ]  # fmt: skip
    for kind, penalties, random, truncated in cases:
        name = f"{kind} random={random} truncated={truncated}"
        draw = partial(sampling.sample, truncated=truncated, random=random)
        args = (jnp.asarray(logits, kind), rows(random), at, penalties)
        runs = jax.jit(draw), *(split(mesh, draw) for mesh in meshes)
        found[name] = [run(*args).tolist() for run in runs]
        large = jax.ShapeDtypeStruct((9, 1 << 17), jnp.float32)
        compiled = split(meshes[0], draw).lower(large, *args[1:3], None).compile()
        found[f"large {name}"] = collectives(compiled.as_text())
    return found


def errors(folder: Path) -> dict[str, str]:
    """What is refused, and in which words; none of it reads weights."""
    found = {}
    refuse = partial(note_error, found)
    lists = ([[1, 2]], GREEDY)
    tiny = replace(CONFIG, num_heads=2, num_kv_heads=1)
    text = folder / "text"
    text.write_text("a" * 999)
    chosen = {"method": "skip", "count": 1, "text": str(text)}
    refuse("devices", lambda: make(16, replace(CONFIG, num_heads=16, vocab_size=128)))
    refuse("degree", lambda: make(3))
    refuse("vocabulary", lambda: make(4, replace(CONFIG, vocab_size=66)))
    refuse("size", lambda: make(0))
    refuse("draft", lambda: make(4, speculative="draft", draft=(weights(tiny), tiny)))
    refuse("chosen", lambda: make(2, speculative=chosen))
    (folder / "config.json").write_text(json.dumps(HF | {"vocab_size": 65}))
    refuse("directory", lambda: LLM(folder, tensor_parallel_size=2))  # there are no weights in it
    with make(2) as llm:
        refuse("capture", lambda: llm.generate(*lists, capture=["layers.0.resid"]))
        refuse("intervene", lambda: llm.generate(*lists, intervene=lambda *_: None))  # type: ignore
        refuse("logits_fn", lambda: llm.generate(*lists, logits_fn=lambda *_: None))  # type: ignore
        refuse("functional", lambda: llm.functional([[1, 2]]))
    return found


def streamed(
    folder: Path, config: ModelConfig = CONFIG, size: int = 4, stages: int = 1
) -> dict[str, Any]:
    """A checkpoint read onto 4 devices, and what lay on each of them meanwhile."""
    from checkpoints import load_params
    from checkpoints.write import write_hf

    whole = weights(config)
    write_hf(folder / "model", whole, declare(config), HF)
    mesh = replica_meshes(size, stages)[0]
    assert mesh is not None
    declared, most = declared_on(config, mesh), [0] * mesh.size
    before = [bytes_on(device) for device in mesh.devices.flat]

    def watch(*_: int) -> None:
        for i, device in enumerate(mesh.devices.flat):
            most[i] = max(most[i], bytes_on(device) - before[i])

    params = load_params(
        folder / "model", declared, dtype="float32", shardings=shardings(declared, mesh),
        progress=watch,
    )  # fmt: skip
    want = arrange(whole, config, mesh)
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), params, want)
    total = sum(x.nbytes for x in jax.tree.leaves(whole))
    drawn = init_params(
        config, jax.random.key(0), jnp.float32, declared=declared, places=shardings(declared, mesh)
    )
    like = jax.tree.map(lambda a, b: (a.shape, a.sharding) == (b.shape, b.sharding), drawn, params)
    return {
        "drawn": all(jax.tree.leaves(like)),
        "same": all(jax.tree.leaves(same)),
        "most": most,
        "each": device_bytes(params),
        "share": device_share(config, mesh) * total,
        "whole": total,
    }


def quantised(_: Path) -> dict[str, Any]:
    """Quantised matrices read onto 2 devices are those of one, rearranged."""
    from checkpoints import load_params
    from checkpoints.gguf import load_gguf, open_gguf, read_config
    from jaxinfer.models import families
    from jaxinfer.quant import QuantisedMatrix, dequantise

    mesh = replica_meshes(2)[0]
    assert mesh is not None
    goldens = ROOT / "tests" / "goldens"

    def dense(leaf: Any) -> Any:
        """What the shards' own matrices stand for, side by side."""
        if isinstance(leaf, jax.Array):
            return np.asarray(leaf)
        specs = jax.tree.map(lambda x: x.sharding.spec, leaf)
        out = jax.tree.leaves(specs)[0]  # of the codes
        run = jax.shard_map(
            dequantise, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False
        )
        return np.asarray(jax.jit(run)(leaf))

    def compare(config: ModelConfig, load: Callable[..., Any]) -> str:
        split = declare(config, 2)
        places = shardings(split, mesh)
        for name in ("embed", "lm_head"):  # of 139 tokens
            if name in places:
                places[name] = NamedSharding(mesh, PartitionSpec())
        whole = jax.tree.map(
            lambda x: np.asarray(dequantise(x)), load(declare(config), None),
            is_leaf=lambda x: not isinstance(x, dict | list),
        )  # fmt: skip
        try:
            found = load(split, places)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        is_leaf = lambda x: not isinstance(x, dict | list)  # noqa: E731
        kept = sum(isinstance(x, QuantisedMatrix) for x in jax.tree.leaves(found, is_leaf=is_leaf))
        got = jax.tree.map(dense, found, is_leaf=is_leaf)
        want = arrange(whole, config, mesh)
        close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)  # fused, or not
        jax.tree.map(close, got, want)
        return f"{kept} quantised, same"

    found = {}
    for path in [*sorted((goldens / "quantised").iterdir())]:
        load = partial(load_params, path, dtype="float32", allowed_extra=["lm_head.weight"])
        found[path.name] = compare(
            families.read_config(path), lambda w, s, load=load: load(w, shardings=s)
        )
    for path in sorted((goldens / "gguf").glob("*.gguf")):
        gguf = open_gguf(path)
        config = read_config(gguf)
        load = partial(load_gguf, gguf, dtype="float32", head_dim=config.head_dim)
        found[path.name] = compare(config, lambda w, s, load=load: load(w, shardings=s))
    return found


def packed(_: Path) -> dict[str, float]:
    """Matrices that each device packs for itself: how far products are from the dense ones."""
    from jaxinfer.quant import Parts, QuantisedMatrix, Scheme, dequantise, matmul, partition
    from jaxinfer.quant.packing import pack_shards

    mesh = replica_meshes(2)[0]
    assert mesh is not None
    rng = np.random.default_rng(0)
    N, K = 256, 512

    def matrix(group: int) -> Any:
        codes = rng.integers(0, 256, (N, K // 2), dtype=np.uint8)
        scales = rng.uniform(0.01, 0.02, (N, K // group)).astype(np.float32)
        scales[:, K // group // 2 :] *= 40  # so that shards of columns choose other row scales
        return QuantisedMatrix(Scheme(), codes, scales)

    found = {}
    x = jnp.asarray(rng.normal(size=(8, K)), jnp.bfloat16)
    rows, columns = PartitionSpec(TENSOR, None), PartitionSpec(None, TENSOR)
    cases = {
        "rows": (matrix(64), rows), "columns": (matrix(64), columns),
        "parts": (Parts((matrix(64), matrix(128))), rows),
    }  # fmt: skip
    for name, (m, spec) in cases.items():
        specs = partition(m, spec, 2)
        split = jax.device_put(m, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
        made = pack_shards(split, mesh)
        leaves = jax.tree.leaves(made)
        assert all(leaf.dtype in (jnp.int32, jnp.float32) for leaf in leaves)  # nothing was left

        def local(x: Any, w: Any, spec: Any = spec) -> Any:
            y = matmul(x, w).astype(jnp.float32)
            return y if spec == rows else jax.lax.psum(y, TENSOR)

        y = jax.shard_map(
            local, mesh=mesh, check_vma=False,
            in_specs=(columns if spec == columns else PartitionSpec(),
                      jax.tree.map(lambda a: a.sharding.spec, made)),
            out_specs=columns if spec == rows else PartitionSpec(),
        )(x, made)  # fmt: skip
        dense = np.asarray(dequantise(m, jnp.float32))
        if name == "parts":  # each device has its rows of both
            dense = dense.reshape(2, 2, N // 2, K).swapaxes(0, 1).reshape(2 * N, K)
        want = np.asarray(x, np.float32) @ dense.T
        found[name] = float(abs(np.asarray(y) - want).max() / abs(want).max())
    return found


def from_disk(folder: Path) -> dict[str, Any]:
    """A directory, dense and quantised by `jaxinfer quantize`, on 1 and 2 devices."""
    from checkpoints.write import write_hf
    from jaxinfer.cli import main as cli

    config = replace(CONFIG, intermediate_size=64)
    dense, made = folder / "dense", folder / "made"
    write_hf(dense, weights(config), declare(config), HF | {"intermediate_size": 64})
    sizes = ["--group-size", "16", "--method", "rtn"]
    assert cli(["quantize", str(dense), "--out", str(made), *sizes]) == 0
    found: dict[str, Any] = {}
    for path in (dense, made):
        for size in (1, 2):
            with LLM(
                path, dtype="float32", tensor_parallel_size=size, max_num_seqs=4, page_size=8,
                max_model_len=64, max_num_batched_tokens=16, max_steps=1, kv_cache_bytes=1 << 16,
            ) as llm:  # fmt: skip
                held = device_bytes(llm.params)
                found[f"{path.name} {size}"] = [tokens_of(llm), held, llm.memory_plan.weights]
                if path == made and size == 2:
                    try:
                        llm.update_params(weights(config))
                    except Exception as error:
                        found["update"] = f"{type(error).__name__}: {error}"
    return found


def every_kind(folder: Path) -> dict[str, Any]:
    """Sampled and scored, and what is kept over a restart."""
    found: dict[str, Any] = {}
    config = replace(CONFIG, num_kv_heads=1, tie_embeddings=True)
    for size in (1, 2):
        with make(size, config) as llm:
            done = llm.generate(PROMPTS, SAMPLED)
            said = [o.outputs[0] for o in done]
            likely = [
                [float(at[i].logprob) for at, i in zip(s.logprobs or (), s.token_ids, strict=True)]
                for s in said
            ]
            if size == 2:
                found["kept"] = kept(llm, folder)
            scores = [np.asarray(x.logprobs).tolist() for x in llm.logprobs(PROMPTS[:1])]
            found[str(size)] = [
                [list(s.token_ids) for s in said], tokens_of(llm), tokens_of(llm, PENALISED),
                tokens_of(llm, DRAWN), likely + scores,
            ]  # fmt: skip
    return found


def kept(llm: LLM, folder: Path) -> dict[str, Any]:
    """Saved in the middle and gone on with; and other weights in place."""
    want = tokens_of(llm)
    requests = [llm.prepare(prompt, GREEDY) for prompt in PROMPTS]
    llm.submit(requests)
    for _ in range(8):
        llm.pump()
    llm.save(folder / "state", pages=True)
    llm.cancel(requests)
    again = llm.load(folder / "state")
    while any(not r.finished for r in again):
        llm.pump()
    resumed = [list(r.samples[0].tokens) for r in again]
    count = llm.engine.compiler.count
    config = llm.config
    llm.update_params(jax.tree.map(np.asarray, weights(config, seed=1)))
    other = tokens_of(llm)
    llm.update_params(weights(config))
    return {
        "want": want, "resumed": resumed, "other": other, "back": tokens_of(llm),
        "compiled": llm.engine.compiler.count - count,
    }  # fmt: skip


def guessing_by(small: ModelConfig, *, skip: str) -> dict[str, dict[str, Any]]:
    """Options of `LLM` by method: none, and two tokens always; `small`: of the draft."""
    return {
        "none": {},
        "lookup": {"speculative": "lookup,tokens=2,adapt=false"},
        "skip": {"speculative": f"skip={skip},tokens=2,adapt=false"},
        "draft": {
            "speculative": {"method": "draft", "tokens": 2, "adapt": False},
            "draft": (weights(small), small),
        },
    }


def speculated(_: Path) -> dict[str, Any]:
    """Guesses by each method, and the collectives of a step that guesses."""
    small = replace(CONFIG, num_kv_heads=1, layers=CONFIG.layers[:1])
    found: dict[str, Any] = {}
    for name, how in guessing_by(small, skip="1").items():
        with make(2, kv_cache_bytes=1 << 16, **how) as llm:
            found[name] = [tokens_of(llm)]
            found[name].append(tokens_of(llm, DRAWN))
            guesses = 0 if name == "none" else 2
            found[name] += [decoding(llm, random=r, guesses=guesses) for r in (False, True)]
            if name in ("none", "lookup"):
                found[name].append(tokens_of(llm, SAMPLED))
    return found


PARTS = {
    f.__name__: f
    for f in (
        greedy,
        sampled_rows,
        errors,
        streamed,
        quantised,
        packed,
        from_disk,
        every_kind,
        speculated,
    )
}


def main(
    path: Path, names: Sequence[str], parts: Mapping[str, Callable[[Path], Any]] = PARTS
) -> None:
    use_compilation_cache(default_cache_directory())
    assert jax.device_count() == 8
    found = {}
    for name in names:
        (path / name).mkdir()
        found[name] = parts[name](path / name)
    (path / "found.json").write_text(json.dumps(found))


# -- the tests ------------------------------------------------------------------------------------


def child(path: Path, *names: str, file: str = __file__) -> dict[str, Any]:
    command, env = [sys.executable, file, str(path), *names], env_of_devices(8)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((path / "found.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("quick")
    return child(path, "greedy", "sampled_rows", "errors", "streamed")


def test_greedy_tokens_are_those_of_one_device(quick):
    found = quick["greedy"]
    assert found["4"] == found["1"] == found["4 again"]
    assert found["4 drawn"] == found["1 drawn"]
    assert len({tuple(tokens) for tokens in found["1"]}) == len(PROMPTS)
    for size in ("1", "4"):
        summary = found[f"{size} said"]["summary"]
        assert summary["preemptions"] > 0
        assert summary["prefix_hit_share"] > 0


def test_each_device_holds_its_part(quick):
    one, four = quick["greedy"]["1 said"], quick["greedy"]["4 said"]
    assert one["cache"] == [[12, 2, 8, 8], [12, 2, 8, 8]]
    assert four["cache"] == [[12, 4, 8, 8], [12, 1, 8, 8]]  # 2 KV heads, each of them twice
    assert four["summary"]["loaded_pages"] > 0
    assert all(far == [[4, 4, 8, 8], [4, 1, 8, 8]] for far in quick["greedy"]["4 far"])
    assert four["plan"][0] < 0.35 * one["plan"][0]  # KV heads twice, and norms
    assert four["plan"][1] == one["plan"][1]


def test_a_decode_step_has_the_collectives_expected_and_no_others(quick):
    """Of 8 rows: the embedding's sum, two sums a layer, gathered, and who has the likeliest."""
    assert quick["greedy"]["1 said"]["collectives"] == []
    found = kinds(quick["greedy"]["4 said"]["collectives"])
    layers = CONFIG.num_layers
    assert found[0] == "all-reduce f32[8,32]"
    assert len(found) == 2 + 2 * layers
    sizes = [np.prod([int(n) for n in re.findall(r"\d+", x.split("[")[1])]) for x in found]
    assert sizes == [8 * 32] + [4 * 8 * 32] * 2 * layers + [4 * 2 * 8]
    assert {x.split(" ")[0] for x in found[1:]} == {"all-gather"}


def test_a_step_that_draws_gathers_no_logits(quick):
    """It has a greedy step's collectives, and those of the draw."""
    said = quick["greedy"]
    assert said["1 said"]["drawing"] == []
    greedy, drawing = (kinds(said["4 said"][name]) for name in ("collectives", "drawing"))
    assert drawing == [*greedy[:-1], *exchanges(8, 4)]


def test_exchanges_of_a_draw_do_not_grow_with_the_vocabulary(quick):
    found = quick["sampled_rows"]
    likeliest, *rest = exchanges(9, 8)
    large = [kinds(x) for name, x in found.items() if name.startswith("large")]
    assert large == [[likeliest], [likeliest], [likeliest, rest[-1]], [likeliest, *rest]]


def test_sampling_of_split_rows_is_that_of_whole_ones(quick):
    drawn = {name: x for name, x in quick["sampled_rows"].items() if "large" not in name}
    for name, (whole, *split) in drawn.items():
        assert split == [whole] * 2, name


def test_weights_stream_to_their_shards(quick):
    found = quick["streamed"]
    assert found["same"]
    assert found["drawn"]  # those of chance lie there too
    assert found["each"] == found["share"] < 0.35 * found["whole"]
    assert max(found["most"]) <= found["each"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("devices", r"ValueError: tensor_parallel_size=16: .*: 1, 2, 4, 8"),
        ("degree", r"ValueError: tensor_parallel_size=3: .* 4 heads.*: 1, 2, 4"),
        ("vocabulary", r"ValueError: tensor_parallel_size=4: .* 66 tokens.*: 1, 2"),
        ("directory", r"ValueError: tensor_parallel_size=2: .* 65 tokens.*: 1"),
        ("size", r"ValueError: tensor_parallel_size=0: expected an integer of at least 1"),
        ("draft", r"ValueError: tensor_parallel_size=4: the draft given has 2 heads.*: 1, 2"),
        ("chosen", r"ValueError: speculative: text=.* chosen on one device only"),
        (
            "capture",
            r"InvalidRequest: request 0, capture: not with tensor_parallel_size=2: expected 1",
        ),
        ("intervene", r"InvalidRequest: request 0, intervene: not with tensor_parallel_size=2"),
        ("logits_fn", r"InvalidRequest: request 0, logits_fn: not with tensor_parallel_size=2"),
        ("functional", r"InvalidRequest: request 0, functional: not with tensor_parallel_size=2"),
    ],
)
def test_what_does_not_work_is_refused(quick, name, message):
    assert re.search(message, quick["errors"].get(name, "nothing")), quick["errors"].get(name)


def test_more_devices_than_there_are(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2: this process has 1 device"):
        make(2)


@pytest.mark.slow
def test_quantised_matrices_are_split_as_dense_ones(tmp_path):
    both = child(tmp_path, "quantised", "packed")
    assert max(both["packed"].values()) < 0.01, both["packed"]
    found = both["quantised"]
    refused = {name: said for name, said in found.items() if "same" not in said}
    assert len(found) - len(refused) >= 20
    for name, said in refused.items():
        assert re.search("CheckpointError: .*degrees? 1", said), (name, said)


@pytest.mark.slow
def test_directories_of_dense_and_of_quantised_weights(tmp_path):
    found = child(tmp_path, "from_disk")["from_disk"]
    for name in ("dense", "made"):
        (one, bytes_one, plan_one), (two, bytes_two, plan_two) = (
            found[f"{name} {n}"] for n in "12"
        )
        assert two == one
        assert (plan_one, plan_two) == (bytes_one, bytes_two)
        assert bytes_two < 0.52 * bytes_one
    assert found["made 2"][1] < 0.6 * found["dense 2"][1]
    assert found["made 1"][0] != found["dense 1"][0]
    assert "CheckpointError: quantised weights with tensor_parallel_size=2" in found["update"]


@pytest.mark.slow
def test_every_kind_of_request(tmp_path):
    found = child(tmp_path, "every_kind")["every_kind"]
    one, two = found["1"], found["2"]
    assert two[:4] == one[:4]
    assert one[3] == one[0]  # with log-probabilities or without
    for got, want in zip(two[4], one[4], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    kept = found["kept"]
    assert kept["resumed"] == kept["want"] == kept["back"] == found["1"][1]
    assert kept["other"] != kept["want"]
    assert kept["compiled"] == 0


@pytest.mark.slow
def test_speculation_changes_no_token(tmp_path):
    found = child(tmp_path, "speculated")["speculated"]
    plain, drawn, *_, sampled = found["none"]
    for name in ("lookup", "skip", "draft"):
        assert found[name][:2] == [plain, drawn], name
        assert found[name][2], name
    assert found["lookup"][-1] == sampled == drawn
    greedy, drawing = found["lookup"][2:4]
    assert len(greedy) == 2 + 2 * CONFIG.num_layers  # as a step without guesses
    assert len(drawing) == len(greedy) - 1 + len(exchanges(8, 2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], PARTS)
