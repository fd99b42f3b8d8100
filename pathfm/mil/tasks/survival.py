"""Times to an event, some censored: by relative risk (Cox), or interval by interval (discrete hazards).

Legend: as in ``contract``; J horizons, K intervals. Targets are time and event [B, 2].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pathfm.errors import UsageError
from pathfm.mil.tasks.cells import check_columns, flags, safe_name, times
from pathfm.mil.tasks.contract import Bank, Floats, Rows, State, Task
from pathfm.mil.tasks.losses import TINY, chain_loss, log_passing, weighted_mean
from pathfm.mil.tasks.regression import QUARTERS
from pathfm.mil_settings import TaskSettings
from pathfm.stats.survival import breslow

LARGEST = 300.0
"""Log relative risks are cut here: survival is 0 long before, and products stay finite."""


@dataclass(frozen=True)
class Survival(Task):
    """What both kinds share. A bag that lacks time or event takes no part.

    Attributes:
        time_column: of the cohort table.
        event_column: of the cohort table; 1 observed, 0 censored.
        horizons: ascending; ``risk`` looks as far as the last.
        quarters: quartiles of all times, by which splits are balanced.
    """

    time_column: str = ""
    event_column: str = ""
    horizons: tuple[float, ...] = ()
    quarters: tuple[float, ...] = ()

    @classmethod
    def of(cls, settings: TaskSettings, rows: Rows) -> Self:
        """A task for the times of these rows.

        Raises:
            UsageError: columns or values that do not fit, no event, or a horizon that nobody is followed to.
        """
        where = f"task {settings.label!r}"
        if not settings.time or not settings.event:
            raise UsageError("survival needs two columns", where=where, fix="set time=COLUMN and event=COLUMN")
        check_columns(rows, (settings.time, settings.event), where)
        task = cls(name=settings.label, weight=settings.weight, time_column=settings.time, event_column=settings.event)
        time, event = task.encode(rows).T
        if not (event == 1).any():
            raise UsageError("no event was observed", where=f"{where}, column {settings.event!r}", fix="survival needs events")
        known = time[~np.isnan(time)]
        late = [horizon for horizon in settings.horizons if horizon > known.max()]
        if late:
            raise UsageError(f"nobody is followed to the horizon {late[0]:g}", where=where, fix=f"last time: {known.max():g}")
        quartiles = [float(f"{value:.4g}") for value in np.quantile(time[event == 1], QUARTERS)]
        horizons = tuple(sorted({value for value in settings.horizons or quartiles if value > 0})) or (1.0,)
        return replace(task, horizons=horizons, quarters=tuple(np.quantile(known, QUARTERS).tolist()))

    @property
    def targets(self) -> int:
        """Time and event."""
        return 2

    @property
    def columns(self) -> tuple[str, ...]:
        """``risk``, and ``survival_<time>`` at every horizon."""
        return ("risk", *(safe_name(f"survival_{horizon:.12g}") for horizon in self.horizons))

    def encode(self, rows: Rows) -> Floats:
        """Time and event [B, 2]; both NaN where one is missing."""
        where = f"task {self.name!r}"
        target = np.stack([times(rows, self.time_column, where), flags(rows, self.event_column, where)], axis=1)
        target[np.isnan(target).any(1)] = np.nan
        return target

    def balance(self, target_FT: Floats) -> Floats:
        """Ones."""
        return np.ones(len(target_FT))

    def stratum(self, target_T: Floats) -> str:
        """Event or censored, and the quarter of all times."""
        if np.isnan(target_T).any():
            return ""
        state = "event" if target_T[1] == 1 else "censored"
        return f"{state}, quarter {np.searchsorted(self.quarters, target_T[0], side='right') + 1}"

    def note(self, target_FT: Floats) -> str:
        """A part without events."""
        return "" if (target_FT[:, 1] == 1).any() else "no event is observed, so nothing about risk can be learned or judged"


@dataclass(frozen=True)
class Cox(Survival):
    """Proportional hazards: the output is the log of the relative risk. Ties as Breslow has them.

    The risk set of an event is everyone of the training part who is still followed then, not those of the batch only: bags
    outside the batch take part with their latest outputs (``Bank``).
    """

    kind = "cox"
    whole_fold = True

    @property
    def outputs(self) -> int:
        """Log of the relative risk."""
        return 1

    def loss(self, output_BO: Tensor, target_BT: Tensor, weight_B: Tensor, bank: Bank | None = None) -> Tensor:
        """Negative log partial likelihood per event of the whole part (without a bank: of the batch as if it were all).

        A bank is not part of the batch, so only the batch's rows get a gradient: (part / batch) times that of the loss of
        the whole part, so that its mean over an epoch is the gradient of the whole, as with every other loss.
        """
        log_risk_B = output_BO[:, 0]
        weight_B = torch.where(target_BT[:, 0].isnan(), 0.0, weight_B)
        if bank is None or not weight_B.any():
            return _partial_likelihood(log_risk_B, target_BT, weight_B)
        # Several rows of one bag (parts of it, or drawn twice) are one patient in the risk sets.
        weight_B = weight_B / bank.place_B.bincount()[bank.place_B]
        other_F = ~(bank.output_FO[:, 0].isnan() | bank.target_FT[:, 0].isnan())
        other_F[bank.place_B] = False
        log_risk = torch.cat([log_risk_B, bank.output_FO[other_F, 0].detach().to(log_risk_B.dtype)])
        weight = torch.cat([weight_B, weight_B.new_ones(len(log_risk) - len(weight_B))])
        target = torch.cat([target_BT, bank.target_FT[other_F].to(target_BT.dtype)])
        whole = _partial_likelihood(log_risk, target, weight)
        share = weight.sum() / weight_B.sum()
        return whole.detach() + share * (whole - whole.detach())

    def fit_state(self, output_FO: Floats, target_FT: Floats) -> State:
        """Breslow's cumulative baseline hazard of the training part, at the mean of its outputs; empty without events."""
        known = ~np.isnan(target_FT[:, 0])
        log_risk, (time, event) = output_FO[known, 0], target_FT[known].T
        center = float(np.sort(log_risk).mean()) if known.any() else 0.0
        baseline = breslow(log_risk - center, time, event)
        return {"center": [center], "time": baseline.time_T.tolist(), "hazard": baseline.value_T.tolist()}

    def predict(self, output_BO: Floats, state: State) -> Floats:
        """Risk (1 - mean survival until the last horizon), and survival at the horizons."""
        time_T, last = np.array(state["time"]), self.horizons[-1]
        inside = time_T[time_T < last]
        step_K = np.diff(np.concatenate([[0.0], inside, [last]]))
        hazard_T = np.append(0.0, state["hazard"])
        relative_B1 = np.exp(np.minimum(output_BO[:, :1] - state["center"][0], LARGEST))
        survival_BK = np.exp(-relative_B1 * hazard_T[: len(inside) + 1])
        survival_BJ = np.exp(-relative_B1 * hazard_T[np.searchsorted(time_T, self.horizons, side="right")])
        risk_B1 = 1 - (survival_BK * step_K).sum(1, keepdims=True) / last
        return np.concatenate([risk_B1, survival_BJ], axis=1)


@dataclass(frozen=True)
class Discrete(Survival):
    """Discrete hazards: each output is the logit of an event in an interval, given none before.

    Who is censored within an interval has passed it if followed beyond its middle. Within an interval hazards are constant;
    after the last event of the training part survival stays as it is.

    Attributes:
        intervals: their number K; the same in every fold.
        ends: their ends, at equal numbers of events of the training part (of all bags, until ``for_part``).
    """

    intervals: int = 4
    ends: tuple[float, ...] = ()
    kind = "discrete"

    @classmethod
    def of(cls, settings: TaskSettings, rows: Rows) -> Self:
        """A task for the times of these rows."""
        task = replace(super().of(settings, rows), intervals=settings.intervals)
        return task.for_part(task.encode(rows))

    @property
    def outputs(self) -> int:
        """A logit per interval."""
        return self.intervals

    def for_part(self, target_FT: Floats) -> Self:
        """With ends at quantiles of the part's event times (as they are without events); equal times may leave some empty."""
        event_times = target_FT[target_FT[:, 1] == 1, 0]
        if not len(event_times):
            return self
        shares = np.arange(1, self.intervals + 1) / self.intervals
        return replace(self, ends=tuple(np.quantile(event_times, shares, method="inverted_cdf").tolist()))

    def loss(self, output_BO: Tensor, target_BT: Tensor, weight_B: Tensor, bank: Bank | None = None) -> Tensor:
        """Negative log-likelihood of the interval of the event, or of having passed until censored."""
        time_B, event_B = target_BT[:, 0].contiguous(), target_BT[:, 1] == 1
        end_K = torch.tensor(self.ends, dtype=time_B.dtype, device=time_B.device)
        middle_K = (end_K + torch.cat([end_K.new_zeros(1), end_K[:-1]])) / 2
        stopped_B = event_B & (time_B <= end_K[-1])
        passed_B = torch.where(stopped_B, torch.searchsorted(end_K, time_B), torch.searchsorted(middle_K, time_B))
        return weighted_mean(chain_loss(output_BO, passed_B, stopped_B), weight_B, ~time_B.isnan())

    def fit_state(self, output_FO: Floats, target_FT: Floats) -> State:
        """The ends of the intervals with which the network has learned."""
        return {"ends": list(self.ends)}

    def predict(self, output_BO: Floats, state: State) -> Floats:
        """Risk (1 - mean survival until the last horizon), and survival at the horizons."""
        end_K, last = np.array(state["ends"]), self.horizons[-1]
        knot = np.append(0.0, end_K)
        hazard_BK = np.concatenate([np.zeros((len(output_BO), 1)), np.cumsum(-log_passing(output_BO), axis=1)], axis=1)
        at = np.concatenate([[0.0], end_K[end_K < last], [last]])
        log_BA = -_between(knot, hazard_BK, at)
        drop_BA = -np.diff(log_BA, axis=1)
        share_BA = np.where(drop_BA > TINY, -np.expm1(-drop_BA) / np.maximum(drop_BA, TINY), 1.0)
        mean_B1 = (np.exp(log_BA[:, :-1]) * share_BA * np.diff(at)).sum(1, keepdims=True) / last
        return np.concatenate([1 - mean_B1, np.exp(-_between(knot, hazard_BK, np.array(self.horizons)))], axis=1)


def _partial_likelihood(log_risk_B: Tensor, target_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Mean over events of log(sum of the risks of all who are still followed) - log risk; weights count bags several times."""
    weight_B = weight_B.to(log_risk_B.dtype)
    known = weight_B > 0
    log_risk, weight, (time, event) = log_risk_B[known], weight_B[known], target_BT[known].T
    if not (event == 1).any():
        return log_risk_B.sum() * 0.0
    order = time.argsort(descending=True, stable=True)
    sums = torch.logcumsumexp((log_risk + weight.log())[order], 0)
    # Everyone with the same time is in the same risk set: the sum up to the last of them.
    _, group, count = torch.unique_consecutive(time[order], return_inverse=True, return_counts=True)
    at_risk = sums[count.cumsum(0) - 1][group]
    weight_of_event = (weight * (event == 1))[order]
    loss: Tensor = (weight_of_event * (at_risk - log_risk[order])).sum() / weight_of_event.sum()
    return loss


def _between(knot_K: Floats, hazard_BK: Floats, time_J: Floats) -> Floats:
    """Cumulative hazards [B, J], linear between knots (two at one place: the later counts) and flat after the last."""
    right = np.searchsorted(knot_K, time_J, side="right").clip(1, len(knot_K) - 1)
    width = knot_K[right] - knot_K[right - 1]
    share = np.where(width > 0, (time_J - knot_K[right - 1]) / np.where(width > 0, width, 1.0), 1.0).clip(0.0, 1.0)
    return np.asarray(hazard_BK[:, right - 1] * (1 - share) + hazard_BK[:, right] * share)
