"""What a call of the Hopper attention kernel is cut into, and the memory that it takes.

Apart from the kernel, because importing Mosaic changes the environment of the process.

Letters: T new tokens, S sequences, H query heads, K key/value heads, G = H / K, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pallas_kernels.attention_common import ROWS, SPLIT, kv_tile
from pallas_kernels.attention_plan import max_units
from pallas_kernels.tuning import tuned

SHARED_BYTES = 225 << 10  # of a block, less what barriers and alignment need


@dataclass(frozen=True)
class Config:
    """Tuning of one kernel. None of it changes a bit of the result.

    Attributes:
        consumers: warpgroups that compute the same unit, 64 rows each.
        teams: units that a block works on at once, each with its own consumers and copies.
        stages: KV tiles in flight for each team.
        overlap: multiply a tile's values during the next tile's softmax; not of 8-bit pages.
        columns: with quantised pages, the most query rows of a consumer, or a token's if more.
    """

    consumers: int = 1
    teams: int = 1
    stages: int = 2
    overlap: bool = False
    columns: int = 32

    def __post_init__(self) -> None:
        if self.stages < 1 or self.consumers < 1 or not 1 <= self.consumers * self.teams <= 4:
            raise ValueError(f"{self}: expected stages >= 1, and consumers * teams of 1 to 4")
        if self.columns % 8 or not 8 <= self.columns <= ROWS:
            raise ValueError(f"{self}: expected columns to be a multiple of 8, up to {ROWS}")


def default_config(max_query: int, G: int, D: int, quantised: bool) -> Config:
    """The tuning for a call whose sequences have at most `max_query` new tokens."""
    few = max_query * G <= (Config().columns if quantised else ROWS)
    found = tuned("sm90", "decode" if few else "prefill", D, G, 8 if quantised else 16)
    if found is not None:
        return Config(**found)
    if quantised:
        return _quantised_config(max_query, G, D)
    if D > 128:
        return Config(stages=2)
    if few:
        return Config(teams=1, stages=2) if D == 128 else Config(teams=2, stages=1)
    return Config(consumers=2, stages=2, overlap=True)


def _quantised_config(max_query: int, G: int, D: int) -> Config:
    """As many stages as shared memory has room for, up to four."""
    config = Config()
    few = max_query * G <= config.columns
    config = replace(config, teams=2 if few else 1, consumers=1 if few or config.columns < G else 2)
    rows, tile = unit_rows(max_query, G, True, config), kv_tile(D)
    worker = rows * (6 * D + 2 * tile + 24)  # queries, results, weights, maxima and sums
    left = SHARED_BYTES - config.teams * config.consumers * worker
    return replace(config, stages=min(4, left // (config.teams * tile * (2 * D + 8))))


def unit_rows(max_query: int, group: int, quantised: bool, config: Config) -> int:
    """Query rows of a consumer. With quantised pages they are columns: as few as will do."""
    if not quantised:
        return ROWS
    return -(-min(max_query, max(1, config.columns // group)) * group // 8) * 8


def tile_tokens(max_query: int, group: int, quantised: bool, config: Config) -> int:
    """New tokens of a unit."""
    return config.consumers * (unit_rows(max_query, group, quantised, config) // group)


def scratch_rows(max_query: int, group: int, max_kv: int, tokens: int, config: Config) -> int:
    """Rows of a unit in scratch memory, of units of so many `tokens`; 0: none can be part of a
    shared tile."""
    if max_kv <= SPLIT:
        return 0
    if config.consumers > 1:
        return config.consumers * ROWS
    return -(-min(max_query, tokens) * group // 8) * 8


def planned_tokens(T: int, S: int, max_query: int, into: bool) -> int:
    """Rows of q that may need work: with `into` those alone that belong to somebody."""
    return min(T, S * max_query) if into else T


def scratch_bytes(
    *, T: int, S: int, H: int, K: int, D: int, max_kv: int, max_query: int,
    window: int | None = None, quantised: bool = False, into: bool = False,
) -> int:  # fmt: skip
    """Memory for the partial results of a call: float32 values [units, K, rows, D], and as many
    maxima and sums as a unit has rows at most."""
    group = H // K
    config = default_config(max_query, group, D, quantised)
    tokens = tile_tokens(max_query, group, quantised, config)
    rows = scratch_rows(max_query, group, max_kv, tokens, config)
    if not rows:
        return 0
    units = max_units(planned_tokens(T, S, max_query, into), S, tokens, max_kv, window)
    return 4 * units * K * (rows * D + 2 * config.consumers * ROWS)
