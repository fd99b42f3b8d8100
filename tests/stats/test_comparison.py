"""Tests between models: a published example, plain slow versions, and honesty where little is known."""

import json
import math

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from pathfm.stats.comparison import (
    Difference,
    chance_of_a_miss,
    corrected_t,
    holm,
    p_text,
    paired_bootstrap,
    paired_delong,
    permutation_p,
    verdict,
)
from pathfm.stats.intervals import delong_freedom, delong_places, patients_of
from pathfm.stats.metrics import auroc, weighted_auroc, weighted_confusion, weighted_mean

# Albumin, total protein, K-G score and outcome of the 43 patients with ovarian cancer of DeLong et al. (1988) for whom all are
# known, as SAS/STAT prints them in "Comparing Receiver Operating Characteristic Curves" (PROC LOGISTIC).
PUBLISHED = np.fromstring(
    """3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1 3.8 5.7 5 1 3.7 6.7 6 1
    3.2 5.4 4 1 3.8 6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0 2.3 4.4 6 1 4.2 7.6 4 0 4.0 6.6 6 0 3.5 5.8 6 1
    3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1 3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1 4.3 6.5 4 1 3.2 5.1 5 1 2.6 4.7 6 1
    3.3 6.8 6 0 1.7 4.0 7 0 3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1 3.5 6.2 5 1 2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1
    3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1""",
    sep=" ",
).reshape(-1, 4)


def test_paired_delong_equals_the_published_example():
    albumin, protein, score, outcome = PUBLISHED.T
    score, positive = 10 - score, outcome == 1
    assert [round(auroc(each, positive), 4) for each in (albumin, score, protein)] == [0.7366, 0.7258, 0.6478]
    first, second = paired_delong(albumin, score, positive), paired_delong(protein, score, positive)
    assert [round(each, 4) for each in first[:4]] == [0.0108, -0.1761, 0.1976, 0.9102]
    assert [round(each, 4) for each in second[:4]] == [-0.0780, -0.2830, 0.1271, 0.4561]


def apart(first, second, positive):
    return [one - other for one, other in zip(*(delong_places(each, positive) for each in (first, second)), strict=True)]


def slow_paired_delong(first, second, positive):
    def wins(score):
        above, below = score[positive], score[~positive]
        return (above[:, None] > below) + (above[:, None] == below) / 2

    apart = wins(first) - wins(second)
    variance = apart.mean(1).var(ddof=1) / positive.sum() + apart.mean(0).var(ddof=1) / (~positive).sum()
    return apart.mean(), variance


@pytest.mark.parametrize("size", [8, 30, 200])
def test_paired_delong_equals_the_plain_quadratic_one(size):
    rng = np.random.default_rng(size)
    positive = np.arange(size) % 3 == 0
    first, second = (rng.integers(0, 8, size) + 2.0 * positive for _ in range(2))
    value, variance = slow_paired_delong(first, second, positive)
    found = paired_delong(first, second, positive)
    assert found.value == pytest.approx(value)
    reach = student.ppf(0.975, delong_freedom(*apart(first, second, positive)))
    assert (reach > 2) == (size == 8)
    assert (found.high - found.low) / 2 == pytest.approx(reach * math.sqrt(variance))
    assert found.significant == (not found.low <= 0 <= found.high)


def test_the_same_order_is_no_difference_and_swapping_models_swaps_signs():
    rng = np.random.default_rng(0)
    positive = np.arange(50) < 20
    first, second = rng.normal(size=50) + positive, rng.normal(size=50)
    same = paired_delong(first, np.exp(first), positive)
    assert (same.value, same.p, same.significant) == (0.0, 1.0, False)
    one, other = paired_delong(first, second, positive), paired_delong(second, first, positive)
    assert (one.value, one.low, one.p) == pytest.approx((-other.value, -other.high, other.p))


def test_two_perfect_models_are_not_certainly_equal():
    positive = np.arange(20) < 10
    found = paired_delong(np.where(positive, 5.0, 1.0), positive + np.linspace(0, 0.5, 20), positive)
    assert (found.value, found.p) == (0.0, 1.0)
    assert found.low < -0.2 < 0.2 < found.high


def test_opposite_models_of_a_handful_of_patients_are_judged_by_limits_that_admit_it():
    found = paired_delong([1, 2, 3, 4], [4, 3, 2, 1], [False, False, True, True])
    assert found.value == 1.0
    assert math.isnan(found.p)
    assert found.low <= 0 and not found.significant


def test_one_class_cannot_be_compared():
    with pytest.raises(ValueError, match="both classes"):
        paired_delong([0.1, 0.2], [0.2, 0.1], [True, True])


def everyone(count, label=None):
    return patients_of([f"p{place:03d}" for place in range(count)], label if label is not None else [0] * count)


def test_paired_bootstrap_agrees_with_delong_and_with_its_own_limits():
    rng = np.random.default_rng(1)
    positive = np.arange(150) < 60
    for strength in (0.1, 0.6, 1.2):
        first, second = rng.normal(size=150) + (0.5 + strength) * positive, rng.normal(size=150) + 0.5 * positive
        exact = paired_delong(first, second, positive)
        pair = weighted_auroc(first, positive), weighted_auroc(second, positive)
        drawn = paired_bootstrap(*pair, everyone(150, positive.tolist()), 2000, 0)
        assert drawn.value == pytest.approx(exact.value)
        assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.03)
        assert drawn.significant == (not drawn.low <= 0 <= drawn.high)
        assert 1 / 2001 <= drawn.p <= 1


def test_a_model_against_itself_has_p_1_and_pairs_cancel_what_is_hard_for_both():
    rng = np.random.default_rng(2)
    hard = rng.normal(size=60) * 10
    first, second = weighted_mean(hard + 0.5 + rng.normal(size=60) / 10), weighted_mean(hard)
    assert paired_bootstrap(second, second, everyone(60), 500, 0).p == 1.0
    assert paired_bootstrap(first, second, everyone(60), 500, 0).significant


def test_p_and_limits_never_contradict_each_other():
    rng = np.random.default_rng(3)
    for _ in range(150):
        value = rng.normal(0.3, 1, 30)
        found = paired_bootstrap(weighted_mean(value), weighted_mean(np.zeros(30)), everyone(30), 400, 0)
        if not 0.04 < found.p < 0.06:  # else the quantile may lie between two draws
            assert found.significant == (not found.low <= 0 <= found.high)


def test_the_corrected_test_is_the_plain_one_with_more_variance():
    rng = np.random.default_rng(4)
    value = rng.normal(0.8, 0.1, 10)
    plain = ttest_1samp(value, 0.5)
    found = corrected_t(value, 0.0, 0.5)
    assert found.p == pytest.approx(plain.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(plain.confidence_interval()))
    shared = corrected_t(value, 1 / 9, 0.5)
    widening = math.sqrt((1 / 10 + 1 / 9) / (1 / 10))
    assert (shared.high - shared.low) == pytest.approx((found.high - found.low) * widening)
    assert shared.p > found.p


def test_too_few_or_equal_folds_give_no_limits():
    assert math.isnan(corrected_t([0.8], 0.25).low)
    assert math.isnan(corrected_t([], 0.25).mean)
    assert corrected_t([0.5, 0.5, 0.5], 0.25, 0.5).p == 1.0
    assert math.isnan(corrected_t([0.7, 0.7, 0.7], 0.25, 0.5).p)


def test_a_few_positives_do_not_make_equal_models_different():
    """The normal distribution calls them so in 8 % of cohorts with 5 positives of 105."""
    rng = np.random.default_rng(6)
    positive, alarms = np.arange(105) < 5, 0
    for _ in range(500):
        shared = rng.normal(size=105) + 1.7 * positive
        alarms += paired_delong(shared + rng.normal(size=105), shared + rng.normal(size=105), positive).significant
    assert alarms / 500 <= 0.055


def test_p_values_are_corrected_for_their_number():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.03]) == [0.03] and holm([]) == []
    assert holm([0.02, 0.02, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    counted = holm([0.02, math.nan, 0.04])  # a comparison without p was made all the same
    assert counted[0] == pytest.approx(0.06) and math.isnan(counted[1]) and counted[2] == pytest.approx(0.08)


def test_several_intervals_miss_more_often_than_one():
    assert chance_of_a_miss(0) == 0 and chance_of_a_miss(1) == pytest.approx(0.05)
    assert chance_of_a_miss(10) == pytest.approx(0.4013, abs=1e-4)


def test_what_is_not_a_number_has_no_permutation_p():
    for values, observed in (([0.5, 0.6], math.nan), ([0.5, math.nan], 0.55)):
        with pytest.raises(ValueError, match="finite"):
            permutation_p(values, observed)


def test_the_permutation_p_is_never_0():
    assert permutation_p([0.4, 0.5, 0.6], 0.9) == 1 / 4
    assert permutation_p([0.4, 0.5, 0.6], 0.5) == 3 / 4
    assert permutation_p([], 0.9) == 1.0


def test_the_verdict_says_so_when_nothing_is_shown():
    unsure = Difference(0.02, -0.05, 0.09, 0.57, "")
    assert verdict("ABMIL", "colour histogram", unsure) == "ABMIL and colour histogram are not significantly different (p 0.57)"
    sure = Difference(0.2, 0.1, 0.3, 1e-5, "")
    assert verdict("a", "b", sure) == "a is better than b (p < 0.001)"
    assert verdict("a", "b", sure, higher_is_better=False) == "b is better than a (p < 0.001)"
    nothing = Difference(math.nan, math.nan, math.nan, math.nan, "no patient of class yes")
    assert verdict("a", "b", nothing) == "a and b cannot be compared: no patient of class yes"
    assert [p_text(p) for p in (0.0004, 0.0123, 0.456)] == ["< 0.001", "0.012", "0.46"]


def test_equally_good_models_are_rarely_called_different():
    rng = np.random.default_rng(5)
    positive, alarms = np.arange(60) < 30, 0
    for _ in range(400):
        first, second = rng.normal(size=60) + positive, rng.normal(size=60) + positive
        alarms += paired_delong(first, second, positive).significant
    assert alarms / 400 <= 0.09


def test_differences_can_be_written_as_json():
    found = paired_bootstrap(weighted_mean([1.0, 2.0, 4.0, 5.0, 7.0]), weighted_mean(np.ones(5)), everyone(5), 50, 0)
    assert json.loads(json.dumps(found._asdict()))["method"] == "bootstrap over patients, paired"
    weights = np.ones((1, 2))
    assert weighted_confusion([0, 1], [0, 1], 2, lambda matrix: matrix.sum(axis=(1, 2)))(weights) == 2
