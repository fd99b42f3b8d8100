"""Split-conformal sets of classes (Vovk et al. 2005): they miss the true class in at most a share alpha of new patients.

The promise holds when calibration and new patients are exchangeable. Legend: N patients, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import betabinom

from pathfm.errors import UsageError
from pathfm.stats.metrics import finite


class TooFewPatientsError(UsageError):
    """No finite quantile keeps the promise with so few calibration patients."""


@dataclass(frozen=True)
class Conformal:
    """Quantiles that make sets.

    Attributes:
        alpha: share of new patients whose set may miss their class.
        class_wise: it is kept in every class (Mondrian), else over all.
        quantile_C: a class is in the set when 1 - its probability is no larger; all equal unless class-wise.
        count_C: calibration patients behind each quantile.
    """

    alpha: float
    class_wise: bool
    quantile_C: tuple[float, ...]
    count_C: tuple[int, ...]

    def contains(self, probability_NC: ArrayLike) -> NDArray[np.bool_]:
        """Which classes [N, C] are in the sets."""
        inside: NDArray[np.bool_] = 1.0 - np.asarray(probability_NC, dtype=np.float64) <= np.array(self.quantile_C)
        return inside

    def record(self) -> dict[str, Any]:
        """Plain values; ``conformal_from_record`` gives the same back, to the last bit."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def conformal_from_record(record: Mapping[str, Any]) -> Conformal:
    """The quantiles of a ``Conformal.record``."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    return Conformal(**values)


def least_patients(alpha: float) -> int:
    """ceil(1/alpha) - 1: with fewer calibration patients no finite quantile exists (19 at 0.05)."""
    return math.ceil(1 / Fraction(repr(alpha))) - 1


def missed_ranks(count: int, alpha: float) -> int:
    """l = floor((n+1) alpha): how many of n scores lie at or above the quantile, exact for alpha as printed."""
    return math.floor((count + 1) * Fraction(repr(alpha)))


def conformal_quantile(score_N: ArrayLike, alpha: float) -> float:
    """The ceil((n+1)(1-alpha))-th smallest of n scores; inf where there are fewer than that."""
    score = np.sort(np.asarray(score_N, dtype=np.float64))
    rank = len(score) + 1 - missed_ranks(len(score), alpha)
    return float(score[rank - 1]) if rank <= len(score) else math.inf


def fit_conformal(
    probability_NC: ArrayLike,
    label_N: ArrayLike,
    patient_N: Sequence[str],
    classes: Sequence[str],
    alpha: float,
    *,
    class_wise: bool = False,
) -> Conformal:
    """Quantiles from the scores 1 - p(true class) of patients whom the scoring model has neither learned nor stopped from.

    A sample is a patient; where patients have several, they count once.

    Raises:
        TooFewPatientsError: fewer than ceil(1/alpha) - 1 patients (class-wise: of some class).
        ValueError: a probability is not finite.
    """
    probability, label = finite(probability_NC, "probabilities"), np.asarray(label_N, dtype=np.intp)
    score, patient = 1.0 - probability[np.arange(len(label)), label], np.asarray(patient_N)
    least, quantiles, counts = least_patients(alpha), [], []
    for number, name in enumerate(classes):
        of_group = label == number if class_wise else np.ones(len(label), dtype=bool)
        quantiles.append(conformal_quantile(score[of_group], alpha))
        counts.append(len(np.unique(patient[of_group])))
        if counts[-1] < least:
            whose = f" of class {name}" if class_wise else ""
            raise TooFewPatientsError(
                f"conformal sets with error rate {alpha:g} need {least} calibration patients{whose}, there are {counts[-1]}",
                fix=f"a larger mil.numbers.alpha{', or class_wise: false' if class_wise else ''}; alpha: null makes no sets",
            )
    return Conformal(alpha, class_wise, tuple(quantiles), tuple(counts))


def coverage_limits(tested: int, calibrated: int, alpha: float, confidence: float = 0.95) -> tuple[float, float]:
    """Where the observed coverage of ``tested`` new patients lies by chance, calibration patients drawn anew as well:
    Beta-binomial(tested; n+1-l, l) with n = ``calibrated`` and l = floor((n+1) alpha) (Vovk 2012; Angelopoulos and Bates 2023).
    """
    missed = missed_ranks(calibrated, alpha)
    tail = (1.0 - confidence) / 2
    law = betabinom(tested, calibrated + 1 - missed, missed)
    return float(law.ppf(tail)) / tested, float(law.ppf(1.0 - tail)) / tested
