"""How messages lie in the memory that `exchange`'s devices write into."""

from __future__ import annotations

# Small messages: every device sends its part to every other.
SMALL = 1 << 20  # numbers of two bytes, at most
LINE = 4  # numbers that a thread handles at once, in 16 bytes on the way
LINE_WORDS = 4  # of 32 bits
SMALL_BLOCKS = 128

# Large ones: every device sums a slice of its own.
LARGE = 1 << 25  # numbers, at most
VECTOR = 8  # numbers that a thread handles at once, in 16 bytes
LARGE_BLOCKS = 256


def message_lines() -> int:
    """Of a small message: there are two for each device, one behind the other, used in turns."""
    return SMALL // LINE


def slice_vectors(devices: int) -> int:
    """Room for a slice of a large message."""
    return -(-LARGE // VECTOR // devices)


def small_counters(devices: int) -> int:
    """Words before the counters of small messages, one of each block of the kernel."""
    return 2 * devices * message_lines() * LINE_WORDS


def large_counters(devices: int) -> int:
    """Words before the counters of large messages, one of each block of the kernel."""
    return small_counters(devices) + SMALL_BLOCKS


def large_flags(devices: int) -> int:
    """Words before [2, devices, blocks]: how far each block of each device has come with parts,
    and with sums."""
    return large_counters(devices) + LARGE_BLOCKS


def large_slices(devices: int) -> int:
    """Words before [2, devices, slice]: each device's parts of the slice that is summed here, and
    the sums of theirs."""
    return large_flags(devices) + 2 * devices * LARGE_BLOCKS


def memory_words(devices: int) -> int:
    """Words of one device's memory."""
    return large_slices(devices) + 2 * devices * slice_vectors(devices) * 4
