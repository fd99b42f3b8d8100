"""Does the attention point at the lesion? One AUROC per slide, then their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathfm.stats.intervals import bootstrap_interval
from pathfm.stats.metrics import auroc

UNKNOWN = -1
"""Truth of a tile nobody has judged."""


class ScoredSlide(NamedTuple):
    """Tile scores of one slide and their truth: 1 lesion, 0 none, ``UNKNOWN``."""

    slide_id: str
    patient_id: str
    score_N: NDArray[np.float64]
    truth_N: NDArray[np.int8]


class Localisation(NamedTuple):
    """Mean per-slide AUROC of tile scores, its interval over patients, and on how many slides it rests."""

    value: float
    low: float
    high: float
    n_slides: int
    n_patients: int
    method: str


def localisation_auroc(slides: Sequence[ScoredSlide], resamples: int, seed: int) -> Localisation | None:
    """AUROC of the tile scores inside each slide that has lesion and lesion-free tiles, averaged over those slides.

    Scores are never pooled across slides: attention sums to one per bag, so its size says more about the number of tiles
    than about the lesion. Tiles of unknown truth are left out. None when no slide has both kinds of tiles. With a single
    patient the limits are 0 and 1: nothing is known of others.
    """
    values, patients = [], []
    for slide in sorted(slides, key=lambda slide: slide.slide_id):
        known = slide.truth_N != UNKNOWN
        lesion = slide.truth_N[known] == 1
        if lesion.any() and not lesion.all():
            values.append(auroc(slide.score_N[known], lesion))
            patients.append(slide.patient_id)
    if not values:
        return None
    value_S = np.asarray(values)
    if len(set(patients)) == 1:
        return Localisation(float(value_S.mean()), 0.0, 1.0, len(values), 1, "one patient, no interval")
    interval = bootstrap_interval(lambda index: float(value_S[index].mean()), patients, ["all"] * len(values), resamples, seed)
    return Localisation(interval.value, interval.low, interval.high, len(values), len(set(patients)), interval.method)
