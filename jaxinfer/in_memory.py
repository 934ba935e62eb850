"""Weights that a user has in memory already: whether they are a model's, and where they go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from jaxinfer.config import EngineOptions, ModelConfig
from jaxinfer.errors import CheckpointError
from jaxinfer.models.decoder import Params
from jaxinfer.models.weights import abstract_params, declare
from jaxinfer.offload import host_places, lies, place_of
from jaxinfer.parallel import arrange, lay_out, said
from jaxinfer.quant import Parts, QuantisedMatrix, pack_params

QUANTISED = (QuantisedMatrix, Parts)


def check_params(
    params: Params, config: ModelConfig, dtype: Any, like: Params | None = None
) -> None:
    """Raises CheckpointError unless `params` is the tree that `config` declares, in `dtype`.

    Matrices may be quantised. With `like`, they are so in the way that those of `like` are.
    """
    if like is None:
        want = _described(abstract_params(config, dtype))
        have = _described(params, _is_quantised)
    else:
        want, have = _described(like), _described(params)
    problems = [
        f"{name}: {have.get(name, 'missing')}, expected {want.get(name, 'nothing there')}"
        for name in sorted(want.keys() | have.keys())
        if want.get(name) != have.get(name) and not _stands_for(have.get(name), want.get(name))
    ]
    if problems:
        raise CheckpointError(
            f"params are not those of this config with dtype={str(dtype)!r}:\n  "
            + "\n  ".join(problems)
        )


def check_dense(params: Any, mesh: Mesh) -> None:
    """Raises CheckpointError if a matrix is quantised, which is not laid out anew in memory."""
    found = jax.tree.leaves_with_path(params, is_leaf=_is_quantised)
    names = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} ({_describe(leaf)})"
        for path, leaf in found
        if _is_quantised(leaf)
    ]
    if names:
        raise CheckpointError(
            f"{said(mesh)} with quantised matrices in memory, such as {names[0]}: "
            "expected dense ones; quantised models are split when they are read from disk"
        )


def stored_bytes(params: Params, config: ModelConfig) -> Any:
    """Bytes of each weight of `models.weights.declare`."""

    def size(_: Any, matrix: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(matrix))

    return jax.tree.map(size, declare(config), params)


def place(
    params: Params, config: ModelConfig, mesh: Mesh | None, layers: Sequence[int] = ()
) -> Params:
    """Weights, whole, to where they are to lie, the matrices of `layers` on the host."""
    if mesh is not None:
        return lay_out(params, config, mesh, layers)
    if not layers:
        return jax.device_put(params)

    def put(place: Sharding, matrix: Any) -> Any:
        return jax.device_put(matrix, jax.tree.map(partial(place_of, place), matrix))

    return jax.tree.map(put, host_places(declare(config), None, layers), params)


def updatable(params: Params, config: ModelConfig, dtype: Any, mesh: Mesh | None) -> Params | None:
    """The shapes of weights that may take the place of these; None: none may.

    Args:
        params: of the model, where they are to lie, but not packed.
        config, dtype: of the model.
        mesh: devices that share it: what takes the place is whole, as for one device.
    """
    quantised = any(map(_is_quantised, jax.tree.leaves(params, is_leaf=_is_quantised)))
    if quantised and (mesh is not None or lies(params).layers):
        return None  # not laid out anew in memory; or all would be packed on the device at once
    if mesh is not None:
        return abstract_params(config, dtype)
    return jax.eval_shape(lambda tree: tree, params)


def check_update(
    params: Params,
    config: ModelConfig,
    options: EngineOptions,
    *,
    like: Params | None,
    mesh: Mesh | None,
) -> None:
    """Raises CheckpointError unless `params` may take the place of weights; lists what differs.

    `like`: of `updatable`, for the devices of `mesh`.
    """
    if like is None:
        how = said(mesh) or f"device_weight_bytes={options.device_weight_bytes}"
        raise CheckpointError(
            f"quantised weights with {how} are not updated: expected dense ones; "
            "make another LLM of the directory"
        )
    check_params(params, config, jnp.dtype(options.dtype), like=like)


def as_loaded(params: Params, config: ModelConfig, dtype: Any, mesh: Mesh | None) -> Params:
    """Weights of `check_update` as an engine has them; the caller's stay as they are."""
    if mesh is not None:  # dense, and whole
        params = arrange(params, config, mesh)
    return pack_params(params, dtype, consume=False)


def _is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, QUANTISED)


def _described(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _describe(leaf)
        for path, leaf in jax.tree.flatten_with_path(tree, is_leaf)[0]
    }


def _describe(leaf: Any) -> str:
    if isinstance(leaf, QUANTISED):
        return f"quantised{list(leaf.shape)}"
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}{list(leaf.shape)}"


def _stands_for(have: str | None, want: str | None) -> bool:
    """Whether a quantised matrix is of the shape of the dense one that is expected."""
    if have is None or want is None or not have.startswith("quantised["):
        return False
    return have.removeprefix("quantised") == want[want.index("[") :]
