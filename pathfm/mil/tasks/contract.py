"""What every task can do; all tasks of a network together are a ``TaskSet``.

Legend: B bags, O network outputs, T target columns, P prediction columns, F bags of a whole fold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pathfm.mil_settings import TaskSettings

Floats = NDArray[np.float64]
Rows = Sequence[Mapping[str, str]]
"""Label columns of each bag, as the cohort table has them; empty text where a value is missing."""
State = Mapping[str, list[float]]
"""What a task fits on a training part besides the network (a baseline hazard); plain numbers, kept beside the weights."""


class Bank(NamedTuple):
    """Outputs and targets of a whole training part, for losses that compare each bag with all others (Cox).

    Attributes:
        output_FO: latest outputs, without gradient; NaN where a bag has not been asked yet (it then takes no part).
        target_FT: their targets.
        place_B: the places in the bank of the bags of the batch.
    """

    output_FO: Tensor
    target_FT: Tensor
    place_B: Tensor


@dataclass(frozen=True)
class Task(ABC):
    """One task; frozen, and made of plain values (``record``), so that a bundle can hold it.

    Attributes:
        name: label of the settings.
        classes: class names by number; of a multilabel task its columns; none for numbers and survival.
        positive: number of the positive class; -1 where there is none.
        weight: of its loss among several tasks.
    """

    name: str
    classes: tuple[str, ...] = ()
    positive: int = -1
    weight: float = 1.0

    kind = ""
    """One of the kinds of ``TaskSettings`` (not ``auto``)."""
    whole_fold = False
    """The loss needs a ``Bank``."""

    @classmethod
    @abstractmethod
    def of(cls, settings: TaskSettings, rows: Rows) -> Self:
        """The task of these settings; what must be the same in all folds (classes, horizons) is read from all rows.

        Raises:
            UsageError: settings and label columns do not fit together.
        """

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Columns O of the network's output."""

    @property
    @abstractmethod
    def targets(self) -> int:
        """Columns T of a target (survival: time and event)."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the prediction columns P: ``probability_<class>``, ``value``, or ``risk`` and ``survival_<time>``;
        safe in the header of a CSV file."""

    @abstractmethod
    def encode(self, rows: Rows) -> Floats:
        """Targets [B, T] of bags; NaN where a value is missing.

        Raises:
            UsageError: a value that cannot be understood, with its column.
        """

    @abstractmethod
    def balance(self, target_FT: Floats) -> Floats:
        """Weight [F] of each bag such that every class counts the same, mean 1; ones where there are no classes."""

    @abstractmethod
    def loss(self, output_BO: Tensor, target_BT: Tensor, weight_B: Tensor, bank: Bank | None = None) -> Tensor:
        """Mean of weight x loss over the bags that have a target; 0 (with a gradient of 0) when none has one.

        Not over the sum of weights, which have mean 1 over a whole part: of a batch of one bag the weight would cancel.
        """

    @abstractmethod
    def fit_state(self, output_FO: Floats, target_FT: Floats) -> State:
        """What predictions need besides the network, from its training part; mostly nothing."""

    @abstractmethod
    def predict(self, output_BO: Floats, state: State) -> Floats:
        """Predictions [B, P], on a scale on which those of several networks may be averaged."""

    @abstractmethod
    def stratum(self, target_T: Floats) -> str:
        """By what splits are balanced: the class, a quarter of the numbers, event and time; "" where unknown."""

    def for_part(self, target_FT: Floats) -> Self:
        """The task as networks of one training part learn it: the units and intervals of its loss come from there alone."""
        return self

    def note(self, target_FT: Floats) -> str:
        """What a part with these targets cannot teach or tell; "" where there is nothing to say."""
        return ""

    def record(self) -> dict[str, Any]:
        """Plain values from which ``task_from_record`` makes the same task again."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind} | {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
