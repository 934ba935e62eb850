"""Engines of `bench.compare` in their processes: real where it is cheap, else recorded stubs."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import engines, parts, record
from bench.engines import ENGINES, RAGGED, Options, Output, Request
from bench.engines.client import Client, EngineError, Missing

STUBS = Path(__file__).parent / "stubs"
DEMO = record.ROOT / "checkpoints" / "demo" / "target"
SMALL = Options(dtype="float32", max_num_seqs=4, max_model_len=64)
EXPECTED = [[(3 + i) % 97 for i in range(5)], [(9 + i) % 97 for i in range(2)]]


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stubs take the packages' place, in this environment's interpreter."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STUBS), str(record.ROOT)]))
    monkeypatch.delenv(parts.TORCH_PYTHON, raising=False)


@pytest.mark.parametrize("speculative", [None, "lookup", "draft"])
@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_an_engine_that_is_not_installed_speaks_its_published_api(
    name: str, speculative: str | None, stubs: None
) -> None:
    options = Options(max_model_len=8, speculative=speculative, prefix_caching=True)
    with Client(name, DEMO, options) as client:
        assert client.wait() > client.began
        requests = [Request([1, 2], 5), Request([4, 5], 2, due=0.05)]
        for _ in range(2):  # the second finds the loop as the first left it
            reply = client.generate(requests, 60)
            assert [out.tokens for out in reply.outputs] == EXPECTED
            assert reply.outputs[1].times[0] > 0.05
            assert reply.seconds >= reply.outputs[1].times[-1]
        assert client.memory(60) == engines.Memory()


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_what_an_engine_does_wrong_is_told_and_it_goes_on(name: str, stubs: None) -> None:
    with Client(name, DEMO, Options(max_model_len=8)) as client:
        client.wait()
        with pytest.raises(EngineError, match="begins with 13") as error:
            client.generate([Request([13], 2)], 60)
        assert "Traceback" in error.value.tail
        with pytest.raises(EngineError, match="1 tokens and 1 times came, 2 were asked for"):
            client.generate([Request([14], 2)], 60)
        assert client.generate([Request([3], 5)], 60).outputs[0].tokens == EXPECTED[0]
        with pytest.raises(EngineError, match="no answer after 0 s"):
            client.generate([Request([1], 2)], 0.0)
        assert not client.alive
        with pytest.raises(EngineError, match="its process has ended"):
            client.generate([Request([1], 2)], 60)


def test_an_error_does_not_say_where_the_checkpoint_lies(tmp_path: Path) -> None:
    with (
        Client("jaxinfer", tmp_path / "nothing", SMALL) as client,
        pytest.raises(EngineError, match="'nothing': does not exist") as error,
    ):
        client.wait()
    assert str(tmp_path) not in f"{error.value}{error.value.tail}"


def test_an_option_that_the_engine_has_not_is_an_error(stubs: None) -> None:
    with (
        Client("vllm", DEMO, Options(extra={"colour": "red"})) as client,
        pytest.raises(EngineError, match="colour"),
    ):
        client.wait()


@pytest.mark.parametrize("name", ["vllm", "sglang", "hf-eager"])
def test_a_package_that_is_missing_is_no_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(parts.TORCH_PYTHON, raising=False)
    if all(map(find_spec, ENGINES[name].packages)):
        pytest.skip(f"{name} could run here")
    with Client(name, DEMO, SMALL) as client, pytest.raises(Missing, match="is not installed"):
        client.wait()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (Output([1], [0.2]), "1 tokens"),
        (Output([1, 2, 3], [0.2] * 3), "3 tokens"),
        (Output([1, 2], [0.2]), "1 times"),
        (Output([1, 2], [0.3, 0.2]), "go back"),
        (Output([1, 2], [0.05, 0.2]), "its request at 0.1 s"),
    ],
)
def test_outputs_are_checked(output: Output, said: str) -> None:
    request = Request([5], 2, due=0.1)
    engines.check(request, Output([1, 2], [0.2, 0.2]))
    with pytest.raises(ValueError, match=said):
        engines.check(request, output)


@pytest.mark.slow
@pytest.mark.skipif(parts.TORCH_PYTHON not in os.environ, reason="no interpreter with torch")
@pytest.mark.parametrize("name", ["hf-eager", "hf-static", "hf-continuous", "torch-compile"])
def test_a_pytorch_engine_says_what_jaxinfer_says(name: str) -> None:
    equal = [Request([7 * i + 3, 40, 41, 300, 5, 6], 9, room=24) for i in range(3)]
    ragged = [Request(list(range(5, 9 + 3 * i)), 4 + i, 0.02 * i) for i in range(3)]
    calls = [equal, equal, ragged] if RAGGED in ENGINES[name].can else [equal, equal]
    found = []
    for engine in ("jaxinfer", name):
        with Client(engine, DEMO, SMALL) as client:
            client.wait()
            found.append([client.generate(c, 600).outputs for c in calls])
            memory = client.memory(60)
            assert memory.loaded
            assert memory.peak
            assert memory.token == 2 * 8 * 2 * 64 * 4  # keys and values, layers, heads, float32
    ours, theirs = ([[out.tokens for out in call] for call in calls] for calls in found)
    assert ours == theirs
