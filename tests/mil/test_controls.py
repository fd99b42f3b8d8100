"""Controls: what a useless one must say, and what a telling one must."""

from __future__ import annotations

import pytest
from sklearn.metrics import roc_auc_score

from pathfm.mil.controls import count_baseline, shuffled_labels
from pathfm.mil.ensemble import FoldPlaces

FOLDS = [FoldPlaces([i for i in range(40) if i % 5 != k], [], list(range(k, 40, 5))) for k in range(5)]
LABEL = [i // 5 % 2 for i in range(40)]


def _auroc(count, label):
    return roc_auc_score(label, count_baseline(count, label, FOLDS, 1)[:, 1])


def test_tile_count_says_nothing_of_a_balanced_cohort():
    assert _auroc([60 + (i // 10) * 7 for i in range(40)], LABEL) == pytest.approx(0.5, abs=0.05)


def test_tile_count_tells_which_side_has_more_tiles():
    fewer = [100 - 30 * one for one in LABEL]
    assert _auroc(fewer, LABEL) == 0.0
    assert _auroc(fewer, [1 - one for one in LABEL]) == 1.0


def test_tile_count_of_three_classes_is_fitted():
    label = [i % 3 for i in range(40)]
    probability = count_baseline([10 ** (1 + one) for one in label], label, FOLDS, 2)
    assert (probability.argmax(axis=1) == label).all()


def test_shuffled_labels_keep_the_folds_and_know_nothing_of_the_truth():
    truth = {f"p{i:02d}": "lesion" if i % 2 else "normal" for i in range(40)}
    parts = [[f"p{i:02d}" for i in range(start, 40, 5)] for start in range(5)]
    seen = set()
    for seed in range(50):
        shuffled = shuffled_labels(truth, parts, seed)
        for part in parts:
            assert sorted(shuffled[p] for p in part) == sorted(truth[p] for p in part)
        agree = sum(shuffled[p] == truth[p] for p in truth)
        assert 15 <= agree <= 25
        seen.add(tuple(shuffled[p] for p in sorted(truth)))
    assert len(seen) == 50
