import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.utils.class_weight import compute_sample_weight

from tests.mil.tasks.conftest import SETTINGS, make, table


def rows_of(*labels, column="label"):
    return [{column: label} for label in labels]


def as_loss(tasks, output, target, weight=None):
    weight = np.ones(len(output)) if weight is None else weight
    return tasks.loss(torch.tensor(output), torch.tensor(target), torch.tensor(weight)[:, None]).item()


def test_classes_are_sorted_and_the_positive_one_is_the_last_or_the_stated():
    rows = rows_of("tumour", "normal", "", "tumour")
    tasks = make(rows)
    assert (tasks.main.kind, tasks.main.classes, tasks.main.positive) == ("binary", ("normal", "tumour"), 1)
    assert tasks.columns == ("probability_normal", "probability_tumour")
    assert make(rows, positive="normal").main.positive == 0
    assert make(**SETTINGS["ordinal"]).main.positive == 2
    np.testing.assert_array_equal(tasks.encode(rows), [[1], [0], [np.nan], [1]])


def test_cross_entropy_and_softmax_are_those_of_scipy():
    tasks = make(**SETTINGS["multiclass"])
    rng = np.random.default_rng(0)
    output, weight = rng.normal(size=(60, 3)), rng.random(60)
    target = tasks.encode(table())
    said = softmax(output, axis=1)
    loss = -(weight * np.log(said[np.arange(60), target[:, 0].astype(int)])).mean()
    assert as_loss(tasks, output, target, weight) == pytest.approx(loss)
    np.testing.assert_allclose(tasks.predict(output, {"organ": {}}), said)


def test_balanced_weights_are_those_of_scikit_learn():
    tasks = make(**SETTINGS["multiclass"])
    target = tasks.encode(table())[:10]
    np.testing.assert_allclose(tasks.balance(target)[:, 0], compute_sample_weight("balanced", target[:, 0]))


def test_unlabelled_bags_weigh_one_and_absent_classes_nothing():
    weight = make(**SETTINGS["multiclass"]).balance(np.array([[0.0], [0], [0], [1], [np.nan]]))[:, 0]
    np.testing.assert_allclose(weight, [2 / 3, 2 / 3, 2 / 3, 2, 1])


def test_multilabel_columns_are_balanced_on_average():
    tasks = make(**SETTINGS["multilabel"])
    weight = tasks.balance(np.array([[1.0, np.nan], [0, np.nan], [0, np.nan], [0, 0], [np.nan, np.nan]]))[:, 0]
    assert weight[:4].mean() == pytest.approx(1)
    assert weight[0] == pytest.approx(3 * weight[1])
    assert weight[4] == 1


def test_multilabel_is_a_sigmoid_per_column_and_a_mean_over_known_values():
    tasks = make(**SETTINGS["multilabel"])
    output, target = np.array([[0.3, -2.0], [1.0, 5.0]]), np.array([[1.0, 0.0], [0.0, np.nan]])
    first = -(np.log(expit(0.3)) + np.log(1 - expit(-2.0))) / 2
    second = -np.log(1 - expit(1.0))
    assert as_loss(tasks, output, target) == pytest.approx((first + second) / 2)
    np.testing.assert_allclose(tasks.predict(output, {"genes": {}}), expit(output))
    assert tasks.columns == ("probability_braf", "probability_kras")
    assert (tasks.main.classes, tasks.main.positive) == (("braf", "kras"), -1)


def test_multilabel_strata_name_the_rarest_column():
    task = make(**SETTINGS["multilabel"]).main
    assert [task.stratum(np.array(row)) for row in ([1.0, 1.0], [1.0, np.nan], [0.0, 0.0])] == ["kras", "braf", "none"]


def test_ordinal_chances_are_a_chain_and_sum_to_one():
    """CORN: outputs are the logits of going beyond each class once it is reached."""
    tasks = make(**SETTINGS["ordinal"])
    output = np.array([[0.2, -1.0], [40.0, -800.0], [-800.0, 0.0]])
    beyond = expit(output)
    plain = np.stack([1 - beyond[:, 0], beyond[:, 0] * (1 - beyond[:, 1]), beyond[:, 0] * beyond[:, 1]], axis=1)
    said = tasks.predict(output, {"grade": {}})
    np.testing.assert_allclose(said, plain, atol=1e-15)
    np.testing.assert_allclose(said.sum(1), 1, rtol=1e-12)
    assert tasks.outputs == 2


def test_the_ordinal_loss_is_the_negative_log_likelihood():
    tasks = make(**SETTINGS["ordinal"])
    output = np.random.default_rng(0).normal(size=(60, 2))
    target = tasks.encode(table())
    said = tasks.predict(output, {"grade": {}})[np.arange(60), target[:, 0].astype(int)]
    assert as_loss(tasks, output, target) == pytest.approx(-np.log(said).mean())


def test_ordinal_classes_follow_the_order_not_the_alphabet():
    tasks = make(**SETTINGS["ordinal"])
    assert tasks.main.classes == ("low", "mid", "high")
    assert tasks.encode([{"grade": "high"}, {"grade": "low"}]).tolist() == [[2], [0]]


def test_absent_classes_are_noted():
    tasks = make(**SETTINGS["multiclass"])
    assert tasks.notes(np.array([[0.0], [np.nan]])) == ["organ: no bag of class lung, skin"]
    multilabel = make(**SETTINGS["multilabel"])
    assert multilabel.notes(np.array([[0.0, 1.0], [1.0, np.nan]])) == ["genes: no bags with both 0 and 1 in kras"]
