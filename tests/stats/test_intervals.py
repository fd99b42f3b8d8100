"""Intervals: right against a slow version, sensible at the edges, and honest in simulation."""

import math

import numpy as np
import pytest
from scipy.stats import brunnermunzel
from scipy.stats import t as student

from benchmarks.interval_coverage import AUROCS, PATIENTS, auroc_coverage, bootstrap_coverage
from pathfm.stats import intervals, metrics
from pathfm.stats.intervals import (
    auroc_interval,
    bootstrap_draws,
    bootstrap_interval,
    delong_places,
    delong_variance,
    patients_of,
    places_freedom,
    strata,
)
from pathfm.stats.localisation import UNKNOWN, ScoredSlide, localisation_auroc
from pathfm.stats.metrics import auroc


def slow_delong(score, positive):
    above, below = score[positive], score[~positive]
    wins = (above[:, None] > below) + (above[:, None] == below) / 2
    return wins.mean(1).var(ddof=1) / len(above) + wins.mean(0).var(ddof=1) / len(below)


def test_fast_delong_equals_the_plain_quadratic_one():
    rng = np.random.default_rng(0)
    for size in (6, 30, 200):
        score, positive = rng.integers(0, 8, size).astype(float), rng.random(size) < 0.4
        positive[:4] = [True, True, False, False]
        assert delong_variance(score, positive) == pytest.approx(slow_delong(score, positive))


def test_the_published_ratings_have_the_published_area():
    """Hanley and McNeil (1982), table I: 58 normal and 51 abnormal CT images rated 1 to 5; area .893. Ties everywhere."""
    rating = np.repeat([1, 2, 3, 4, 5] * 2, [33, 6, 6, 11, 2, 3, 2, 2, 11, 33])
    abnormal = np.arange(109) >= 58
    assert round(auroc(rating, abnormal), 3) == 0.893
    assert delong_variance(rating, abnormal) == pytest.approx(slow_delong(rating, abnormal))
    assert round(math.sqrt(delong_variance(rating, abnormal)), 4) == 0.0307


@pytest.mark.parametrize("distinct", [4, 1000])
def test_variance_and_freedom_are_those_of_scipys_brunner_and_munzel(distinct):
    rng = np.random.default_rng(distinct)
    for positives in (3, 7, 40):
        score, positive = rng.integers(0, distinct, 60).astype(float), np.arange(60) < positives
        places = delong_places(score, positive)
        size = abs(auroc(score, positive) - 0.5) / math.sqrt(delong_variance(score, positive))
        reference = brunnermunzel(score[positive], score[~positive])
        assert size == pytest.approx(abs(reference.statistic))
        assert 2 * student.sf(size, places_freedom(*places)) == pytest.approx(reference.pvalue)


def test_a_few_positives_among_many_negatives_do_not_make_a_short_interval():
    """With 1.96 in place of Student's t the truth was held in 88 % of such cohorts."""
    assert auroc_coverage(5, 100, 0.8, 700).held >= 91


@pytest.mark.parametrize(("patients", "truth"), [(24, 0.95), (40, 0.8), (155, 0.6)])
def test_the_auroc_interval_covers_the_truth_about_as_often_as_it_says(patients, truth):
    assert 91 <= auroc_coverage(patients // 2, patients - patients // 2, truth, 700).held <= 99.5


@pytest.mark.long
@pytest.mark.parametrize("patients", PATIENTS)
@pytest.mark.parametrize("truth", AUROCS)
def test_coverage_of_the_auroc_interval_is_between_93_and_98_5_percent(patients, truth):
    assert 93.0 <= auroc_coverage(patients // 2, patients - patients // 2, truth, 5000).held <= 98.5
    # One in five positive: four and eight of them get an interval that is too wide rather than too short.
    assert 93.0 <= auroc_coverage(patients // 5, patients - patients // 5, truth, 5000).held <= 99.5


@pytest.mark.long
@pytest.mark.parametrize("patients", PATIENTS)
def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say(patients):
    held = bootstrap_coverage(patients // 2, patients - patients // 2, 0.8, 300)
    assert all(share >= 90.0 for share in held.values()), held


def test_a_perfect_auroc_is_not_certain():
    interval = auroc_interval([1, 2, 3, 4, 5, 6, 7, 8], [False] * 4 + [True] * 4)
    assert (interval.value, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.025 ** (1 / 4))
    mirrored = auroc_interval([8, 7, 6, 5, 4, 3, 2, 1], [False] * 4 + [True] * 4)
    assert (mirrored.low, mirrored.high) == (0.0, pytest.approx(1 - interval.low))


def test_no_variance_gives_a_wide_interval_not_a_point():
    tied = auroc_interval(np.zeros(20), np.arange(20) < 10)
    assert tied.low < 0.25 < 0.75 < tied.high
    alone = auroc_interval([0.5, 0.1, 0.9, 0.2], [True, False, False, False])
    assert alone.low < 0.1 < 0.95 < alone.high


def test_a_share_has_exact_limits_for_any_number():
    assert intervals.share_interval(3, 3) == (1.0, pytest.approx(0.025 ** (1 / 3)), 1.0, "Clopper-Pearson")
    assert intervals.share_interval(2, 3)[1:3] == pytest.approx((0.0943, 0.9916), abs=1e-4)
    with pytest.raises(ValueError, match="needs samples"):
        intervals.share_interval(0, 0)


def test_more_patients_give_a_narrower_interval_inside_0_and_1():
    rng = np.random.default_rng(2)
    widths = []
    for size in (30, 120, 480):
        positive = np.arange(size) % 2 == 0
        interval = auroc_interval(rng.normal(size=size) + 1.5 * positive, positive)
        assert 0 < interval.low < interval.value < interval.high < 1
        widths.append(interval.high - interval.low)
    assert widths[0] > widths[1] > widths[2]


def test_bootstrap_resamples_patients_not_slides():
    rng = np.random.default_rng(3)
    patient = np.repeat(rng.normal(size=12), 20)  # twenty identical slides each
    names = np.repeat([f"p{index}" for index in range(12)], 20).tolist()
    by_patient = bootstrap_interval(lambda index: float(patient[index].mean()), names, ["all"] * 240, 400, 0)
    by_slide = bootstrap_interval(lambda index: float(patient[index].mean()), list(map(str, range(240))), ["all"] * 240, 400, 0)
    assert by_patient.high - by_patient.low > 3 * (by_slide.high - by_slide.low)


def test_bootstrap_is_seeded_and_does_not_depend_on_row_order():
    rng = np.random.default_rng(4)
    value, places = rng.normal(size=30), rng.permutation(30)
    names, kinds = [f"p{index:02d}" for index in range(30)], ["x", "y"] * 15

    def run(seed, order=slice(None)):
        chosen, stratum = np.array(names)[order].tolist(), np.array(kinds)[order].tolist()
        return bootstrap_interval(lambda index: float(value[order][index].mean()), chosen, stratum, 200, seed)

    assert run(0) == run(0) != run(1)
    assert run(0, places)[:3] == pytest.approx(run(0)[:3], rel=1e-12)


def test_weights_are_counts_that_keep_every_stratum_and_do_not_depend_on_the_block(monkeypatch):
    names = [f"p{index // 2}" for index in range(20)]
    patients = patients_of(names, [0] * 12 + [1] * 8)
    weight_RN = np.concatenate(list(patients.weights(300, 7)))
    assert weight_RN.shape == (300, 20)
    assert (weight_RN[:, :12].sum(axis=1) == 12).all() and (weight_RN[:, 12:].sum(axis=1) == 8).all()
    assert (weight_RN[:, ::2] == weight_RN[:, 1::2]).all()  # both slides of a patient
    assert weight_RN.mean(axis=0) == pytest.approx(np.ones(20), abs=0.25)
    monkeypatch.setattr(intervals, "BLOCK", 100)
    assert (np.concatenate(list(patients.weights(300, 7))) == weight_RN).all()


def test_draws_of_weights_equal_draws_of_samples():
    rng = np.random.default_rng(5)
    score, positive = rng.integers(0, 5, 24).astype(float), np.arange(24) < 10
    names, kinds = [f"p{index:02d}" for index in range(24)], positive.tolist()
    draws = bootstrap_draws({"auroc": metrics.weighted_auroc(score, positive)}, patients_of(names, kinds), 50, 3)["auroc"]
    plain = []
    bootstrap_interval(lambda index: plain.append(auroc(score[index], positive[index])) or plain[-1], names, kinds, 50, 3)
    assert draws == pytest.approx(np.array(plain[:50]))


def test_a_patient_belongs_to_the_rarest_class_it_has():
    assert strata([0, 0, 1, 0, 0], ["a", "a", "b", "b", "c"]) == [0, 0, 1, 1, 0]
    assert strata([0, 0, 1, 0, 0][::-1], ["a", "a", "b", "b", "c"][::-1]) == [0, 1, 1, 0, 0]


def test_intervals_are_withheld_with_the_reason():
    few = intervals.percentile_interval(0.5, np.append(np.full(80, np.nan), np.linspace(0, 1, 20)), 9)
    assert not few.known and few.method == "undefined in 80 of 100 resamples"
    assert not intervals.percentile_interval(0.5, np.linspace(0, 1, 100), 1).known
    assert intervals.logit_interval(1.0, np.linspace(0.9, 1, 100), 9).method == intervals.NO_SPREAD
    assert intervals.percentile_interval(0.7, np.full(100, 0.7), 9).method == intervals.NO_SPREAD
    few = intervals.percentile_interval(0.5, np.linspace(0, 1, 100), 4)
    assert not few.known and few.method == "4 patients of a kind to draw from, 5 needed"
    assert intervals.percentile_interval(0.5, np.linspace(0, 1, 100), 5).known
    assert intervals.percentile_interval(0.7, np.full(100, 0.7), 3).method == intervals.NO_SPREAD  # of which more is known
    assert not bootstrap_interval(lambda index: 0.7, ["a", "b", "c"], [0] * 3, 20, 0).known


def test_small_samples_widen_intervals_and_large_ones_do_not():
    assert intervals.expansion(5) > intervals.expansion(20) > intervals.expansion(10000) > 1.95
    assert intervals.expansion(10000) == pytest.approx(1.96, abs=0.001)
    draws = np.random.default_rng(6).normal(0.6, 0.05, 4000)
    small, large = (intervals.percentile_interval(0.6, draws, count) for count in (5, 10000))
    assert small.high - small.low > 1.3 * (large.high - large.low)
    small, large = (intervals.logit_interval(0.6, draws, count) for count in (5, 10000))
    assert small.high - small.low > 1.3 * (large.high - large.low)
    assert (large.low, large.high) == pytest.approx((0.5, 0.7), abs=0.02)


def test_the_error_of_calibration_is_never_said_to_be_surely_above_0_when_it_is_0():
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(150):
        chance = rng.random(80)
        right = rng.random(80) < chance
        everyone = patients_of([f"p{index}" for index in range(80)], [0] * 80)
        draws = bootstrap_draws({"": metrics.weighted_calibration_drift(chance, right)}, everyone, 200, 0)[""]
        interval = intervals.distance_interval(metrics.calibration_error(chance, right), draws, 80)
        held += interval.low == 0.0
    assert held / 150 > 0.88


def test_every_resample_keeps_the_number_of_patients_per_class():
    label = np.array([0] * 3 + [1] * 9)
    seen = []
    bootstrap_interval(
        lambda index: seen.append(int(label[index].sum())) or 0.0, [f"p{i}" for i in range(12)], label.tolist(), 50, 0
    )
    assert set(seen) == {9}


def slide(name, patient, score, truth):
    return ScoredSlide(name, patient, np.array(score, float), np.array(truth, np.int8))


def test_localisation_never_pools_raw_attention_across_slides():
    # In each slide the lesion is found; pooled, the large attention of the small bag would hide it.
    slides = [
        slide("s1", "p1", [0.2, 0.8], [0, 1]),
        slide("s2", "p2", [0.01, 0.02, 0.03, 0.09], [0, 0, 0, 1]),
    ]
    found = localisation_auroc(slides, 100, 0)
    assert (found.value, found.n_slides, found.n_patients) == (1.0, 2, 2)
    assert auroc(np.concatenate([s.score_N for s in slides]), np.concatenate([s.truth_N for s in slides]) == 1) < 1


def test_localisation_leaves_out_unknown_tiles_and_slides_of_one_kind():
    known = slide("s1", "p1", [0.1, 0.9, 0.5], [0, 1, UNKNOWN])
    none = slide("s2", "p2", [0.1, 0.9], [0, 0])
    unknown = slide("s3", "p3", [0.1, 0.9], [UNKNOWN, 1])
    found = localisation_auroc([known, none, unknown], 100, 0)
    assert (found.value, found.n_slides) == (1.0, 1)
    assert (found.low, found.high) == (0.0, 1.0)  # one patient says nothing of others
    assert localisation_auroc([none, unknown], 100, 0) is None
