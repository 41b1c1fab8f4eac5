"""Intervals and calibration measures against published or hand-worked values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hma_gym.errors import InvalidArgument
from hma_gym.metrics.calibration import binary_report
from hma_gym.metrics.statistics import bootstrap_interval, wilson_interval


def test_wilson_matches_worked_values() -> None:
    # Newcombe (1998), Table I, method 3: 81/263, 15/148, 0/20.
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = wilson_interval(successes, trials)
        assert interval.value == successes / trials
        assert interval.low == pytest.approx(low, abs=1e-4)
        assert interval.high == pytest.approx(high, abs=1e-4)


def test_wilson_edges() -> None:
    empty = wilson_interval(0, 0)
    assert math.isnan(empty.value) and (empty.low, empty.high) == (0.0, 1.0)
    assert wilson_interval(7, 7).high == 1.0
    with pytest.raises(InvalidArgument, match="successes=3"):
        wilson_interval(3, 2)
    with pytest.raises(InvalidArgument, match="confidence"):
        wilson_interval(1, 2, confidence=1.0)


def test_bootstrap_covers_the_normal_interval_and_repeats() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.04)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.04)
    assert interval == bootstrap_interval(values, seed=1)
    assert interval != bootstrap_interval(values, seed=2)
    median = bootstrap_interval(values, lambda rows: float(np.median(rows)), resamples=200)
    assert median.low < np.median(values) < median.high


def test_binary_report_by_hand() -> None:
    probability = np.array([0.9, 0.8, 0.4, 0.2, 0.6, 1.0])
    truth = np.array([True, True, True, False, False, True])
    report = binary_report(probability, truth)
    assert (report.true_positives, report.false_positives) == (3, 1)
    assert (report.true_negatives, report.false_negatives) == (1, 1)
    assert report.accuracy == pytest.approx(4 / 6)
    assert report.precision == pytest.approx(3 / 4)
    assert report.recall == pytest.approx(3 / 4)
    assert report.brier == pytest.approx((0.01 + 0.04 + 0.36 + 0.04 + 0.36 + 0) / 6)
    assert sum(b.count for b in report.reliability) == 6
    assert binary_report(probability, truth, threshold=0.35).recall == 1.0
    certain = binary_report(np.array([0.0, 1.0]), np.array([False, True]))
    assert certain.brier == 0 and certain.expected_calibration_error == 0


def test_binary_report_refuses_other_shapes() -> None:
    with pytest.raises(InvalidArgument, match="one length"):
        binary_report(np.zeros(3), np.zeros(4, dtype=bool))
