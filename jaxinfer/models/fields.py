"""Reads values of a Hugging Face `config.json`: numbers, flags, rotary embeddings.

Every function raises `UnsupportedModel`, naming field and value, for a value it cannot take.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import RopeConfig
from jaxinfer.errors import UnsupportedModel

_STRETCH = frozenset({"factor", "original_max_position_embeddings"})
_ROPE_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": _STRETCH,
    "llama3": _STRETCH | {"low_freq_factor", "high_freq_factor"},
    "yarn": _STRETCH
    | {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"},
}


def read_rope(c: Mapping[str, Any]) -> RopeConfig:
    """Reads `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    old, new = c["rope_scaling"], c["rope_parameters"]
    if old and new and old != new:
        raise UnsupportedModel(
            f"config.json: rope_scaling = {old!r} contradicts rope_parameters = {new!r}"
        )
    given = old or new or {}
    where = f"{'rope_scaling' if old else 'rope_parameters'} = {given!r}"
    if not isinstance(given, dict):
        raise UnsupportedModel(f"config.json: {where} must be an object")
    p = {k: v for k, v in given.items() if v is not None}
    kinds = {str(p.pop(k)) for k in ("type", "rope_type") if k in p} or {"default"}
    kind = kinds.pop()
    if kinds or kind not in _ROPE_FIELDS:
        raise UnsupportedModel(
            f"config.json: {where}: the rope_type must be one of {', '.join(_ROPE_FIELDS)}"
        )
    partial = p.pop("partial_rotary_factor", 1.0)
    p.setdefault("rope_theta", c["rope_theta"])
    if partial != 1.0 or not set(p) <= {"rope_theta", *_ROPE_FIELDS[kind]}:
        raise UnsupportedModel(
            f"config.json: {where}: a rope_type of {kind!r} takes "
            f"{', '.join(['rope_theta', *sorted(_ROPE_FIELDS[kind])])}, and no "
            "partial_rotary_factor but 1"
        )
    theta = number(p, "rope_theta", above=1)
    if kind == "default":
        return RopeConfig(theta)
    max_position = size(c, "max_position_embeddings")
    p.setdefault("original_max_position_embeddings", max_position)
    original = size(p, "original_max_position_embeddings")
    if kind == "yarn":
        p.setdefault("factor", max_position / original)
    factor = number(p, "factor", above=0)
    rope = dataclasses.replace(
        RopeConfig(theta), kind=kind, factor=factor, original_max_position=original
    )
    if kind == "llama3":
        return _llama3(rope, p)
    return _yarn(rope, p) if kind == "yarn" else rope


def _llama3(rope: RopeConfig, p: Mapping[str, Any]) -> RopeConfig:
    low = number(p, "low_freq_factor", above=0)
    high = number(p, "high_freq_factor", above=low)
    return dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: RopeConfig, p: dict[str, Any]) -> RopeConfig:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(max(rope.factor, 1.0)) + 1.0

    if "attention_factor" in p:
        attention_factor = number(p, "attention_factor", above=0)
    elif p.get("mscale") and p.get("mscale_all_dim"):  # 0 counts as absent
        ratio = [magnitude(number(p, k, above=0)) for k in ("mscale", "mscale_all_dim")]
        attention_factor = ratio[0] / ratio[1]
    else:
        attention_factor = magnitude(1.0)
    p = {"beta_slow": 1.0, "beta_fast": 32.0, "truncate": True} | p
    slow = number(p, "beta_slow", above=0)
    return dataclasses.replace(
        rope,
        beta_slow=slow,
        beta_fast=number(p, "beta_fast", above=slow),
        attention_factor=attention_factor,
        truncate=flag(p, "truncate"),
    )


def read_max_position(c: Mapping[str, Any], rope: RopeConfig) -> int:
    """The longest sequence in tokens, RoPE scaling included."""
    stated = size(c, "max_position_embeddings")
    if rope.kind in ("linear", "yarn"):  # some configs state the length before stretching
        return max(stated, int(rope.factor * rope.original_max_position))
    return stated


def size(c: Mapping[str, Any], key: str) -> int:
    """A positive integer."""
    return integer(c, key, at_least=1)


def integer(c: Mapping[str, Any], key: str, *, at_least: int) -> int:
    """An integer of at least `at_least`."""
    value = c[key]
    if type(value) is not int or value < at_least:  # a bool is not a number here
        raise UnsupportedModel(
            f"config.json: {key} = {value!r} must be an integer of at least {at_least}"
        )
    return value


def number(c: Mapping[str, Any], key: str, *, above: float) -> float:
    """A finite number above `above`."""
    value: Any = c.get(key)
    if type(value) not in (int, float) or not above < value < math.inf:
        raise UnsupportedModel(f"config.json: {key} = {value!r} must be a number above {above:g}")
    return float(value)


def flag(c: Mapping[str, Any], key: str) -> bool:
    """A boolean; false where it is absent."""
    value = c.get(key, False)
    if not isinstance(value, bool):
        raise UnsupportedModel(f"config.json: {key} = {value!r} must be true or false")
    return value
