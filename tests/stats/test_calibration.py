"""Calibrators against scikit-learn and plain searches, on good, tiny and degenerate samples."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from pathfm.stats.calibration import calibrator_from_record, fit_calibrator
from pathfm.stats.metrics import brier, calibration_error

KINDS = ("temperature", "platt", "isotonic")


def two(score):
    return np.stack([1 - np.asarray(score), np.asarray(score)], axis=1)


def over_confident(count, seed, factor=3.0):
    """Scores whose log-odds are ``factor`` times what they should be."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, count)
    return two(expit(factor * z)), (rng.random(count) < expit(z)).astype(int)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_falls_on_an_over_confident_simulator(kind, seed):
    probability, label = over_confident(6000, seed)
    learn, test = np.arange(6000) % 2 == 0, np.arange(6000) % 2 == 1
    calibrated = fit_calibrator(kind, probability[learn], label[learn]).apply(probability[test])
    before, after = (calibration_error(values[:, 1], label[test] == 1) for values in (probability[test], calibrated))
    assert after < 0.4 * before
    assert brier(calibrated, label[test]) < brier(probability[test], label[test])


def test_calibration_error_of_many_classes_falls_by_temperature():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, (2000, 4))
    label = (softmax(z, axis=1).cumsum(1) < rng.random((2000, 1))).sum(1)
    calibrator = fit_calibrator("platt", softmax(3 * z, axis=1)[:1000], label[:1000])
    assert calibrator.kind == "temperature"
    assert 1 / calibrator.slope == pytest.approx(3, rel=0.1)
    calibrated, raw = calibrator.apply(softmax(3 * z, axis=1)[1000:]), softmax(3 * z, axis=1)[1000:]
    np.testing.assert_allclose(calibrated.sum(1), 1)
    np.testing.assert_array_equal(calibrated.argmax(1), raw.argmax(1))

    def error(values):
        return calibration_error(values.max(1), values.argmax(1) == label[1000:])

    assert error(calibrated) < 0.3 * error(raw)


def test_temperature_is_what_a_plain_search_finds():
    probability, label = over_confident(200, 7)
    grid = np.exp(np.linspace(-np.log(10), np.log(10), 20001))
    log = np.log(np.clip(probability, 1e-6, 1))
    cost = [0.5 * np.log(s) ** 2 - log_softmax(s * log, axis=1)[np.arange(200), label].sum() for s in grid]
    assert fit_calibrator("temperature", probability, label).slope == pytest.approx(grid[np.argmin(cost)], rel=5e-4)


def test_platt_is_scikit_learns_logistic_regression_on_smoothed_targets():
    probability, label = over_confident(150, 3)
    score, positives = logit(np.clip(probability[:, 1], 1e-6, 1 - 1e-6)), int(label.sum())
    target = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (150 - positives + 2))
    reference = LogisticRegression(C=1e10, tol=1e-10, max_iter=10000)
    doubled = np.concatenate([score, score])[:, None]
    reference.fit(doubled, np.repeat([1, 0], 150), np.concatenate([target, 1 - target]))
    found = fit_calibrator("platt", probability, label)
    assert (found.slope, found.intercept) == pytest.approx((reference.coef_[0, 0], reference.intercept_[0]), abs=1e-4)


def test_isotonic_is_scikit_learns_inside_its_bounds():
    rng = np.random.default_rng(1)
    probability, label = over_confident(120, 2)
    probability = two(np.round(probability[:, 1], 2))  # ties
    reference = IsotonicRegression(y_min=1 / 122, y_max=1 - 1 / 122, out_of_bounds="clip")
    reference.fit(probability[:, 1], label)
    asked = rng.random(500)
    found = fit_calibrator("isotonic", probability, label).apply(two(asked))[:, 1]
    np.testing.assert_allclose(found, reference.predict(asked), atol=1e-12)


HARD = {
    "perfect separation": ([0.0, 0.1, 0.2, 0.8, 0.9, 1.0], [0, 0, 0, 1, 1, 1]),
    "two samples": ([0.2, 0.7], [0, 1]),
    "one positive": ([0.1, 0.2, 0.3, 0.4, 0.35], [0, 0, 0, 1, 0]),
    "all tied": ([0.5] * 8, [0, 1] * 4),
    "upside down": ([0.9, 0.8, 0.7, 0.1, 0.2], [0, 0, 0, 1, 1]),
    "certain and wrong": ([0.0, 1.0, 0.0, 1.0], [1, 0, 0, 1]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HARD)
def test_hard_samples_give_bounded_non_decreasing_finite_probabilities(kind, name):
    score, label = HARD[name]
    calibrator = fit_calibrator(kind, two(score), label)
    found = calibrator.apply(two(np.linspace(0, 1, 201)))[:, 1]
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()
    assert ((found > 0) & (found < 1)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=2, max_size=30), st.sampled_from(KINDS))
def test_no_sample_breaks_a_calibrator(rows, kind):
    score, label = np.array([row[0] / 10 for row in rows]), np.array([row[1] for row in rows], int)
    if len(set(label)) < 2:
        with pytest.raises(ValueError, match="two classes"):
            fit_calibrator(kind, two(score), label)
        return
    found = fit_calibrator(kind, two(score), label).apply(two(np.linspace(0, 1, 101)))
    assert np.isfinite(found).all()
    assert (np.diff(found[:, 1]) >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1)


def test_scores_that_are_upside_down_become_the_share_of_positives():
    rng = np.random.default_rng(0)
    label = (rng.random(300) < 0.3).astype(int)
    score = np.where(label == 1, rng.uniform(0, 0.4, 300), rng.uniform(0.6, 1, 300))
    found = fit_calibrator("platt", two(score), label).apply(two([0.0, 1.0]))[:, 1]
    np.testing.assert_allclose(found, label.mean(), atol=0.01)


def test_perfect_separation_is_not_certainty():
    few, many = (fit_calibrator("platt", two(np.repeat([0.3, 0.7], n)), np.repeat([0, 1], n)) for n in (5, 500))
    assert few.apply(two([0.7]))[0, 1] == pytest.approx(6 / 7, abs=0.01)
    assert many.apply(two([0.7]))[0, 1] > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_the_positive_class_may_be_either_column(kind):
    probability, label = over_confident(100, 5)
    one = fit_calibrator(kind, probability, label, positive=1).apply(probability)
    other = fit_calibrator(kind, probability[:, ::-1], 1 - label, positive=0).apply(probability[:, ::-1])
    np.testing.assert_allclose(one, other[:, ::-1], atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_gives_the_same_calibrator_back(kind):
    calibrator = fit_calibrator(kind, *over_confident(57, 5))
    assert calibrator_from_record(json.loads(json.dumps(calibrator.record(), sort_keys=True))) == calibrator


def test_unknown_calibrators_are_named():
    with pytest.raises(ValueError, match="there are temperature, platt, isotonic"):
        fit_calibrator("beta", *over_confident(30, 0))


@pytest.mark.parametrize("kind", ["temperature", "platt", "isotonic"])
def test_a_probability_that_is_not_a_number_is_an_error(kind):
    with pytest.raises(ValueError, match="finite"):
        fit_calibrator(kind, [[0.1, 0.9], [np.nan, np.nan], [0.3, 0.7]], [0, 1, 1])
