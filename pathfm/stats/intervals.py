"""How sure a number is: DeLong for independent patients, and the bootstrap over patients for everything else.

Legend: N samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

from pathfm.stats.metrics import auroc, balanced_accuracy


class Interval(NamedTuple):
    """A number with its two-sided confidence limits and how they were made."""

    value: float
    low: float
    high: float
    method: str


def delong_variance(score_N: ArrayLike, positive_N: ArrayLike) -> float:
    """Variance of the AUROC by DeLong et al. (1988), from midranks (Sun and Xu 2014); O(N log N).

    NaN when a class has a single member: a variance cannot be estimated from one.
    """
    score, positive = np.asarray(score_N, dtype=np.float64), np.asarray(positive_N, dtype=bool)
    above, below = score[positive], score[~positive]
    if min(len(above), len(below)) < 2:
        return math.nan
    ranks = rankdata(np.concatenate([above, below]))
    place_above = (ranks[: len(above)] - rankdata(above)) / len(below)
    place_below = 1.0 - (ranks[len(above) :] - rankdata(below)) / len(above)
    return float(np.var(place_above, ddof=1) / len(above) + np.var(place_below, ddof=1) / len(below))


def auroc_interval(score_N: ArrayLike, positive_N: ArrayLike, confidence: float = 0.95) -> Interval:
    """AUROC of independent samples with the DeLong interval on the logit scale, which stays inside (0, 1).

    Where DeLong says nothing, something wider is said instead of nothing:

    - A perfect AUROC (1 or 0) has DeLong variance 0. With m = the smaller class, m disjoint pairs of one positive and one
      negative are all in order, which has probability AUROC**m; the limit is the value that makes this (1-confidence)/2.
    - A variance that is 0 or undefined at another AUROC (all scores tied, a class with one member) is replaced by its
      largest possible value AUROC (1 - AUROC) / m (Van Dantzig 1951).

    Raises:
        ValueError: only one class is present.
    """
    value = auroc(score_N, positive_N)
    positive = np.asarray(positive_N, dtype=bool)
    smaller = int(min(positive.sum(), (~positive).sum()))
    tail = (1.0 - confidence) / 2
    if value in (0.0, 1.0):
        limit = tail ** (1.0 / smaller)
        low, high = (limit, 1.0) if value == 1.0 else (0.0, 1.0 - limit)
        return Interval(value, low, high, "exact, disjoint pairs")
    variance, method = delong_variance(score_N, positive_N), "DeLong, logit"
    if not variance > 0.0:
        variance, method = value * (1.0 - value) / smaller, "largest variance, logit"
    reach = float(norm.ppf(1.0 - tail)) * math.sqrt(variance) / (value * (1.0 - value))
    centre = float(logit(value))
    return Interval(value, float(expit(centre - reach)), float(expit(centre + reach)), method)


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    group_N: Sequence[str],
    stratum_N: Sequence[Hashable],
    resamples: int,
    seed: int,
) -> Interval:
    """Percentile interval (95 %) from resampling whole groups (patients) within their strata.

    Args:
        statistic: value from sample indices; it is called with all samples once, then once per resample.
        group_N: the patient of each sample; all samples of a drawn patient are drawn together.
        stratum_N: the stratum of each sample's patient, such that every resample keeps the class sizes (in patients).
        resamples: number of resamples.
        seed: any non-negative integer.
    """
    members: dict[str, list[int]] = {}
    strata: dict[str, set[str]] = {}
    for index, (group, stratum) in enumerate(zip(group_N, stratum_N, strict=True)):
        members.setdefault(group, []).append(index)
        strata.setdefault(repr(stratum), set()).add(group)
    pools = [[np.asarray(members[group], dtype=np.intp) for group in sorted(strata[key])] for key in sorted(strata)]
    rng = np.random.default_rng(seed)
    draws = [statistic(_resample(pools, rng)) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.025, 0.975])
    value = statistic(np.arange(len(group_N), dtype=np.intp))
    return Interval(value, float(low), float(high), "bootstrap over patients")


def balanced_accuracy_interval(
    predicted_N: ArrayLike, label_N: ArrayLike, group_N: Sequence[str], resamples: int, seed: int
) -> Interval:
    """Balanced accuracy with the bootstrap over groups (patients), stratified by the classes of a group.

    When all predictions are right, so are those of every resample, and the bootstrap says nothing. With C classes of at least
    m groups each, that has probability at most value**(m C) (recalls of mean ``value`` have no larger product); the lower
    limit is the value that makes this 2.5 %. All wrong: its mirror image.
    """
    predicted, label = np.asarray(predicted_N), np.asarray(label_N)
    value = balanced_accuracy(predicted, label)
    if value in (0.0, 1.0):
        sizes = Counter(number for _, number in set(zip(group_N, label.tolist(), strict=True))).values()
        limit = 0.025 ** (1.0 / (min(sizes) * len(sizes)))
        low, high = (limit, 1.0) if value == 1.0 else (0.0, 1.0 - limit)
        return Interval(value, low, high, "exact")

    def statistic(index: NDArray[np.intp]) -> float:
        return balanced_accuracy(predicted[index], label[index])

    return bootstrap_interval(statistic, group_N, strata(label.tolist(), group_N), resamples, seed)


def strata(label_N: Sequence[int], group_N: Sequence[str]) -> list[tuple[int, ...]]:
    """The stratum of each sample: the classes its group (patient) has."""
    classes_of: dict[str, set[int]] = {}
    for label, group in zip(label_N, group_N, strict=True):
        classes_of.setdefault(group, set()).add(label)
    return [tuple(sorted(classes_of[group])) for group in group_N]


def _resample(pools: Sequence[Sequence[NDArray[np.intp]]], rng: np.random.Generator) -> NDArray[np.intp]:
    drawn = [pool[place] for pool in pools for place in rng.integers(len(pool), size=len(pool))]
    return np.concatenate(drawn)
