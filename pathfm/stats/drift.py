"""Do new slides look like those of the training? Units, a limit that keeps a promised rate of false alarms, tests of a window.

Everything that is kept of the training is an aggregate: medians, quantiles, counts of at least ``LEAST_IN_BIN`` values.

Legend: N values, S slides, P patients, D features, M tests.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import betabinom, fisher_exact, kstwo, norm

from pathfm.stats.novelty import NEARLY_CONSTANT

Floats = NDArray[np.float64]
MAD_TO_DEVIATION, TAIL, TAIL_DEVIATIONS = 1.4826, 0.05, 1.645
"""Of a normal distribution: deviation per median absolute deviation; and where its 5 % tails begin [deviations]."""
ENOUGH_FOR_TAILS = 20
"""Values of which the last but one says something about the tail."""
MOST_BINS, LEAST_IN_BIN = 20, 5


@dataclass(frozen=True)
class Spread:
    """Where a number lies and how far it strays to either side; robust against a few odd values.

    Attributes:
        centre: median.
        below: unit of values below the centre: the largest of the median absolute deviation, the distances to the 5 % quantile
            and to the last but one value (all as deviations of a normal distribution) and the least that counts.
        above: the same above it.
    """

    centre: float
    below: float
    above: float

    def score(self, value_N: ArrayLike) -> Floats:
        """How many units [N] values lie from the centre; negative below it, NaN where a value is."""
        away = np.asarray(value_N, dtype=np.float64) - self.centre
        return np.asarray(np.where(away < 0, away / self.below, away / self.above))

    def at(self, score: float) -> float:
        """The value with this score."""
        return self.centre + score * (self.below if score < 0 else self.above)


def fit_spread(value_N: ArrayLike, least: float) -> Spread:
    """The spread of finite values.

    Args:
        value_N: at least one.
        least: units are not smaller: a difference that nobody would call one.
    """
    value = np.sort(np.asarray(value_N, dtype=np.float64))
    low, centre, high = (float(found) for found in np.quantile(value, [TAIL, 0.5, 1 - TAIL]))
    deviation = max(least, MAD_TO_DEVIATION * float(np.median(np.abs(value - centre))))
    below, above = max(deviation, (centre - low) / TAIL_DEVIATIONS), max(deviation, (high - centre) / TAIL_DEVIATIONS)
    if len(value) >= ENOUGH_FOR_TAILS:
        # A long tail widens the units of its own number here, else the limit that all numbers share.
        usual = float(norm.ppf(1 - 1.5 / len(value)))
        below, above = max(below, (centre - value[1]) / usual), max(above, (value[-2] - centre) / usual)
    return Spread(centre, float(below), float(above))


class Limit(NamedTuple):
    """Scores above ``value`` are flagged; of new patients like the known ones a share of about ``expected`` is, by chance."""

    value: float
    expected: float


def fit_limit(score_P: ArrayLike, rate: float) -> Limit:
    """The limit of scores that were each measured against other patients (split conformal prediction, Vovk et al. 2005).

    A new patient lies beyond the most extreme of P known ones with probability 1/(P+1): nothing smaller can be promised.
    Infinite scores (never seen before) are flagged whatever the limit, and count.

    Args:
        score_P: at least one.
        rate: the wanted share of false alarms.
    """
    score = np.sort(np.asarray(score_P, dtype=np.float64))
    patients, finite = len(score), score[np.isfinite(score)]
    rank = min(patients, math.ceil((1 - rate) * (patients + 1)))
    value = float(min(score[rank - 1], finite[-1])) if len(finite) else 0.0
    return Limit(value, (1 + int((score > value).sum())) / (patients + 1))


def excess_p(flagged: int, count: int, expected: float, patients: int) -> float:
    """p-value of so many flagged slides or more, were they like the training's.

    What share of all slides lies beyond a limit that rests on P patients is itself not known: it has a beta distribution, so
    the number of flagged ones is beta-binomial.

    Args:
        flagged: of the slides.
        count: slides.
        expected: of the ``Limit``.
        patients: P.
    """
    beyond = round(expected * (patients + 1))
    return float(betabinom.sf(flagged - 1, count, beyond, patients + 1 - beyond)) if beyond <= patients else 1.0


@dataclass(frozen=True)
class Bins:
    """How values are distributed: counts between edges, which lie between values and are none themselves."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Values N."""
        return sum(self.counts)

    def record(self) -> dict[str, list[float]]:
        """JSON values."""
        return {"edges": list(self.edges), "counts": list(self.counts)}


def fit_bins(value_N: ArrayLike) -> Bins:
    """At most ``MOST_BINS`` bins of about as many values each, at least ``LEAST_IN_BIN``; equal values share one."""
    distinct, times = np.unique(np.asarray(value_N, dtype=np.float64), return_counts=True)
    size = max(LEAST_IN_BIN, math.ceil(times.sum() / MOST_BINS))
    edges, counts = list[float](), [0]
    for place, count in enumerate(times.tolist()):
        counts[-1] += count
        rest = int(times[place + 1 :].sum())
        if counts[-1] >= size and rest >= LEAST_IN_BIN:
            middle = float(distinct[place] + (distinct[place + 1] - distinct[place]) / 2)
            edges.append(middle if middle < distinct[place + 1] else float(distinct[place]))
            counts.append(0)
    return Bins(tuple(edges), tuple(counts))


class Shift(NamedTuple):
    """A window against the training: largest difference of the cumulative shares, its p-value, population stability index."""

    difference: float
    p: float
    psi: float


def find_shift(bins: Bins, value_N: ArrayLike) -> Shift | None:
    """Kolmogorov-Smirnov test of two samples, looked at only at the edges of the bins: it can only miss, never cry wolf.

    None where there is a single bin or no value. The index has half a value added to every bin.
    """
    value = np.sort(np.asarray(value_N, dtype=np.float64))
    if not bins.edges or not len(value):
        return None
    known = np.cumsum(bins.counts)[:-1] / bins.total
    places = np.searchsorted(value, bins.edges, side="right")
    difference = float(np.abs(places / len(value) - known).max())
    size = round(bins.total * len(value) / (bins.total + len(value)))
    p = float(np.clip(kstwo.sf(difference, max(size, 1)), 0.0, 1.0))
    counts = np.diff(places, prepend=0, append=len(value))
    return Shift(difference, p, stability_index(bins.counts, counts))


def stability_index(known_K: ArrayLike, new_K: ArrayLike) -> float:
    """Population stability index of counts: sum of (new - known) ln(new / known) over shares; 0.25 is often called large."""
    known, new = (np.asarray(counts, dtype=np.float64) + 0.5 for counts in (known_K, new_K))
    known, new = known / known.sum(), new / new.sum()
    return float(((new - known) * np.log(new / known)).sum())


def rate_p(hits: int, count: int, known_hits: int, known_count: int) -> float:
    """Two-sided p-value of two shares by Fisher's exact test; 1 where nothing was counted."""
    if not count or not known_count:
        return 1.0
    return float(fisher_exact([[hits, count - hits], [known_hits, known_count - known_hits]])[1])


@dataclass(frozen=True, eq=False)
class FeatureSpread:
    """Mean and deviation of every feature over the training slides' mean features.

    Attributes:
        centre_D: float32.
        scale_D: float32.
    """

    centre_D: NDArray[np.float32]
    scale_D: NDArray[np.float32]

    def distance(self, mean_ND: ArrayLike) -> Floats:
        """Root mean square [N] of the deviations of slides' mean features, each in its own unit; 1 is usual.

        Raises:
            ValueError: another number of features.
        """
        mean = np.atleast_2d(np.asarray(mean_ND, dtype=np.float64))
        if mean.shape[1] != len(self.scale_D):
            raise ValueError(f"{mean.shape[1]} features, but the training had {len(self.scale_D)}")
        return np.asarray(np.sqrt((((mean - self.centre_D) / self.scale_D) ** 2).mean(axis=1)))

    def record(self) -> dict[str, str]:
        """JSON values: little-endian float32 as base64."""
        return {name: b64encode(values.astype("<f4").tobytes()).decode("ascii") for name, values in vars(self).items()}


def fit_features(mean_SD: ArrayLike) -> FeatureSpread:
    """Of at least two slides; a feature that hardly varies is measured in units of the typical one."""
    mean = np.asarray(mean_SD, dtype=np.float64)
    scale = mean.std(axis=0)
    typical = float(np.median(scale[scale > 0])) if scale.any() else 1.0
    scale = np.where(scale > NEARLY_CONSTANT * typical, scale, typical)
    return FeatureSpread(mean.mean(axis=0).astype(np.float32), scale.astype(np.float32))


def features_from_record(record: Mapping[str, str]) -> FeatureSpread:
    """What ``FeatureSpread.record`` recorded."""
    centre, scale = (np.frombuffer(b64decode(record[name]), dtype="<f4") for name in ("centre_D", "scale_D"))
    return FeatureSpread(centre.astype(np.float32), scale.astype(np.float32))
