"""How good scores are against the truth: pure functions of arrays.

Legend: N samples, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata


def auroc(score_N: ArrayLike, positive_N: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half (Mann-Whitney).

    Raises:
        ValueError: only one class is present (the area is undefined, not 1), or a score is not finite.
    """
    score, positive = _checked(score_N, positive_N)
    count = int(positive.sum())
    rank_sum = rankdata(score)[positive].sum()
    return float((rank_sum - count * (count + 1) / 2) / (count * (len(score) - count)))


def macro_auroc(probability_NC: ArrayLike, label_N: ArrayLike) -> float:
    """Mean over classes of the one-versus-rest AUROC, each class counting the same."""
    probability, label = np.asarray(probability_NC, dtype=np.float64), np.asarray(label_N)
    return float(np.mean([auroc(probability[:, index], label == index) for index in range(probability.shape[1])]))


def balanced_accuracy(predicted_N: ArrayLike, label_N: ArrayLike) -> float:
    """Mean over the classes present in ``label_N`` of the share that is predicted right."""
    predicted, label = np.asarray(predicted_N), np.asarray(label_N)
    hits = np.bincount(label, weights=predicted == label)
    totals = np.bincount(label)
    present = totals > 0
    return float(np.mean(hits[present] / totals[present]))


def roc_curve(score_N: ArrayLike, positive_N: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates at every distinct threshold, from (0, 0) to (1, 1); tied scores move together."""
    score, positive = _checked(score_N, positive_N)
    order = np.argsort(-score, kind="stable")
    score, positive = score[order], positive[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    true = np.cumsum(positive)[last_of_tie] / positive.sum()
    false = np.cumsum(~positive)[last_of_tie] / (~positive).sum()
    return np.append(0.0, false), np.append(0.0, true)


def _checked(score_N: ArrayLike, positive_N: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    score, positive = np.asarray(score_N, dtype=np.float64), np.asarray(positive_N, dtype=bool)
    if positive.all() or not positive.any():
        raise ValueError("AUROC needs samples of both classes")
    if not np.isfinite(score).all():
        raise ValueError("AUROC needs finite scores")
    return score, positive
