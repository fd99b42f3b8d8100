"""Metrics against scikit-learn and against the plainest thing that can be written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn import metrics as reference

from pathfm.stats import metrics
from pathfm.stats.metrics import auroc, average_precision, balanced_accuracy, brier, calibration_error, macro_auroc, roc_curve
from pathfm.stats.metrics import value_of as value
from tests.stats.plain_survival import concordance_index, time_dependent_auc

samples = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({positive for _, positive in rows}) == 2
)
exactly = {"rel": 1e-12, "abs": 1e-12}


def arrays(rows):
    return np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])


def pairs_auroc(score, positive):
    values = [(a > b) + (a == b) / 2 for a in score[positive] for b in score[~positive]]
    return sum(values) / len(values)


@given(samples)
def test_auroc_equals_counting_pairs_and_sklearn(rows):
    score, positive = arrays(rows)
    assert auroc(score, positive) == pytest.approx(pairs_auroc(score, positive), **exactly)
    assert auroc(score, positive) == pytest.approx(reference.roc_auc_score(positive, score), **exactly)
    assert value(metrics.weighted_auroc(score, positive), len(score)) == pytest.approx(auroc(score, positive), **exactly)


@given(samples)
def test_average_precision_equals_sklearn(rows):
    score, positive = arrays(rows)
    assert average_precision(score, positive) == pytest.approx(reference.average_precision_score(positive, score), **exactly)


def test_one_class_is_an_error_not_an_auroc_of_1():
    """DSMIL sets the AUROC of a class without patients to 1."""
    for function in (auroc, average_precision):
        with pytest.raises(ValueError, match="both classes"):
            function([0.1, 0.9], [True, True])
    for make in (metrics.weighted_auroc, metrics.weighted_average_precision):
        assert np.isnan(value(make([0.1, 0.9], [False, False]), 2))


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="finite"):
        auroc([0.1, np.nan], [True, False])


@given(samples)
def test_roc_curve_equals_sklearn(rows):
    score, positive = arrays(rows)
    false, true = roc_curve(score, positive)
    wanted_false, wanted_true, _ = reference.roc_curve(positive, score, drop_intermediate=False)
    np.testing.assert_allclose(false, wanted_false)
    np.testing.assert_allclose(true, wanted_true)
    assert np.trapezoid(true, false) == pytest.approx(auroc(score, positive))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_metrics_of_classes_equal_sklearn(classes):
    rng = np.random.default_rng(classes)
    label = np.append(np.arange(classes), rng.integers(0, classes, 60))
    probability = np.round(rng.dirichlet(np.ones(classes), len(label)), 1) + 0.1
    probability /= probability.sum(axis=1, keepdims=True)
    predicted = probability.argmax(1)

    def found(summary):
        return value(metrics.weighted_confusion(predicted, label, classes, summary), len(label))

    wanted = reference.balanced_accuracy_score(label, predicted)
    assert found(metrics.mean_recall) == pytest.approx(wanted, **exactly)
    assert balanced_accuracy(predicted, label) == pytest.approx(wanted, **exactly)
    assert found(metrics.f1_of(range(classes))) == pytest.approx(
        reference.f1_score(label, predicted, average="macro"), **exactly
    )
    assert found(metrics.f1_of([1])) == pytest.approx(reference.f1_score(label == 1, predicted == 1), **exactly)
    assert found(metrics.recall_of(1)) == pytest.approx(reference.recall_score(label == 1, predicted == 1), **exactly)
    assert found(metrics.specificity_of(1)) == pytest.approx(reference.recall_score(label != 1, predicted != 1), **exactly)
    kappa = reference.cohen_kappa_score(label, predicted, weights="quadratic")
    assert found(metrics.quadratic_kappa) == pytest.approx(kappa, **exactly)
    truth = np.eye(classes)[label]
    terms = (probability - truth)[:, 1] ** 2 if classes == 2 else ((probability - truth) ** 2).sum(1)
    assert brier(probability, label) == pytest.approx(terms.mean(), **exactly)
    if classes == 2:
        assert brier(probability, label) == pytest.approx(reference.brier_score_loss(label, probability[:, 1]), **exactly)
    else:
        wanted = reference.roc_auc_score(label, probability, multi_class="ovr")
        assert macro_auroc(probability, label) == pytest.approx(wanted, **exactly)


def test_metrics_of_numbers_equal_sklearn_and_scipy():
    rng = np.random.default_rng(0)
    truth = 1000 + rng.normal(size=80)
    predicted = truth + rng.normal(size=80)
    assert value(metrics.weighted_r2(predicted, truth), 80) == pytest.approx(reference.r2_score(truth, predicted), **exactly)
    assert value(metrics.weighted_pearson(predicted, truth), 80) == pytest.approx(pearsonr(predicted, truth)[0], **exactly)
    error = value(metrics.weighted_mean(np.abs(truth - predicted)), 80)
    assert error == pytest.approx(reference.mean_absolute_error(truth, predicted), **exactly)
    assert np.isnan(value(metrics.weighted_r2(predicted, np.full(80, 3.3)), 80))
    assert np.isnan(value(metrics.weighted_pearson(np.full(80, 3.3), truth), 80))


def test_metrics_of_survival_equal_those_of_survival_itself():
    rng = np.random.default_rng(1)
    time, event, risk = rng.integers(1, 9, 90).astype(float), rng.random(90) < 0.6, rng.integers(0, 6, 90).astype(float)
    found = value(metrics.weighted_concordance(risk, time, event), 90)
    assert found == pytest.approx(concordance_index(risk, time, event), **exactly)
    weight = 1 / metrics_censoring(time, event)
    case, control = event & (time <= 4), time > 4
    found = value(metrics.weighted_order(risk, case * weight, control), 90)
    assert found == pytest.approx(time_dependent_auc(risk, time, event, 4), **exactly)


def metrics_censoring(time, event):
    from pathfm.stats.survival import censoring_curve

    return censoring_curve(time, event).at(time, before=True)


STATISTICS = {
    "auroc": lambda s, y: metrics.weighted_auroc(s, y),
    "auprc": lambda s, y: metrics.weighted_average_precision(s, y),
    "balanced accuracy": lambda s, y: metrics.weighted_confusion(s > 0.5, y, 2, metrics.mean_recall),
    "sensitivity": lambda s, y: metrics.weighted_confusion(s > 0.5, y, 2, metrics.recall_of(1)),
    "specificity": lambda s, y: metrics.weighted_confusion(s > 0.5, y, 2, metrics.specificity_of(1)),
    "f1": lambda s, y: metrics.weighted_confusion(s > 0.5, y, 2, metrics.f1_of([1])),
    "kappa": lambda s, y: metrics.weighted_confusion(s > 0.5, y, 2, metrics.quadratic_kappa),
    "mean": lambda s, y: metrics.weighted_mean((s - y) ** 2),
    "r2": lambda s, y: metrics.weighted_r2(s, y + s),
    "pearson": lambda s, y: metrics.weighted_pearson(s, y),
    "c-index": lambda s, y: metrics.weighted_concordance(s, 1 - s + y, y),
    "macro": lambda s, y: metrics.weighted_macro([metrics.weighted_auroc(s, y), metrics.weighted_auroc(-s, ~y)]),
}


@pytest.mark.parametrize("make", STATISTICS.values(), ids=STATISTICS)
def test_a_weight_is_a_number_of_copies(make):
    rng = np.random.default_rng(2)
    score, positive = rng.integers(0, 9, 40) / 8, rng.random(40) < 0.5
    weight_RN = rng.integers(0, 4, (6, 40)).astype(float)
    found = make(score, positive)(weight_RN)
    for row, weight_N in enumerate(weight_RN.astype(int)):
        copies = make(np.repeat(score, weight_N), np.repeat(positive, weight_N))
        assert found[row] == pytest.approx(value(copies, weight_N.sum()), rel=1e-10)
    assert np.isnan(make(score, positive)(np.zeros((1, 40)))).all()


def slow_calibration_error(confidence, right, bins):
    order = np.argsort(confidence, kind="stable")
    rank = {value: place for place, value in reversed(list(enumerate(confidence[order])))}
    parts = {}
    for sure, hit in zip(confidence, right, strict=True):
        parts.setdefault(rank[sure] * bins // len(confidence), []).append((sure, hit))
    return sum(abs(sum(sure - hit for sure, hit in part)) for part in parts.values()) / len(confidence)


@given(samples, st.integers(1, 12))
def test_calibration_error_equals_a_plain_loop(rows, bins):
    score, positive = arrays(rows)
    assert calibration_error(score / 6, positive, bins) == pytest.approx(slow_calibration_error(score / 6, positive, bins))


def test_calibration_error_tells_confident_from_calibrated():
    rng = np.random.default_rng(3)
    chance = rng.random(20000)
    positive = rng.random(20000) < chance
    assert calibration_error(chance, positive) < 0.02
    assert calibration_error(np.where(chance > 0.5, 0.99, 0.01), positive) > 0.2


def test_equal_values_share_a_bin_and_small_samples_have_few_bins():
    assert set(metrics.equal_mass_bins(np.full(30, 0.3))) == {0}
    assert len(set(metrics.equal_mass_bins(np.arange(24)))) == 2
    assert len(set(metrics.equal_mass_bins(np.arange(1000)))) == 10
    assert np.bincount(metrics.equal_mass_bins(np.arange(100), 5)).tolist() == [20] * 5


def test_too_few_for_a_calibration_error_are_counted_in_bins():
    assert metrics.too_few_bins(np.arange(9) / 9).startswith("0 bins of 10 or more")
    assert metrics.too_few_bins(np.arange(19) / 19).startswith("1 bin of 10 or more")
    assert metrics.too_few_bins(np.full(500, 0.3)).startswith("1 bin of 10 or more")  # one probability for everyone
    assert metrics.too_few_bins(np.arange(30) / 30) == ""
