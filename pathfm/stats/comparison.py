"""Is one model better than another? Paired tests on the same patients, and on folds that share their training data.

Sources: DeLong, DeLong and Clarke-Pearson (1988); Brunner and Munzel (2000); Zou and Donner (2008); Nadeau and Bengio (2003);
Phipson and Smyth (2010); Holm (1979).

Legend: N samples, R resamples, K folds, M comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm
from scipy.stats import t as student

from pathfm.stats.intervals import (
    Patients,
    auroc_interval,
    bootstrap_draws,
    delong_freedom,
    delong_places,
    percentile_interval,
    places_variance,
)
from pathfm.stats.metrics import Floats, Statistic, finite, value_of

SIGNIFICANT = 0.05
SHARED_FOLDS = (
    "Folds share most of their training patients, so that their values are not independent: limits and p are those of the "
    "corrected resampled t-test (Nadeau and Bengio 2003)."
)


class Difference(NamedTuple):
    """First minus second, with 95 % limits and the two-sided p value (NaN where there is none) of no difference."""

    value: float
    low: float
    high: float
    p: float
    method: str

    @property
    def significant(self) -> bool:
        """Whether p is below 5 %; without a p value, whether the limits exclude 0."""
        return not self.low <= 0.0 <= self.high if math.isnan(self.p) else self.p < SIGNIFICANT


class FoldTest(NamedTuple):
    """Mean over folds with 95 % limits and the two-sided p value of a mean of ``against``; NaN with fewer than two folds."""

    mean: float
    low: float
    high: float
    p: float


def paired_delong(first_N: ArrayLike, second_N: ArrayLike, positive_N: ArrayLike) -> Difference:
    """Difference of the AUROCs of two scores of the same independent samples.

    p and limits are from the normal distribution or, where a class is small, from Student's t (``delong_freedom``).

    Without variance (both separate the classes perfectly, a class of one) DeLong says nothing; then the limits are made from
    those of each AUROC (MOVER, Zou and Donner), as if the two were independent, and p is 1 for equal AUROCs, else NaN.

    Raises:
        ValueError: only one class is present, or a score is not finite.
    """
    first, second = auroc_interval(first_N, positive_N), auroc_interval(second_N, positive_N)
    value = first.value - second.value
    places = zip(delong_places(first_N, positive_N), delong_places(second_N, positive_N), strict=True)
    above, below = (one - other for one, other in places)
    if not (above.any() or below.any()) and 0.0 < first.value < 1.0:
        return Difference(0.0, 0.0, 0.0, 1.0, "same order of all patients")
    variance = places_variance(above, below)
    if not variance > 0.0:
        low = value - math.hypot(first.value - first.low, second.high - second.value)
        high = value + math.hypot(first.high - first.value, second.value - second.low)
        return Difference(value, max(-1.0, low), min(1.0, high), 1.0 if value == 0 else math.nan, "limits of both AUROCs")
    error, degrees = math.sqrt(variance), delong_freedom(above, below)
    reach = float(student.ppf(0.975, degrees)) * error
    p = 2.0 * float(student.sf(abs(value) / error, degrees))
    return Difference(value, max(-1.0, value - reach), min(1.0, value + reach), p, "DeLong, paired")


def paired_bootstrap(first: Statistic, second: Statistic, patients: Patients, resamples: int, seed: int) -> Difference:
    """Difference of any metric of two models on the same samples, from the same resamples of patients for both.

    p is the level at which the limits just touch 0, so that the two never contradict each other.
    """

    def difference(weight_RN: Floats) -> Floats:
        return first(weight_RN) - second(weight_RN)

    value, smallest = value_of(difference, len(patients.group_N)), patients.smallest
    draws = bootstrap_draws({"difference": difference}, patients, resamples, seed)["difference"]
    interval = percentile_interval(value, draws, smallest)
    if not interval.known:
        same = value == 0.0 and bool((draws[np.isfinite(draws)] == 0.0).all())
        return Difference(value, interval.low, interval.high, 1.0 if same else math.nan, interval.method)
    draws = draws[np.isfinite(draws)]
    beyond = min((draws <= 0.0).sum(), (draws >= 0.0).sum()) + 1
    place = float(norm.ppf(min(0.5, beyond / (len(draws) + 1)))) * math.sqrt((smallest - 1) / smallest)
    p = min(1.0, 2.0 * float(student.cdf(place, smallest - 1)))
    return Difference(value, interval.low, interval.high, p, "bootstrap over patients, paired")


def corrected_t(value_K: Sequence[float], test_share: float, against: float = 0.0) -> FoldTest:
    """Corrected resampled t-test of Nadeau and Bengio: the variance of fold values is enlarged by what folds share.

    Args:
        value_K: of each fold (or repeat of folds): a metric, or the difference of two models.
        test_share: patients tested over patients trained on, of a usual fold (1/4 for five folds).
        against: mean that is tested: 0 for differences, chance for a metric.
    """
    values = np.asarray(value_K, dtype=np.float64)
    count = len(values)
    mean = float(values.mean()) if count else math.nan
    if count < 2:
        return FoldTest(mean, math.nan, math.nan, math.nan)
    error = math.sqrt((1.0 / count + test_share) * float(values.var(ddof=1)))
    if np.ptp(values) <= 1e-12 * abs(mean):
        return FoldTest(mean, math.nan, math.nan, 1.0 if math.isclose(mean, against) else math.nan)
    reach = float(student.ppf(0.975, count - 1)) * error
    p = 2.0 * float(student.sf(abs(mean - against) / error, count - 1))
    return FoldTest(mean, mean - reach, mean + reach, p)


def permutation_p(value_M: Sequence[float], observed: float) -> float:
    """Share of shuffled runs that do at least as well, (b + 1) / (m + 1): never 0, as the observed run is one of them.

    Raises:
        ValueError: a value is not finite: nothing is at least as good as NaN, which would look like the smallest p there is.
    """
    finite([observed, *value_M], "values")
    return (sum(value >= observed for value in value_M) + 1) / (len(value_M) + 1)


def holm(p_M: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): of a family without any true difference, one falls below a level no more
    often than that level, however they depend on each other.

    NaN, a comparison without a p value, stays NaN and is counted: it was made, too.
    """
    known = [1.0 if math.isnan(p) else p for p in p_M]
    adjusted, largest = [math.nan] * len(known), 0.0
    for turn, place in enumerate(sorted(range(len(known)), key=lambda place: known[place])):
        largest = max(largest, min(1.0, known[place] * (len(known) - turn)))
        adjusted[place] = math.nan if math.isnan(p_M[place]) else largest
    return adjusted


def chance_of_a_miss(intervals: int) -> float:
    """Chance that at least one of several 95 % intervals misses its truth, of groups that share no patient."""
    return float(1.0 - (1.0 - SIGNIFICANT) ** intervals)


def verdict(model: str, other: str, difference: Difference, higher_is_better: bool = True) -> str:
    """The result in words; "not significantly different" whenever it is so."""
    p = "" if math.isnan(difference.p) else f" (p {p_text(difference.p)})"
    if math.isnan(difference.low) and math.isnan(difference.p):
        return f"{model} and {other} cannot be compared: {difference.method}"
    if not difference.significant:
        return f"{model} and {other} are not significantly different{p}"
    better, worse = (model, other) if (difference.value > 0) == higher_is_better else (other, model)
    return f"{better} is better than {worse}{p}"


def p_text(p: float) -> str:
    """A p value as it is written: two digits, and never 0."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
