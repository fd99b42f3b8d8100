"""Curves behind the numbers, as rows that JSON can hold: ROC, precision-recall, reliability and decision curves.

Legend: N samples, K thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pathfm.stats.metrics import equal_mass_bins, finite, roc_curve

THRESHOLDS = tuple(step / 100 for step in range(1, 100))
Row = dict[str, float]


def roc_points(score_N: ArrayLike, positive_N: ArrayLike) -> list[Row]:
    """Rows ``false_positive_rate``, ``true_positive_rate``, from (0, 0) to (1, 1).

    Raises:
        ValueError: only one class is present, or a score is not finite.
    """
    points = zip(*roc_curve(score_N, positive_N), strict=True)
    return [{"false_positive_rate": float(false), "true_positive_rate": float(true)} for false, true in points]


def precision_recall_points(score_N: ArrayLike, positive_N: ArrayLike) -> list[Row]:
    """Rows ``threshold``, ``recall``, ``precision`` at every distinct score, from the highest; tied scores move together.

    Raises:
        ValueError: there is no positive, or a score is not finite.
    """
    score, positive = finite(score_N, "scores"), np.asarray(positive_N, dtype=bool)
    if not positive.any():
        raise ValueError("precision and recall need positives")
    order = np.argsort(-score, kind="stable")
    score, positive = score[order], positive[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    true = np.cumsum(positive)[last_of_tie]
    points = zip(score[last_of_tie], true / positive.sum(), true / (last_of_tie + 1), strict=True)
    return [{"threshold": float(at), "recall": float(r), "precision": float(p)} for at, r, p in points]


def reliability_bins(probability_N: ArrayLike, positive_N: ArrayLike, bins: int | None = None) -> list[Row]:
    """Of each bin of equally many samples: its lowest and highest probability, their mean, the observed share, the count.

    The bins are those of the calibration error, which is the mean of |mean - observed| weighted by the counts.
    """
    probability, positive = np.asarray(probability_N, dtype=np.float64), np.asarray(positive_N, dtype=np.float64)
    places = equal_mass_bins(probability, bins)
    rows = []
    for place in np.unique(places):
        inside = np.sort(probability[places == place])
        rows.append(
            {
                "low": float(inside[0]),
                "high": float(inside[-1]),
                "mean": float(inside.mean()),
                "observed": float(positive[places == place].mean()),
                "count": len(inside),
            }
        )
    return rows


def decision_curve(probability_N: ArrayLike, positive_N: ArrayLike, thresholds: Sequence[float] = THRESHOLDS) -> list[Row]:
    """Net benefit per patient (Vickers and Elkin 2006) of acting on a probability of at least ``threshold``, on all, on none.

    True positives minus false positives that weigh threshold / (1 - threshold), per sample: a threshold says how many needless
    actions one needful action is worth. Rows ``threshold``, ``model``, ``all``, ``none``; none without samples.

    Raises:
        ValueError: a probability is not finite.
    """
    probability, positive = finite(probability_N, "probabilities"), np.asarray(positive_N, dtype=bool)
    if not len(positive):
        return []
    share = float(positive.mean())
    rows = []
    for threshold in thresholds:
        odds, acted = threshold / (1.0 - threshold), probability >= threshold
        model = float((acted & positive).mean() - odds * (acted & ~positive).mean())
        rows.append({"threshold": float(threshold), "model": model, "all": share - (1.0 - share) * odds, "none": 0.0})
    return rows
