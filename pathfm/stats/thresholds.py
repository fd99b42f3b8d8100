"""Operating points: thresholds above which a score counts as positive, and exact limits of shares.

Legend: N samples.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from pathfm.stats.metrics import finite


class Threshold(NamedTuple):
    """A score of at least ``value`` is positive; ``note`` says what is wrong with it, if anything."""

    value: float
    note: str = ""


def choose_threshold(rule: str, score_N: ArrayLike, positive_N: ArrayLike) -> Threshold:
    """The threshold of a rule on given scores; tied scores fall on the same side, and rounding moves none across.

    Thresholds lie midway between neighbouring scores. Of equally good ones the most sensitive is taken (``youden``).

    Args:
        rule: ``youden`` (largest sensitivity + specificity), ``sensitivity=S`` (the highest threshold that keeps S) or
            ``specificity=S`` (the lowest).
        score_N: probabilities of the positive class.
        positive_N: who is positive.

    Raises:
        ValueError: only one class is present, a score is not finite, or the rule is unknown.
    """
    score, positive = finite(score_N, "scores"), np.asarray(positive_N, dtype=bool)
    if positive.all() or not positive.any():
        raise ValueError("an operating point needs samples of both classes")
    candidate = _candidates(score)
    above, below = np.sort(score[positive]), np.sort(score[~positive])
    found = len(above) - np.searchsorted(above, candidate, side="left")
    spared = np.searchsorted(below, candidate, side="left")
    name, _, wanted = rule.partition("=")
    if name == "youden":
        index = int(np.argmax(found * len(below) + spared * len(above)))
        note = "no threshold is better than chance" if index in (0, len(candidate) - 1) else ""
    elif name == "sensitivity":
        index = int(np.flatnonzero(found >= math.ceil(Fraction(wanted) * len(above)))[-1])
        note = _doubt(wanted, len(above), "positives", "calling everyone positive" if index == 0 else "")
    elif name == "specificity":
        index = int(np.flatnonzero(spared >= math.ceil(Fraction(wanted) * len(below)))[0])
        note = _doubt(wanted, len(below), "negatives", "calling nobody positive" if index == len(candidate) - 1 else "")
    else:
        raise ValueError(f"no operating point {rule!r}; there are youden, sensitivity=S, specificity=S")
    return Threshold(float(candidate[index]), note)


def _candidates(score_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """One threshold for every way to cut the scores, increasing: from everyone positive to nobody."""
    distinct = np.unique(score_N)
    middle = distinct[:-1] + np.diff(distinct) / 2
    middle = np.where(middle > distinct[:-1], middle, distinct[1:])
    last = distinct[-1]
    top = (last + 1) / 2 if (last + 1) / 2 > last else np.nextafter(last, np.inf)
    return np.concatenate([[0.0], middle, [top]])


def _doubt(wanted: str, count: int, who: str, only_by: str) -> str:
    """A new sample lies beyond the most extreme of n known ones with probability 1/(n+1): no threshold promises more than
    n/(n+1)."""
    if only_by:
        return f"{wanted} is reached only by {only_by}"
    if count < Fraction(wanted) * (count + 1):
        return f"{count} {who} are too few to promise {wanted}: at best {count / (count + 1):.2f}"
    return ""


def share_limits(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided limits of a share by Clopper and Pearson (1934): exact, never too narrow; (0, 1) where nothing was counted."""
    tail = (1.0 - confidence) / 2
    low = float(beta.ppf(tail, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1.0 - tail, hits + 1, count - hits)) if hits < count else 1.0
    return low, high
