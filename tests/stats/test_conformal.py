"""Conformal sets: the finite-sample promise, checked on freshly simulated cohorts."""

import json

import numpy as np
import pytest
from scipy.special import expit

from pathfm.stats.conformal import (
    TooFewPatientsError,
    conformal_from_record,
    conformal_quantile,
    coverage_limits,
    fit_conformal,
    least_patients,
    missed_ranks,
)

CLASSES = ("benign", "malignant")


def cohort(rng, count, share=0.4):
    """Over-confident scores of two unequal classes."""
    label = (rng.random(count) < share).astype(int)
    score = expit(2.5 * (label - 0.5) + rng.normal(0, 1.5, count))
    return np.stack([1 - score, score], axis=1), label


def names(count):
    return [f"p{number}" for number in range(count)]


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (60, 0.1), (99, 0.29), (155, 0.05), (33, 0.2)])
def test_mean_and_single_coverage_of_1000_cohorts_keep_the_promise(n, alpha):
    rng, tested, rounds = np.random.default_rng([n, 1]), 100, 1000
    covered = np.empty(rounds)
    for number in range(rounds):
        probability, label = cohort(rng, n + tested)
        made = fit_conformal(probability[:n], label[:n], names(n), CLASSES, alpha)
        covered[number] = made.contains(probability[n:])[np.arange(tested), label[n:]].mean()
    error = 3 * covered.std(ddof=1) / np.sqrt(rounds)
    assert 1 - alpha - error <= covered.mean() <= 1 - alpha + 1 / (n + 1) + error
    low, high = coverage_limits(tested, n, alpha)
    share = ((covered >= low) & (covered <= high)).mean()
    assert share >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / rounds)
    # Not by being wide: the law is discrete, so a little more than 95 % is inside.
    assert share <= 0.985


def test_class_wise_sets_keep_the_promise_in_every_class():
    rng, alpha, rounds = np.random.default_rng(3), 0.1, 400
    covered, marginal = np.zeros((rounds, 2)), np.zeros((rounds, 2))
    for number in range(rounds):
        probability, label = cohort(rng, 300, share=0.2)
        for table, class_wise in ((covered, True), (marginal, False)):
            made = fit_conformal(probability[:150], label[:150], names(150), CLASSES, alpha, class_wise=class_wise)
            inside = made.contains(probability[150:])[np.arange(150), label[150:]]
            table[number] = [inside[label[150:] == c].mean() for c in (0, 1)]
    error = 3 * covered.std(axis=0) / np.sqrt(rounds)
    assert (covered.mean(axis=0) >= 0.9 - error).all()
    assert (covered.mean(axis=0) <= 0.9 + np.array([1 / 100, 1 / 18]) + error).all()
    assert abs(marginal.mean(axis=0) - 0.9).max() > 0.002


def test_quantile_is_the_ranked_score():
    score = np.random.default_rng(0).permutation(np.arange(1, 20))
    assert conformal_quantile(score, 0.05) == 19  # ceil(20 x 0.95)
    assert conformal_quantile(score, 0.1) == 18
    assert conformal_quantile(score[:18], 0.05) == np.inf
    assert conformal_quantile([], 0.3) == np.inf


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.07, 0.1, 0.15, 0.29, 1 / 3])
def test_ranks_are_exact_for_alpha_as_printed(alpha):
    percent = round(alpha * 100)
    for n in range(1, 400):
        if alpha != 1 / 3:
            assert missed_ranks(n, alpha) == (n + 1) * percent // 100
        assert np.isinf(conformal_quantile(np.arange(n), alpha)) == (n < least_patients(alpha))


def test_fewer_than_19_patients_at_5_percent_is_a_named_refusal():
    assert least_patients(0.05) == 19
    probability, label = cohort(np.random.default_rng(0), 19)
    assert fit_conformal(probability, label, names(19), CLASSES, 0.05).count_C == (19, 19)
    with pytest.raises(TooFewPatientsError, match="need 19 calibration patients, there are 18"):
        fit_conformal(probability[:18], label[:18], names(18), CLASSES, 0.05)


def test_class_wise_the_class_with_too_few_is_named():
    probability, _ = cohort(np.random.default_rng(0), 40)
    label = np.repeat([0, 1], [35, 5])
    with pytest.raises(TooFewPatientsError, match="need 9 calibration patients of class malignant, there are 5"):
        fit_conformal(probability, label, names(40), CLASSES, 0.1, class_wise=True)
    assert fit_conformal(probability, label, names(40), CLASSES, 0.1).count_C == (40, 40)


def test_many_bags_of_few_patients_are_few():
    probability, label = cohort(np.random.default_rng(0), 40)
    with pytest.raises(TooFewPatientsError, match="there are 4"):
        fit_conformal(probability, label, names(4) * 10, CLASSES, 0.1)


def test_tied_scores_are_in_the_set_together():
    probability = np.tile([0.3, 0.7], (30, 1))
    made = fit_conformal(probability, np.ones(30, int), names(30), CLASSES, 0.1)
    np.testing.assert_array_equal(made.contains(probability), np.tile([False, True], (30, 1)))


def test_limits_are_what_simulated_ranks_do():
    rng = np.random.default_rng(0)
    n, tested, alpha = 39, 25, 0.1
    draws = rng.random((40000, n + tested))
    quantile = np.sort(draws[:, :n], axis=1)[:, n - missed_ranks(n, alpha)]
    coverage = (draws[:, n:] <= quantile[:, None]).mean(axis=1)
    low, high = coverage_limits(tested, n, alpha)
    assert low == pytest.approx(np.quantile(coverage, 0.025, method="inverted_cdf"), abs=1 / tested + 1e-9)
    assert (coverage < low).mean() <= 0.027
    assert (coverage > high).mean() <= 0.027


def test_a_probability_that_is_not_a_number_is_an_error():
    with pytest.raises(ValueError, match="finite"):
        fit_conformal(np.full((30, 2), np.nan), np.zeros(30, int), names(30), CLASSES, 0.1)


def test_a_record_gives_the_same_back():
    made = fit_conformal(*cohort(np.random.default_rng(0), 50), names(50), CLASSES, 0.1, class_wise=True)
    assert conformal_from_record(json.loads(json.dumps(made.record(), sort_keys=True))) == made
