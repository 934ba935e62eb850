"""Which device programs are compiled for, and what it is."""

from __future__ import annotations

from typing import Any

import jax


def target_device() -> Any:
    """The device that programs are compiled for."""
    return jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore[reportAttributeAccessIssue]


def capability() -> float | None:
    """Compute capability of the device; None without a GPU."""
    device = target_device()
    found = getattr(device, "compute_capability", None)
    return float(found) if device.platform in ("gpu", "cuda") and found else None


def sm_count() -> int | None:
    """Multiprocessors of the device; None where it does not say."""
    return getattr(target_device(), "core_count", 0) or None


def has_kernels(capability: float | None) -> bool:
    """Whether the kernels run on a GPU of this capability, A100 to H200; None is no GPU."""
    return capability is not None and 8 <= capability < 10
