"""Times to an event, some of them censored: curves and hazards. Pure functions of arrays.

Legend: N patients, T distinct event times.

Sources: Kaplan and Meier 1958; Breslow 1974.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Curve(NamedTuple):
    """A step function that changes at ``time_T`` (ascending) and holds ``value_T`` from there on; before it is ``start``."""

    time_T: Floats
    value_T: Floats
    start: float

    def at(self, time: ArrayLike, *, before: bool = False) -> Floats:
        """Values at these times; ``before``: just before them."""
        place = np.searchsorted(self.time_T, np.asarray(time, dtype=np.float64), side="left" if before else "right")
        return np.append(self.start, self.value_T)[place]


def kaplan_meier(time_N: ArrayLike, event_N: ArrayLike) -> Curve:
    """Share of patients without the event, over time; who is censored at a time of events was at risk of them."""
    time, event = _checked(time_N, event_N)
    event_T = np.unique(time[event])
    at_risk, events = _at_risk(time, event_T), _count(time[event], event_T)
    return Curve(event_T, np.asarray(np.cumprod(1 - events / at_risk)), 1.0)


def censoring_curve(time_N: ArrayLike, event_N: ArrayLike) -> Curve:
    """Share of patients who are not yet censored (Kaplan-Meier of censoring): events come before censoring at the same time."""
    time, event = _checked(time_N, event_N)
    lost_T = np.unique(time[~event])
    at_risk = _at_risk(time, lost_T) - _count(time[event], lost_T)
    return Curve(lost_T, np.asarray(np.cumprod(1 - _count(time[~event], lost_T) / at_risk)), 1.0)


def breslow(log_risk_N: ArrayLike, time_N: ArrayLike, event_N: ArrayLike) -> Curve:
    """Cumulative baseline hazard of a Cox model: the hazard of a patient whose log risk is 0. Empty without events."""
    time, event = _checked(time_N, event_N)
    log_risk = _finite(log_risk_N)
    order = np.argsort(time, kind="stable")
    event_T = np.unique(time[event])
    top = log_risk.max(initial=-np.inf)
    # Sums from the last time back: who is at risk at a time is everyone from there on.
    sums = np.cumsum(np.exp(log_risk[order] - top)[::-1])[::-1]
    risk_T = sums[np.searchsorted(time[order], event_T)]
    return Curve(event_T, np.cumsum(_count(time[event], event_T) / risk_T * np.exp(-top)), 0.0)


def _at_risk(time_N: Floats, at_T: Floats) -> Floats:
    return (len(time_N) - np.searchsorted(np.sort(time_N), at_T, side="left")).astype(np.float64)


def _count(time_N: Floats, at_T: Floats) -> Floats:
    ordered = np.sort(time_N)
    return (np.searchsorted(ordered, at_T, side="right") - np.searchsorted(ordered, at_T, side="left")).astype(np.float64)


def _checked(time_N: ArrayLike, event_N: ArrayLike) -> tuple[Floats, Bools]:
    time, event = np.asarray(time_N, dtype=np.float64), np.asarray(event_N, dtype=bool)
    if not np.isfinite(time).all() or (time < 0).any():
        raise ValueError("times must be finite and not negative")
    return time, event


def _finite(risk_N: ArrayLike) -> Floats:
    risk = np.asarray(risk_N, dtype=np.float64)
    if not np.isfinite(risk).all():
        raise ValueError("risks must be finite")
    return risk
