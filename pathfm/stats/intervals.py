"""How sure a number is: DeLong for independent patients, and the bootstrap over patients for everything else.

A bootstrap is a matrix of weights (how often each patient was drawn) that all metrics share; see ``metrics.Statistic``.

Legend: N samples, G groups (patients), R resamples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import norm, rankdata
from scipy.stats import t as student

from pathfm.stats.metrics import Floats, Statistic, auroc
from pathfm.stats.thresholds import share_limits

MOST_UNDEFINED = 0.05
"""Share of resamples in which a metric may be undefined (a class was not drawn) before its interval is withheld."""
LEAST_FOR_PERCENTILES = 5
"""Groups of the smallest stratum that percentiles need: the extremes of resampled fewer ones hold the truth too rarely (of two:
in half of the cohorts)."""
FEW = 10
"""Samples of the smaller class below which DeLong's normal distribution is too sure, and Student's t stands in for it."""
NO_SPREAD = "resamples do not differ"
"""Method of an interval without limits: the metric of every resample is that of the sample, as of a perfect model."""
BLOCK = 2**21
"""Weights held at a time."""


class Interval(NamedTuple):
    """A number with its two-sided confidence limits and how they were made; limits are NaN where nothing can be said."""

    value: float
    low: float
    high: float
    method: str

    @property
    def known(self) -> bool:
        """Whether there are limits."""
        return not (math.isnan(self.low) or math.isnan(self.high))


@dataclass(frozen=True)
class Patients:
    """Which samples are drawn together (a patient's), and among whom.

    Attributes:
        group_N: number of each sample's group.
        pools: numbers of the groups of each stratum; a resample draws as many from each as it holds.
    """

    group_N: NDArray[np.intp]
    pools: tuple[NDArray[np.intp], ...]

    @property
    def count(self) -> int:
        """Groups G."""
        return sum(len(pool) for pool in self.pools)

    @property
    def smallest(self) -> int:
        """Groups of the smallest stratum, which limits what resampling can tell."""
        return min((len(pool) for pool in self.pools), default=0)

    @property
    def independent(self) -> bool:
        """Whether every group is one sample."""
        return self.count == len(self.group_N)

    def weights(self, resamples: int, seed: int) -> Iterator[Floats]:
        """Blocks [r, N] of weights: how often the group of each sample was drawn. Depends on names and strata, not on order."""
        streams = [np.random.default_rng([seed, number]) for number in range(len(self.pools))]
        block = max(1, BLOCK // max(1, len(self.group_N)))
        for start in range(0, resamples, block):
            rows = min(block, resamples - start)
            drawn_RG = np.zeros((rows, self.count))
            for pool, stream in zip(self.pools, streams, strict=True):
                places = stream.integers(len(pool), size=(rows, len(pool))) + np.arange(rows)[:, None] * len(pool)
                drawn_RG[:, pool] = np.bincount(places.ravel(), minlength=rows * len(pool)).reshape(rows, len(pool))
            yield drawn_RG[:, self.group_N]


def patients_of(group_N: Sequence[str], stratum_N: Sequence[Hashable]) -> Patients:
    """Groups in sorted order, and the strata in which they are drawn; all samples of a group have its stratum."""
    names = sorted(set(group_N))
    number = {name: place for place, name in enumerate(names)}
    members: dict[str, set[int]] = {}
    for group, stratum in zip(group_N, stratum_N, strict=True):
        members.setdefault(repr(stratum), set()).add(number[group])
    pools = tuple(np.array(sorted(members[key]), dtype=np.intp) for key in sorted(members))
    return Patients(np.array([number[group] for group in group_N], dtype=np.intp), pools)


def strata(label_N: Sequence[int], group_N: Sequence[str]) -> list[int]:
    """The stratum of each sample: of the classes that its group has, the one that the fewest groups have."""
    held = set(zip(group_N, label_N, strict=True))
    groups_of = Counter(label for _, label in held)
    rarest: dict[str, int] = {}
    for group, label in sorted(held):
        if group not in rarest or groups_of[label] < groups_of[rarest[group]]:
            rarest[group] = label
    return [rarest[group] for group in group_N]


def delong_places(score_N: ArrayLike, positive_N: ArrayLike) -> tuple[Floats, Floats]:
    """Structural components of DeLong et al. (1988): of each positive the share of negatives below it, of each negative the
    share of positives above it; ties count one half. From midranks (Sun and Xu 2014), O(N log N)."""
    score, positive = np.asarray(score_N, dtype=np.float64), np.asarray(positive_N, dtype=bool)
    above, below = score[positive], score[~positive]
    ranks = rankdata(np.concatenate([above, below]))
    place_above = (ranks[: len(above)] - rankdata(above)) / len(below)
    place_below = 1.0 - (ranks[len(above) :] - rankdata(below)) / len(above)
    return place_above, place_below


def places_variance(place_above: Floats, place_below: Floats) -> float:
    """Variance of the mean of structural components, or of their difference between two scores of the same samples.

    NaN when a class has a single member: a variance cannot be estimated from one.
    """
    if min(len(place_above), len(place_below)) < 2:
        return math.nan
    return float(np.var(place_above, ddof=1) / len(place_above) + np.var(place_below, ddof=1) / len(place_below))


def delong_variance(score_N: ArrayLike, positive_N: ArrayLike) -> float:
    """Variance of the AUROC; NaN when a class has a single member."""
    return places_variance(*delong_places(score_N, positive_N))


def places_freedom(place_above: Floats, place_below: Floats) -> float:
    """Degrees of freedom of ``places_variance`` (Satterthwaite; for this statistic Brunner and Munzel 2000): a variance that
    rests on the places of a few positives is itself not well known. The variance must be above 0."""
    parts = [(float(np.var(place, ddof=1)) / len(place), len(place) - 1) for place in (place_above, place_below)]
    return sum(part for part, _ in parts) ** 2 / sum(part**2 / degrees for part, degrees in parts)


def delong_freedom(place_above: Floats, place_below: Floats) -> float:
    """Degrees of freedom of DeLong's statistic: endless as published; ``places_freedom`` if a class has fewer than ``FEW``."""
    return math.inf if min(len(place_above), len(place_below)) >= FEW else places_freedom(place_above, place_below)


def auroc_interval(score_N: ArrayLike, positive_N: ArrayLike, confidence: float = 0.95) -> Interval:
    """AUROC of independent samples with the DeLong interval on the logit scale, which stays inside (0, 1).

    Where a class is small, Student's t stands in for the normal distribution (``delong_freedom``): with it 5 positives and 100
    negatives of AUROC 0.8 hold the truth in 93 % of cohorts, without in 88 %.

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
        return pairs_interval(value, smaller, confidence)
    places = delong_places(score_N, positive_N)
    variance, method = places_variance(*places), "DeLong, logit"
    if variance > 0.0:
        reach = float(student.ppf(1.0 - tail, delong_freedom(*places)))
    else:
        variance, method = value * (1.0 - value) / smaller, "largest variance, logit"
        reach = float(norm.ppf(1.0 - tail))
    low, high = _on_logit(value, reach * math.sqrt(variance))
    return Interval(value, low, high, method)


def pairs_interval(value: float, pairs: int, confidence: float = 0.95) -> Interval:
    """Limits of a share of ordered pairs that is 1 (or 0) in all of ``pairs`` disjoint ones."""
    limit = ((1.0 - confidence) / 2) ** (1.0 / pairs)
    low, high = (limit, 1.0) if value == 1.0 else (0.0, 1.0 - limit)
    return Interval(value, low, high, "exact, disjoint pairs")


def share_interval(hits: int, count: int) -> Interval:
    """Exact limits of a share of independent samples (sensitivity, specificity), which hold for any number of them.

    Raises:
        ValueError: nothing was counted.
    """
    if not count:
        raise ValueError("a share needs samples")
    return Interval(hits / count, *share_limits(hits, count), "Clopper-Pearson")


def bootstrap_draws(statistics: Mapping[str, Statistic], patients: Patients, resamples: int, seed: int) -> dict[str, Floats]:
    """Every statistic [R] on the same resamples of patients."""
    parts: dict[str, list[Floats]] = {name: [] for name in statistics}
    for weight_RN in patients.weights(resamples, seed):
        for name, statistic in statistics.items():
            parts[name].append(statistic(weight_RN))
    return {name: np.concatenate(part) for name, part in parts.items()}


def percentile_interval(value: float, draw_R: Floats, smallest: int) -> Interval:
    """Percentile interval, expanded for small samples as Student's t is against the normal (Hesterberg 2015).

    ``smallest``: groups of the smallest stratum. Limits are NaN when resamples are undefined or do not differ, or when there
    are fewer groups than ``LEAST_FOR_PERCENTILES``.
    """
    draws, method = _usable(draw_R, smallest)
    if draws is not None and smallest < LEAST_FOR_PERCENTILES:
        draws, method = None, f"{smallest} patients of a kind to draw from, {LEAST_FOR_PERCENTILES} needed"
    if draws is None:
        return Interval(value, math.nan, math.nan, method)
    tail = float(norm.cdf(-expansion(smallest)))
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return Interval(value, min(value, float(low)), max(value, float(high)), method)


def logit_interval(value: float, draw_R: Floats, smallest: int) -> Interval:
    """Bootstrap standard error on the logit scale with Student's t: for shares of ordered pairs, which resampling biases.

    Limits are NaN when resamples are undefined or do not differ, and at 0 and 1.
    """
    draws, method = _usable(draw_R, smallest)
    if draws is None or not 0.0 < value < 1.0:
        return Interval(value, math.nan, math.nan, method if draws is None else NO_SPREAD)
    low, high = _on_logit(value, expansion(smallest) * float(np.std(draws)))
    return Interval(value, low, high, f"{method}, logit")


def distance_interval(value: float, centred_R: Floats, smallest: int) -> Interval:
    """Interval of a sum of absolute deviations (calibration error), which noise only enlarges, so that resampling it misleads.

    The sum differs from the true one by no more than the sum of the deviations' errors; ``centred_R`` are resampled sums of
    those (the triangle inequality: never too short, often too long).
    """
    draws, method = _usable(centred_R, smallest)
    if draws is None:
        return Interval(value, math.nan, math.nan, method)
    reach = float(np.quantile(draws, 0.95)) * expansion(smallest) / float(norm.ppf(0.975))
    return Interval(value, max(0.0, value - reach), min(1.0, value + reach), f"{method}, largest distance")


def expansion(smallest: int) -> float:
    """What replaces 1.96 when the smallest stratum has so many groups: t with one degree less, for a variance by N."""
    return float(student.ppf(0.975, smallest - 1)) * math.sqrt(smallest / (smallest - 1))


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    group_N: Sequence[str],
    stratum_N: Sequence[Hashable],
    resamples: int,
    seed: int,
) -> Interval:
    """Percentile interval (95 %) from resampling whole groups (patients) within their strata, for any function of samples.

    Args:
        statistic: value from sample indices; it is called with all samples once, then once per resample.
        group_N: the patient of each sample; all samples of a drawn patient are drawn together.
        stratum_N: the stratum of each sample's patient, such that every resample keeps the class sizes (in patients).
        resamples: number of resamples.
        seed: any non-negative integer.

    Limits are NaN where ``percentile_interval`` has none.
    """
    patients, everything = patients_of(group_N, stratum_N), np.arange(len(group_N), dtype=np.intp)
    draws = [
        statistic(np.repeat(everything, weight_N.astype(np.intp)))
        for weight_RN in patients.weights(resamples, seed)
        for weight_N in weight_RN
    ]
    return percentile_interval(statistic(everything), np.asarray(draws), patients.smallest)


def _usable(draw_R: Floats, smallest: int) -> tuple[Floats | None, str]:
    """Draws that tell something, or None; and the method, or why there is none."""
    draws = draw_R[np.isfinite(draw_R)]
    if len(draws) < (1.0 - MOST_UNDEFINED) * len(draw_R):
        return None, f"undefined in {len(draw_R) - len(draws)} of {len(draw_R)} resamples"
    if smallest < 2:
        return None, "a class has one patient" if smallest else "no patients"
    if np.ptp(draws) <= 1e-12 * max(1.0, float(np.abs(draws).max())):
        return None, NO_SPREAD
    return draws, "bootstrap over patients"


def _on_logit(value: float, reach: float) -> tuple[float, float]:
    """Value plus and minus a reach that is carried to the logit scale and back."""
    centre, reach = float(logit(value)), reach / (value * (1.0 - value))
    return float(expit(centre - reach)), float(expit(centre + reach))
