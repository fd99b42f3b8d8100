"""All tasks of one network: its outputs, targets and predictions lie side by side, task after task.

Legend: as in ``contract``; K tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pathfm.errors import StoreError
from pathfm.mil.tasks.cells import safe_name
from pathfm.mil.tasks.classes import Binary, Multiclass, Multilabel, Ordinal
from pathfm.mil.tasks.contract import Bank, Floats, Rows, State, Task
from pathfm.mil.tasks.regression import Regression
from pathfm.mil.tasks.survival import Cox, Discrete

KINDS: Mapping[str, type[Task]] = {
    task.kind: task for task in (Binary, Multiclass, Multilabel, Ordinal, Regression, Cox, Discrete)
}


class Place(NamedTuple):
    """Where a task lies among all: columns of outputs, targets and predictions."""

    outputs: slice
    targets: slice
    columns: slice


@dataclass(frozen=True)
class TaskSet:
    """Tasks of one network, the main one first."""

    tasks: tuple[Task, ...]

    @property
    def main(self) -> Task:
        """The task by which folds are made and the primary numbers are given."""
        return self.tasks[0]

    @property
    def outputs(self) -> int:
        """Columns of the network's output."""
        return sum(task.outputs for task in self.tasks)

    @property
    def targets(self) -> int:
        """Columns of the targets."""
        return sum(task.targets for task in self.tasks)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the prediction columns; those of further tasks start with the task's name."""
        further = [safe_name(f"{task.name}_{name}") for task in self.tasks[1:] for name in task.columns]
        return (*self.main.columns, *further)

    @property
    def whole_fold(self) -> bool:
        """Some loss needs a ``Bank``."""
        return any(task.whole_fold for task in self.tasks)

    def slice_of(self, task: Task) -> Place:
        """Where a task (known by its name) lies."""
        return dict(zip((task.name for task in self.tasks), self._places, strict=True))[task.name]

    @cached_property
    def _places(self) -> list[Place]:
        parts = [
            _slices(sizes)
            for sizes in (
                [task.outputs for task in self.tasks],
                [task.targets for task in self.tasks],
                [len(task.columns) for task in self.tasks],
            )
        ]
        return [Place(*slices) for slices in zip(*parts, strict=True)]

    def encode(self, rows: Rows) -> Floats:
        """Targets [B, T] of bags; NaN where a value is missing.

        Raises:
            UsageError: a value that cannot be understood, with its column.
        """
        return np.concatenate([task.encode(rows) for task in self.tasks], axis=1)

    def for_part(self, target_FT: Floats) -> TaskSet:
        """The tasks as networks of one training part learn them; their losses and ``fit_state`` are for that part alone."""
        return TaskSet(tuple(task.for_part(target_FT[:, at.targets]) for task, at in self._each))

    def balance(self, target_FT: Floats) -> Floats:
        """Weights [F, K] of each bag in each task."""
        return np.stack([task.balance(target_FT[:, at.targets]) for task, at in self._each], axis=1)

    def notes(self, target_FT: Floats) -> list[str]:
        """What a part with these targets cannot teach or tell, by task."""
        said = [(task.name, task.note(target_FT[:, at.targets])) for task, at in self._each]
        return [f"{name}: {note}" for name, note in said if note]

    def loss(self, output_BO: Tensor, target_BT: Tensor, weight_BK: Tensor, bank: Bank | None = None) -> Tensor:
        """Sum over tasks of task weight x loss, in float32 or better; a bag without a target has no part in that task.

        Args:
            output_BO: of the network.
            target_BT: of ``encode``.
            weight_BK: of ``balance``.
            bank: of the whole training part, all outputs and targets; needed where ``whole_fold``, and None where the batch
                is the whole part already.
        """
        output_BO = output_BO.to(torch.promote_types(output_BO.dtype, torch.float32))
        losses = []
        for number, (task, at) in enumerate(self._each):
            part = Bank(bank.output_FO[:, at.outputs], bank.target_FT[:, at.targets], bank.place_B) if bank else None
            loss = task.loss(output_BO[:, at.outputs], target_BT[:, at.targets], weight_BK[:, number], part)
            losses.append(task.weight * loss)
        return torch.stack(losses).sum()

    def fit_state(self, output_FO: Floats, target_FT: Floats) -> dict[str, State]:
        """By task name, what predictions need besides the network, from its training part."""
        return {task.name: task.fit_state(output_FO[:, at.outputs], target_FT[:, at.targets]) for task, at in self._each}

    def predict(self, output_BO: Floats, states: Mapping[str, State]) -> Floats:
        """Predictions [B, P], on scales on which those of several networks may be averaged."""
        output_BO = np.asarray(output_BO, dtype=np.float64)
        parts = [task.predict(output_BO[:, at.outputs], states[task.name]) for task, at in self._each]
        return np.concatenate(parts, axis=1)

    def record(self) -> dict[str, Any]:
        """Plain values from which ``tasks_from_record`` makes the same tasks again."""
        return {"tasks": [task.record() for task in self.tasks]}

    @property
    def _each(self) -> list[tuple[Task, Place]]:
        return list(zip(self.tasks, self._places, strict=True))


def task_from_record(record: Mapping[str, Any]) -> Task:
    """The task of a record.

    Raises:
        StoreError: of an unknown kind, or with other fields than that kind has.
    """
    kind: Any = KINDS.get(record.get("kind", ""))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items() if name != "kind"}
    if kind is None or set(values) != {field.name for field in fields(kind)}:
        raise StoreError("not the record of a task", fix="it is damaged, or of another version of pathfm")
    task: Task = kind(**values)
    return task


def tasks_from_record(record: Mapping[str, Any]) -> TaskSet:
    """The tasks of a record.

    Raises:
        StoreError: it holds no tasks, or one that is not understood.
    """
    found: Iterable[Any] = record.get("tasks") or ()
    tasks = tuple(task_from_record(each) for each in found)
    if not tasks:
        raise StoreError("the record holds no tasks", fix="it is damaged, or of another version of pathfm")
    return TaskSet(tasks)


def _slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
