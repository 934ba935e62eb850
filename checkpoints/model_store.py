"""Whole models as jaxinfer keeps them: Orbax arrays, quantised matrices as they are in memory, and
all else that a Hugging Face directory holds.

`config.json` is Hugging Face's, with one more key, `jaxinfer`: the dtype and shape of every array,
and the scheme of every quantised matrix.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints import store
from checkpoints.load import flat_shardings, listed
from checkpoints.load_matrices import shardings_of
from checkpoints.safetensors_reader import read_json
from jaxinfer.errors import CheckpointError
from jaxinfer.quant import Parts, QuantisedMatrix, Scheme

KEY = "jaxinfer"  # of config.json


def save_model(
    directory: str | Path, params: Any, config: dict[str, Any], files: Iterable[Path] = ()
) -> None:
    """Writes a directory that `LLM` reads, whole or not at all.

    Args:
        directory: must not exist.
        params: a tree of `models.weights.declare`, quantised or not.
        config: Hugging Face's `config.json` of the model.
        files: to be copied beside it, such as the tokenizer's.

    Raises:
        CheckpointError: as `store.save`.
    """

    def write(path: Path) -> None:
        store.write(path, params, config | {KEY: describe(params)})
        for file in files:
            shutil.copy(file, path / file.name)

    store.write_whole(directory, write)


def is_saved_model(directory: str | Path) -> bool:
    """Whether `save_model` wrote it."""
    return (Path(directory) / store.PARAMS).is_dir() and (
        Path(directory) / store.MANIFEST
    ).is_file()


def restore_model(
    directory: str | Path, weights: Any, shardings: Any = None, *, dtype: Any = None
) -> Any:
    """Reads what `save_model` wrote onto the devices.

    Args:
        directory: of it.
        weights: `declare(config)`.
        shardings: as for `load_params`.
        dtype: of what is not quantised; None: as it was saved.

    Raises:
        CheckpointError: as `store.restore`; or the arrays are not those of the model.
    """
    leaves, treedef = jax.tree.flatten(weights)
    abstract = _abstract(directory)
    try:
        found = treedef.flatten_up_to(abstract)
    except ValueError as error:
        raise CheckpointError(f"{directory}: not the arrays of this model: {error}") from None
    wrong = [
        f"{weight.pieces[0].name} {_shape(matrix)}, not {[*weight.shape]}"
        for matrix, weight in zip(found, leaves, strict=True)
        if isinstance(matrix, dict) or tuple(matrix.shape) != weight.shape
    ]
    if wrong:
        raise CheckpointError(f"{directory}: {listed('of another shape', wrong)}")
    places = [
        shardings_of(matrix, weight, sharding)
        for matrix, weight, sharding in zip(
            found, leaves, flat_shardings(treedef, shardings), strict=True
        )
    ]
    params = store.restore(directory, abstract, jax.tree.unflatten(treedef, places))
    if dtype is None:
        return params
    return jax.tree.map(
        lambda x: x if isinstance(x, QuantisedMatrix) else x.astype(dtype),
        params,
        is_leaf=lambda x: isinstance(x, QuantisedMatrix),
    )


def _shape(matrix: Any) -> str:
    return "without a scheme" if isinstance(matrix, dict) else str([*matrix.shape])


def saved_bytes(directory: str | Path) -> int:
    """Bytes of all arrays. Raises CheckpointError as `restore_model`."""
    leaves = jax.tree.leaves(_abstract(directory))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def describe(params: Any) -> dict[str, Any]:
    """What `config.json` keeps of a tree: JSON types."""
    arrays = {
        _name(path): [leaf.dtype.name, list(leaf.shape)]
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    matrices = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, QuantisedMatrix))
    schemes = {
        _name(path): asdict(leaf.scheme)
        for path, leaf in matrices
        if isinstance(leaf, QuantisedMatrix)
    }
    return {"arrays": arrays, "schemes": schemes}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _abstract(directory: str | Path) -> Any:
    """The tree of a saved model, of `jax.ShapeDtypeStruct`."""
    described = read_json(Path(directory) / store.CONFIG).get(KEY)
    try:
        assert isinstance(described, dict), f"no {KEY}"
        arrays = {
            name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
            for name, (dtype, shape) in described["arrays"].items()
        }
        schemes = {
            name: Scheme(**scheme | {"table": tuple(scheme["table"])})
            for name, scheme in described["schemes"].items()
        }
        return _built(_nested(arrays), schemes, "")
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{directory}: config.json: {KEY} does not describe a model: {error}"
        ) from None


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in arrays.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _built(node: Any, schemes: Mapping[str, Scheme], name: str) -> Any:
    """Lists where keys are numbers, matrices where there is a scheme, else dicts."""
    if not isinstance(node, dict):
        return node
    if name in schemes:
        return QuantisedMatrix(schemes[name], **node)
    children = {k: _built(v, schemes, f"{name}.{k}".removeprefix(".")) for k, v in node.items()}
    if children.keys() == {"parts"}:
        return Parts(tuple(children["parts"]))
    if all(key.isdecimal() for key in children):
        return [children[str(i)] for i in range(len(children))]
    return children
