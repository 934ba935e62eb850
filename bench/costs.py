"""What a step costs the device, as a formula whose coefficients are fitted to measured steps.

    step_ms = fixed + max(weights, per_token * padded tokens) + kv * tokens held + per_row * rows

Every step reads the weights; above some hundred tokens the matrix products take longer than that.
Attention reads the keys and values of the rows that decode. Logits are computed of each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

KV_BYTES, COPY_BYTES_PER_S = 131072, 2.9e12  # of a token, 8B in bfloat16; of one H100
CROSSOVERS = range(16, 1025, 8)  # tokens; see `fit`
MIXED_ROWS = 32  # rows of logits beside those that decode, in the steps with chunks of `SAMPLES`


@dataclass(frozen=True)
class CostModel:
    """Coefficients of the formula above.

    Attributes:
        fixed_ms: of a step whatever it does.
        weights_ms: to read the weights once.
        per_token_ms: of a token in the matrix products, padding included.
        kv_ms_per_token: to read keys and values of one token of a row that decodes.
        per_row_ms: of a row of logits, padding included.
    """

    fixed_ms: float
    weights_ms: float
    per_token_ms: float
    kv_ms_per_token: float
    per_row_ms: float

    def step_ms(self, *, tokens: float, held: float, rows: float) -> float:
        """Of one step.

        Args:
            tokens: padded: those of chunks and of rows that decode, or rows alone.
            held: tokens in the cache of all the rows that decode.
            rows: of logits, padded: rows that decode, and chunks.
        """
        products = max(self.weights_ms, self.per_token_ms * tokens)
        return self.fixed_ms + products + self.kv_ms_per_token * held + self.per_row_ms * rows


@dataclass(frozen=True)
class Sample:
    """A size of step that was measured.

    Attributes:
        rows: that decode, padded.
        tokens: padded; 0 for a step that only decodes.
        decoding: rows that decode, without padding.
        context: tokens in the cache of each of them, in the mean.
        ms: median time.
    """

    rows: int
    tokens: int
    decoding: int
    context: float
    ms: float

    @property
    def sizes(self) -> dict[str, float]:
        """Arguments of `CostModel.step_ms`."""
        mixed = MIXED_ROWS if self.tokens else 0
        held = self.decoding * self.context
        return {"tokens": self.tokens or self.rows, "held": held, "rows": self.rows + mixed}


# 8B in bfloat16 on one H100: medians of the steps of two runs of the lognormal list, policies
# continuous and makespan. Contexts were not measured: they are those that the simulation of the
# same runs has in steps of about as many rows.
SAMPLES = (
    Sample(8, 0, 3, 1262, 6.38),
    Sample(32, 0, 22, 1197, 7.68),
    Sample(64, 0, 46, 928, 8.41),
    Sample(128, 0, 91, 712, 9.83),
    Sample(192, 0, 158, 553, 11.79),
    Sample(256, 0, 225, 510, 14.09),
    Sample(320, 0, 284, 469, 15.97),
    Sample(384, 0, 350, 432, 17.77),
    Sample(512, 0, 484, 382, 21.93),
    Sample(640, 0, 572, 336, 25.75),
    Sample(768, 0, 672, 305, 29.82),
    Sample(64, 192, 35, 766, 9.53),
    Sample(64, 256, 46, 536, 10.57),
    Sample(256, 256, 74, 517, 11.17),
    Sample(320, 320, 113, 449, 13.04),
    Sample(384, 384, 158, 477, 14.79),
    Sample(512, 512, 250, 375, 18.82),
    Sample(640, 640, 412, 447, 25.75),
    Sample(768, 768, 460, 471, 30.21),
    Sample(64, 2048, 40, 146, 47.19),
    Sample(1024, 2048, 534, 259, 57.44),
)

# No step reads the weights or the cache faster than the memory can be copied.
LEAST = CostModel(0.0, 5.0, 0.0, 1e3 * KV_BYTES / COPY_BYTES_PER_S, 0.0)


def fit(samples: Sequence[Sample] = SAMPLES, least: CostModel = LEAST) -> CostModel:
    """The coefficients with the least squares of relative errors, none below those of `least`.

    Where the products begin to take longer than the weights is tried out, token by token; given
    that, the formula is linear. The default samples are of an 8B model in bfloat16 on one H100, and
    so are the bounds.

    Raises:
        ValueError: fewer than four samples.
    """
    if len(samples) < 4:
        raise ValueError(f"{len(samples)} samples: expected at least 4, one for each coefficient")
    sizes = [sample.sizes for sample in samples]
    tokens, held, rows = (np.array([s[k] for s in sizes]) for k in ("tokens", "held", "rows"))
    ms = np.array([sample.ms for sample in samples])
    bounds = (least.fixed_ms, least.weights_ms, least.kv_ms_per_token, least.per_row_ms)

    def tried() -> Iterator[tuple[float, CostModel]]:
        for crossover in CROSSOVERS:
            columns = [np.ones(len(ms)), np.maximum(1, tokens / crossover), held, rows]
            matrix = np.stack(columns, axis=1) / ms[:, None]
            error, (fixed, weights, kv, row) = _bounded(matrix, np.ones(len(ms)), np.array(bounds))
            yield error, CostModel(fixed, weights, weights / crossover, kv, row)

    return min(tried(), key=lambda each: each[0])[1]


def _bounded(matrix: np.ndarray, goal: np.ndarray, least: np.ndarray) -> tuple[float, list[float]]:
    """The x >= `least` that brings `matrix @ x` closest to `goal`, and the square of what is left.

    Every choice of coefficients that lie on their bound is tried: there are few.
    """
    best, found = float("inf"), least.tolist()
    for free in product((False, True), repeat=len(least)):
        at = np.flatnonzero(free)
        x = least.astype(float)
        x[at] += np.linalg.lstsq(matrix[:, at], goal - matrix @ least, rcond=None)[0]
        error = float(((matrix @ x - goal) ** 2).sum())
        if (x >= least - 1e-12).all() and error < best:
            best, found = error, x.tolist()
    return best, found


def residuals(model: CostModel, samples: Sequence[Sample] = SAMPLES) -> list[float]:
    """Of each sample: time by the formula over the time measured, less one."""
    return [model.step_ms(**sample.sizes) / sample.ms - 1 for sample in samples]


def print_fit(model: CostModel, samples: Sequence[Sample] = SAMPLES) -> None:
    """The coefficients, and how far each sample is from them."""
    for name, value in vars(model).items():
        print(f"{name:<18} {value:.6g}")
    print(f"{'rows':>6} {'tokens':>7} {'decoding':>9} {'context':>8} {'ms':>7} {'error':>7}")
    for s, error in zip(samples, residuals(model, samples), strict=True):
        size = f"{s.rows:>6} {s.tokens:>7} {s.decoding:>9} {s.context:>8.0f}"
        print(f"{size} {s.ms:>7.2f} {error:>7.1%}")
