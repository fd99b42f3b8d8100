"""Intervals: right against a slow version, sensible at the edges, and honest in simulation."""

import numpy as np
import pytest

from pathfm.stats.intervals import auroc_interval, balanced_accuracy_interval, bootstrap_interval, delong_variance
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


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    positive = np.arange(60) < 25
    truth, hits = 0.7602, 0  # of two unit normals one apart: Phi(1 / sqrt 2)
    for _ in range(600):
        interval = auroc_interval(rng.normal(size=60) + positive, positive)
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / 600 <= 0.98


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


def test_bootstrap_is_seeded_and_does_not_depend_on_row_order_of_strata():
    value = np.random.default_rng(4).normal(size=30)
    names = [f"p{index:02d}" for index in range(30)]

    def run(seed):
        return bootstrap_interval(lambda index: float(value[index].mean()), names, ["x", "y"] * 15, 200, seed)

    assert run(0) == run(0) != run(1)


def test_every_resample_keeps_the_number_of_patients_per_class():
    label = np.array([0] * 3 + [1] * 9)
    seen = []
    bootstrap_interval(
        lambda index: seen.append(int(label[index].sum())) or 0.0, [f"p{i}" for i in range(12)], label.tolist(), 50, 0
    )
    assert set(seen) == {9}


def test_all_right_is_not_certain_and_the_bootstrap_does_the_rest():
    label = [0, 1] * 10
    patients = [f"p{index}" for index in range(20)]
    perfect = balanced_accuracy_interval(label, label, patients, 100, 0)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(0.025 ** (1 / 20))
    one_wrong = balanced_accuracy_interval([1, *label[1:]], label, patients, 500, 0)
    assert one_wrong.low < one_wrong.value == 0.95 <= one_wrong.high


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
