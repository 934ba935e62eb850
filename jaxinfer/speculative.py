"""From what a user says of speculation to what guesses, checked before any weights are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.config import EngineOptions, Method, ModelConfig, Speculative
from jaxinfer.controller import Costs
from jaxinfer.drafting import Drafter
from jaxinfer.errors import CheckpointError
from jaxinfer.loading import load_weights, model_config, open_source, weight_bytes
from jaxinfer.models.decoder import Params
from jaxinfer.models.weights import count_params
from jaxinfer.parallel import said
from jaxinfer.placement import check_degrees
from jaxinfer.progress import layers_bar
from jaxinfer.quant import pack_params
from jaxinfer.skipping import choose_layers

if TYPE_CHECKING:
    from jaxinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

METHODS = "'draft=MODEL', 'lookup' or 'skip=LAYERS' (such as skip=4-9), each with ',tokens=4'"
# Of an H100, and of a desktop's processor: what the controller goes by until it has measured.
GPU_SPEED, CPU_SPEED = (2.9e12, 6e14), (1.5e10, 1e11)
WINDOW, MOST_WINDOWS = 256, 8  # tokens of text that layers are chosen by
GPU_LAYER_S, CPU_LAYER_S = 25e-6, 50e-6  # that the launches of a layer take beside its work


class Draft(NamedTuple):
    """What guesses, and where its weights are: None if there are none, or they are there already.

    `bytes`: of the weights.
    """

    drafter: Drafter
    source: Any
    bytes: int


def parse(given: str | Mapping[str, Any] | Speculative) -> Speculative:
    """What a user said of speculation.

    Args:
        given: `Speculative`, its fields, or text: `draft=MODEL`, `lookup`, `skip=4-9` (layers;
            several ranges with `+`) or `skip,count=6,text=FILE`, followed by other fields:
            `lookup,tokens=8,longest=4`.

    Raises:
        ValueError: no such method or field, or a value out of range.
    """
    if isinstance(given, Speculative):
        return given
    if isinstance(given, Mapping):
        return _made(dict(given))
    if not isinstance(given, str):
        raise ValueError(f"speculative={given!r}: expected {METHODS}")
    method, *rest = (part.partition("=") for part in given.split(","))
    values: dict[str, Any] = {"method": method[0].strip()}
    for name, _, value in [method, *rest] if method[1] else rest:
        if name.strip() in values:
            raise ValueError(f"speculative={given!r}: {name.strip()!r} is given twice")
        values[name.strip()] = _value(name.strip(), value.strip())
    return _made(values)


def _made(values: dict[str, Any]) -> Speculative:
    known = [field.name for field in fields(Speculative)]
    if values.get("method") not in get_args(Method):
        raise ValueError(f"speculative: method {values.get('method')!r}: expected {METHODS}")
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise ValueError(f"speculative: {unknown}: expected some of {known}")
    if isinstance(values.get("skip"), list | range):
        values["skip"] = tuple(values["skip"])
    return Speculative(**values)


def _value(name: str, text: str) -> Any:
    """A field's value, as it is written in text."""
    try:
        match name:
            case "tokens" | "longest" | "shortest" | "count":
                return int(text)
            case "forced":
                return float(text)
            case "adapt":
                return {"true": True, "false": False}[text.lower()]
            case "skip":
                return tuple(i for part in text.split("+") for i in _range(part))
    except (KeyError, ValueError) as error:
        raise ValueError(f"speculative: {name}={text!r} cannot be read") from error
    return text


def _range(text: str) -> range:
    first, several, last = text.partition("-")
    return range(int(first), int(last if several else first) + 1)


def prepare(
    how: Speculative, config: ModelConfig, options: EngineOptions,
    given: tuple[Params, ModelConfig] | None = None, mesh: Mesh | None = None,
) -> Draft:  # fmt: skip
    """Finds a draft and checks that it is one for this model; no weights are read.

    Args:
        given: a draft model that is in memory already.
        mesh: devices that share the model, and the draft.

    Raises:
        ValueError: a draft of another vocabulary or too short a context, that the devices cannot
            share, or none at all; layers that the model does not have, that are not alike in all
            stages, or that are to be chosen where several devices share the model; more guesses
            than a sequence has room for.
        CheckpointError, UnsupportedModel: of the draft.
    """
    from jaxinfer.hub import resolve_model

    if how.forced is not None:
        logger.warning("speculative: forced=%g: the text will be nobody's", how.forced)
    longest = options.max_model_len or config.max_position
    if how.tokens + 2 > longest:
        raise ValueError(
            f"speculative: tokens={how.tokens}: sequences of up to {longest} tokens have room for "
            f"{longest - 2} guesses at most"
        )
    if given is not None and (how.method != "draft" or how.draft is not None):
        raise ValueError(
            f"speculative: method={how.method!r}, draft={how.draft!r}: a draft that is in memory "
            "is for the method 'draft' without a name"
        )
    if how.method == "skip":
        _check_skipped(how, config, options.pipeline_parallel_size)
    if how.text is not None and mesh is not None:
        raise ValueError(
            f"speculative: text={how.text!r}: layers are chosen on one device only: name them "
            f"(skip=4-9), or leave out {said(mesh)}"
        )
    if how.method != "draft":
        return Draft(Drafter(how), None, 0)
    if given is not None:
        _check_draft(given[1], config, longest, "the draft given")
        check_degrees(given[1], options, "the draft given")
        return Draft(Drafter(how, given[1]), None, 0)
    if how.draft is None:
        raise ValueError("speculative: method 'draft' needs a model: draft=MODEL")
    try:
        source = open_source(resolve_model(how.draft))
        model = model_config(source)
    except CheckpointError as error:
        raise CheckpointError(f"the draft: {error}") from error
    _check_draft(model, config, longest, f"the draft {how.draft!r}")
    check_degrees(model, options, f"the draft {how.draft!r}")
    size = weight_bytes(source, model, jnp.dtype(options.dtype), mesh)
    return Draft(Drafter(how, model), source, size)


def _check_draft(draft: ModelConfig, config: ModelConfig, longest: int, name: str) -> None:
    if draft.vocab_size != config.vocab_size:
        raise ValueError(
            f"speculative: {name} has a vocabulary of {draft.vocab_size} tokens, the model one of "
            f"{config.vocab_size}: a draft must have the same"
        )
    if draft.max_position < longest:
        raise ValueError(
            f"speculative: {name} was made for sequences of up to {draft.max_position} tokens, "
            f"these may have {longest}: set max_model_len to {draft.max_position} or less"
        )


def _check_skipped(how: Speculative, config: ModelConfig, stages: int) -> None:
    unknown = [i for i in how.skip if not 0 <= i < config.num_layers]
    most = config.num_layers - 1
    if how.text is not None and not Path(how.text).is_file():
        raise ValueError(f"speculative: text={how.text!r}: there is no such file")
    if unknown or len(set(how.skip)) > most or not 0 <= (how.count or 0) <= most:
        raise ValueError(
            f"speculative: skip={how.skip}, count={how.count}: this model has layers 0 to {most}, "
            "of which at least one must stay"
        )
    each = config.num_layers // stages
    own = {i % each for i in how.skip}
    if stages > 1 and len(set(how.skip)) != stages * len(own):
        such = "+".join(str(each * (stage + 1) - 1) for stage in range(stages))
        raise ValueError(
            f"speculative: skip={how.skip} with pipeline_parallel_size={stages}: each stage must "
            f"do without the same of its {each} layers, and keep one: such as skip={such}"
        )


def settled(
    draft: Draft, params: Params, config: ModelConfig, tokenizer: Tokenizer | None
) -> Draft:
    """With the layers chosen that are left out, if the user left that open.

    Raises:
        ValueError: there is no tokenizer to read the text with, or the text is too short.
    """
    how = draft.drafter.how
    if how.text is None or how.count is None:
        return draft
    if tokenizer is None:
        raise ValueError(f"speculative: text={how.text!r} needs a tokenizer, and there is none")
    tokens = np.asarray(tokenizer.encode(Path(how.text).read_text(encoding="utf-8")), np.int32)
    rows = min(len(tokens) // WINDOW, MOST_WINDOWS)
    if rows < 1:
        raise ValueError(
            f"speculative: text={how.text!r} has {len(tokens)} tokens, expected {WINDOW} at least"
        )
    with layers_bar("choosing layers") as progress:
        skip = choose_layers(
            params, config, tokens[: rows * WINDOW].reshape(rows, WINDOW), how.count,
            progress=progress,
        )  # fmt: skip
    logger.info("speculative: layers %s are left out when guessing", skip)
    chosen = replace(how, skip=skip, count=None, text=None)
    return draft._replace(drafter=replace(draft.drafter, how=chosen))


def load_draft(draft: Draft, options: EngineOptions, mesh: Mesh | None = None) -> Params | None:
    """The weights of a draft that lies on disk, on the devices that share it.

    Raises:
        CheckpointError: see `loading.load_weights`.
    """
    if draft.source is None or draft.drafter.model is None:
        return None
    dtype = jnp.dtype(options.dtype)
    try:
        weights = load_weights(draft.source, draft.drafter.model, dtype, mesh)
    except CheckpointError as error:
        raise CheckpointError(f"the draft: {error}") from error
    return pack_params(weights, dtype, consume=True, mesh=mesh)


def costs(
    config: ModelConfig, drafter: Drafter, *, weight_bytes: int, draft_bytes: int, gpu: bool,
    devices: int = 1,
) -> Costs:  # fmt: skip
    """What the controller goes by.

    Args:
        config: of the model.
        weight_bytes, draft_bytes: of both models' weights on each of `devices`, of all stages.
    """
    layer_s = GPU_LAYER_S if gpu else CPU_LAYER_S
    bytes_per_s, flops_per_s = GPU_SPEED if gpu else CPU_SPEED
    flops_per_s *= devices  # FLOPs are of all of them
    draft, layers, flops = drafter.model, 0, 0.0
    if draft is not None:
        layers, flops = draft.num_layers, 2.0 * count_params(draft)
    elif drafter.how.method == "skip":
        layers = config.num_layers - len(drafter.how.skip)
        rest = replace(config, layers=config.layers[:layers])
        draft_bytes = int(weight_bytes * count_params(rest) / count_params(config))
        flops = 2.0 * count_params(rest)
    return Costs(
        weight_bytes=weight_bytes,
        token_flops=2.0 * count_params(config),
        launch_s=layer_s * config.num_layers,
        draft_bytes=draft_bytes,
        draft_flops=flops,
        draft_launch_s=layer_s * layers,
        bytes_per_s=bytes_per_s,
        flops_per_s=flops_per_s,
    )
