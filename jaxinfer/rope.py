"""Frequencies of rotary position embeddings, plain and stretched for long context. NumPy only.

Computed in float32 in the order in which PyTorch models were trained with them: at position
100,000 a relative error of 1e-6 in a frequency is a tenth of a radian.
"""

from __future__ import annotations

import math

import numpy as np

from jaxinfer.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angles per position of every pair of dimensions, and the scale of cos and sin.

    Dimensions `i` and `i + head_dim / 2` form pair `i`, rotated by `position * frequencies[i]`.

    Args:
        rope: the kind and its parameters.
        head_dim: even.

    Returns:
        float32 [head_dim / 2] frequencies in radians a token, and the attention factor.

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embeddings, got {head_dim}")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.power(np.float64(rope.theta), exponents).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    match rope.kind:
        case "default":
            return frequencies, 1.0
        case "linear":
            return frequencies / np.float32(rope.factor), 1.0
        case "llama3":
            return _llama3(frequencies, rope), 1.0
        case "yarn":
            return _yarn(wavelengths, rope, head_dim), rope.attention_factor


def _llama3(frequencies: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Divides long wavelengths by the factor, keeps short ones, blends the band between them."""
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    wavelengths = np.float32(2 * math.pi) / frequencies
    rotations = np.float32(rope.original_max_position) / wavelengths
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - keep) * (frequencies / np.float32(rope.factor)) + keep * frequencies


def _yarn(wavelengths: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    """NTK-by-parts (Peng et al. 2023, section 3.2), `wavelengths` in units of 2 pi tokens."""

    def dimension(rotations: float) -> float:
        """The pair, as a real number, that turns this often over the original context."""
        wavelength = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound counts dimensions, not pairs, as in the paper's code and every checkpoint.
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
    keep = np.float32(1) - np.clip(ramp, 0, 1)
    interpolated = np.float32(1) / (np.float32(rope.factor) * wavelengths)
    return interpolated * (1 - keep) + keep / wavelengths
