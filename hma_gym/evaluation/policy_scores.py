"""How well a learned world's verdicts stand for the true ones: rates, ranks, errors, and episode by episode.

Shape legend: P policies, E starts. Verdicts are float: 1 success, 0 failure, NaN not known (yet).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import InvalidArgument
from hma_gym.judges.agreement import cohen_kappa
from hma_gym.metrics.ranking import mean_maximum_rank_violation, pearson, spearman
from hma_gym.metrics.statistics import Interval, wilson_interval

Verdicts = NDArray[np.float64]
Rates = NDArray[np.float64]
_TAIL = 0.025

STATISTICS: Mapping[str, Callable[[Rates, Rates], float]] = {
    "Pearson r": pearson,
    "Spearman rho": spearman,
    "MMRV": mean_maximum_rank_violation,
    "mean absolute error": lambda true_P, learned_P: float(np.abs(learned_P - true_P).mean()),
    "bias": lambda true_P, learned_P: float((learned_P - true_P).mean()),
    "largest gap": lambda true_P, learned_P: float(np.abs(learned_P - true_P).max()),
}
"""Name -> function of the true and the learned success rates."""


@dataclass(frozen=True)
class Agreement:
    """Verdicts of the same episodes in two worlds.

    Attributes:
        both, only_true, only_learned, neither: numbers of episodes that succeed in both worlds, and so on.
    """

    both: int
    only_true: int
    only_learned: int
    neither: int

    @property
    def episodes(self) -> int:
        """How many were compared."""
        return self.both + self.only_true + self.only_learned + self.neither

    @property
    def accuracy(self) -> Interval:
        """Share with the same verdict, with Wilson's interval."""
        return wilson_interval(self.both + self.neither, self.episodes)

    @property
    def kappa(self) -> float | None:
        """Cohen's; None where it is not defined."""
        cells = {("1", "1"): self.both, ("1", "0"): self.only_true, ("0", "1"): self.only_learned}
        cells[("0", "0")] = self.neither
        return cohen_kappa([pair for pair, count in cells.items() for _ in range(count)])


@dataclass(frozen=True)
class Comparison:
    """A learned world against the true one.

    Attributes:
        policies: labels of the policies with verdicts in both worlds.
        true_P, learned_P: their success rates, over the episodes known in both.
        statistics: name -> value with its 95 percent bootstrap interval; see :func:`compare`.
        agreement: of all episodes; by policy in ``agreement_P``.
        undefined: name -> share of the bootstrap draws in which the statistic was not defined (constant rates).
    """

    policies: tuple[str, ...]
    true_P: Rates
    learned_P: Rates
    statistics: Mapping[str, Interval]
    agreement: Agreement
    agreement_P: tuple[Agreement, ...]
    undefined: Mapping[str, float]


def rate(verdicts_E: Verdicts) -> Interval:
    """Share of success among the known verdicts, with Wilson's interval."""
    known = verdicts_E[~np.isnan(verdicts_E)]
    return wilson_interval(int(known.sum()), len(known))


def agree(true: Verdicts, learned: Verdicts) -> Agreement:
    """Count the episodes whose verdict is known in both worlds; any equal shapes."""
    known = ~(np.isnan(true) | np.isnan(learned))
    a, b = true[known] > 0.5, learned[known] > 0.5
    return Agreement(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def compare(
    policies: Sequence[str], true_PE: Verdicts, learned_PE: Verdicts, *, resamples: int = 2000, seed: int = 0
) -> Comparison | None:
    """Compare two worlds over policies with episodes in both; None with fewer than two such policies.

    The bootstrap draws policies and starts, both with replacement and independently of each other: policies because
    another roster could have been measured, starts because another bank could have been. A drawn start counts for all
    policies and both worlds, so pairs stay together. Draws in which a statistic is not defined are left out of its
    interval, and counted.

    Raises:
        InvalidArgument: the arrays do not fit.
    """
    if true_PE.shape != learned_PE.shape or true_PE.ndim != 2 or len(true_PE) != len(policies):
        raise InvalidArgument(
            f"true_PE and learned_PE must have one row for each of {len(policies)} policies, got shapes "
            f"{true_PE.shape} and {learned_PE.shape}."
        )
    known_PE = ~(np.isnan(true_PE) | np.isnan(learned_PE))
    rows = np.flatnonzero(known_PE.any(axis=1))
    if len(rows) < 2:
        return None
    known_PE = known_PE[rows]
    true = np.where(known_PE, true_PE[rows], np.nan)
    learned = np.where(known_PE, learned_PE[rows], np.nan)
    true_P, learned_P = np.nanmean(true, axis=1), np.nanmean(learned, axis=1)
    generator = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for _ in range(resamples):
        chosen = generator.integers(0, len(rows), len(rows))
        starts = generator.integers(0, true.shape[1], true.shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a policy without any of the drawn starts: NaN
            a, b = (np.nanmean(x[np.ix_(chosen, starts)], axis=1) for x in (true, learned))
        there = ~np.isnan(a)
        for name, statistic in STATISTICS.items():
            draws[name].append(statistic(a[there], b[there]) if there.sum() >= 2 else math.nan)
    statistics, undefined = {}, {}
    for name, statistic in STATISTICS.items():
        values = np.array(draws[name])
        defined = values[~np.isnan(values)]
        low, high = np.quantile(defined, [_TAIL, 1 - _TAIL]) if len(defined) else (math.nan, math.nan)
        statistics[name] = Interval(statistic(true_P, learned_P), float(low), float(high))
        undefined[name] = 1 - len(defined) / resamples
    return Comparison(
        policies=tuple(policies[row] for row in rows),
        true_P=true_P,
        learned_P=learned_P,
        statistics=statistics,
        agreement=agree(true, learned),
        agreement_P=tuple(agree(t, s) for t, s in zip(true, learned, strict=True)),
        undefined=undefined,
    )


@dataclass(frozen=True)
class Criterion:
    """A promise and whether it is kept; ``kept`` is None where it does not apply."""

    text: str
    value: str
    kept: bool | None


def number(value: float) -> str:
    """For people; NaN is a statistic that is not defined."""
    return "not defined" if math.isnan(value) else f"{value:.3f}"


GOOD = 0.9
"""True success from which a policy must not be under-scored."""


def judge_criteria(comparison: Comparison) -> list[Criterion]:
    """The floors that a learned world must reach before its ranking is believed."""
    found = comparison.statistics
    r, agreement = found["Pearson r"], comparison.agreement.accuracy
    many = len(comparison.policies) >= 10
    best = int(np.argmax(comparison.true_P))
    good = [i for i, value in enumerate(comparison.true_P) if value >= GOOD]
    worst = max((abs(comparison.learned_P[i] - comparison.true_P[i]) for i in good), default=math.nan)
    return [
        Criterion("10 policies or more", str(len(comparison.policies)), many),
        Criterion("Pearson r at least 0.95", number(r.value), r.value >= 0.95),
        Criterion("lower end of its interval at least 0.85", number(r.low), r.low >= 0.85),
        Criterion("MMRV at most 0.03", f"{found['MMRV'].value:.3f}", found["MMRV"].value <= 0.03),
        Criterion(
            "mean absolute error at most 0.08",
            f"{found['mean absolute error'].value:.3f}",
            found["mean absolute error"].value <= 0.08,
        ),
        Criterion("largest gap at most 0.15", f"{found['largest gap'].value:.3f}", found["largest gap"].value <= 0.15),
        Criterion("episodes agree in 85 % or more", f"{100 * agreement.value:.1f} %", agreement.value >= 0.85),
        Criterion(
            f"policies of true success {GOOD} or more are within 0.1",
            f"{worst:.3f}" if good else f"none is that good (best {comparison.true_P[best]:.2f})",
            bool(worst <= 0.1) if good else None,
        ),
    ]
