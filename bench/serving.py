"""What clients see of a server, as functions of when tokens came. Pure, and without a framework.

Names as in `vllm bench serve`: TTFT, time to the first token, from when the request was due; ITL,
between tokens that follow each other; TPOT, a request's mean time for each token after its first;
E2EL, until its last; goodput, requests a second that met every limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = tuple(range(0, 101, 2))  # of the ITL, for a picture
LIMITS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Stream:
    """What a client saw of one request.

    Attributes:
        due: when it arrived, in seconds.
        times: when tokens came: those that came together, once.
        counts: how many came at each of these times.
    """

    due: float
    times: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.due

    @property
    def e2el(self) -> float:
        """Seconds to the last token."""
        return self.times[-1] - self.due

    @property
    def itl(self) -> list[float]:
        """Seconds between tokens that follow each other; of those that come together, nothing."""
        gaps = [0.0] * (self.counts[0] - 1)
        for before, now, n in zip(self.times, self.times[1:], self.counts[1:], strict=False):
            gaps += [now - before] + [0.0] * (n - 1)
        return gaps

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None with one token only."""
        n = sum(self.counts)
        return (self.times[-1] - self.times[0]) / (n - 1) if n > 1 else None


def stream(due: float, times: Iterable[float]) -> Stream:
    """Of a time for each token."""
    found: list[float] = []
    counts: list[int] = []
    for time in times:
        if found and time == found[-1]:
            counts[-1] += 1
        else:
            found.append(time)
            counts.append(1)
    return Stream(due, tuple(found), tuple(counts))


def percentile(values: Sequence[float], p: float) -> float:
    """In milliseconds, of seconds."""
    return 1000 * float(np.percentile(values, p))


def itl_quantiles(seen: Sequence[Stream]) -> list[float]:
    """`QUANTILES` of all gaps between tokens, in milliseconds; empty without any."""
    gaps = [gap for one in seen for gap in one.itl]
    return [round(percentile(gaps, q), 3) for q in QUANTILES] if gaps else []


def goodput(seen: Sequence[Stream], limits_ms: Mapping[str, float], seconds: float) -> float:
    """Requests a second that stayed within every limit; one token has no TPOT, and meets it."""

    def met(one: Stream) -> bool:
        return all(
            (value := getattr(one, name)) is None or 1000 * value <= most
            for name, most in limits_ms.items()
        )

    return sum(map(met, seen)) / seconds


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """`ttft:250 tpot:40` → milliseconds by name.

    Raises:
        ValueError: another name, or not a positive number.
    """
    found = {}
    for word in words:
        name, _, text = word.partition(":")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if name not in LIMITS or not 0 < value < math.inf:
            raise ValueError(f"{word!r}: expected one of {', '.join(LIMITS)}, then : and ms")
        found[name] = value
    return found
