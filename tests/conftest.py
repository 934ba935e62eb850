"""Markers `gpu` and `slow`, hypothesis' profiles, the compilation cache, and a tiny model.

`pytest --slow` runs the long tests too; `pytest --hypothesis-profile=long` tries more examples.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import settings

from jaxinfer import LLM, SamplingParams
from jaxinfer.backend import default_cache_directory, use_compilation_cache
from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.models.weights import init_params
from jaxinfer.plans import Kind
from jaxinfer.tokenizer import Tokenizer, load_tokenizer

NO_GPU = "no GPU here"
ROOT = Path(__file__).parents[1]
MOST_MAPS = 30_000  # of 65530
QUICK = "--xla_backend_optimization_level=0"

settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=1000, deadline=None)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config: pytest.Config) -> None:
    """Threads for JAX on the CPU, before it starts, and its cache.

    In the kernel interpreter a thread of a kernel that waits blocks one of XLA's, of which there
    would be one a processor. Programs compiled by tests, their workers and subprocesses are kept in
    .pytest_cache: compiling is most of the suite's time. JAX decides at its first compilation
    whether it has a cache, so it is told here. Without a GPU the quick suite leaves out what the
    compiler would do for speed alone, which saves a third of that; the long one has it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    quick = not config.getoption("--slow") and shutil.which("nvidia-smi") is None
    if quick and QUICK not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK}"
    os.environ["NPROC"] = str(max(8, os.cpu_count() or 1))
    os.environ["XDG_CACHE_HOME"] = str(config.rootpath / ".pytest_cache" / "xdg")
    use_compilation_cache(default_cache_directory())


def env_of_devices(count: int) -> dict[str, str]:
    """For a process of its own: so many simulated devices, and this checkout's packages."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    here = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **here}


@pytest.fixture(scope="module", autouse=True)
def let_go_of_programs() -> Iterator[None]:
    """JAX keeps the programs of single operations, each in memory mapped in several pieces, and
    Linux maps so many a process at most: beyond them it crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


@dataclass(frozen=True)
class TinyModel:
    """Random float32 weights of a model that compiles fast, and the demo's tokenizer for it."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    tokenizer = load_tokenizer(ROOT / "checkpoints" / "demo" / "target")
    assert tokenizer is not None
    config = ModelConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        layers=(LayerConfig(), LayerConfig()),
        max_position=512,
        eos_token_ids=(0,),
    )
    params = init_params(config, jax.random.key(0), jnp.float32)
    # Random embeddings are small: greedy output would not depend on them.
    params["embed"] = params["embed"] * 50
    return TinyModel(config, params, tokenizer)


def small_llm(tiny: TinyModel, **options: Any) -> LLM:
    """Few rows and small pages, so that little is compiled and pages can run out."""
    sizes: dict[str, Any] = {
        "max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 1 << 20,
        "max_num_batched_tokens": 16, "max_steps": 4, "page_size": 8,
    }  # fmt: skip
    return LLM.from_params(
        tiny.params, tiny.config, tokenizer=tiny.tokenizer, dtype="float32", **{**sizes, **options}
    )


def of_kinds(engine: Engine, *params: SamplingParams) -> Engine:
    """As after a warm-up: steps have programs for such requests alone, and take the first that can
    do what is wanted. Else there is one of each mixture, and compiling is most of a test's time."""
    engine._variants = tuple(map(Kind.of, params))
    return engine


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow") and "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and jax.default_backend() != "gpu":
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if NO_GPU in str(r.longrepr)]
    if skipped:
        terminalreporter.section("GPU", yellow=True)
        terminalreporter.write_line(f"{len(skipped)} gpu tests skipped: {NO_GPU}", yellow=True)
