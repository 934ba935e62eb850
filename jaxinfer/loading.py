"""A model on disk, in any format: its config, tokenizer, and weights, read onto devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.config import EngineOptions, ModelConfig
from jaxinfer.errors import CheckpointError
from jaxinfer.memory import split_within
from jaxinfer.models.decoder import Params
from jaxinfer.models.weights import declare
from jaxinfer.offload import Split, host_places
from jaxinfer.parallel import declared_on, device_share, said
from jaxinfer.progress import loading_bar
from jaxinfer.sharding import shardings

if TYPE_CHECKING:
    from checkpoints.gguf.reader import Gguf
    from jaxinfer.tokenizer import Tokenizer

    Source = Path | Gguf  # where a model lies: a directory, or an opened GGUF file


def is_gguf(path: Path) -> bool:
    """Whether a model is one GGUF file instead of a directory."""
    return path.suffix == ".gguf"


def open_source(source: Source) -> Source:
    """A directory as it is; a GGUF file with its header read, once for all that wants it.

    Raises:
        CheckpointError: see `checkpoints.gguf.open_gguf`.
    """
    from checkpoints.gguf import open_gguf

    return open_gguf(source) if isinstance(source, Path) and is_gguf(source) else source


def model_config(source: Source) -> ModelConfig:
    """The config of a model.

    Raises:
        CheckpointError, UnsupportedModel: see `models.families.read_config`, `checkpoints.gguf`.
    """
    from checkpoints import gguf
    from jaxinfer.models.families import read_config

    source = open_source(source)
    return read_config(source) if isinstance(source, Path) else gguf.read_config(source)


def model_tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer of a model; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    from checkpoints import gguf
    from jaxinfer.tokenizer import gguf_tokenizer, load_tokenizer

    source = open_source(source)
    if isinstance(source, Path):
        return load_tokenizer(source)
    fields = gguf.tokenizer_fields(source)
    return None if fields is None else gguf_tokenizer(source.path, fields)


def load_weights(
    source: Source,
    config: ModelConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    layers: Sequence[int] = (),
) -> Params:
    """Weights from disk, each part to its device, with a progress bar where someone can see it.

    `layers`: of which the matrices are to lie on the host; see `offload`.

    Raises:
        CheckpointError: see `checkpoints.load_params` and `checkpoints.gguf.load_gguf`; or a model
            that Orbax wrote is to be split.
    """
    from checkpoints import load_params
    from checkpoints.gguf import load_gguf
    from checkpoints.model_store import is_saved_model, restore_model

    source = open_source(source)
    weights = declared_on(config, mesh)
    places = None if mesh is None else shardings(weights, mesh)
    if layers:
        places = host_places(weights, places, layers)
    if not isinstance(source, Path):
        with loading_bar(source.path.name) as progress:
            return load_gguf(
                source, weights, dtype=dtype, head_dim=config.head_dim, shardings=places,
                progress=progress,
            )  # fmt: skip
    if is_saved_model(source):
        if mesh is not None:
            raise CheckpointError(
                f"{source}: a model that jaxinfer saved has its matrices fused for one device: "
                f"{said(mesh)} needs safetensors or GGUF"
            )
        return restore_model(source, weights, dtype=dtype)
    # What a checkpoint may hold beside the weights: constants, and the tied matrix once more.
    extra = [r".*rotary_emb\.inv_freq"]
    if config.tie_embeddings:
        extra.append(r"lm_head\.weight")
    with loading_bar(source.name) as progress:
        return load_params(
            source, weights, dtype=dtype, shardings=places, allowed_extra=extra, progress=progress
        )


def weight_bytes(source: Source, config: ModelConfig, dtype: Any, mesh: Mesh | None = None) -> int:
    """What the weights of a model will take of each device, before they are read: exact where all
    are dense.

    Raises:
        CheckpointError, UnsupportedModel: see `checkpoints.load_params`.
    """
    from checkpoints.model_store import is_saved_model, saved_bytes

    source = open_source(source)
    if isinstance(source, Path) and is_saved_model(source):
        return saved_bytes(source)
    return round(sum(jax.tree.leaves(_sizes(source, config, dtype))) * device_share(config, mesh))


def _sizes(source: Source, config: ModelConfig, dtype: Any) -> Any:
    """Bytes of each weight, split among no devices."""
    from checkpoints import gguf
    from checkpoints.load import stored_sizes

    if isinstance(source, Path):
        return stored_sizes(source, declare(config), dtype)
    return gguf.stored_sizes(source, declare(config), dtype)


def split_stored(
    source: Source, config: ModelConfig, options: EngineOptions, mesh: Mesh | None
) -> Split:
    """Where the weights of a model on disk are to lie.

    Raises:
        CheckpointError, UnsupportedModel, CapacityError: see `weight_bytes` and
            `memory.split_within`; or jaxinfer saved the model and some of it should lie on the
            host.
    """
    from checkpoints.model_store import is_saved_model

    dtype, source = jnp.dtype(options.dtype), open_source(source)
    if options.device_weight_bytes is None:
        return Split((), weight_bytes(source, config, dtype, mesh), 0, 0)
    if isinstance(source, Path) and is_saved_model(source):
        raise CheckpointError(
            f"{source}: a model that jaxinfer saved is read onto the device as a whole: "
            "device_weight_bytes needs safetensors or GGUF"
        )
    return split_within(_sizes(source, config, dtype), config, options.device_weight_bytes, mesh)
