"""Intervals: Wilson's for proportions, the bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import InvalidArgument

Statistic = Callable[[NDArray[np.float64]], float]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, in the estimate's units."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InvalidArgument(f"confidence must lie inside (0, 1), got {confidence}; 0.95 is usual.")


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927); value is ``successes / trials``.

    Never leaves [0, 1] and keeps its width at 0 and at ``trials`` successes, where the normal interval collapses.
    Zero trials give NaN with the interval [0, 1].
    """
    _check_confidence(confidence)
    if trials < 0 or not 0 <= successes <= trials:
        raise InvalidArgument(f"need 0 <= successes <= trials, got successes={successes}, trials={trials}.")
    if trials == 0:
        return Interval(math.nan, 0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def bootstrap_interval(
    values: NDArray[np.floating[Any]],
    statistic: Statistic | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over the first axis (the independent unit: episodes, not frames).

    Args:
        values: (N, ...) one row per independent unit; NaN rows are the caller's to remove.
        statistic: maps (N, ...) to a number; the mean by default.
        confidence: of the two-sided interval.
        resamples: bootstrap draws.
        seed: of the draws; the same seed gives the same interval.
    """
    _check_confidence(confidence)
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 0 or len(rows) == 0:
        return Interval(math.nan, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    estimate = float(rows.mean()) if statistic is None else statistic(rows)
    draws = np.empty(resamples)
    for i in range(resamples):
        sample = rows[generator.integers(0, len(rows), len(rows))]
        draws[i] = sample.mean() if statistic is None else statistic(sample)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))
