"""The named places of a decoder at which activations can be read, and changed.

A site is `embed`, `final_norm`, or `layers.N.` and one of `LAYER_SITES`. At each of them lies a
vector a token; patterns with `*` name several (`layers.*.resid`). Queries, keys and values are not
among them: one kernel turns them and writes them to the cache.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidRequest

if TYPE_CHECKING:
    import jax

# In the order in which a layer reaches them; what each is, for `jaxinfer info --sites`.
LAYER_SITES: dict[str, str] = {
    "attn_norm": "input of attention, normalised",
    "attn_heads": "output of the heads, one after the other, before the output projection",
    "attn_out": "what attention adds to the residual stream",
    "resid_mid": "residual stream after attention",
    "mlp_norm": "input of the MLP, normalised",
    "mlp_hidden": "act(gate) * up: the MLP's neurons",
    "mlp_out": "what the MLP adds to the residual stream",
    "resid": "residual stream after the layer",
}
EMBED, FINAL_NORM = "embed", "final_norm"
OTHER_SITES = {EMBED: "embeddings", FINAL_NORM: "residual stream at the end, normalised"}

At = Callable[[str, "jax.Array"], "jax.Array"]
Change = Mapping[str, Callable[["jax.Array"], "jax.Array"]]


def layer_site(index: int, name: str) -> str:
    return f"layers.{index}.{name}"


def widths(config: ModelConfig) -> dict[str, int]:
    """Every site of a model, in the order in which a token reaches them, and its vectors' width."""
    hidden = config.hidden_size
    of = dict.fromkeys(LAYER_SITES, hidden)
    of |= {
        "attn_heads": config.num_heads * config.head_dim,
        "mlp_hidden": config.intermediate_size,
    }
    layers = {
        layer_site(i, name): width for i in range(config.num_layers) for name, width in of.items()
    }
    return {EMBED: hidden, **layers, FINAL_NORM: hidden}


def describe(config: ModelConfig) -> dict[str, tuple[int, str]]:
    """Width and meaning of every kind of site; N stands for a layer's number."""
    width = widths(config)
    layers = {
        f"layers.N.{name}": (width[layer_site(0, name)], what) for name, what in LAYER_SITES.items()
    }
    ends = {name: (width[name], what) for name, what in OTHER_SITES.items()}
    return {EMBED: ends[EMBED], **layers, FINAL_NORM: ends[FINAL_NORM]}


def match(
    patterns: Iterable[str], config: ModelConfig, *, field: str = "capture"
) -> tuple[str, ...]:
    """The sites that any of `patterns` names, in the order in which a token reaches them.

    Raises:
        InvalidRequest: `patterns` is not several strings, or one of them names no site.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise InvalidRequest(f"{patterns!r} is not a list of sites", field=field)
    every, wanted = widths(config), set()
    for pattern in patterns:
        named = [s for s in every if isinstance(pattern, str) and fnmatchcase(s, pattern)]
        if not named:
            raise InvalidRequest(
                f"{pattern!r} names no site; {_hint(pattern, config)}", field=field
            )
        wanted.update(named)
    return tuple(site for site in every if site in wanted)


def _hint(pattern: object, config: ModelConfig) -> str:
    last = config.num_layers - 1
    every = [*OTHER_SITES, *(f"layers.N.{name}" for name in LAYER_SITES)]
    close = difflib.get_close_matches(re.sub(r"\d+|\*", "N", str(pattern)), every, n=1)
    meant = f"is it {close[0]}? " if close else ""
    return f"{meant}There are {', '.join(every)}, for N from 0 to {last} or *"


def visit(capture: Iterable[str], change: Change) -> tuple[At, dict[str, jax.Array]]:
    """What a forward calls at each site: it changes what is to be changed, and keeps what is to be
    kept, in the dict that is returned."""
    kept: dict[str, jax.Array] = {}
    wanted = frozenset(capture)

    def at(site: str, x: jax.Array) -> jax.Array:
        if site in change:
            x = change[site](x)
        if site in wanted:
            kept[site] = x
        return x

    return at, kept
