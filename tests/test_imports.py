"""Who may import whom: the table below is ARCHITECTURE's, and every module has its place in it.

Reads the source: imports inside functions and for type checkers count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "checkpoints", "jaxinfer", "bench", "tests")

# layer: (its modules, by longest prefix; the layers it stands on, and through them all below)
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "kernels": ({"pallas_kernels"}, set()),
    "data": (
        {
            "jaxinfer.config",
            "jaxinfer.errors",
            "jaxinfer.known_models",
            "jaxinfer.response_cache",
            "jaxinfer.types",
            "jaxinfer.validation",
        },
        set(),
    ),
    "pages": ({"jaxinfer.pages", "jaxinfer.persistent", "jaxinfer.tier"}, {"data"}),
    "batcher": (
        {"jaxinfer.batcher", "jaxinfer.eventlog", "jaxinfer.metrics", "jaxinfer.router"},
        {"pages"},
    ),
    "buckets": ({"jaxinfer.buckets"}, {"pages"}),
    "offload": ({"jaxinfer.offload"}, {"data"}),
    "quant": ({"jaxinfer.quant"}, {"kernels", "offload"}),
    "cache": ({"jaxinfer.cache"}, {"kernels", "data"}),
    "layers": ({"jaxinfer.layers", "jaxinfer.rope"}, {"cache", "quant"}),
    "sampling": ({"jaxinfer.sampling"}, {"kernels", "data"}),
    "speculate": ({"jaxinfer.speculate", "jaxinfer.proposers"}, {"sampling"}),
    "batch": ({"jaxinfer.batch"}, {"cache", "sampling"}),
    "models": ({"jaxinfer.models"}, {"layers", "batch"}),
    "packing": ({"jaxinfer.packing"}, {"sharding"}),
    "distributed": ({"jaxinfer.distributed"}, {"data"}),
    "hooks": ({"jaxinfer.hooks", "jaxinfer.hooked"}, {"models"}),
    "drafting": (
        {"jaxinfer.acceptance", "jaxinfer.drafting", "jaxinfer.windows"},
        {"pipeline", "sharding", "speculate"},
    ),
    "pipeline": ({"jaxinfer.pipeline"}, {"models", "pages"}),
    "runner": ({"jaxinfer.runner"}, {"hooks", "packing", "drafting"}),
    "plans": ({"jaxinfer.plans", "jaxinfer.warmup"}, {"runner", "batcher", "buckets"}),
    "controller": ({"jaxinfer.controller"}, set()),
    "engine": (
        {
            "jaxinfer.engine",
            "jaxinfer.following",
            "jaxinfer.guesser",
            "jaxinfer.observe",
            "jaxinfer.page_copies",
            "jaxinfer.replicas",
            "jaxinfer.sequences",
            "jaxinfer.state",
        },
        {"plans", "controller", "distributed"},
    ),
    "functional": ({"jaxinfer.functional"}, {"plans"}),
    "quantise": ({"jaxinfer.quantise", "jaxinfer.quality", "jaxinfer.skipping"}, {"models"}),
    "sharding": ({"jaxinfer.parallel", "jaxinfer.sharding"}, {"models"}),
    "sizing": (
        {
            "jaxinfer.estimate",
            "jaxinfer.hardware",
            "jaxinfer.placement",
            "jaxinfer.roofline",
            "jaxinfer.sizing",
            "jaxinfer.temporaries",
        },
        {"models", "buckets"},
    ),
    "host": (
        {
            "jaxinfer.backend",
            "jaxinfer.detokenizer",
            "jaxinfer.hub",
            "jaxinfer.progress",
            "jaxinfer.tokenizer",
        },
        {"data"},
    ),
    "checkpoints": ({"checkpoints"}, {"models", "quant", "sharding"}),
    "requests": (
        {"jaxinfer.delivery", "jaxinfer.requests", "jaxinfer.scoring"},
        {"engine", "host"},
    ),
    "loading": (
        {"jaxinfer.in_memory", "jaxinfer.loading", "jaxinfer.memory", "jaxinfer.speculative"},
        {"checkpoints", "sizing", "host", "engine", "quantise"},
    ),
    "starting": ({"jaxinfer.sources", "jaxinfer.starting"}, {"loading"}),
    "llm": (
        {"jaxinfer.llm", "jaxinfer.preparing", "jaxinfer.saving"},
        {"requests", "starting", "functional"},
    ),
    "async": ({"jaxinfer.async_llm"}, {"llm"}),
    "offline": ({"jaxinfer.offline"}, {"llm"}),
    "api": ({"jaxinfer"}, {"async", "offline"}),
    "training": ({"jaxinfer.training"}, {"models"}),
    "demo": ({"checkpoints.demo"}, {"api", "training"}),
    "verify": ({"jaxinfer.verify"}, {"api"}),
    "evaluation": ({"jaxinfer.eval_arguments", "jaxinfer.evaluation"}, {"api"}),
    "server": ({"jaxinfer.server"}, {"api"}),
    "profiling": ({"jaxinfer.profiling"}, {"api", "quantise"}),
    "cli": ({"jaxinfer.cli"}, {"server", "verify", "quantise", "training", "profiling"}),
    "bench": ({"bench"}, {"cli", "training"}),
    "tests": ({"tests"}, {"bench", "demo", "evaluation"}),
}

# Packages of others that only some layers may import.
RESTRICTED: dict[str, set[str]] = {
    "torch": {"bench", "verify", "tests"},
    "flax": {"training", "demo", "tests"},
    "optax": {"training", "demo", "bench", "tests"},
    "orbax": {"checkpoints", "tests"},
    "lm_eval": {"evaluation", "tests"},
    "pickle": set(),
    "dill": set(),
    "cloudpickle": set(),
    "shelve": set(),
    "joblib": set(),
}

WITHOUT_JAX = {"data", "pages", "batcher", "controller"}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of ours: dotted name to syntax tree."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Dotted names that a module imports: ours to the module, those of others as written."""
    names = set()
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in sources() else str(node.module) for name in inner}
    return frozenset(names)


def ours(module: str) -> set[str]:
    return {name for name in imports(module) if name.partition(".")[0] in PACKAGES}


def layer_of(module: str) -> str:
    places = [
        (len(prefix), layer)
        for layer, (prefixes, _) in LAYERS.items()
        for prefix in prefixes
        # `jaxinfer` itself is the API, not the place of whatever is not listed.
        if module == prefix or (prefix != "jaxinfer" and module.startswith(f"{prefix}."))
    ]
    assert places, f"{module} has no layer: give it a place in LAYERS"
    return max(places)[1]


def below(layer: str) -> set[str]:
    direct = LAYERS[layer][1]
    return direct.union(*(below(other) for other in direct))


def test_the_table_has_no_cycles() -> None:
    TopologicalSorter({layer: under for layer, (_, under) in LAYERS.items()}).prepare()


def test_modules_have_no_cycles() -> None:
    TopologicalSorter({module: ours(module) for module in sources()}).prepare()


@pytest.mark.parametrize("module", sorted(sources()))
def test_direction(module: str) -> None:
    layer = layer_of(module)
    allowed = below(layer) | {layer}
    wrong = {name for name in ours(module) if layer_of(name) not in allowed}
    assert not wrong, f"{module} ({layer}) may import {sorted(allowed)} only"


def test_kernels_stand_alone() -> None:
    for module in sources():
        if layer_of(module) == "kernels":
            # jaxlib holds the compiler's half of jax: its MLIR bindings
            allowed = {"jax", "jaxlib", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names)
            assert {name.partition(".")[0] for name in imports(module)} <= allowed, module


def test_the_scheduler_and_its_data_never_import_jax() -> None:
    for layer in WITHOUT_JAX:
        assert below(layer) <= WITHOUT_JAX
    for module in sources():
        if layer_of(module) in WITHOUT_JAX:
            used = {name.partition(".")[0] for name in imports(module)}
            assert used <= {"jaxinfer", "numpy"} | set(sys.stdlib_module_names), module


@pytest.mark.parametrize("package", sorted(RESTRICTED))
def test_packages_of_others_stay_where_they_belong(package: str) -> None:
    users = {m for m in sources() if package in {n.partition(".")[0] for n in imports(m)}}
    assert {m for m in users if layer_of(m) not in RESTRICTED[package]} == set()


def test_nothing_unpickles_weights() -> None:
    for module, tree in sources().items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert "torch.load" not in {ast.unparse(call.func) for call in calls}, module
        assert "allow_pickle" not in {k.arg for call in calls for k in call.keywords}, module


def in_a_new_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_starts_and_changes_nothing() -> None:
    in_a_new_process("""
import os, sys
import jax
before = dict(os.environ), dict(jax.config.values)
import jaxinfer
for name in jaxinfer.__all__:
    getattr(jaxinfer, name)
assert (dict(os.environ), dict(jax.config.values)) == before
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
heavy = {"transformers", "orbax", "flax", "optax", "torch"} & set(sys.modules)
assert not heavy, heavy
""")


def test_the_package_alone_is_cheap() -> None:
    in_a_new_process("""
import sys
import jaxinfer, jaxinfer.batcher, jaxinfer.validation
assert "jax" not in sys.modules
""")
