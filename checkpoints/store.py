"""Saves a parameter tree with Orbax, as one directory that is either complete or not there.

Layout: `params/` is Orbax's, a flat dict from each array's path in the tree to the array, so that
the tree's containers are free to change; `config.json`; and, written last, `manifest.json` with
the size of every file. Orbax is imported on use: it takes a second or more.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from checkpoints.load import flat_shardings, listed
from checkpoints.safetensors_reader import read_json
from checkpoints.write import write_json
from jaxinfer.errors import CheckpointError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

MANIFEST = "manifest.json"
CONFIG = "config.json"
PARAMS = "params"


def save(
    directory: str | Path, params: Any, config: dict[str, Any], *, overwrite: bool = False
) -> None:
    """Writes `params` and `config` to `directory`.

    All is written to `<directory>.tmp-<pid>`, synced to disk and renamed. A process that is
    killed leaves that temporary directory at most. With `overwrite`, the old directory is moved
    to `<directory>.old-<pid>` just before the rename and removed after it; a process killed
    between the two leaves it there, whole.

    Args:
        directory: must not exist, unless `overwrite`.
        params: pytree of arrays, every one addressable from this process.
        config: read back by `read_config`; JSON types.
        overwrite: replace what is there.

    Raises:
        CheckpointError: `directory` exists, and not `overwrite`; or Orbax cannot write.
    """
    write_whole(directory, lambda path: write(path, params, config), overwrite=overwrite)


def write_whole(
    directory: str | Path, write: Callable[[Path], object], *, overwrite: bool = False
) -> None:
    """Has `write` fill a directory that appears under its name as a whole; see `save`."""
    directory = Path(directory).absolute()
    if directory.exists() and not overwrite:
        raise CheckpointError(f"{directory} exists already")
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        _seal(temporary)
        _swap(temporary, directory)
    except OSError as e:
        raise CheckpointError(f"{directory}: cannot be saved: {e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore(directory: str | Path, abstract_params: Any, shardings: Any = None) -> Any:
    """Reads what `save` wrote, onto the devices.

    Args:
        directory: written by `save`.
        abstract_params: pytree of `jax.ShapeDtypeStruct`, with the paths that the saved tree has.
        shardings: pytree of `jax.sharding.Sharding` like it; None: the default device.

    Raises:
        CheckpointError: the directory is not one that `save` wrote, a file of it is missing or
            truncated, or its arrays are not those of `abstract_params`: all are listed.
    """
    directory = Path(directory).absolute()
    check_files(directory)
    leaves, treedef = jax.tree.flatten(abstract_params)
    places = flat_shardings(treedef, shardings)
    names = _names(abstract_params)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf, sharding in zip(names, leaves, places, strict=True)
    }
    try:
        found = _restore(directory, wanted)
    except CheckpointError:
        raise
    except Exception as e:  # Orbax and TensorStore raise whatever they please
        raise CheckpointError(f"{directory}: cannot be restored: {e}") from e
    return jax.tree.unflatten(treedef, [found[name] for name in names])


def read_config(directory: str | Path) -> dict[str, Any]:
    """The `config` that `save` was given. Raises `CheckpointError` as `restore` does."""
    directory = Path(directory).absolute()
    check_files(directory)
    return read_json(directory / CONFIG)


def write(directory: Path, params: Any, config: dict[str, Any]) -> None:
    """Fills a directory, which `write_whole` makes appear: see `save`."""
    import orbax.checkpoint as ocp

    write_json(directory / CONFIG, config)
    tree = dict(zip(_names(params), jax.tree.leaves(params), strict=True))
    with make_checkpointer(leaf.nbytes for leaf in tree.values()) as checkpointer:
        checkpointer.save(directory / PARAMS, args=ocp.args.PyTreeSave(tree))


def _seal(directory: Path) -> None:
    """Syncs every file to disk, and writes the manifest that names them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in [*files, *(p for p in directory.rglob("*") if p.is_dir())]:
        _sync(path)
    manifest = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    write_json(directory / MANIFEST, {"format": 1, "files": manifest})
    _sync(directory)


def _swap(temporary: Path, directory: Path) -> None:
    """Renames `temporary` to `directory`, and removes what had that name."""
    old = directory.with_name(f"{directory.name}.old-{os.getpid()}")
    if directory.exists():
        directory.rename(old)
    temporary.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_files(directory: Path) -> None:
    """Requires a manifest, and every file that it names at its size."""
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"{directory}: not a directory that was saved: no {MANIFEST} there")
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != 1 or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{directory / MANIFEST}: format 1 is expected, with `files`")
    for name, size in manifest["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path}: missing, or not of the {size} bytes that were saved")


def _restore(directory: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    sizes = (math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in wanted.values())
    with make_checkpointer(sizes) as checkpointer:
        saved: Any = checkpointer.metadata(directory / PARAMS)
        _check_tree(directory, saved.item_metadata.tree, wanted)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args)
        return checkpointer.restore(directory / PARAMS, args=args)


def _check_tree(
    directory: Path, saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]
) -> None:
    """Raises one error that lists the arrays which are not the same on both sides."""

    def differs(name: str) -> str:
        a, b = saved[name], wanted[name]
        if tuple(a.shape) == b.shape and a.dtype == b.dtype:
            return ""
        return f"{name} {a.dtype} {[*a.shape]}, not {b.dtype} {[*b.shape]}"

    problems = [
        listed("missing", wanted.keys() - saved.keys()),
        listed("not part of the model", saved.keys() - wanted.keys()),
        listed(
            "of another shape or dtype",
            filter(None, (differs(name) for name in saved.keys() & wanted.keys())),
        ),
    ]
    if any(problems):
        raise CheckpointError(
            f"{directory}: the saved arrays and the model do not agree.\n"
            + "\n".join(filter(None, problems))
        )


def make_checkpointer(sizes: Iterable[int]) -> ocp.Checkpointer:
    """A synchronous checkpointer whose host memory follows the largest array, not the model.

    Orbax's limits are whole GB, and refuse an array that does not fit under them.
    """
    import orbax.checkpoint as ocp

    limit = 1 + max(sizes, default=0) // 10**9
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            save_concurrent_gb=limit,
            save_device_host_concurrent_gb=limit,
            restore_concurrent_gb=limit,
        )
    )


def _names(tree: Any) -> list[str]:
    """The path of each leaf, such as `layers.0.qkv`."""
    keystr = jax.tree_util.keystr
    return [keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)]
