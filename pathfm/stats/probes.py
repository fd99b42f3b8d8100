"""How much do frozen features know? kNN and linear probes that keep patients apart, and measures of the features themselves.

Legend: N training samples, M samples to score, D features, C classes (labels are 0..C-1), G groups (patients).

Sources: kNN as in DINO (Wu et al. 2018: k 20, temperature .07); RankMe (Garrido et al. 2023); CKA (Kornblith et al. 2019).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathfm.stats.folds import stratified_group_folds
from pathfm.stats.intervals import Interval, bootstrap_interval, patients_of, strata
from pathfm.stats.metrics import auroc, balanced_accuracy, macro_auroc

Array = NDArray[np.float64]

NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C (the inverse of the L2 penalty) that the linear probe chooses from."""
INNER_FOLDS = 3
MAX_ITERATIONS = 1000
EPSILON = 1e-7

Metric = Literal["auroc", "balanced accuracy"]


def knn_scores(train_ND: ArrayLike, label_N: ArrayLike, test_MD: ArrayLike, classes: int, k: int = NEIGHBOURS) -> Array:
    """Shares of the votes of the ``k`` nearest training samples, weighted by exp(cosine / temperature). Returns [M, C]."""
    label = np.asarray(label_N)
    cosine_MN = _unit(test_MD) @ _unit(train_ND).T
    k = min(k, len(label))
    nearest_Mk = np.argsort(-cosine_MN, axis=1, kind="stable")[:, :k]
    near_Mk = np.take_along_axis(cosine_MN, nearest_Mk, axis=1)
    # The largest is taken off first: shares do not change, and nothing overflows.
    weight_Mk = np.exp((near_Mk - near_Mk[:, :1]) / TEMPERATURE)
    votes_MC = np.stack([(weight_Mk * (label[nearest_Mk] == number)).sum(axis=1) for number in range(classes)], axis=1)
    shares_MC: Array = votes_MC / votes_MC.sum(axis=1, keepdims=True)
    return shares_MC


def linear_scores(
    train_ND: ArrayLike, label_N: ArrayLike, group_N: Sequence[str], test_MD: ArrayLike, classes: int, seed: int = 0
) -> Array:
    """Probabilities of a logistic regression on standardised features. Returns [M, C].

    C is the one of ``PENALTIES`` with the best balanced accuracy over inner folds of the training groups; the smallest of
    equals. With too few groups to tell, it is the middle one.

    Raises:
        ValueError: the training labels are of one class only.
    """
    from threadpoolctl import threadpool_limits

    train, label = np.asarray(train_ND, dtype=np.float64), np.asarray(label_N)
    # A fit is thousands of tiny products. Threads that share one wait for each other: a hundred times as long on busy cores.
    with threadpool_limits(1, user_api="blas"):
        penalty = _chosen_penalty(train, label, group_N, seed)
        return _fitted_scores(train, label, np.asarray(test_MD, dtype=np.float64), classes, penalty)


def _chosen_penalty(train: Array, label: NDArray[np.int_], group_N: Sequence[str], seed: int) -> float:
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(INNER_FOLDS, len(set(group_N)), *Counter(label.tolist()).values())
    usual = PENALTIES[len(PENALTIES) // 2]
    if folds < 2:
        return usual
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "The least populated class": folds without a class are left out below
        splits = list(
            StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32).split(train, label, np.asarray(group_N))
        )
    classes = int(label.max()) + 1
    usable = [(fit, held) for fit, held in splits if set(label[fit]) == set(label) and len(held)]
    if not usable:
        return usual

    def quality(penalty: float) -> float:
        scores = [_fitted_scores(train[fit], label[fit], train[held], classes, penalty) for fit, held in usable]
        truth = np.concatenate([label[held] for _, held in usable])
        return balanced_accuracy(np.concatenate(scores).argmax(axis=1), truth)

    return max(PENALTIES, key=lambda penalty: (round(quality(penalty), 9), -penalty))


def _fitted_scores(train: Array, label: NDArray[np.int_], test: Array, classes: int, penalty: float) -> Array:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe need not be exact to the last digit
        model.fit(scaler.transform(train), label)
    scores = np.zeros((len(test), classes))
    scores[:, model.classes_] = model.predict_proba(scaler.transform(test))
    return scores


def knn_probe(
    train_ND: ArrayLike, label_N: ArrayLike, group_N: Sequence[str], test_MD: ArrayLike, classes: int, seed: int = 0
) -> Array:
    """``knn_scores`` with the parameters of every probe; groups and seed change nothing."""
    return knn_scores(train_ND, label_N, test_MD, classes)


PROBES: dict[str, Callable[[ArrayLike, ArrayLike, Sequence[str], ArrayLike, int, int], Array]] = {
    "knn": knn_probe,
    "linear": linear_scores,
}
"""Probes by name: (training features, labels and groups, features to score, classes, seed) -> scores [M, C]."""


def out_of_fold_scores(
    probe: str, features_ND: ArrayLike, label_N: Sequence[int], group_N: Sequence[str], folds: int = 5, seed: int = 0
) -> Array:
    """Scores [N, C] of every sample by a probe that saw no sample of its group.

    The folds depend on the labels, the groups and the seed only, so that several features are compared on the same ones.
    Groups are stratified by the rarest class they hold.

    Raises:
        UsageError: too few groups of a class for so many folds.
    """
    features, label, group = np.asarray(features_ND, dtype=np.float64), np.asarray(label_N), np.asarray(group_N)
    classes = int(label.max()) + 1
    scores_NC = np.zeros((len(label), classes))
    for fold in stratified_group_folds(_rarest_class(label, group), folds, 0.2, seed):
        held = np.isin(group, fold.test)
        scores_NC[held] = PROBES[probe](features[~held], label[~held], group[~held].tolist(), features[held], classes, seed)
    return scores_NC


def _rarest_class(label: NDArray[np.int_], group: NDArray[np.str_]) -> dict[str, str]:
    """group -> the class it holds that the fewest groups hold."""
    held = sorted(set(zip(group.tolist(), label.tolist(), strict=True)))
    groups_of = Counter(number for _, number in held)
    rarest: dict[str, int] = {}
    for name, number in held:
        if name not in rarest or groups_of[number] < groups_of[rarest[name]]:
            rarest[name] = number
    return {name: str(number) for name, number in rarest.items()}


def score_metric(metric: Metric, scores_NC: ArrayLike, label_N: ArrayLike) -> float:
    """AUROC (of class 1, or the mean over more than two classes) or balanced accuracy of the largest score."""
    scores, label = np.asarray(scores_NC, dtype=np.float64), np.asarray(label_N)
    if metric == "balanced accuracy":
        return balanced_accuracy(scores.argmax(axis=1), label)
    return auroc(scores[:, 1], label == 1) if scores.shape[1] == 2 else macro_auroc(scores, label)


def paired_difference(
    metric: Metric,
    scores: tuple[ArrayLike, ArrayLike],
    label_N: Sequence[int],
    group_N: Sequence[str],
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Metric of the first scores minus that of the second, with the 95 % bootstrap interval over groups (patients).

    Both are scored on the same samples in every resample, so that what is hard for both cancels. Where resamples tell nothing
    (few groups of a class, all of them alike) the limits leave room for groups that were not seen: were fewer than .025**(1/G)
    of all like these G, so many in a row would be rare, and of the others the difference can be anything from -1 to 1.
    Equal scores do not differ.
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in scores)
    label = np.asarray(label_N)

    def difference(index: NDArray[np.intp]) -> float:
        return score_metric(metric, first[index], label[index]) - score_metric(metric, second[index], label[index])

    if np.array_equal(first, second):
        return Interval(0.0, 0.0, 0.0, "the same scores")
    kinds = strata(label.tolist(), group_N)
    found = bootstrap_interval(difference, group_N, kinds, resamples, seed)
    if found.known:
        return found
    share = 0.025 ** (1 / patients_of(group_N, kinds).smallest)
    return found._replace(low=share * found.value - (1 - share), high=share * found.value + (1 - share))


def rankme(features_ND: ArrayLike) -> float:
    """Effective rank in [1, min(N, D)]: exp of the entropy of the normalised singular values. Wants N of several D."""
    values = np.linalg.svd(np.asarray(features_ND, dtype=np.float64), compute_uv=False)
    share = values / max(values.sum(), np.finfo(np.float64).tiny) + EPSILON
    return float(np.exp(-(share * np.log(share)).sum()))


def linear_cka(first_ND: ArrayLike, second_ND: ArrayLike) -> float:
    """Linear centred kernel alignment of two features of the same samples, in [0, 1]; 1: equal up to turning and scaling."""
    first, second = (np.asarray(each, dtype=np.float64) for each in (first_ND, second_ND))
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    sizes = np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    return float(np.linalg.norm(second.T @ first) ** 2 / sizes) if sizes > 0 else 0.0


def _unit(features: ArrayLike) -> Array:
    values = np.asarray(features, dtype=np.float64)
    unit: Array = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return unit
