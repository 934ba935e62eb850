"""What creating an `LLM` does to the JAX of this process, all in one place.

Importing jaxinfer does none of it. Both act once, before the first computation, and only where the
user has not chosen otherwise.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import jax
from jax._src import xla_bridge  # JAX has no public way to ask whether it has started

from jaxinfer.config import EngineOptions

logger = logging.getLogger(__name__)

PINNED, PINNED_DEFAULT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64  # of XLA


def prepare_backend(options: EngineOptions) -> None:
    """All that an LLM does to the JAX of this process, before its first computation."""
    reserve_memory(options.gpu_memory_utilization)
    if options.device_weight_bytes is not None or options.kv_host_bytes:
        allow_pinned()
    if options.compilation_cache != "":
        chosen = options.compilation_cache
        use_compilation_cache(default_cache_directory() if chosen is None else Path(chosen))


def reserve_memory(fraction: float) -> None:
    """Lets JAX take `fraction` of the GPU's memory, or says in the log that it is too late."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ:
        return
    if xla_bridge.backends_are_initialized():
        if jax.default_backend() == "gpu":
            logger.warning("JAX has started already: gpu_memory_utilization has no effect")
        return
    jax.config.update("jax_pjrt_client_create_options", {"memory_fraction": fraction})


def pinnable_bytes() -> int:
    """Most bytes of the host's memory that JAX takes for arrays which a GPU reads by itself."""
    if jax.default_backend() != "gpu":
        return host_bytes()
    return min(host_bytes(), int(os.environ.get(PINNED, PINNED_DEFAULT)) << 30)


def allow_pinned() -> None:
    """Lets JAX take all of the host's memory for such arrays, where it has not started yet."""
    if not xla_bridge.backends_are_initialized():
        os.environ.setdefault(PINNED, str(host_bytes() >> 30))


def host_bytes() -> int:
    """The host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_cache_directory() -> Path:
    """Where compiled programs are kept: under XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jaxinfer" / "xla"


def use_compilation_cache(directory: Path) -> None:
    """Keeps compiled programs on disk, unless the user has set a cache of their own.

    Compiled programs are code: a directory that others may write is not used, and the log says so.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    info = directory.stat()
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        logger.warning("others may write %s: compiled programs are not kept there", directory)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
