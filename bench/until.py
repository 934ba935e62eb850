"""The moment at which a run must be over, as those see it who could go on longer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

OUT_OF_TIME = "out of time"  # why something has no figure


class Until(NamedTuple):
    """`at`: seconds of the clock `now` at which it is over."""

    at: float = math.inf
    now: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        """Seconds; 0 when it is over."""
        return max(0.0, self.at - self.now())

    @property
    def over(self) -> bool:
        return not self.left

    def part(self, share: float) -> Until:
        """When `share` of what is left now has passed."""
        return self._replace(at=self.now() + share * self.left)


NEVER = Until()
