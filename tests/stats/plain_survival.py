"""The C-index and the time-dependent AUC of one cohort, written plainly: what the weighted ones are held to.

Sources: Harrell et al. 1982; Uno et al. 2007 (weights are the inverse chance of not being censored).
"""

import numpy as np
from numpy.typing import ArrayLike

from pathfm.stats.survival import _checked, _finite, censoring_curve


def concordance_index(risk_N: ArrayLike, time_N: ArrayLike, event_N: ArrayLike) -> float:
    """Harrell's C: the chance that of two patients whose order is known the one with the earlier event has the higher risk.

    The order is known where one has an event and the other is followed longer, or is censored at the same time. Equal risks
    count one half; two events at the same time have no order.

    Raises:
        ValueError: there is no such pair (C is undefined), a risk is not finite, or a time is negative.
    """
    time, event = _checked(time_N, event_N)
    risk = _finite(risk_N)
    i = np.flatnonzero(event)[:, None]
    comparable = (time[i] < time) | ((time[i] == time) & ~event)
    right = float(((risk[i] > risk) & comparable).sum() + 0.5 * ((risk[i] == risk) & comparable).sum())
    pairs = int(comparable.sum())
    if not pairs:
        raise ValueError("the C-index needs an event with somebody who was followed longer")
    return right / pairs


def time_dependent_auc(risk_N: ArrayLike, time_N: ArrayLike, event_N: ArrayLike, horizon: float) -> float:
    """Chance that a patient with an event until ``horizon`` has a higher risk than one without (cumulative/dynamic AUC).

    Who is censored before takes no part; those with an event stand in for them by the inverse of the chance of having been
    followed until then (IPCW). Equal risks count one half.

    Raises:
        ValueError: nobody has an event until then, or nobody is followed beyond (the area is undefined).
    """
    time, event = _checked(time_N, event_N)
    risk = _finite(risk_N)
    case, control = event & (time <= horizon), time > horizon
    if not case.any() or not control.any():
        raise ValueError(f"the AUC at {horizon:g} needs patients with an event until then, and others followed beyond")
    weight = 1 / censoring_curve(time, event).at(time[case], before=True)
    others = np.sort(risk[control])
    lower = np.searchsorted(others, risk[case], side="left") + np.searchsorted(others, risk[case], side="right")
    return float((weight * lower).sum() / (2 * len(others) * weight.sum()))
