"""Models as pure functions: `apply` is the whole forward, without cache or engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.models.decoder import ForwardOutput, apply
    from jaxinfer.models.families import read_config
    from jaxinfer.models.weights import declare, init_params

# Imported on first use: configs are read where there is no jax.
_WHERE = {
    "ForwardOutput": "decoder",
    "apply": "decoder",
    "declare": "weights",
    "init_params": "weights",
    "read_config": "families",
}

__all__ = ["ForwardOutput", "apply", "declare", "init_params", "read_config"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
