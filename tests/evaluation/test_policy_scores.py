"""Scores of a learned world against the true one, on verdicts whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.policy_charts import place_labels
from hma_gym.evaluation.policy_scores import agree, compare, judge_criteria, rate

LABELS = tuple("abcdefghijk")
STARTS = 40


def verdicts(shift: int = 0) -> np.ndarray:
    """Policy i succeeds in the first 4 i (+ shift) of 40 starts."""
    count = np.clip(4 * np.arange(len(LABELS))[:, None] + shift, 0, STARTS)
    return (np.arange(STARTS) < count).astype(float)


def test_equal_worlds_score_perfectly() -> None:
    comparison = compare(LABELS, verdicts(), verdicts(), resamples=200)
    assert comparison is not None
    found = {name: interval.value for name, interval in comparison.statistics.items()}
    assert found["Pearson r"] == pytest.approx(1) and found["Spearman rho"] == pytest.approx(1)
    assert found["MMRV"] == found["mean absolute error"] == found["bias"] == found["largest gap"] == 0
    assert comparison.agreement.accuracy.value == 1 and comparison.agreement.kappa == 1
    assert all(criterion.kept for criterion in judge_criteria(comparison))


def test_a_kinder_world_is_biased_by_what_it_adds() -> None:
    comparison = compare(LABELS, verdicts(), verdicts(4), resamples=200)
    assert comparison is not None
    bias = comparison.statistics["bias"]
    assert bias.value == pytest.approx(10 * 0.1 / 11) and bias.low <= bias.value <= bias.high
    assert comparison.statistics["largest gap"].value == pytest.approx(0.1)
    assert comparison.agreement.only_learned == 40 and comparison.agreement.only_true == 0
    assert comparison.agreement_P[0].episodes == 40


def test_a_reversed_world_fails_the_floors() -> None:
    comparison = compare(LABELS, verdicts(), verdicts()[::-1], resamples=200)
    assert comparison is not None
    assert comparison.statistics["Pearson r"].value == pytest.approx(-1)
    assert comparison.statistics["MMRV"].value > 0.5
    kept = {criterion.text: criterion.kept for criterion in judge_criteria(comparison)}
    assert kept["Pearson r at least 0.95"] is False and kept["10 policies or more"] is True
    assert kept["policies of true success 0.9 or more are within 0.1"] is False


def test_intervals_are_wider_with_fewer_policies_and_repeat_with_their_seed() -> None:
    rng = np.random.default_rng(0)
    learned = np.where(rng.random(verdicts().shape) < 0.8, verdicts(), 1 - verdicts())
    many = compare(LABELS, verdicts(), learned, resamples=300)
    few = compare(LABELS[:4], verdicts()[:4], learned[:4], resamples=300)
    again = compare(LABELS, verdicts(), learned, resamples=300)
    assert many is not None and few is not None and again is not None
    widths = [c.statistics["Pearson r"].high - c.statistics["Pearson r"].low for c in (many, few)]
    assert widths[0] < widths[1]
    assert many.statistics == again.statistics
    assert 0 < few.undefined["Pearson r"] < 0.5 and many.undefined["bias"] == 0


def test_only_episodes_known_in_both_worlds_count() -> None:
    true, learned = verdicts(), verdicts()
    learned[0] = np.nan
    learned[1, :10] = np.nan
    comparison = compare(LABELS, true, learned, resamples=50)
    assert comparison is not None
    assert comparison.policies == LABELS[1:]
    assert comparison.true_P[0] == 0 and comparison.agreement_P[0].episodes == 30
    learned[:] = np.nan
    assert compare(LABELS, true, learned) is None
    assert rate(true[5]).value == 0.5 and math.isnan(rate(learned[0]).value)
    assert agree(true[0], learned[0]).episodes == 0


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"one row for each of 11 policies, got shapes \(11, 40\) and \(10, 40\)"):
        compare(LABELS, verdicts(), verdicts()[:10])


def test_labels_of_near_points_do_not_lie_on_each_other() -> None:
    texts = [(250.0 + 8 * i, 150.0, f"policy number {i}") for i in range(6)]
    placed = place_labels(texts)
    assert [text for _, _, text in placed] == [text for _, _, text in texts]
    for i, (left, baseline, text) in enumerate(placed):
        assert abs(baseline - 150.0) < 60 and 0 <= left and left + 5.6 * len(text) <= 400
        for other_left, other_baseline, other in placed[:i]:
            apart = left >= other_left + 5.6 * len(other) or other_left >= left + 5.6 * len(text)
            assert apart or abs(baseline - other_baseline) >= 12
