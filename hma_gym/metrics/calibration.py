"""How far a judge's probabilities can be trusted: accuracy, precision, recall, Brier score, reliability."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import InvalidArgument


@dataclass(frozen=True)
class ReliabilityBin:
    """Probabilities in [low, high): how many, their mean, and how often the event happened."""

    low: float
    high: float
    count: int
    mean_probability: float
    frequency: float


@dataclass(frozen=True)
class BinaryReport:
    """A binary classifier against the truth. Ratios with an empty denominator are NaN."""

    count: int
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    accuracy: float
    precision: float
    recall: float
    brier: float
    expected_calibration_error: float
    reliability: tuple[ReliabilityBin, ...]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def binary_report(
    probability_N: NDArray[np.floating[Any]], truth_N: NDArray[np.bool_], threshold: float = 0.5, bins: int = 10
) -> BinaryReport:
    """Measure probabilities against the truth.

    The verdict is ``probability >= threshold``. Brier score: mean squared difference of probability and outcome.
    Expected calibration error: mean over ``bins`` equal bins of |mean probability - frequency|, weighted by count.
    """
    probability = np.asarray(probability_N, dtype=np.float64)
    truth = np.asarray(truth_N, dtype=bool)
    if probability.shape != truth.shape or probability.ndim != 1:
        raise InvalidArgument(
            "probability_N and truth_N must be vectors of one length, got shapes "
            f"{probability.shape} and {truth.shape}."
        )
    verdict = probability >= threshold
    tp, fp = int((verdict & truth).sum()), int((verdict & ~truth).sum())
    tn, fn = int((~verdict & ~truth).sum()), int((~verdict & truth).sum())
    index = np.minimum((probability * bins).astype(int), bins - 1)
    reliability = []
    for b in range(bins):
        chosen = index == b
        if chosen.any():
            reliability.append(
                ReliabilityBin(
                    b / bins,
                    (b + 1) / bins,
                    int(chosen.sum()),
                    float(probability[chosen].mean()),
                    float(truth[chosen].mean()),
                )
            )
    count = len(truth)
    gap = sum(r.count * abs(r.mean_probability - r.frequency) for r in reliability)
    return BinaryReport(
        count=count,
        true_positives=tp,
        false_positives=fp,
        true_negatives=tn,
        false_negatives=fn,
        accuracy=_ratio(tp + tn, count),
        precision=_ratio(tp, tp + fp),
        recall=_ratio(tp, tp + fn),
        brier=float(np.mean((probability - truth) ** 2)) if count else math.nan,
        expected_calibration_error=gap / count if count else math.nan,
        reliability=tuple(reliability),
    )
