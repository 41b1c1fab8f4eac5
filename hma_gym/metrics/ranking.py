"""How well scores in one world rank policies as another world does: Pearson, Spearman, MMRV.

Shape legend: P policies.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import InvalidArgument

Scores = NDArray[np.floating[Any]]


def _pair(true_P: Scores, simulated_P: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    true, simulated = np.asarray(true_P, dtype=np.float64), np.asarray(simulated_P, dtype=np.float64)
    if true.shape != simulated.shape or true.ndim != 1 or len(true) < 2:
        raise InvalidArgument(
            "true_P and simulated_P must be vectors of one length of at least 2 policies, got shapes "
            f"{true.shape} and {simulated.shape}."
        )
    return true, simulated


def pearson(true_P: Scores, simulated_P: Scores) -> float:
    """Pearson's correlation coefficient; NaN when either side is constant."""
    true, simulated = _pair(true_P, simulated_P)
    x, y = true - true.mean(), simulated - simulated.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else math.nan


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, ties sharing their mean rank."""
    below = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2, dtype=np.float64)


def spearman(true_P: Scores, simulated_P: Scores) -> float:
    """Spearman's rank correlation: Pearson's on ranks, ties sharing their mean rank."""
    true, simulated = _pair(true_P, simulated_P)
    return pearson(_ranks(true), _ranks(simulated))


def mean_maximum_rank_violation(true_P: Scores, simulated_P: Scores) -> float:
    """MMRV: how much true score is lost, at worst, by trusting the simulated order. 0 is perfect.

    ``MMRV = mean_i max_j v(i, j)``, with ``v(i, j) = |true_i - true_j|`` where
    ``(true_i - true_j) (simulated_i - simulated_j) <= 0`` and 0 elsewhere. After SIMPLER (arXiv 2405.05941,
    Section IV), whose inequality counts a simulated tie in one direction only; here ``v(i, j) = v(j, i)``: a tie
    between policies that truly differ is a violation for both. The measure is in units of the true score and is not
    symmetric in its arguments: the true scores come first.
    """
    true, simulated = _pair(true_P, simulated_P)
    true_gap = true[:, None] - true[None, :]
    simulated_gap = simulated[:, None] - simulated[None, :]
    violation = np.where(true_gap * simulated_gap <= 0, np.abs(true_gap), 0.0)
    return float(violation.max(axis=1).mean())
