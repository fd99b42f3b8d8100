"""Who takes part: the cohort's slides become units (patients, specimens or slides), or drop out for a stated reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pathfm.errors import UsageError
from pathfm.mil_settings import MilSettings, TaskSettings
from pathfm.store.cohort import Cohort, SlideRow, check_labels
from pathfm.study import CohortSettings

KINDS = ("no file", "failed", "empty", "no label")
"""Why a slide takes no part, in the order in which reasons win."""


class Absence(NamedTuple):
    """Why a slide takes no part: one of ``KINDS``, and the reason in words."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """What is classified as one: a patient with all slides, a specimen, or one slide.

    Attributes:
        unit_id: patient_id, specimen or slide_id, by ``mil.level``.
        patient_id: whom it belongs to.
        specimen_id: of which specimen it is; of a patient's unit the patient again.
        slide_ids: sorted; their tiles follow each other in this order.
        labels: label columns; of its slides that say something, also of those that take no part, the first.
    """

    unit_id: str
    patient_id: str
    specimen_id: str
    slide_ids: tuple[str, ...]
    labels: Mapping[str, str]


def label_columns(task: TaskSettings) -> tuple[str, ...]:
    """The columns of the cohort table that a task needs."""
    if task.time or task.event:
        return tuple(name for name in (task.time, task.event) if name)
    return task.columns or (task.label,)


def all_columns(settings: MilSettings) -> tuple[str, ...]:
    """The columns that any task needs, each once."""
    return tuple(dict.fromkeys(name for task in settings.tasks for name in label_columns(task)))


def has_label(labels: Mapping[str, str], settings: MilSettings) -> bool:
    """Whether there is what at least one task needs (of several columns of one task: any; of survival: both)."""

    def has(task: TaskSettings) -> bool:
        found = [bool(labels.get(name)) for name in label_columns(task)]
        return all(found) if task.time else any(found)

    return any(has(task) for task in settings.tasks)


def patient_ids(cohort: Cohort, settings: CohortSettings) -> dict[str, str]:
    """slide_id -> patient.

    Raises:
        UsageError: slides without patient_id, unless ``cohort.patient_is_slide`` accepts that each is its own patient.
    """
    missing = [row for row in cohort.rows if not row.patient_id]
    if missing and not settings.patient_is_slide:
        raise UsageError(
            f"mil refuses to split until patient_id is given: {len(missing)} of {len(cohort.rows)} slides have none",
            where=f"{settings.table or 'cohort'}: {_named(missing)}",
            fix="add a patient_id column, or accept that every slide is its own patient with --patient-is-slide",
        )
    return {row.slide_id: row.patient_id or row.slide_id for row in cohort.rows}


def check_cohort(cohort: Cohort, settings: MilSettings) -> None:
    """Refuse a cohort that cannot be learned from whatever the features are.

    Raises:
        UsageError: a label column is absent or empty, slides of one unit contradict each other, or specimens are not named.
    """
    for name in all_columns(settings):
        check_labels(cohort, name, settings.level)
    unnamed = [row for row in cohort.rows if not row.specimen_id]
    if settings.level == "specimen" and unnamed:
        what = f"{len(unnamed)} of {len(cohort.rows)} slides have no specimen_id"
        raise UsageError(what, where=f"mil.level: {_named(unnamed)}", fix="fill the column, or set mil.level to another one")


def make_units(
    cohort: Cohort, patients: Mapping[str, str], absent: Mapping[str, Absence], settings: MilSettings
) -> tuple[Unit, ...]:
    """Units of all slides that take part, sorted by patient and id; the order of the table plays no role.

    Args:
        cohort: all slides.
        patients: slide_id -> patient.
        absent: slides that take no part.
        settings: the level, and the columns of the tasks.
    """
    members: dict[tuple[str, str], list[SlideRow]] = {}
    for row in sorted(cohort.rows, key=lambda row: row.slide_id):
        patient = patients[row.slide_id]
        members.setdefault((unit_name(row, patient, settings.level), patient), []).append(row)
    columns = all_columns(settings)
    units = (
        Unit(
            unit_id,
            patient,
            patient if settings.level == "patient" else rows[0].specimen_id or "",
            tuple(row.slide_id for row in rows if row.slide_id not in absent),
            {name: next((row.labels[name] for row in rows if row.labels.get(name)), "") for name in columns},
        )
        for (unit_id, patient), rows in sorted(members.items())
    )
    return tuple(unit for unit in units if unit.slide_ids)


def labelled_units(cohort: Cohort, patients: Mapping[str, str], settings: MilSettings) -> tuple[Unit, ...]:
    """Units that have what a task needs, as if no slide will fail: the label of any slide is the unit's."""
    return tuple(unit for unit in make_units(cohort, patients, {}, settings) if has_label(unit.labels, settings))


def labelled_slides(cohort: Cohort, patients: Mapping[str, str], settings: MilSettings) -> frozenset[str]:
    """Slides of units that have a label; whether it stands in their own row plays no role."""
    return frozenset(slide_id for unit in labelled_units(cohort, patients, settings) for slide_id in unit.slide_ids)


def unit_name(row: SlideRow, patient: str, level: str) -> str:
    """The unit_id of a slide."""
    if level == "patient":
        return patient
    return (row.specimen_id or row.slide_id) if level == "specimen" else row.slide_id


def said_label(task: TaskSettings, labels: Mapping[str, str]) -> str:
    """What a task is to say, in words: the class, the number, or the values of its columns in their order, as ``a=1 b=0``."""
    if not (task.columns or task.time):
        return labels.get(task.label, "")
    return " ".join(f"{column}={labels[column]}" for column in label_columns(task) if labels.get(column))


def said_labels(task: TaskSettings, rows: Iterable[SlideRow]) -> str:
    """The same of several slides: a value that only some have is that of all; slides that differ are told one by one."""
    labels, columns = [row.labels for row in rows], label_columns(task)
    values = {column: {each[column] for each in labels if each.get(column)} for column in columns}
    if all(len(found) < 2 for found in values.values()):
        return said_label(task, {column: next(iter(found), "") for column, found in values.items()})
    return " | ".join(sorted({said_label(task, each) for each in labels} - {""}))


def stratum_of(units: Sequence[Unit], stratum_B: Sequence[str]) -> dict[str, str]:
    """Patient -> stratum by which folds are balanced: of a patient with several, the rarest (by patients)."""
    found: dict[str, set[str]] = {}
    for unit, stratum in zip(units, stratum_B, strict=True):
        found.setdefault(unit.patient_id, set()).add(stratum)
    patients = Counter(stratum for strata in found.values() for stratum in strata)
    # Unknown ("") only counts for those of whom nothing is known.
    return {
        patient: min((strata - {""}) or strata, key=lambda name: (patients[name], name)) for patient, strata in found.items()
    }


def flow(cohort: Cohort, absent: Mapping[str, Absence]) -> dict[str, int]:
    """Slides by fate: ``cohort`` is the sum of all others."""
    lost = Counter(absence.kind for absence in absent.values())
    used = len(cohort.rows) - len(absent)
    return {"cohort": len(cohort.rows), **{kind: lost[kind] for kind in KINDS}, "used": used}


def patient_flow(cohort: Cohort, patients: Mapping[str, str], absent: Mapping[str, Absence]) -> dict[str, int]:
    """Patients by fate: used with any slide, else lost by the first reason (in the order of ``KINDS``) of their slides."""
    kinds: dict[str, set[str]] = {}
    for row in cohort.rows:
        absence = absent.get(row.slide_id)
        kinds.setdefault(patients[row.slide_id], set()).add(absence.kind if absence else "used")
    fate = Counter("used" if "used" in found else next(k for k in KINDS if k in found) for found in kinds.values())
    return {"cohort": len(kinds), **{kind: fate[kind] for kind in KINDS}, "used": fate["used"]}


def _named(rows: Sequence[SlideRow]) -> str:
    names = [f"line {row.line}" if row.line else row.slide_id for row in rows[:5]]
    return ", ".join(names) + (", ..." if len(rows) > 5 else "")
