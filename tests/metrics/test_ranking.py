"""Rank measures against hand-worked values and their own symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hma_gym.errors import InvalidArgument
from hma_gym.metrics.ranking import mean_maximum_rank_violation, pearson, spearman


def test_perfect_order() -> None:
    true = np.array([0.1, 0.4, 0.9])
    assert pearson(true, 2 * true + 1) == pytest.approx(1.0)
    assert spearman(true, true**3) == pytest.approx(1.0)
    assert mean_maximum_rank_violation(true, true**3) == 0.0


def test_spearman_with_ties_by_hand() -> None:
    # ranks of the second: 1.5, 1.5, 3, 4
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([5.0, 5, 6, 7])) == pytest.approx(
        np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3, 4])[0, 1]
    )


def test_mmrv_by_hand() -> None:
    true = np.array([0.2, 0.5, 0.9])
    # the first two are exchanged: each loses .3 at worst, the third nothing
    assert mean_maximum_rank_violation(true, np.array([0.6, 0.3, 0.8])) == pytest.approx(0.2)
    assert mean_maximum_rank_violation(true, -true) == pytest.approx((0.7 + 0.4 + 0.7) / 3)


def test_mmrv_counts_a_simulated_tie_for_both() -> None:
    assert mean_maximum_rank_violation(np.array([0.0, 1.0]), np.array([0.5, 0.5])) == 1.0
    assert mean_maximum_rank_violation(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == 1.0
    assert mean_maximum_rank_violation(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == 0.0


def test_mmrv_does_not_depend_on_the_order_of_policies() -> None:
    generator = np.random.default_rng(0)
    true, simulated = generator.random(6).round(1), generator.random(6).round(1)
    order = generator.permutation(6)
    assert mean_maximum_rank_violation(true, simulated) == pytest.approx(
        mean_maximum_rank_violation(true[order], simulated[order])
    )


def test_constant_scores_and_wrong_shapes() -> None:
    assert math.isnan(pearson(np.array([1.0, 2.0]), np.array([1.0, 1.0])))
    with pytest.raises(InvalidArgument, match="at least 2"):
        spearman(np.array([1.0]), np.array([1.0]))
