"""Layers on the host: the same tokens, and a program that copies them in time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import load_params
from checkpoints.model_store import save_model
from checkpoints.write import write_hf
from jaxinfer import LLM, CapacityError, CheckpointError, SamplingParams
from jaxinfer.cli import main as cli
from jaxinfer.memory import LINK_BYTES_PER_S, batcher_config, read_bytes
from jaxinfer.models import apply
from jaxinfer.models.families import parse_config
from jaxinfer.models.weights import declare, init_params, tree_bytes
from jaxinfer.offload import BUFFERS, host_places, lies, on_host, split, spread
from jaxinfer.quant.make import Recipe
from jaxinfer.quantise import Method, quantise_params
from tests.conftest import env_of_devices
from tests.pallas_kernels.aot import run_with_plugin

ROOT = Path(__file__).parents[1]
HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_hidden_layers": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIG = parse_config(HF)
LAYER = 4 * (32 * (64 + 32 + 3 * 48))  # bytes of a layer's matrices, float32
REST = 4 * (2 * 64 * 32 + 9 * 32)
BUDGET = REST + 3 * LAYER  # one stays, two on their way
PROMPTS = [[5, 6, 7], [*range(9, 40)], [17, 18, 17, 18, 17]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def weights(seed: int = 0) -> dict[str, Any]:
    params = init_params(CONFIG, jax.random.key(seed), jnp.float32)
    # Random embeddings are small: greedy output would not depend on them.
    return params | {"embed": params["embed"] * 50}


def make(params: Any = None, **options: Any) -> LLM:
    sizes: dict[str, Any] = {
        "max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 1 << 17, "max_steps": 4,
        "max_num_batched_tokens": 16, "page_size": 8,
    }  # fmt: skip
    return LLM.from_params(params or weights(), CONFIG, dtype="float32", **sizes | options)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def resident() -> Iterator[LLM]:
    with make() as llm:
        yield llm


@pytest.fixture(scope="module")
def offloaded() -> Iterator[LLM]:
    with make(device_weight_bytes=BUDGET) as llm:
        yield llm


# -- which layers ---------------------------------------------------------------------------------


def test_sizes_are_as_this_file_says():
    assert tree_bytes(weights()) == REST + 4 * LAYER


@given(st.integers(1, 40), st.integers(10, 99), st.integers(0, 300), st.data())
def test_as_few_as_will_do_lie_on_the_host(layers: int, size: int, rest: int, data: Any):
    declared = declare(replace(CONFIG, layers=CONFIG.layers[:1] * layers))
    sizes = jax.tree.map(lambda w: 0 if len(w.shape) == 1 else size, declared)
    sizes["embed"], sizes["lm_head"] = rest, 0
    least = rest + 4 * size * min(BUFFERS, layers)
    budget = data.draw(st.integers(least, rest + 4 * size * (layers + 1)))
    found = split(declared, sizes, budget)
    assert found.device + found.buffers <= budget
    assert found.device + found.host == rest + 4 * size * layers
    assert found.host == 4 * size * len(found.layers)
    assert found.buffers == (BUFFERS * 4 * size if found.layers else 0)
    if found.layers:  # with one fewer, there is too much
        assert found.device + 4 * size + found.buffers > budget or len(found.layers) == BUFFERS + 1
        assert layers - 1 in found.layers
        gaps = {b - a for a, b in zip(found.layers, found.layers[1:], strict=False)}
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
    if layers > BUFFERS:
        with pytest.raises(CapacityError, match=f"at least {least}"):
            split(declared, sizes, least - 1)


def test_layers_are_spread():
    assert spread(2, 8) == (3, 7)
    assert spread(3, 8) == (2, 5, 7)
    assert spread(8, 8) == tuple(range(8))
    assert spread(0, 8) == ()


# -- the same tokens ------------------------------------------------------------------------------


def test_weights_lie_where_they_are_said_to(offloaded: LLM):
    found = lies(offloaded.params)
    assert found == split(declare(CONFIG), jax.tree.map(lambda x: x.nbytes, weights()), BUDGET)
    assert found.layers == (1, 2, 3)
    for i, layer in enumerate(offloaded.params["layers"]):
        far = {name for name, x in layer.items() if on_host(x)}
        assert far == ({"qkv", "o", "gate_up", "down"} if i else set())
    memory = offloaded.memory_plan
    assert (memory.weights, memory.host_weights) == (REST + LAYER, 3 * LAYER)
    assert "on the host" in str(memory)
    assert read_bytes(memory) > memory.weights


def test_tokens_are_those_of_weights_on_the_device(resident: LLM, offloaded: LLM):
    want = tokens_of(resident)
    assert tokens_of(offloaded) == want
    assert len({tuple(tokens) for tokens in want}) == len(PROMPTS)


def test_requests_saved_by_one_go_on_in_the_other(resident: LLM, offloaded: LLM, tmp_path: Path):
    want = tokens_of(resident)
    for a, b in ((resident, offloaded), (offloaded, resident)):
        requests = [a.prepare(prompt, GREEDY) for prompt in PROMPTS]
        a.submit(requests)
        for _ in range(3):
            a.pump()
        a.save(tmp_path / "state", pages=True)
        a.cancel(requests)
        again = b.load(tmp_path / "state")
        while any(not r.finished for r in again):
            b.pump()
        assert [list(r.samples[0].tokens) for r in again] == want


def test_other_weights_take_the_same_places(resident: LLM, offloaded: LLM):
    tokens_of(offloaded)  # compiles, whichever test comes first
    before, count = lies(offloaded.params), offloaded.engine.compiler.count
    other = jax.tree.map(np.asarray, weights(seed=1))
    for llm in (resident, offloaded):
        llm.update_params(other)
    assert tokens_of(offloaded) == tokens_of(resident)
    assert lies(offloaded.params) == before
    assert offloaded.engine.compiler.count == count
    for llm in (resident, offloaded):
        llm.update_params(weights())


@pytest.mark.slow
def test_the_inside_is_the_same(resident: LLM, offloaded: LLM):
    tokens = jnp.asarray([PROMPTS[1]])
    near, far = (apply(llm.params, CONFIG, tokens).logits for llm in (resident, offloaded))
    np.testing.assert_array_equal(near, far)
    seen = [
        llm.generate(PROMPTS[:1], GREEDY, capture=["layers.2.resid"])[0].outputs[0].activations
        for llm in (resident, offloaded)
    ]
    jax.tree.map(np.testing.assert_array_equal, *seen)
    runs = []
    for llm in (resident, offloaded):
        step, state = llm.functional(PROMPTS[:1], GREEDY)
        runs.append([int((out := step(llm.params, state))[1].tokens[0])])
        runs[-1].append(int(step(llm.params, out[0])[1].tokens[0]))
    assert runs[0] == runs[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lookup,tokens=2,adapt=false", "skip=1,tokens=2,adapt=false"])
def test_guesses_change_nothing(resident: LLM, how: str):
    with make(device_weight_bytes=BUDGET, speculative=how) as llm:
        assert tokens_of(llm) == tokens_of(resident)


def test_quantised_matrices_are_streamed_as_they_are():
    recipe = Recipe(bits=4, group=16)
    params = quantise_params(weights(), CONFIG, Method(recipe))
    whole = tree_bytes(params)
    with make(params, max_steps=1) as llm:
        want = tokens_of(llm)
    with make(params, max_steps=1, device_weight_bytes=round(whole * 0.9)) as llm:
        far = [x for x in jax.tree.leaves(llm.params) if on_host(x)]
        assert {x.dtype for x in far} == {jnp.dtype(jnp.uint8), jnp.dtype(jnp.float32)}
        assert sum(x.nbytes for x in far) == llm.memory_plan.host_weights < LAYER
        assert tokens_of(llm) == want
        with pytest.raises(CheckpointError, match="device_weight_bytes"):
            llm.update_params(params)


def test_a_step_over_the_link_is_a_dispatch_of_its_own(
    offloaded: LLM, monkeypatch: pytest.MonkeyPatch
):
    memory = replace(offloaded.memory_plan, weights=1, host_weights=int(LINK_BYTES_PER_S))
    options = replace(offloaded._options, max_steps=None)
    gpu = type("Gpu", (), {"platform": "gpu"})
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert batcher_config(CONFIG, options, memory).max_steps == 1
    assert batcher_config(CONFIG, options, replace(memory, host_weights=0)).max_steps > 1


# -- from disk ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload") / "model"
    write_hf(path, weights(), declare(CONFIG), HF)
    return path


def test_weights_go_from_disk_to_where_they_lie(directory: Path):
    declared, most = declare(CONFIG), 0
    places = host_places(declared, None, (1, 2, 3))

    def held() -> int:
        near = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if not on_host(x)}
        return sum(near.values())

    before = held()

    def watch(*_: int) -> None:
        nonlocal most
        most = max(most, held() - before)

    params = load_params(directory, declared, dtype="float32", shardings=places, progress=watch)
    jax.tree.map(np.testing.assert_array_equal, params, weights())
    assert lies(params).device == most == REST + LAYER


def test_a_directory_is_read_onto_host_and_device(directory: Path, resident: LLM):
    with LLM(
        directory, dtype="float32", device_weight_bytes=BUDGET, max_num_seqs=4, page_size=8,
        max_model_len=64, max_num_batched_tokens=16, max_steps=4, kv_cache_bytes=1 << 17,
    ) as llm:  # fmt: skip
        assert lies(llm.params).layers == (1, 2, 3)
        assert tokens_of(llm) == tokens_of(resident)


def test_what_cannot_be_done_is_refused_before_weights_are_read(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "config.json").write_text(json.dumps(HF))  # there are no weights
    least = REST + BUFFERS * LAYER
    with pytest.raises(CapacityError, match=f"device_weight_bytes=9: .* at least {least}"):
        LLM(tmp_path, dtype="float32", device_weight_bytes=9)
    with pytest.raises(ValueError, match="device_weight_bytes=0"):
        LLM(tmp_path, dtype="float32", device_weight_bytes=0)
    monkeypatch.setattr("jaxinfer.memory.pinnable_bytes", lambda: 3 * LAYER - 1)
    with pytest.raises(CapacityError, match=f"leaves {3 * LAYER} bytes to the host's memory"):
        LLM(tmp_path, dtype="float32", device_weight_bytes=BUDGET)
    save_model(tmp_path / "saved", weights(), HF)
    with pytest.raises(CheckpointError, match="device_weight_bytes needs safetensors or GGUF"):
        LLM(tmp_path / "saved", dtype="float32", device_weight_bytes=BUDGET)


def test_the_command_line_has_the_option(capsys: pytest.CaptureFixture[str]):
    assert cli(["generate", "a", "--device-weight-bytes", "9"]) != 0
    assert "device_weight_bytes=9: this model needs at least" in capsys.readouterr().err


@pytest.mark.slow
def test_each_of_two_devices_streams_its_part(directory: Path):
    command, env = [sys.executable, __file__, str(directory)], env_of_devices(2)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["disk"] == found["memory"] == found["resident"]
    assert found["host"] == 3 * LAYER // 2


def two_devices(directory: Path) -> dict[str, Any]:
    """What the child of the test above finds."""
    options: dict[str, Any] = {"tensor_parallel_size": 2, "max_steps": 1}
    with make(**options) as llm:
        found: dict[str, Any] = {"resident": tokens_of(llm)}
    options["device_weight_bytes"] = BUDGET * 6 // 10
    with make(**options) as llm:
        found |= {"memory": tokens_of(llm), "host": llm.memory_plan.host_weights}
    with LLM(
        directory, dtype="float32", max_num_seqs=4, max_model_len=64, page_size=8,
        max_num_batched_tokens=16, kv_cache_bytes=1 << 17, **options,
    ) as llm:  # fmt: skip
        return found | {"disk": tokens_of(llm)}


# -- the program of a GPU -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aot")
    compile_steps(folder, ("all",))
    return folder


def compile_steps(folder: Path, names: Sequence[str]) -> None:
    run_with_plugin("tests.offload_aot", str(folder), *names)


def schedule(text: str) -> list[tuple[str, str, list[str]]]:
    """Of the computation that copies, in the order in which it runs: operation, its name, and the
    names of what it takes. `text` is scheduled."""
    (body,) = [part for part in text.split("\n\n") if " copy-start(" in part]
    line = r"^\s*(?:ROOT )?%(\S+) = (?:\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:,|$)"
    found = re.findall(line, body, re.M)
    return [(op, name, re.findall(r"%([\w.-]+)", operands)) for name, op, operands in found]


def far_names(text: str) -> set[str]:
    """What lies in the host's memory, which is number 5."""
    return set(re.findall(r"^\s*%(\S+) = \w+\[[\d,]*\]\{[\d,]*:S\(5\)\}", text, re.M))


WORKSPACE = 32 << 20  # of cuBLAS


def check_program(text: str, layers: int) -> None:
    steps = schedule(text)
    starts = {name: at for at, (op, name, _) in enumerate(steps) if op == "copy-start"}
    ends = {used[0]: at for at, (op, _, used) in enumerate(steps) if op == "copy-done"}
    products = [at for at, (op, _, _) in enumerate(steps) if op == "custom-call"]
    assert len(starts) == 4 * layers  # a copy for each matrix
    assert starts.keys() == ends.keys()
    far = far_names(text)
    assert all(not far & set(steps[at][2]) for at in products)  # none reads over the link
    hidden = sum(any(a < at < ends[name] for at in products) for name, a in starts.items())
    assert hidden >= layers  # the largest of each layer but the first, and of the last more
    # Not all at once: those of the third layer begin after something of the first is computed.
    late = sorted(starts.values())[4 * BUFFERS :]
    assert all(at > products[0] for at in late)


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA plugin is for Linux")
def test_copies_run_beside_what_is_computed(programs: Path):
    check_program((programs / "all.hlo").read_text(), 4)


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA plugin is for Linux")
def test_two_layers_are_on_the_device_at_most(programs: Path):
    layer = 2 * 1024 * (1536 + 1024 + 3 * 4096)  # of `offload_aot.CONFIG`
    rest = 2 << 20  # what tokens and logits take
    found = int((programs / "all.temp").read_text()) - WORKSPACE
    assert found - rest < BUFFERS * layer < found


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA plugin is for Linux")
def test_steps_of_one_dispatch_copy_anew_each(programs: Path):
    text = (programs / "all.hlo").read_text()
    (loop,) = re.findall(r" while\(.*?body=%(\S+?)[,\s]", text)
    (body,) = [part for part in text.split("\n\n") if " copy-start(" in part]
    assert body.lstrip().startswith(f"%{loop} ")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("half", 2), ("int4", 4)])
def test_other_programs_copy_likewise(tmp_path: Path, name: str, layers: int):
    """Layers between that stay, with prompts; and packed matrices, which are copied packed."""
    compile_steps(tmp_path, (name,))
    check_program((tmp_path / f"{name}.hlo").read_text(), layers)


if __name__ == "__main__":
    print(json.dumps(two_devices(Path(sys.argv[1]))))
