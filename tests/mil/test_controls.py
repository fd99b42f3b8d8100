"""Controls: what a useless one must say, and what a telling one must."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from pathfm.mil.controls import count_baseline, cross_fit, dealt_patients, fit_linear, permuted_patients
from pathfm.mil.ensemble import FoldPlaces
from pathfm.mil.tasks import make_tasks
from pathfm.mil_settings import MilSettings

FOLDS = [FoldPlaces([i for i in range(40) if i % 5 != k], [], list(range(k, 40, 5))) for k in range(5)]
LABEL = [i // 5 % 2 for i in range(40)]


def _tasks(labels, **settings):
    rows = [{"label": str(label)} for label in labels]
    tasks = make_tasks(MilSettings(**settings), rows)
    return tasks, tasks.encode(rows)


def _auroc(count, label):
    tasks, target = _tasks(label)
    return roc_auc_score(label, count_baseline(count, target, tasks, FOLDS)[0][:, 1])


def test_tile_count_says_nothing_of_a_balanced_cohort():
    assert _auroc([60 + (i // 10) * 7 for i in range(40)], LABEL) == pytest.approx(0.5, abs=0.05)


def test_tile_count_is_read_in_the_way_that_suits_it_and_says_which():
    fewer = [100 - 30 * one for one in LABEL]
    assert _auroc(fewer, LABEL) == _auroc(fewer, [1 - one for one in LABEL]) == 1.0
    tasks, target = _tasks(LABEL)
    assert count_baseline(fewer, target, tasks, FOLDS)[1] == {"label": "fewer tiles, more 1"}
    more = [100 + 30 * one for one in LABEL]
    assert count_baseline(more, target, tasks, FOLDS)[1] == {"label": "more tiles, more 1"}


def test_tile_count_is_as_good_whichever_class_is_positive():
    rng = np.random.default_rng(0)
    count = [int(rng.integers(4, 9) if one else rng.integers(6, 14)) for one in LABEL]
    found = []
    for positive in "01":
        tasks, target = _tasks(LABEL, positive=positive)
        said, _ = count_baseline(count, target, tasks, FOLDS)
        np.testing.assert_allclose(said.sum(axis=1), 1)
        found.append(roc_auc_score([str(one) == positive for one in LABEL], said[:, int(positive)]))
    assert found[0] == pytest.approx(found[1]) and found[0] > 0.8


def test_tile_count_of_two_classes_is_not_fitted_beside_other_tasks_either():
    count = [60 + (i // 10) * 7 for i in range(40)]
    rows = [{"label": str(one), "size": str(tiles)} for one, tiles in zip(LABEL, count, strict=True)]
    tasks = make_tasks(MilSettings(also=[{"label": "size", "kind": "regression"}]), rows)
    target = tasks.encode(rows)
    said, direction = count_baseline(count, target, tasks, FOLDS)
    alone, target_alone = _tasks(LABEL)
    np.testing.assert_array_equal(said[:, :2], count_baseline(count, target_alone, alone, FOLDS)[0])
    assert set(direction) == {"label"} and np.corrcoef(said[:, 2], count)[0, 1] > 0.9


def test_tile_count_of_three_classes_is_fitted():
    label = [i % 3 for i in range(40)]
    tasks, target = _tasks(label)
    probability, direction = count_baseline([10 ** (1 + one) for one in label], target, tasks, FOLDS)
    assert not direction
    assert (probability.argmax(axis=1) == label).all()


def test_shuffled_labels_keep_the_folds_and_know_nothing_of_the_truth():
    truth = {f"p{i:02d}": "lesion" if i % 2 else "normal" for i in range(40)}
    parts = [[f"p{i:02d}" for i in range(start, 40, 5)] for start in range(5)]
    seen = set()
    for seed in range(50):
        shuffled = {patient: truth[source] for patient, source in dealt_patients(truth, parts, seed).items()}
        for part in parts:
            assert sorted(shuffled[p] for p in part) == sorted(truth[p] for p in part)
        agree = sum(shuffled[p] == truth[p] for p in truth)
        assert 15 <= agree <= 25
        seen.add(tuple(shuffled[p] for p in sorted(truth)))
    assert len(seen) == 50


def test_a_linear_control_is_the_balanced_logistic_regression():
    rng = np.random.default_rng(0)
    value, label = rng.normal(size=(60, 4)), (rng.random(60) < 0.3).astype(int)
    value[:, 0] += label
    tasks, target = _tasks(label)
    model = fit_linear(value, target, tasks)
    scaled = StandardScaler().fit_transform(value)
    # Two outputs whose difference counts: half the squares of both are a quarter of the square of their difference.
    reference = LogisticRegression(C=2.0, class_weight="balanced", tol=1e-8, max_iter=10_000).fit(scaled, label)
    found = model(value)
    np.testing.assert_allclose(found[:, 1] - found[:, 0], reference.decision_function(scaled), atol=2e-3)


def test_linear_controls_do_not_depend_on_threads():
    tasks, target = _tasks(np.arange(1300) % 2)
    value, before = np.random.default_rng(0).random((1300, 64)) + 0.05 * target, torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(fit_linear(value, target, tasks))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0].weight_DO, found[1].weight_DO)
    np.testing.assert_array_equal(found[0].bias_O, found[1].bias_O)


def test_linear_controls_of_other_tasks_learn_too():
    rng = np.random.default_rng(1)
    value = rng.normal(size=(40, 3))
    tasks, target = _tasks([f"{10 + 5 * row[0]:.3f}" for row in value], kind="regression")
    said, _ = cross_fit(value, target, tasks, FOLDS)
    assert np.corrcoef(said[:, 0], target[:, 0])[0, 1] > 0.95


def test_permutations_move_every_label_blindly():
    patients = [f"p{index}" for index in range(30)]
    moved = [permuted_patients(patients, 0, number) for number in range(20)]
    assert all(sorted(one.values()) == sorted(patients) for one in moved)
    assert len({tuple(one.items()) for one in moved}) == 20
    assert moved[3] == permuted_patients(patients[::-1], 0, 3)
