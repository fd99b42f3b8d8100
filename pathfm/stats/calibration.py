"""Probabilities that mean what they say: calibrators, fitted on scores of samples that were not learned from.

Legend: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression, minimize, minimize_scalar
from scipy.special import expit, log_softmax, logit, softmax

from pathfm.stats.metrics import finite

Floats = NDArray[np.float64]
LEAST = 1e-6
"""Probabilities nearer to 0 or 1 than this count as this: a logarithm needs an end."""
STEEPEST = 10.0
"""A calibrator makes log-odds at most this many times larger, or (a temperature) smaller."""


@dataclass(frozen=True)
class Calibrator:
    """A non-decreasing map from probabilities to probabilities, in plain numbers.

    Attributes:
        kind: temperature, platt or isotonic.
        positive: column of the positive class; of two classes, the other one gets the rest.
        slope: factor of the log-odds (of the log-probabilities where there are more than two classes); 1/temperature.
        intercept: added to the log-odds; Platt only.
        knot_x: isotonic: probabilities, increasing, between which ``knot_y`` is interpolated.
        knot_y: what they become.
    """

    kind: str
    positive: int = 1
    slope: float = 1.0
    intercept: float = 0.0
    knot_x: tuple[float, ...] = ()
    knot_y: tuple[float, ...] = ()

    def apply(self, probability_NC: ArrayLike) -> Floats:
        """Calibrated probabilities [N, C]; rows sum to 1."""
        probability = np.asarray(probability_NC, dtype=np.float64)
        if probability.shape[1] != 2:
            return np.asarray(softmax(self.slope * _log(probability), axis=1), dtype=np.float64)
        score = probability[:, self.positive]
        if self.kind == "isotonic":
            risen = np.interp(score, self.knot_x, self.knot_y)
        else:
            risen = expit(self.slope * _log_odds(score) + self.intercept)
        calibrated = np.empty_like(probability)
        calibrated[:, self.positive], calibrated[:, 1 - self.positive] = risen, 1.0 - risen
        return calibrated

    def record(self) -> dict[str, Any]:
        """Plain values; ``calibrator_from_record`` gives the same calibrator back, to the last bit."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def calibrator_from_record(record: Mapping[str, Any]) -> Calibrator:
    """The calibrator of a ``Calibrator.record``."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    return Calibrator(**values)


def fit_calibrator(kind: str, probability_NC: ArrayLike, label_N: ArrayLike, positive: int = 1) -> Calibrator:
    """Fits a calibrator on scores of samples that the scoring model has not learned from.

    Args:
        kind: temperature, platt or isotonic; with more than two classes always temperature.
        probability_NC: predicted probabilities.
        label_N: class numbers.
        positive: column of the positive class, where there are two.

    Raises:
        ValueError: fewer than two classes are present: nothing can be learned about probabilities; or one is not finite.
    """
    probability, label = finite(probability_NC, "probabilities"), np.asarray(label_N, dtype=np.intp)
    if len(np.unique(label)) < 2:
        raise ValueError("calibration needs samples of two classes")
    if kind == "temperature" or probability.shape[1] != 2:
        return Calibrator("temperature", positive, slope=_fit_temperature(_log(probability), label))
    score, happened = probability[:, positive], label == positive
    if kind == "platt":
        slope, intercept = _fit_platt(_log_odds(score), happened)
        return Calibrator("platt", positive, slope=slope, intercept=intercept)
    if kind == "isotonic":
        knot_x, knot_y = _fit_isotonic(score, happened)
        return Calibrator("isotonic", positive, knot_x=tuple(knot_x.tolist()), knot_y=tuple(knot_y.tolist()))
    raise ValueError(f"no calibrator {kind!r}; there are temperature, platt, isotonic")


def _fit_temperature(log_NC: Floats, label_N: NDArray[np.intp]) -> float:
    """1/temperature of Guo et al. (2017). A standard normal prior on its logarithm, which is worth less than one sample, keeps
    it finite when every sample is predicted right."""
    rows = np.arange(len(label_N))

    def cost(log_slope: float) -> float:
        likelihood = log_softmax(np.exp(log_slope) * log_NC, axis=1)[rows, label_N].sum()
        return float(0.5 * log_slope**2 - likelihood)

    reach = float(np.log(STEEPEST))
    return float(np.exp(minimize_scalar(cost, bounds=(-reach, reach), method="bounded", options={"xatol": 1e-9}).x))


def _fit_platt(log_odds_N: Floats, happened_N: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept of Platt (1999) with his smoothed targets, which keep them finite under perfect separation; the slope
    is never negative, so scores that say nothing become the (smoothed) share of positives."""
    positives, negatives = int(happened_N.sum()), int((~happened_N).sum())
    target = np.where(happened_N, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def cost(line: Floats) -> tuple[float, Floats]:
        z = line[0] * log_odds_N + line[1]
        error = expit(z) - target
        value = (np.logaddexp(0.0, z) - target * z).sum()
        return float(value), np.array([(error * log_odds_N).sum(), error.sum()])

    # Beyond these bounds lies no optimum of smoothed targets with this slope and these log-odds.
    reach = (STEEPEST + 1) * float(-logit(LEAST))
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    found = minimize(cost, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(0.0, STEEPEST), (-reach, reach)], options=options)
    return float(found.x[0]), float(found.x[1])


def _fit_isotonic(score_N: Floats, happened_N: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Knots of the isotonic regression (tied scores share one), never nearer to 0 or 1 than one of N + 2 samples."""
    x, place_N, count = np.unique(score_N, return_inverse=True, return_counts=True)
    share = np.bincount(place_N, weights=happened_N) / count
    y = isotonic_regression(share, weights=count).x
    least = 1.0 / (len(score_N) + 2)
    # Inside a level stretch only its ends matter.
    kept = np.ones(len(x), dtype=bool)
    kept[1:-1] = (y[1:-1] != y[:-2]) | (y[1:-1] != y[2:])
    return x[kept], np.clip(y[kept], least, 1.0 - least)


def _log(probability: Floats) -> Floats:
    return np.log(np.clip(probability, LEAST, 1.0))


def _log_odds(probability: Floats) -> Floats:
    return np.asarray(logit(np.clip(probability, LEAST, 1.0 - LEAST)), dtype=np.float64)
