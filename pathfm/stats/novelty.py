"""Is a bag like those that were learned from? Distance of its mean feature vector to the nearest training bags.

Legend: B training bags, R bags kept as reference, N asked bags, D features, K neighbours.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

Floats = NDArray[np.float64]
NEIGHBOURS = 5
MOST_REFERENCES = 256
"""Bags kept as reference: one of every patient, then a second one and so on; of more patients than this, evenly spaced ones.
With 1,024 features they take 0.7 MB in a record."""
ROUNDING = 1e-5
"""Distances smaller than this are rounding of half-precision references, not novelty."""
NEARLY_CONSTANT = 0.01
"""A feature that varies less than this share of the typical one is measured in units of the typical one: a constant that
changes is news, its rounding is not."""
SINGLE_PRECISION = 1e-6
"""A feature that varies less than this share of its mean is constant."""


@dataclass(frozen=True, eq=False)
class Novelty:
    """Reference bags and a limit; no names, so that a bundle may carry them.

    Attributes:
        centre_D: float32, mean of each feature over the training bags.
        scale_D: float32, deviation of each feature over the training bags; distances are in these units.
        reference_RD: float16, reference bags in these units.
        neighbours: K; the distance of a bag is the mean of its K smallest root-mean-square differences to references.
        limit: a patient farther than this is out of distribution.
        expected: share of new patients like the training ones that lie beyond the limit by chance, at most about.
    """

    centre_D: NDArray[np.float32]
    scale_D: NDArray[np.float32]
    reference_RD: NDArray[np.float16]
    neighbours: int
    limit: float
    expected: float

    def distance(self, mean_ND: ArrayLike) -> Floats:
        """Distance [N] of bags by their mean features; inf where these are not finite. Each depends on its own bag only.

        Raises:
            ValueError: another number of features than the training bags had.
        """
        mean = np.atleast_2d(np.asarray(mean_ND, dtype=np.float64))
        if mean.shape[1] != len(self.scale_D):
            raise ValueError(f"{mean.shape[1]} features, but the training bags had {len(self.scale_D)}")
        distance_NR = cdist((mean - self.centre_D) / self.scale_D, self.reference_RD.astype(np.float64))
        far = _nearest(distance_NR, self.neighbours) / math.sqrt(mean.shape[1])
        return np.where(np.isfinite(mean).all(axis=1), far, math.inf)

    def record(self) -> dict[str, Any]:
        """JSON values (arrays as base64 of little-endian numbers); ``novelty_from_record`` gives the same back exactly."""
        return {
            "features": len(self.scale_D),
            "centre": _text(self.centre_D, "<f4"),
            "scale": _text(self.scale_D, "<f4"),
            "reference": _text(self.reference_RD, "<f2"),
            "neighbours": self.neighbours,
            "limit": self.limit,
            "expected": self.expected,
        }


def novelty_from_record(record: Mapping[str, Any]) -> Novelty:
    """The reference of a ``Novelty.record``."""
    return Novelty(
        _array(record["centre"], "<f4").astype(np.float32),
        _array(record["scale"], "<f4").astype(np.float32),
        _array(record["reference"], "<f2").astype(np.float16).reshape(-1, record["features"]),
        record["neighbours"],
        record["limit"],
        record["expected"],
    )


def fit_novelty(mean_BD: ArrayLike, patient_B: Sequence[str], share: float) -> Novelty:
    """Reference from training bags. The distance of a patient is the largest of its bags', and the limit is the one that a
    share of the training patients keep when each is measured against the others alone (scale of features included: units that
    know a bag make it look nearer than a new one, enough to flag every new one when features outnumber bags).

    The order of the bags does not matter as long as those of a patient keep theirs.

    Raises:
        ValueError: fewer than three patients: nobody is far from two.
    """
    order = sorted(range(len(patient_B)), key=lambda place: patient_B[place])
    mean = np.asarray(mean_BD, dtype=np.float64)[order]
    names, owner = np.unique([patient_B[place] for place in order], return_inverse=True)
    patients = len(names)
    if patients < 3:
        raise ValueError(f"a distance to training bags needs three patients, not {patients}")
    references = _references(owner, patients)
    neighbours = min(NEIGHBOURS, len(references) - int(np.bincount(owner[references]).max()))
    sums = _Sums.of(mean)
    distance = np.sort([_left_out(mean, owner == number, references, neighbours, sums) for number in range(patients)])
    rank = math.ceil(Fraction(repr(share)) * patients)
    scale = sums.scale(mean[:0]).astype(np.float32)
    centre = sums.centre_D.astype(np.float32)
    reference = ((mean[references] - centre) / scale).astype(np.float16)
    # Sorted by their numbers, the references do not tell whose they are.
    reference = reference[np.lexsort(reference.T[::-1])]
    limit = max(float(distance[rank - 1]), ROUNDING)
    return Novelty(centre, scale, reference, neighbours, limit, (patients + 1 - rank) / (patients + 1))


def _references(owner_B: NDArray[np.intp], patients: int) -> NDArray[np.intp]:
    """Places [R] of the reference bags, of at least three patients."""
    turn = np.arange(len(owner_B)) - np.searchsorted(owner_B, owner_B)
    in_turn = np.lexsort((owner_B, turn))
    if patients <= MOST_REFERENCES:
        return in_turn[:MOST_REFERENCES]
    return in_turn[np.linspace(0, patients - 1, MOST_REFERENCES).round().astype(np.intp)]


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over all bags, from which those of one patient can be taken."""

    count: int
    centre_D: Floats
    squares_D: Floats

    @classmethod
    def of(cls, mean_BD: Floats) -> _Sums:
        centre = mean_BD.mean(axis=0)
        return cls(len(mean_BD), centre, ((mean_BD - centre) ** 2).sum(axis=0))

    def scale(self, without_ND: Floats) -> Floats:
        """Units [D] of the features: their deviation over all bags but these, or the typical one where there is none."""
        away, rest = without_ND - self.centre_D, self.count - len(without_ND)
        variance = (self.squares_D - (away**2).sum(axis=0)) / rest - (away.sum(axis=0) / rest) ** 2
        scale = np.sqrt(np.maximum(variance, 0.0))
        scale[scale <= SINGLE_PRECISION * np.abs(self.centre_D)] = 0.0
        typical = float(np.median(scale[scale > 0])) if scale.any() else 1.0
        return np.where(scale > NEARLY_CONSTANT * typical, scale, typical)


def _left_out(mean_BD: Floats, own_B: NDArray[np.bool_], references_R: NDArray[np.intp], neighbours: int, sums: _Sums) -> float:
    """Distance of one patient to the others as if it were new: they alone give units and references."""
    scale = sums.scale(mean_BD[own_B])
    reference = mean_BD[references_R[~own_B[references_R]]]
    distance = cdist(mean_BD[own_B] / scale, reference / scale) / math.sqrt(mean_BD.shape[1])
    return float(_nearest(distance, neighbours).max())


def _nearest(distance_NR: Floats, neighbours: int) -> Floats:
    return np.asarray(np.sort(distance_NR, axis=1)[:, :neighbours].mean(axis=1), dtype=np.float64)


def _text(values: NDArray[Any], dtype: str) -> str:
    return b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode("ascii")


def _array(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(b64decode(text), dtype=dtype)
