"""From what a user calls a model to a directory that holds it."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from jaxinfer.errors import CheckpointError

DEMO_MODELS = {"demo": "demo/target", "demo-draft": "demo/draft"}  # within the package checkpoints

# Weights as safetensors, configs, tokenizers, chat templates. Never pickles (.bin) or code (.py).
ALLOW_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
# The same weights again, under other names or for other runtimes.
IGNORE_PATTERNS = ["*/*", "consolidated*"]

ACCEPTED = (
    "Give a directory with config.json and *.safetensors, a .gguf file, a Hugging Face Hub id such "
    "as 'Qwen/Qwen3-0.6B', or 'demo'"
)


def resolve_model(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory or GGUF file of `model`; a Hub id that is not cached is downloaded first.

    Args:
        model: `"demo"` or `"demo-draft"` (shipped with jaxinfer; `./demo` is a directory of that
            name), a directory, a `.gguf` file, or a Hub id. huggingface_hub's cache and
            `HF_HUB_OFFLINE` apply.
        revision: branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched.
    """
    name = os.fspath(model)
    if name not in DEMO_MODELS and not _is_local(name):
        return _download(name, revision)
    if revision is not None:
        raise CheckpointError(
            f"revision {revision!r} given for {name!r}, which is not fetched from the Hub; "
            "leave it out"
        )
    if name in DEMO_MODELS:
        return _demo(name)
    path = Path(os.path.expanduser(name))
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not name or not path.is_dir():
        what = "is a file, not a directory" if path.is_file() else "does not exist"
        raise CheckpointError(f"model {name!r}: {what}. {ACCEPTED}")
    return path


def _demo(name: str) -> Path:
    path = Path(str(resources.files("checkpoints") / DEMO_MODELS[name]))
    if not path.is_dir():
        raise CheckpointError(
            f"model {name!r}: this installation of jaxinfer lacks {path}; reinstall it"
        )
    return path


def _is_local(name: str) -> bool:
    """Whether `name` is on this disk, or is written as only a path can be."""
    return (
        Path(os.path.expanduser(name)).exists()
        or name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith(".gguf")
    )


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=ALLOW_PATTERNS,
            ignore_patterns=IGNORE_PATTERNS,
        )
    # Network and HTTP errors and missing cache entries are OSErrors, a malformed id a ValueError.
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"model {name!r}: there is no such directory, and fetching it from the Hub{at} "
            f"failed: {type(error).__name__}: {reason.rstrip('.')}. {ACCEPTED}"
        ) from error
    return Path(path)
