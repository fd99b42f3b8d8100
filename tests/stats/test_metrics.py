"""Metrics against scikit-learn and against the plainest thing that can be written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from pathfm.stats.metrics import auroc, balanced_accuracy, macro_auroc, roc_curve

samples = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({positive for _, positive in rows}) == 2
)


def pairs_auroc(score, positive):
    values = [(a > b) + (a == b) / 2 for a in score[positive] for b in score[~positive]]
    return sum(values) / len(values)


@given(samples)
def test_auroc_equals_counting_pairs_and_sklearn(rows):
    score, positive = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])
    assert auroc(score, positive) == pytest.approx(pairs_auroc(score, positive))
    assert auroc(score, positive) == pytest.approx(reference.roc_auc_score(positive, score))


def test_one_class_is_an_error_not_an_auroc_of_1():
    with pytest.raises(ValueError, match="both classes"):
        auroc([0.1, 0.9], [True, True])


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="finite"):
        auroc([0.1, np.nan], [True, False])


@given(samples)
def test_roc_curve_equals_sklearn(rows):
    score, positive = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])
    false, true = roc_curve(score, positive)
    wanted_false, wanted_true, _ = reference.roc_curve(positive, score, drop_intermediate=False)
    np.testing.assert_allclose(false, wanted_false)
    np.testing.assert_allclose(true, wanted_true)
    assert np.trapezoid(true, false) == pytest.approx(auroc(score, positive))


def test_macro_auroc_and_balanced_accuracy_equal_sklearn():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 60)
    probability = rng.dirichlet(np.ones(3), 60)
    assert macro_auroc(probability, label) == pytest.approx(reference.roc_auc_score(label, probability, multi_class="ovr"))
    predicted = probability.argmax(1)
    assert balanced_accuracy(predicted, label) == pytest.approx(reference.balanced_accuracy_score(label, predicted))
    assert balanced_accuracy([0, 0, 2], [0, 0, 2]) == 1.0
