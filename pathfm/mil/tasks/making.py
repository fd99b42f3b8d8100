"""Settings and label columns -> tasks; everything that cannot be is refused before any work starts."""

from __future__ import annotations

import math

from pathfm.errors import UsageError
from pathfm.mil.tasks.cells import check_columns, check_names, texts
from pathfm.mil.tasks.contract import Rows
from pathfm.mil.tasks.task_set import KINDS, TaskSet
from pathfm.mil_settings import MilSettings, TaskSettings

BELONGS = {
    "positive": ("binary", "multiclass", "ordinal"),
    "order": ("ordinal",),
    "columns": ("multilabel",),
    "time": ("cox", "discrete"),
    "event": ("cox", "discrete"),
    "horizons": ("cox", "discrete"),
    "intervals": ("discrete",),
}
"""Which kinds a setting has a meaning for."""
MOST_CLASSES = 20
"""More different labels than this are hardly classes; whoever means it says ``kind=multiclass``."""


def make_tasks(settings: MilSettings, rows: Rows) -> TaskSet:
    """The tasks of the settings, the main one first.

    Args:
        settings: of the stage.
        rows: label columns of all bags of the study (not of one fold), so that no fold has other classes; their order plays no
            role.

    Raises:
        UsageError: settings and label columns do not fit together.
    """
    if not rows:
        raise UsageError("there is nothing to learn from", where="mil", fix="no bag is left")
    tasks = []
    for each in settings.tasks:
        kind = kind_of(each, rows)
        _refuse_strangers(each, kind)
        tasks.append(KINDS[kind].of(each, rows))
    made = TaskSet(tuple(tasks))
    check_names(made.columns, "mil.also")
    return made


def kind_of(settings: TaskSettings, rows: Rows) -> str:
    """The kind of a task: as set, else by its settings, else by the number of classes.

    Raises:
        UsageError: the labels look like numbers or names rather than classes.
    """
    if settings.kind != "auto":
        return settings.kind
    by_setting = {"multilabel": settings.columns, "cox": settings.time or settings.event, "ordinal": settings.order}
    for kind, value in by_setting.items():
        if value:
            return kind
    where = f"task {settings.label!r}"
    check_columns(rows, (settings.label,), where)
    labels = sorted(set(texts(rows, settings.label)) - {""})
    if len(labels) <= 2:
        return "binary"
    fractions = any(_is_number(label) and not label.lstrip("+-").isdigit() for label in labels)
    if all(map(_is_number, labels)) and (fractions or len(labels) > MOST_CLASSES / 2):
        raise UsageError(
            f"{len(labels)} different numbers: are they classes?",
            where=where,
            fix="set kind=regression, or kind=multiclass, or kind=ordinal with an order",
        )
    if len(labels) > MOST_CLASSES:
        raise UsageError(
            f"{len(labels)} different labels, as {labels[0]!r}: are they classes?",
            where=where,
            fix="set kind=multiclass if they are",
        )
    return "multiclass"


def _refuse_strangers(settings: TaskSettings, kind: str) -> None:
    for name, kinds in BELONGS.items():
        if kind not in kinds and getattr(settings, name) != TaskSettings.model_fields[name].default:
            raise UsageError(
                f"{name} has no meaning for a task of kind {kind}",
                where=f"task {settings.label!r}",
                fix=f"leave it out, or set kind={' or '.join(kinds)}",
            )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
