"""A saved directory is complete or it is not there, whenever the process dies."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import read_config, restore, save
from checkpoints.store import MANIFEST
from jaxinfer.errors import CheckpointError

CONFIG = {"family": "llama", "sizes": [1, 2]}


def tree(offset=0):
    return {
        "embed": jnp.arange(12, dtype=jnp.bfloat16).reshape(4, 3) + offset,
        "layers": [{"norm": jnp.full((3,), i, jnp.float32)} for i in range(2)],
    }


def abstract(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def assert_restores(directory, params):
    restored = restore(directory, abstract(params))
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    save(directory, tree(), CONFIG)
    return directory


def test_round_trip(saved):
    assert_restores(saved, tree())
    assert read_config(saved) == CONFIG
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_shardings_are_kept(saved):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")
    restored = restore(saved, abstract(tree()), jax.tree.map(lambda _: sharding, tree()))
    assert all(x.sharding == sharding for x in jax.tree.leaves(restored))


def test_saving_over_a_directory(tmp_path):
    save(tmp_path / "model", tree(), CONFIG)
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path / "model", tree(1), CONFIG)
    assert_restores(tmp_path / "model", tree())
    save(tmp_path / "model", tree(1), CONFIG, overwrite=True)
    assert_restores(tmp_path / "model", tree(1))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_parent_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be saved"):
        save(tmp_path / "file" / "model", tree(), CONFIG)


def test_arrays_that_are_not_the_models_are_listed(saved):
    wanted = abstract(tree())
    wanted["embed"] = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)
    wanted["layers"][0]["norm"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    wanted["head"] = wanted["layers"].pop()["norm"]
    with pytest.raises(CheckpointError) as e:
        restore(saved, wanted)
    assert str(e.value).splitlines()[1:] == [
        "1 missing: head",
        "1 not part of the model: layers.1.norm",
        "2 of another shape or dtype: embed bfloat16 [4, 3], not bfloat16 [4, 4]; "
        "layers.0.norm float32 [3], not bfloat16 [3]",
    ]


def test_a_foreign_directory(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="not a directory that was saved"):
            restore(directory, abstract(tree()))
        with pytest.raises(CheckpointError, match="not a directory that was saved"):
            read_config(directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "files": {}}'])
def test_a_foreign_manifest(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        restore(tmp_path, abstract(tree()))


def test_a_copy_that_lacks_something(saved, tmp_path):
    for path in sorted(p for p in saved.rglob("*") if p.is_file()):
        for change in (lambda p: p.unlink(), lambda p: os.truncate(p, p.stat().st_size // 2)):
            shutil.copytree(saved, tmp_path / "copy")
            change(tmp_path / "copy" / path.relative_to(saved))
            with pytest.raises(CheckpointError):
                restore(tmp_path / "copy", abstract(tree()))
            shutil.rmtree(tmp_path / "copy")


def test_data_of_the_right_size_that_orbax_cannot_read(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    for path in (tmp_path / "copy" / "params").rglob("*"):
        if path.is_file() and path.name.startswith("manifest"):
            path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CheckpointError, match="cannot be restored"):
        restore(tmp_path / "copy", abstract(tree()))


@pytest.mark.parametrize("overwrite", [False, True])
def test_at_every_moment_of_a_save(tmp_path, monkeypatch, overwrite):
    """A kill leaves the files as they are at that moment: they are copied at each system call."""
    place = tmp_path / "place"
    place.mkdir()
    if overwrite:
        save(place / "model", tree(), CONFIG)
    moments = []

    def watched(call):
        def run(*args, **kwargs):
            moments.append(tmp_path / str(len(moments)))
            shutil.copytree(place, moments[-1])
            return call(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "replace"):
            patch.setattr(os, name, watched(getattr(os, name)))
        save(place / "model", tree(1), CONFIG, overwrite=overwrite)
    assert len(moments) > 10
    assert_restores(place / "model", tree(1))
    for moment in moments:
        found = {p.name: version(p) for p in moment.iterdir()}
        final = {name: v for name, v in found.items() if ".tmp-" not in name}
        assert None not in final.values()
        assert 0 in final.values() or 1 in final.values() or not overwrite


def version(directory):
    """Which of `tree(0)` and `tree(1)` a directory holds; None where it is not whole."""
    try:
        restored = restore(directory, abstract(tree()))
    except CheckpointError:
        return None
    found = int(restored["embed"][0, 0])
    assert_restores(directory, tree(found))
    return found


SAVE = """
import os, signal, sys, time
import jax.numpy as jnp
from checkpoints import save
directory, moment = sys.argv[1:]
rename = os.rename
def last_rename(source, target):
    if str(target) == directory:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
if moment == "before the last rename":
    os.rename = last_rename
params = {"embed": jnp.arange(12, dtype=jnp.bfloat16).reshape(4, 3) + 1,
          "layers": [{"norm": jnp.full((3,), i, jnp.float32)} for i in range(2)]}
save(directory, params, {"family": "llama", "sizes": [1, 2]}, overwrite=True)
"""


@pytest.mark.parametrize("moment", ["before the last rename", "anywhere"])
def test_a_process_that_is_killed(tmp_path, moment):
    save(tmp_path / "model", tree(), CONFIG)
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen([sys.executable, "-c", SAVE, tmp_path / "model", moment], env=env)
    while child.poll() is None:
        # The old and the new directory, and the temporary one: the save has begun.
        if moment == "anywhere" and len(os.listdir(tmp_path)) > 1:
            child.kill()
    assert child.wait() == -signal.SIGKILL
    left = {p.name.split("-")[0]: p for p in tmp_path.iterdir()}
    if moment == "anywhere":
        assert version(left["model"]) == 0
    else:
        assert {name: version(p) for name, p in left.items()} == {"model.tmp": 1, "model.old": 0}
