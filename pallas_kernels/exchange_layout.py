"""How messages lie in the memory that `exchange`'s devices write into."""

from __future__ import annotations

CAPACITY = 1 << 19  # numbers of a message that the kernel takes, at most
VECTOR = 8  # numbers of two bytes that a thread handles at once
SLOT_WORDS = 8  # of 32 bits that these take on the way
COUNTERS = 32  # words, one of each block of the kernel


def message_slots() -> int:
    """Of a message: there are two for each device, one behind the other, used in turns."""
    return CAPACITY // VECTOR


def memory_words(devices: int) -> int:
    """Words of one device's memory: messages, then counters."""
    return 2 * devices * message_slots() * SLOT_WORDS + COUNTERS
