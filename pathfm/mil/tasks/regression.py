"""Numbers. Legend: as in ``contract``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from torch import Tensor
from torch.nn.functional import huber_loss

from pathfm.errors import UsageError
from pathfm.mil.tasks.cells import check_columns, numbers
from pathfm.mil.tasks.contract import Bank, Floats, Rows, State, Task
from pathfm.mil.tasks.losses import weighted_mean
from pathfm.mil_settings import TaskSettings

QUARTERS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Regression(Task):
    """A number; its label column is the task's name. The network learns it in standard deviations from the mean.

    Attributes:
        mean: of the training part (of all bags, until ``for_part``).
        deviation: standard deviation likewise; 1 where all values are the same.
        quarters: quartiles of all bags, by which splits are balanced.
    """

    mean: float = 0.0
    deviation: float = 1.0
    quarters: tuple[float, ...] = ()
    kind = "regression"

    @classmethod
    def of(cls, settings: TaskSettings, rows: Rows) -> Self:
        """A task for the numbers of these rows."""
        where = f"task {settings.label!r}"
        check_columns(rows, (settings.label,), where)
        value = numbers(rows, settings.label, where)
        known = value[~np.isnan(value)]
        if known.min() == known.max():
            raise UsageError(f"all values are {known[0]:g}", where=f"{where}, column {settings.label!r}")
        quarters = tuple(np.quantile(known, QUARTERS).tolist())
        return cls(name=settings.label, weight=settings.weight, quarters=quarters).for_part(value[:, None])

    @property
    def outputs(self) -> int:
        """The standardised number."""
        return 1

    @property
    def targets(self) -> int:
        """The number as the table has it."""
        return 1

    @property
    def columns(self) -> tuple[str, ...]:
        """``value``, in the unit of the table."""
        return ("value",)

    def encode(self, rows: Rows) -> Floats:
        """Numbers [B, 1]."""
        return numbers(rows, self.name, f"task {self.name!r}")[:, None]

    def for_part(self, target_FT: Floats) -> Self:
        """With mean and deviation of the part."""
        known = np.sort(target_FT[~np.isnan(target_FT)])  # sorted: sums do not depend on the order of bags
        if not len(known):
            return self
        same = known[0] == known[-1]
        return replace(self, mean=float(known.mean()), deviation=1.0 if same else float(known.std()))

    def balance(self, target_FT: Floats) -> Floats:
        """Ones."""
        return np.ones(len(target_FT))

    def loss(self, output_BO: Tensor, target_BT: Tensor, weight_B: Tensor, bank: Bank | None = None) -> Tensor:
        """Huber loss of the standardised number: squared within one standard deviation, absolute beyond."""
        unit_B = ((target_BT[:, 0] - self.mean) / self.deviation).nan_to_num(0.0).to(output_BO.dtype)
        return weighted_mean(huber_loss(output_BO[:, 0], unit_B, reduction="none"), weight_B, ~target_BT[:, 0].isnan())

    def fit_state(self, output_FO: Floats, target_FT: Floats) -> State:
        """The unit in which the network has learned."""
        return {"mean": [self.mean], "deviation": [self.deviation]}

    def predict(self, output_BO: Floats, state: State) -> Floats:
        """Back in the unit of the table."""
        return np.asarray(output_BO * state["deviation"][0] + state["mean"][0], dtype=np.float64)

    def stratum(self, target_T: Floats) -> str:
        """The quarter of all numbers it lies in."""
        return "" if math.isnan(target_T[0]) else f"quarter {np.searchsorted(self.quarters, target_T[0], side='right') + 1}"

    def note(self, target_FT: Floats) -> str:
        """A part without different numbers."""
        known = target_FT[~np.isnan(target_FT)]
        return "" if len(np.unique(known)) > 1 else f"no two bags with different values of {self.name}"
