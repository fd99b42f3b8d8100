"""Curves against scikit-learn, the numbers they belong to, and the plainest loops."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from pathfm.stats.curves import decision_curve, precision_recall_points, reliability_bins, roc_points
from pathfm.stats.metrics import average_precision, calibration_error

samples = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({positive for _, positive in rows}) == 2
)


def arrays(rows):
    return np.array([row[0] for row in rows]) / 6, np.array([row[1] for row in rows])


@given(samples)
def test_roc_and_precision_recall_points_equal_sklearn(rows):
    score, positive = arrays(rows)
    false, true, _ = reference.roc_curve(positive, score, drop_intermediate=False)
    points = roc_points(score, positive)
    np.testing.assert_allclose([point["false_positive_rate"] for point in points], false, atol=1e-12)
    np.testing.assert_allclose([point["true_positive_rate"] for point in points], true, atol=1e-12)
    precision, recall, threshold = reference.precision_recall_curve(positive, score)
    points = precision_recall_points(score, positive)
    np.testing.assert_allclose([point["precision"] for point in points[::-1]], precision[:-1], atol=1e-12)
    np.testing.assert_allclose([point["recall"] for point in points[::-1]], recall[:-1], atol=1e-12)
    np.testing.assert_allclose([point["threshold"] for point in points[::-1]], threshold, atol=1e-12)
    steps = np.diff([0.0, *(point["recall"] for point in points)])
    assert (steps * [point["precision"] for point in points]).sum() == pytest.approx(average_precision(score, positive))


@given(samples, st.sampled_from([None, 1, 3, 10]))
def test_reliability_bins_hold_everyone_once_and_add_up_to_the_calibration_error(rows, bins):
    score, positive = arrays(rows)
    found = reliability_bins(score, positive, bins)
    assert sum(row["count"] for row in found) == len(score)
    assert all(before["high"] < after["low"] for before, after in itertools.pairwise(found))
    assert all(row["low"] <= row["mean"] + 1e-12 and row["mean"] <= row["high"] + 1e-12 for row in found)
    error = sum(row["count"] * abs(row["mean"] - row["observed"]) for row in found) / len(score)
    assert error == pytest.approx(calibration_error(score, positive, bins), abs=1e-12)


def test_distinct_probabilities_are_cut_into_bins_of_equal_size_as_sklearn_does():
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(0)
    probability = rng.permutation(np.linspace(0.01, 0.99, 200))
    positive = rng.random(200) < probability
    found = reliability_bins(probability, positive)
    observed, mean = calibration_curve(positive, probability, n_bins=10, strategy="quantile")
    assert [row["count"] for row in found] == [20] * 10
    np.testing.assert_allclose([row["mean"] for row in found], mean)
    np.testing.assert_allclose([row["observed"] for row in found], observed)


@given(samples)
def test_net_benefit_equals_counting(rows):
    score, positive = arrays(rows)
    for row in decision_curve(score, positive, (0.1, 0.5, 0.8)):
        at = row["threshold"]
        true = sum(bool(p) and s >= at for s, p in zip(score, positive, strict=True))
        false = sum(not p and s >= at for s, p in zip(score, positive, strict=True))
        assert row["model"] == pytest.approx(true / len(score) - false / len(score) * at / (1 - at))
        assert row["all"] == pytest.approx(positive.mean() - (1 - positive.mean()) * at / (1 - at))
        assert row["none"] == 0.0


def test_a_useful_calibrated_model_beats_treating_all_and_none():
    rng = np.random.default_rng(1)
    probability = rng.random(4000)
    positive = rng.random(4000) < probability
    assert all(row["model"] >= max(row["all"], 0.0) - 0.01 for row in decision_curve(probability, positive))


def test_curves_can_be_written_as_json():
    score, positive = np.array([0.1, 0.4, 0.8]), np.array([0, 0, 1])
    for rows in (roc_points, precision_recall_points, reliability_bins, decision_curve):
        json.dumps(rows(score, positive), allow_nan=False)
    assert decision_curve([], []) == reliability_bins([], []) == []
    with pytest.raises(ValueError, match="positives"):
        precision_recall_points([0.1], [False])
    for curve in (roc_points, precision_recall_points, decision_curve):
        with pytest.raises(ValueError, match="finite"):
            curve([0.1, np.nan], [False, True])
