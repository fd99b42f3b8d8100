"""Classes of which a bag has one (binary, multiclass, ordinal), or any number (multilabel).

Legend: as in ``contract``; C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from pathfm.config import did_you_mean
from pathfm.errors import UsageError
from pathfm.mil.tasks.cells import check_columns, check_names, class_names, class_numbers, flags, safe_name
from pathfm.mil.tasks.contract import Bank, Floats, Rows, State, Task
from pathfm.mil.tasks.losses import balanced, chain_loss, log_passing, weighted_mean
from pathfm.mil_settings import TaskSettings


@dataclass(frozen=True)
class Classes(Task):
    """One class of several per bag; its label column is the task's name. Targets are class numbers."""

    @classmethod
    def of(cls, settings: TaskSettings, rows: Rows) -> Self:
        """Classes of all rows, sorted."""
        where = f"task {settings.label!r}"
        check_columns(rows, (settings.label,), where)
        names = cls.names(settings, class_names(rows, settings.label, where))
        if settings.positive is not None and settings.positive not in names:
            hint = did_you_mean(settings.positive, names)
            raise UsageError(
                f"nothing has the class {settings.positive!r}, which positive names{hint}",
                where=where,
                fix=f"classes: {', '.join(names)}",
            )
        positive = names.index(settings.positive) if settings.positive is not None else len(names) - 1
        return cls(name=settings.label, classes=names, positive=positive, weight=settings.weight)

    @classmethod
    def names(cls, settings: TaskSettings, present: tuple[str, ...]) -> tuple[str, ...]:
        """The classes by number, given those that are present."""
        return present

    @property
    def outputs(self) -> int:
        """A logit per class."""
        return len(self.classes)

    @property
    def targets(self) -> int:
        """The class number."""
        return 1

    @property
    def columns(self) -> tuple[str, ...]:
        """``probability_<class>`` of every class; a row sums to 1."""
        return tuple(safe_name(f"probability_{name}") for name in self.classes)

    def encode(self, rows: Rows) -> Floats:
        """Class numbers [B, 1]."""
        return class_numbers(rows, self.name, self.classes, f"task {self.name!r}")[:, None]

    def balance(self, target_FT: Floats) -> Floats:
        """Every class that is present counts the same."""
        return balanced(target_FT[:, 0])

    def loss(self, output_BO: Tensor, target_BT: Tensor, weight_B: Tensor, bank: Bank | None = None) -> Tensor:
        """Cross-entropy."""
        label_B = target_BT[:, 0].nan_to_num(0.0).long()
        return weighted_mean(cross_entropy(output_BO, label_B, reduction="none"), weight_B, ~target_BT[:, 0].isnan())

    def fit_state(self, output_FO: Floats, target_FT: Floats) -> State:
        """Nothing."""
        return {}

    def predict(self, output_BO: Floats, state: State) -> Floats:
        """Softmax."""
        return np.asarray(softmax(output_BO, axis=1))

    def stratum(self, target_T: Floats) -> str:
        """The class."""
        return "" if math.isnan(target_T[0]) else self.classes[int(target_T[0])]

    def note(self, target_FT: Floats) -> str:
        """Classes that the part does not have."""
        absent = [name for number, name in enumerate(self.classes) if not (target_FT[:, 0] == number).any()]
        return f"no bag of class {', '.join(absent)}" if absent else ""


@dataclass(frozen=True)
class Binary(Classes):
    """Two classes."""

    kind = "binary"

    @classmethod
    def names(cls, settings: TaskSettings, present: tuple[str, ...]) -> tuple[str, ...]:
        """Both.

        Raises:
            UsageError: there are more.
        """
        if len(present) > 2:
            raise UsageError(
                f"binary means two classes, but there are {len(present)}: {', '.join(present)}",
                where=f"task {settings.label!r}",
                fix="set kind=multiclass",
            )
        return present


@dataclass(frozen=True)
class Multiclass(Classes):
    """Two or more classes without an order."""

    kind = "multiclass"


@dataclass(frozen=True)
class Ordinal(Classes):
    """Classes with an order, by conditional chances of going beyond each (CORN, Shi et al. 2021).

    Output k is the logit of a class above k given that it is not below; the chances of the classes follow by the chain rule,
    so they are never negative and sum to 1.
    """

    kind = "ordinal"

    @classmethod
    def names(cls, settings: TaskSettings, present: tuple[str, ...]) -> tuple[str, ...]:
        """The order of the settings.

        Raises:
            UsageError: it is missing, misses a label that is present, or names one twice.
        """
        where, order = f"task {settings.label!r}", settings.order
        if not order:
            raise UsageError("an ordinal task needs an order", where=where, fix=f"set order to {list(present)}, lowest first")
        if len(set(order)) < len(order):
            raise UsageError("the order names a class twice", where=where, fix=f"order: {', '.join(order)}")
        for name in present:
            if name not in order:
                hint = did_you_mean(name, set(order) - set(present))
                raise UsageError(f"the order misses the label {name!r}{hint}", where=where, fix=f"order: {', '.join(order)}")
        check_names(order, where)
        return order

    @property
    def outputs(self) -> int:
        """One less than there are classes."""
        return len(self.classes) - 1

    def loss(self, output_BO: Tensor, target_BT: Tensor, weight_B: Tensor, bank: Bank | None = None) -> Tensor:
        """Negative log-likelihood of the class."""
        label_B = target_BT[:, 0].nan_to_num(0.0).long()
        loss_B = chain_loss(-output_BO, label_B, label_B < self.outputs)
        return weighted_mean(loss_B, weight_B, ~target_BT[:, 0].isnan())

    def predict(self, output_BO: Floats, state: State) -> Floats:
        """Chances of the classes, by the chain rule."""
        above = np.cumsum(log_passing(-output_BO), axis=1)
        reached = np.exp(np.concatenate([np.zeros((len(above), 1)), above], axis=1))
        stops = np.concatenate([expit(-output_BO), np.ones((len(above), 1))], axis=1)
        return np.asarray(reached * stops)


@dataclass(frozen=True)
class Multilabel(Task):
    """Several columns with 0, 1 or nothing, each with a chance of its own.

    Attributes:
        rarest: numbers of the columns, from the fewest ones to the most.
    """

    rarest: tuple[int, ...] = ()
    kind = "multilabel"

    @classmethod
    def of(cls, settings: TaskSettings, rows: Rows) -> Self:
        """The columns of the settings, in their order."""
        where, columns = f"task {settings.label!r}", settings.columns
        if not columns or len(set(columns)) < len(columns):
            raise UsageError("a multilabel task needs columns, each named once", where=where, fix="set columns=[A, B, ...]")
        check_columns(rows, columns, where)
        check_names(columns, where)
        count = []
        for column in columns:
            value = flags(rows, column, where)
            if len(np.unique(value[~np.isnan(value)])) < 2:
                raise UsageError("a column needs both 0 and 1", where=f"{where}, column {column!r}", fix="leave it out")
            count.append(int(np.nansum(value)))
        rarest = tuple(sorted(range(len(columns)), key=lambda number: (count[number], columns[number])))
        return cls(name=settings.label, classes=columns, weight=settings.weight, rarest=rarest)

    @property
    def outputs(self) -> int:
        """A logit per column."""
        return len(self.classes)

    @property
    def targets(self) -> int:
        """A value per column."""
        return len(self.classes)

    @property
    def columns(self) -> tuple[str, ...]:
        """``probability_<column>``."""
        return tuple(safe_name(f"probability_{name}") for name in self.classes)

    def encode(self, rows: Rows) -> Floats:
        """0, 1 or NaN [B, T]."""
        return np.stack([flags(rows, column, f"task {self.name!r}") for column in self.classes], axis=1)

    def balance(self, target_FT: Floats) -> Floats:
        """Mean over the columns in which a bag has a value of the weights that would balance each."""
        known_FT = ~np.isnan(target_FT)
        weight_FT = np.stack([balanced(column_F) for column_F in target_FT.T], axis=1)
        weight = (weight_FT * known_FT).sum(1) / known_FT.sum(1).clip(1)
        some = known_FT.any(1)
        weight[some] *= some.sum() / weight[some].sum()
        return np.where(some, weight, 1.0)

    def loss(self, output_BO: Tensor, target_BT: Tensor, weight_B: Tensor, bank: Bank | None = None) -> Tensor:
        """Binary cross-entropy, mean over the columns in which a bag has a value."""
        known_BT = ~target_BT.isnan()
        target_BT = target_BT.nan_to_num(0.0).to(output_BO.dtype)
        loss_BT = binary_cross_entropy_with_logits(output_BO, target_BT, reduction="none")
        loss_B = torch.where(known_BT, loss_BT, 0.0).sum(1) / known_BT.sum(1).clamp_min(1)
        return weighted_mean(loss_B, weight_B, known_BT.any(1))

    def fit_state(self, output_FO: Floats, target_FT: Floats) -> State:
        """Nothing."""
        return {}

    def predict(self, output_BO: Floats, state: State) -> Floats:
        """Sigmoid."""
        return np.asarray(expit(output_BO))

    def stratum(self, target_T: Floats) -> str:
        """The rarest column with a 1, or "none": patterns of many columns would be too rare to balance by."""
        if np.isnan(target_T).all():
            return ""
        return next((self.classes[number] for number in self.rarest if target_T[number] == 1), "none")

    def note(self, target_FT: Floats) -> str:
        """Columns in which the part lacks 0 or 1."""
        flat = [name for name, value in zip(self.classes, target_FT.T, strict=True) if not {0.0, 1.0} <= set(value.tolist())]
        return f"no bags with both 0 and 1 in {', '.join(flat)}" if flat else ""
