"""Saves an engine's state, as one directory that is either complete or not there.

Layout: `host.json`, all that is plain; `arrays/`, Orbax's, where there are arrays; and, written
last, `manifest.json` with the size of every file. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.safetensors_reader import read_json
from checkpoints.store import check_files, make_checkpointer, write_whole
from checkpoints.write import write_atomically
from jaxinfer.errors import CheckpointError

VERSION = 1
HOST = "host.json"
ARRAYS = "arrays"


def save_state(
    directory: str | Path, host: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes `host`, of JSON types, and `arrays` by name to `directory`.

    A state that was saved there before is replaced, as by `store.save` with `overwrite`.

    Raises:
        CheckpointError: what is there is something else; or it cannot be written.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not _replaceable(directory):
        raise CheckpointError(f"{directory} exists already, and is not the state of an engine")
    described = {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()}
    text = json.dumps({"version": VERSION, "arrays": described, **host})

    def write(path: Path) -> None:
        write_atomically(path / HOST, lambda f: f.write(text.encode()))
        if arrays:
            _write_arrays(path / ARRAYS, arrays)

    write_whole(directory, write, overwrite=True)


def load_state(directory: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `save_state` wrote.

    Raises:
        CheckpointError: the directory is not one that `save_state` wrote, or of another version;
            a file of it is missing or truncated.
    """
    directory = Path(directory).absolute()
    check_files(directory)
    if not (directory / HOST).is_file():
        raise CheckpointError(f"{directory}: not the state of an engine: no {HOST} there")
    host = read_json(directory / HOST)
    if host.get("version") != VERSION or not isinstance(host.get("arrays"), dict):
        raise CheckpointError(
            f"{directory / HOST}: version {host.get('version')!r}, expected {VERSION}"
        )
    if not host["arrays"]:
        return host, {}
    try:
        return host, _read_arrays(directory / ARRAYS, host["arrays"])
    except Exception as e:  # Orbax and TensorStore raise whatever they please
        raise CheckpointError(f"{directory}: cannot be restored: {e}") from e


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and ((directory / HOST).is_file() or not any(directory.iterdir()))


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    # As bytes: not every dtype of a KV cache is one that TensorStore can write.
    tree = {name: np.frombuffer(x.tobytes(), np.uint8) for name, x in arrays.items() if x.size}
    with make_checkpointer(x.nbytes for x in tree.values()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def _read_arrays(path: Path, described: Mapping[str, Any]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    empty = {n: np.empty(shape, _dtype(dtype)) for n, (dtype, shape) in described.items()}
    item = {n: np.empty(x.nbytes, np.uint8) for n, x in empty.items() if x.size}
    as_host = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in item}
    with make_checkpointer(x.nbytes for x in item.values()) as checkpointer:
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_host)
        found = checkpointer.restore(path, args=args)
    return empty | {n: x.view(empty[n].dtype).reshape(empty[n].shape) for n, x in found.items()}


def _dtype(name: str) -> np.dtype:
    import jax.numpy as jnp  # names bfloat16 and the 8-bit floats

    return jnp.dtype(name)
