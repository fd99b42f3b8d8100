"""Do the tile scores point at the lesion? One number per slide, then the mean over slides.

Scores are never pooled across slides: attention sums to one per bag, so its size says more about the number of tiles than
about the lesion.

Legend: N tiles, S slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathfm.stats.intervals import bootstrap_interval
from pathfm.stats.metrics import auroc, average_precision

UNKNOWN = -1
"""Truth of a tile nobody has judged."""


class ScoredSlide(NamedTuple):
    """Tile scores of one slide and their truth: 1 lesion, 0 none, ``UNKNOWN``; NaN scores: tiles not looked at."""

    slide_id: str
    patient_id: str
    score_N: NDArray[np.float64]
    truth_N: NDArray[np.int8]


class Localisation(NamedTuple):
    """Mean of a number per slide, its interval over patients, and on how many slides it rests."""

    value: float
    low: float
    high: float
    n_slides: int
    n_patients: int
    method: str


class Localised(NamedTuple):
    """How well tile scores find the lesion, as means over the slides that have both lesion and lesion-free tiles.

    Attributes:
        auroc: chance that a lesion tile scores above a lesion-free one; 0.5 by chance.
        average_precision: area under precision and recall; ``lesion_share`` by chance.
        pointing: share of slides whose highest tile lies in the lesion (pointing game); ``lesion_share`` by chance.
        lesion_share: lesion tiles among the judged ones.
        left_out: slides of which all judged tiles are of one kind, or none was looked at.
    """

    auroc: Localisation
    average_precision: Localisation
    pointing: Localisation
    lesion_share: float
    left_out: int

    def record(self) -> dict[str, Any]:
        """As JSON has it: ``localisation_auroc``, ``localisation_average_precision``, ``pointing_game`` and the rest."""
        return {
            "localisation_auroc": self.auroc._asdict(),
            "localisation_average_precision": self.average_precision._asdict(),
            "pointing_game": self.pointing._asdict(),
            "lesion_share": self.lesion_share,
            "n_left_out": self.left_out,
        }


def localise(slides: Sequence[ScoredSlide], resamples: int, seed: int) -> Localised | None:
    """Scores how well tiles are ranked inside each slide that has lesion and lesion-free tiles; None when no slide has both.

    Tiles of unknown truth, and those not looked at, are left out; so are slides with tiles of one kind, which are counted.

    Args:
        slides: tile scores and truth; their order plays no role.
        resamples: of patients, for the intervals.
        seed: of the resampling.
    """
    rows: list[tuple[float, float, float, float]] = []
    patients: list[str] = []
    for slide in sorted(slides, key=lambda slide: slide.slide_id):
        known = (slide.truth_N != UNKNOWN) & np.isfinite(slide.score_N)
        score_N, lesion_N = slide.score_N[known], slide.truth_N[known] == 1
        if lesion_N.any() and not lesion_N.all():
            precision, pointing = average_precision(score_N, lesion_N), pointing_game(score_N, lesion_N)
            rows.append((auroc(score_N, lesion_N), precision, pointing, float(lesion_N.mean())))
            patients.append(slide.patient_id)
    if not rows:
        return None
    aurocs, precisions, pointings, shares = np.asarray(rows).T
    means = [mean_over_slides(value_S, patients, resamples, seed) for value_S in (aurocs, precisions, pointings)]
    return Localised(means[0], means[1], means[2], float(shares.mean()), len(slides) - len(rows))


def localisation_auroc(slides: Sequence[ScoredSlide], resamples: int, seed: int) -> Localisation | None:
    """The AUROC of ``localise`` alone."""
    found = localise(slides, resamples, seed)
    return found.auroc if found else None


def pointing_game(score_N: NDArray[np.float64], lesion_N: NDArray[np.bool_]) -> float:
    """1 when the highest tile is lesion, else 0; the share of lesion among several tiles that are highest together."""
    return float(lesion_N[score_N == score_N.max()].mean())


def mean_over_slides(value_S: NDArray[np.float64], patient_S: Sequence[str], resamples: int, seed: int) -> Localisation:
    """Mean of a number in 0..1 over slides, with the bootstrap interval over patients.

    A single patient tells nothing of others: the limits are 0 and 1. Nor does resampling fewer than five, or equal values. Then
    the limits are exact: if a share of all patients lies at or above the lowest value, P of them all do with probability
    share**P. So the share is at least .025**(1/P), and the others do not lie below 0; from above alike.

    Raises:
        ValueError: there are no slides.
    """
    value, count = float(value_S.mean()) if len(value_S) else None, len(set(patient_S))
    if value is None:
        raise ValueError("a mean over slides needs slides")
    if count == 1:
        return Localisation(value, 0.0, 1.0, len(value_S), 1, "one patient, no interval")

    def mean(index: NDArray[np.intp]) -> float:
        return float(value_S[index].mean())

    interval = bootstrap_interval(mean, patient_S, ["all"] * len(value_S), resamples, seed)
    if not interval.known:
        share = 0.025 ** (1 / count)
        low, high = share * float(value_S.min()), 1.0 - share * (1.0 - float(value_S.max()))
        return Localisation(value, low, high, len(value_S), count, "exact")
    return Localisation(interval.value, interval.low, interval.high, len(value_S), count, interval.method)
