"""Drift: agreement with scipy, false alarms as rare as promised, and shifts that are found."""

import json

import numpy as np
import pytest
from scipy.stats import binom, ks_2samp, norm

from pathfm.stats.comparison import holm
from pathfm.stats.drift import (
    LEAST_IN_BIN,
    MOST_BINS,
    excess_p,
    features_from_record,
    find_shift,
    fit_bins,
    fit_features,
    fit_limit,
    fit_spread,
    rate_p,
    stability_index,
)


def is_at_most(hits, trials, rate):
    """A count that chance gives at least once in a thousand times, were the rate what was promised."""
    return hits <= binom.ppf(0.999, trials, rate)


def test_units_are_deviations_of_a_normal_distribution_to_either_side():
    rng = np.random.default_rng(0)
    value = np.where((x := rng.normal(size=20_000)) < 0, x, 3 * x) + 7
    spread = fit_spread(value, 0.01)
    assert spread.centre == pytest.approx(7, abs=0.05) and spread.above == pytest.approx(3, rel=0.05)
    assert spread.score([7 + 6, np.nan])[0] == pytest.approx(2, rel=0.06) and np.isnan(spread.score([np.nan]))[0]
    for score in (-2.5, 0.0, 4.0):
        assert spread.score(spread.at(score)) == pytest.approx(score)


def test_one_odd_value_moves_units_little_and_a_constant_has_the_least_unit():
    value = np.random.default_rng(1).normal(size=40)
    assert fit_spread([*value, 1e6], 0.01).above < 2 * fit_spread(value, 0.01).above
    same = fit_spread([0.3] * 9, 0.01)
    assert (same.centre, same.below, same.above) == (0.3, 0.01, 0.01)


@pytest.mark.parametrize("patients", [5, 19, 20, 40, 300])
def test_new_scores_lie_above_the_limit_as_often_as_stated(patients):
    hits, expected = 0, []
    for seed in range(400):
        rng = np.random.default_rng([seed, patients])
        limit = fit_limit(rng.normal(size=patients), 0.05)
        hits += int((rng.normal(size=10) > limit.value).sum())
        expected.append(limit.expected)
    assert len(set(expected)) == 1 and expected[0] >= 1 / (patients + 1)
    assert expected[0] <= 0.05 or patients < 19
    # Ten new scores share a limit, so their number strays more than a binomial one: by simulation less than 1.6 times.
    assert abs(hits / 4000 - expected[0]) < 1.6 * 3.3 * np.sqrt(expected[0] * (1 - expected[0]) / 4000)


def test_scores_that_are_never_seen_before_count_as_false_alarms_and_leave_a_finite_limit():
    limit = fit_limit([1.0, 2.0, 3.0, np.inf, np.inf], 0.05)
    assert limit.value == 3.0 and limit.expected == pytest.approx(3 / 6)


def test_bins_hold_enough_values_and_edges_are_no_values():
    rng = np.random.default_rng(2)
    for value in (rng.normal(size=1000), np.round(rng.normal(size=200), 1), np.repeat([0.0, 1.0], [195, 5]), np.zeros(50)):
        bins = fit_bins(value)
        assert bins.total == len(value) and min(bins.counts) >= LEAST_IN_BIN and len(bins.counts) <= MOST_BINS + 1
        assert not set(bins.edges) & set(value.tolist())
        counts = np.histogram(value, [-np.inf, *bins.edges, np.inf])[0]
        assert counts.tolist() == list(bins.counts)
    assert fit_bins(range(4)).edges == () and find_shift(fit_bins(range(4)), [1.0]) is None


def test_the_shift_is_that_of_scipy_but_for_what_lies_within_a_bin():
    rng = np.random.default_rng(3)
    for seed in range(30):
        known, new = rng.normal(size=400), rng.normal(rng.uniform(-1, 1), 1, size=50)
        found, exact = find_shift(fit_bins(known), new), ks_2samp(known, new, method="asymp")
        assert exact.statistic - 1 / MOST_BINS <= found.difference <= exact.statistic + 1e-12, seed
        assert found.p >= exact.pvalue - 1e-12
    at_edges = np.concatenate([known, known + 100])
    assert find_shift(fit_bins(at_edges), at_edges + 100).difference == pytest.approx(
        ks_2samp(at_edges, at_edges + 100).statistic
    )


@pytest.mark.parametrize("draw", [lambda rng, n: rng.normal(size=n), lambda rng, n: (rng.random(n) < 0.2) * rng.random(n)])
def test_windows_without_a_shift_are_called_one_no_more_often_than_promised(draw):
    trials, hits = 600, 0
    for seed in range(trials):
        rng = np.random.default_rng([seed, 4])
        hits += find_shift(fit_bins(draw(rng, 150)), draw(rng, 50)).p < 0.05
    assert is_at_most(hits, trials, 0.05)


def test_a_planted_shift_of_one_deviation_is_found_in_most_windows():
    rng = np.random.default_rng(5)
    bins = fit_bins(rng.normal(size=100))
    p = [find_shift(bins, rng.normal(1.0, 1.0, 50)).p for _ in range(100)]
    assert np.mean(np.array(p) < 0.001) > 0.9


def test_the_stability_index_is_zero_for_equal_shares_and_large_for_a_shift():
    assert stability_index([10, 10, 10], [10, 10, 10]) == 0.0
    assert stability_index([100, 100], [50, 50]) < 0.01
    wide = norm.cdf(np.linspace(-2, 2, 11))
    assert stability_index(1000 * np.diff(wide), 1000 * np.diff(norm.cdf(np.linspace(-3, 1, 11)))) > 0.25


def test_more_flags_than_the_limit_allows_are_noticed_and_chance_rarely_is():
    trials, hits = 1000, 0
    for seed in range(trials):
        rng = np.random.default_rng([seed, 8])
        limit = fit_limit(rng.normal(size=40), 0.05)
        hits += excess_p(int((rng.normal(size=50) > limit.value).sum()), 50, limit.expected, 40) < 0.05
    assert is_at_most(hits, trials, 0.05)
    assert excess_p(25, 50, 2 / 41, 40) < 1e-4 and excess_p(0, 50, 2 / 41, 40) == 1.0


def test_rates_and_corrections():
    assert rate_p(5, 50, 10, 100) == pytest.approx(1.0) and rate_p(25, 50, 10, 100) < 1e-5 and rate_p(0, 0, 3, 9) == 1.0
    rng = np.random.default_rng(6)
    hits = sum(min(holm(rng.random(12).tolist())) < 0.05 for _ in range(2000))
    assert is_at_most(hits, 2000, 0.05) and hits > 60


def test_the_distance_of_features_is_one_in_training_and_larger_for_other_slides():
    rng = np.random.default_rng(7)
    scale = np.linspace(0.01, 5, 64)
    known = fit_features(np.column_stack([rng.normal(size=(100, 64)) * scale, np.full(100, 3.0)]))
    new = np.column_stack([rng.normal(size=(50, 64)) * scale, np.full(50, 3.0)])
    assert np.median(known.distance(new)) == pytest.approx(1.0, abs=0.1)
    assert known.distance(new + np.append(2 * scale, 0)).min() > known.distance(new).max()
    again = features_from_record(json.loads(json.dumps(known.record())))
    assert np.array_equal(again.distance(new), known.distance(new))
    with pytest.raises(ValueError, match="3 features, but the training had 65"):
        known.distance(np.zeros((1, 3)))
