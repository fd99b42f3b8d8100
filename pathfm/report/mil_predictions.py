"""Rows of predictions as arrays: what was said of each judged bag of the main task, beside the truth.

Legend: N bags (of survival: patients), C classes or columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathfm.report.results import MilResult, Row, to_number

Floats = NDArray[np.float64]


class Ranked(NamedTuple):
    """Scores [N] of one class (or column) and who has it."""

    name: str
    score_N: Floats
    positive_N: NDArray[np.bool_]


class Risks(NamedTuple):
    """One entry per patient; ``group_N``: 0 for the lowest risk of the patient's test fold, upwards."""

    risk_N: Floats
    time_N: Floats
    event_N: NDArray[np.bool_]
    fold_N: NDArray[np.str_]


def probability_columns(row: Row, count: int) -> list[str]:
    """Columns with the main task's probabilities, in the order of its classes."""
    return [name for name in row if name.startswith("probability_")][:count]


def ranked(result: MilResult) -> tuple[Ranked, ...]:
    """Every class against the rest (of two classes the positive one), or every column; without those all or nobody has."""
    found = []
    for place, name in enumerate(result.classes):
        if result.task.kind == "binary" and name != result.positive:
            continue
        pairs = [pair for row in result.predictions if (pair := _pair(result, row, place)) is not None]
        score_N = np.array([score for score, _ in pairs], dtype=np.float64)
        positive_N = np.array([positive for _, positive in pairs], dtype=np.bool_)
        if positive_N.any() and not positive_N.all():
            found.append(Ranked(name, score_N, positive_N))
    return tuple(found)


def _pair(result: MilResult, row: Row, place: int) -> tuple[float, bool] | None:
    columns = probability_columns(row, len(result.classes))
    score = to_number(row.get(columns[place])) if place < len(columns) else None
    label, name = row.get("label", ""), result.classes[place]
    truth = said_of(label, result.classes).get(name, "") if result.task.kind == "multilabel" else label
    if score is None or not truth:
        return None
    if result.task.kind == "multilabel":
        number = to_number(truth)
        return None if number is None else (score, number == 1)
    return (score, label == name) if label in result.classes else None


def said_of(label: str, columns: Sequence[str]) -> dict[str, str]:
    """The values in a label of several columns, as ``er=1 pr=0``, of those that have one.

    Args:
        label: as ``predictions.csv`` has it.
        columns: of the task, in their order: a name may hold spaces, and end in another one.
    """
    found = re.match("".join(rf"(?:{re.escape(column)}=(\S+)(?:\s|$))?" for column in columns), label)
    values = found.groups() if found else (None,) * len(columns)
    return {column: value for column, value in zip(columns, values, strict=True) if value}


def numbers(result: MilResult) -> tuple[Floats, Floats]:
    """Predicted and true value [N] of a regression."""
    pairs = [(to_number(row.get("value")), to_number(row.get("label"))) for row in result.predictions]
    known = [(said, truth) for said, truth in pairs if said is not None and truth is not None]
    return np.array([said for said, _ in known]), np.array([truth for _, truth in known])


def risks(result: MilResult, time: str, event: str) -> Risks:
    """Mean risk of each patient's bags, time, event and test fold (the first, of several); without patients who lack a label.

    Args:
        result: of a survival task.
        time: label column of the times.
        event: label column of the events.
    """
    risks_of: dict[str, list[float]] = {}
    followed: dict[str, tuple[float, bool, str]] = {}
    for row in result.predictions:
        patient, risk, said = row.get("patient_id") or row.get("slide_id", ""), to_number(row.get("risk")), row.get("label", "")
        until, happened = (to_number(said_of(said, (time, event)).get(column)) for column in (time, event))
        if risk is None:
            continue
        risks_of.setdefault(patient, []).append(risk)
        if until is not None and happened is not None:
            followed.setdefault(patient, (until, happened == 1, row.get("fold", "").split(";")[0]))
    patients = sorted(followed)
    return Risks(
        np.array([np.mean(risks_of[patient]) for patient in patients], dtype=np.float64),
        np.array([followed[patient][0] for patient in patients], dtype=np.float64),
        np.array([followed[patient][1] for patient in patients], dtype=np.bool_),
        np.array([followed[patient][2] for patient in patients], dtype=np.str_),
    )


def risk_groups(found: Risks, groups: int) -> NDArray[np.intp]:
    """Groups [N] of equal size within each test fold, 0 for the lowest risk: the scale of risk differs between folds."""
    group_N = np.zeros(len(found.risk_N), dtype=np.intp)
    for fold in np.unique(found.fold_N):
        inside = np.flatnonzero(found.fold_N == fold)
        order = inside[np.argsort(found.risk_N[inside], kind="stable")]
        group_N[order] = np.arange(len(order)) * groups // len(order)
    return group_N


def spoken(result: MilResult, row: Row) -> tuple[str, float] | None:
    """What the model says of a bag, in words and as a number; None where it was not judged."""
    kind = result.task.kind
    if kind == "regression":
        return _said(f"predicted {result.label}", row.get("value"))
    if kind in {"cox", "discrete"}:
        return _said("predicted risk", row.get("risk"))
    columns = probability_columns(row, len(result.classes))
    if result.positive not in result.classes or len(columns) < len(result.classes):
        return None
    return _said(f"predicted probability of {result.positive}", row.get(columns[result.classes.index(result.positive)]))


def _said(words: str, cell: object) -> tuple[str, float] | None:
    value = to_number(cell)
    return None if value is None else (words, value)


def said_by_slide(result: MilResult) -> dict[str, tuple[str, float]]:
    """What the model says of each slide, or of the patient whose slides were judged together; patients by their ids as well."""
    found: dict[str, tuple[str, float]] = {}
    for row in result.predictions:
        said = spoken(result, row)
        if said is None:
            continue
        names: Sequence[str] = row.get("slide_id", "").split(";")
        names = [*names, row.get("patient_id", "")] if result.level == "patient" else names
        found.update({name: said for name in names if name})
    return found
