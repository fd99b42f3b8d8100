"""Probes: equal to scikit-learn's, blind to a patient's own tiles, and honest about differences."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from pathfm.errors import UsageError
from pathfm.stats import probes


def sample(seed=0, patients=24, tiles=6, width=8, signal=1.5, classes=2):
    """Features with a class signal and a strong patient signal, labels, patients."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(patients) % classes, tiles)
    group = np.repeat([f"p{number:02d}" for number in range(patients)], tiles).tolist()
    own = np.repeat(rng.normal(size=(patients, width)), tiles, axis=0)
    features = own + 0.3 * rng.normal(size=(len(label), width))
    features[:, :classes] += signal * np.eye(classes)[label]
    return features, label.tolist(), group


@pytest.mark.parametrize("classes", [2, 3])
def test_knn_equals_scikit_learn(classes):
    features, label, _ = sample(classes=classes)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    train, test = np.arange(0, 144, 2), np.arange(1, 144, 2)
    reference = KNeighborsClassifier(
        20, metric="sqeuclidean", algorithm="brute", weights=lambda squared: np.exp((1 - squared / 2) / probes.TEMPERATURE)
    )
    reference.fit(unit[train], np.array(label)[train])
    scores = probes.knn_scores(features[train] * 7, np.array(label)[train], features[test], classes)
    np.testing.assert_allclose(scores, reference.predict_proba(unit[test]), atol=1e-9)


def test_knn_with_fewer_samples_than_neighbours_and_with_a_zero_feature():
    scores = probes.knn_scores([[1.0, 0], [0, 1]], [0, 1], [[2.0, 0], [0, 0]], 2)
    assert scores[0, 0] > 0.99
    assert scores[1].tolist() == [0.5, 0.5]


def test_the_linear_probe_equals_scikit_learn_at_its_penalty(monkeypatch):
    features, label, group = sample()
    monkeypatch.setattr(probes, "PENALTIES", (0.1,))
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(features[:96], label[:96])
    scores = probes.linear_scores(features[:96], label[:96], group[:96], features[96:], 2)
    np.testing.assert_allclose(scores, reference.predict_proba(features[96:]), atol=1e-6)


def test_the_penalty_is_chosen_on_training_groups_only(monkeypatch):
    features, label, group = sample(signal=0.5)
    seen = []
    fitted = probes._fitted_scores
    monkeypatch.setattr(probes, "_fitted_scores", lambda *given: seen.append((given[0], given[2])) or fitted(*given))
    probes.linear_scores(features[:96], label[:96], group[:96], features[96:], 2)
    group_of = {row.tobytes(): name for row, name in zip(features, group, strict=True)}
    assert len(seen) == 3 * len(probes.PENALTIES) + 1
    for fit, held in seen:
        parts = [{group_of[row.tobytes()] for row in part} for part in (fit, held)]
        assert not parts[0] & parts[1]
    test_rows = {row.tobytes() for row in features[96:]}
    assert not any(row.tobytes() in test_rows for fit, held in seen[:-1] for row in (*fit, *held))


def test_the_linear_probe_multiplies_in_one_thread(monkeypatch):
    """With several, threads wait for each other in thousands of tiny products: minutes for what takes a second."""
    features, label, group = sample()
    fitted, used = probes._fitted_scores, set()

    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    monkeypatch.setattr(probes, "_fitted_scores", lambda *given: used.update(threads()) or fitted(*given))
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        probes.linear_scores(features, label, group, features, 2)
        assert threads() == before, "what other code may use is as it was"
    assert used == {1}


def test_a_class_missing_in_training_gets_no_probability():
    features, label, group = sample(classes=3)
    known = [index for index, number in enumerate(label) if number != 1]
    scores = probes.linear_scores(features[known], np.array(label)[known], np.array(group)[known].tolist(), features, 3)
    assert scores[:, 1].max() == 0
    np.testing.assert_allclose(scores.sum(axis=1), 1)


@pytest.mark.parametrize("probe", probes.PROBES)
def test_no_sample_is_scored_by_its_own_patient(probe, monkeypatch):
    features, label, group = sample()
    group_of = {row.tobytes(): name for row, name in zip(features, group, strict=True)}
    real, times = probes.PROBES[probe], []

    def watched(train, train_label, train_group, test, *rest):
        times.append(len(test))
        assert not {group_of[row.tobytes()] for row in train} & {group_of[row.tobytes()] for row in test}
        assert [group_of[row.tobytes()] for row in train] == train_group
        return real(train, train_label, train_group, test, *rest)

    monkeypatch.setitem(probes.PROBES, probe, watched)
    scores = probes.out_of_fold_scores(probe, features, label, group)
    assert sum(times) == len(label)
    np.testing.assert_allclose(scores.sum(axis=1), 1)


def test_a_patient_signal_alone_gives_no_score():
    """Random labels per patient: split by tiles the probe would look perfect, split by patients it is at chance."""
    features, label, group = sample(signal=0.0, patients=40)
    leaky = probes.out_of_fold_scores("knn", features, label, [f"{name}-{tile}" for tile, name in enumerate(group)])
    honest = probes.out_of_fold_scores("knn", features, label, group)
    assert probes.score_metric("auroc", leaky, label) > 0.95
    assert 0.3 < probes.score_metric("auroc", honest, label) < 0.7


def test_folds_depend_neither_on_features_nor_on_row_order():
    features, label, group = sample(classes=3)
    label = [(number + index) % 3 if index % 6 == 0 else number for index, number in enumerate(label)]  # several per patient
    order = np.random.default_rng(1).permutation(len(label))
    scores = probes.out_of_fold_scores("knn", features, label, group)
    turned = probes.out_of_fold_scores("knn", features[order], np.array(label)[order], np.array(group)[order])
    np.testing.assert_allclose(turned, scores[order], atol=1e-9)


def test_too_few_patients_are_refused():
    features, label, group = sample(patients=6)
    with pytest.raises(UsageError, match="too few patients"):
        probes.out_of_fold_scores("knn", features, label, group)


@pytest.mark.parametrize("metric", ["auroc", "balanced accuracy"])
def test_a_paired_difference_is_narrower_than_an_unpaired_one(metric):
    features, label, group = sample(patients=40, signal=1.0)
    worse = features + 0.6 * np.random.default_rng(2).normal(size=features.shape)
    better, worse = (probes.out_of_fold_scores("linear", each, label, group) for each in (features, worse))
    paired = probes.paired_difference(metric, (better, worse), label, group, 300)
    assert paired.value == pytest.approx(probes.score_metric(metric, better, label) - probes.score_metric(metric, worse, label))
    assert paired.low <= paired.value <= paired.high
    alone = probes.paired_difference(metric, (better, np.tile([0.9, 0.1], (len(label), 1))), label, group, 300)
    assert paired.high - paired.low < alone.high - alone.low
    nothing = probes.paired_difference(metric, (better, better), label, group, 50)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_the_interval_of_a_difference_covers_the_truth():
    """Two features of the same quality: 0 lies in about 95 % of the intervals."""
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        label = np.repeat(np.arange(40) % 2, 3)
        scores = [np.stack([-x, x], axis=1) for x in label + np.repeat(rng.normal(size=(2, 40)), 3, axis=1)]
        interval = probes.paired_difference(
            "auroc", tuple(scores), label.tolist(), np.repeat(np.arange(40), 3).astype(str), 200
        )
        hits += interval.low <= 0 <= interval.high
    assert hits >= 52


def test_rankme_is_the_number_of_equal_directions():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 16)))[0]
    assert probes.rankme(basis[:, :5] @ np.eye(5, 16)) == pytest.approx(5, rel=1e-3)
    assert probes.rankme(np.ones((20, 8))) == pytest.approx(1, rel=1e-3)
    assert probes.rankme(np.zeros((4, 3))) == pytest.approx(1, rel=1e-3)


def test_cka_does_not_see_turns_and_scales_but_sees_differences():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 6))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert probes.linear_cka(features, 3 * features @ turn + 5) == pytest.approx(1)
    assert probes.linear_cka(features, rng.normal(size=(200, 6))) < 0.1
    centred = features - features.mean(axis=0)
    gram = centred @ centred.T
    other = centred[:, :2] @ centred[:, :2].T
    expected = (gram * other).sum() / np.sqrt((gram**2).sum() * (other**2).sum())  # the definition by kernels
    assert probes.linear_cka(features, features[:, :2]) == pytest.approx(expected)
    assert probes.linear_cka(features, np.ones((200, 3))) == 0


def test_a_difference_that_resamples_cannot_tell_leaves_room_for_groups_not_seen():
    scores = tuple(np.stack([-each, each], axis=1) for each in (np.arange(6.0), np.array([0.0, 5, 1, 3, 2, 4])))
    found = probes.paired_difference("auroc", scores, [0, 0, 0, 1, 1, 1], list("abcdef"), 20)
    share = 0.025 ** (1 / 3)
    assert (found.low, found.high) == pytest.approx((share * found.value - 1 + share, share * found.value + 1 - share))
    assert found.method == "3 patients of a kind to draw from, 5 needed"
