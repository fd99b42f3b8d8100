"""Controls: what a useless one must say, and what a telling one must."""

from __future__ import annotations

import numpy as np
import pytest
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
    return roc_auc_score(label, count_baseline(count, target, tasks, FOLDS)[:, 1])


def test_tile_count_says_nothing_of_a_balanced_cohort():
    assert _auroc([60 + (i // 10) * 7 for i in range(40)], LABEL) == pytest.approx(0.5, abs=0.05)


def test_tile_count_tells_which_side_has_more_tiles():
    fewer = [100 - 30 * one for one in LABEL]
    assert _auroc(fewer, LABEL) == 0.0
    assert _auroc(fewer, [1 - one for one in LABEL]) == 1.0


def test_tile_count_of_three_classes_is_fitted():
    label = [i % 3 for i in range(40)]
    tasks, target = _tasks(label)
    probability = count_baseline([10 ** (1 + one) for one in label], target, tasks, FOLDS)
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
