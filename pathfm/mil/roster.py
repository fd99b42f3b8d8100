"""Who takes part: the cohort's slides become units (patients or slides) with a class, or drop out for a stated reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pathfm.errors import UsageError
from pathfm.store.cohort import Cohort, SlideRow, check_labels
from pathfm.study import CohortSettings, MilSettings

KINDS = ("no file", "failed", "empty", "no label")
"""Why a slide takes no part, in the order in which reasons win."""


class Absence(NamedTuple):
    """Why a slide takes no part: one of ``KINDS``, and the reason in words."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """What is classified as one: a patient with all slides, or one slide.

    Attributes:
        unit_id: patient_id or slide_id, by ``mil.level``.
        patient_id: whom it belongs to.
        slide_ids: sorted; their tiles follow each other in this order.
        label: the class by name.
    """

    unit_id: str
    patient_id: str
    slide_ids: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Roster:
    """Everyone who takes part, sorted by unit_id, and the classes, sorted by name."""

    units: tuple[Unit, ...]
    classes: tuple[str, ...]
    positive: str

    @property
    def label_B(self) -> tuple[int, ...]:
        """The class number of each unit."""
        return tuple(self.classes.index(unit.label) for unit in self.units)

    @property
    def stratum_of(self) -> dict[str, str]:
        """Patient -> class by which folds are balanced: of a patient with several classes the rarest (by patients)."""
        classes_of: dict[str, set[str]] = {}
        for unit in self.units:
            classes_of.setdefault(unit.patient_id, set()).add(unit.label)
        patients = Counter(label for labels in classes_of.values() for label in labels)
        return {patient: min(labels, key=lambda label: (patients[label], label)) for patient, labels in classes_of.items()}


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
        UsageError: the label column is absent or empty, or patients whose slides contradict each other (level patient).
    """
    check_labels(cohort, settings.label, settings.level)


def make_roster(cohort: Cohort, patients: Mapping[str, str], absent: Mapping[str, Absence], settings: MilSettings) -> Roster:
    """Units of all slides that take part; the order of the table plays no role.

    Args:
        cohort: all slides.
        patients: slide_id -> patient.
        absent: slides that take no part.
        settings: label, level and the positive class.

    Raises:
        UsageError: fewer than two classes are left, or ``mil.positive`` is none of them.
    """
    members: dict[tuple[str, str], list[SlideRow]] = {}
    for row in sorted(cohort.rows, key=lambda row: row.slide_id):
        if row.slide_id not in absent:
            patient = patients[row.slide_id]
            members.setdefault((patient if settings.level == "patient" else row.slide_id, patient), []).append(row)
    units = tuple(
        Unit(unit_id, patient, tuple(row.slide_id for row in rows), rows[0].labels[settings.label])
        for (unit_id, patient), rows in sorted(members.items())
    )
    counts = Counter(unit.label for unit in units)
    classes = tuple(sorted(counts))
    if len(classes) < 2:
        present = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "none"
        lost = ", ".join(f"{kind}: {count}" for kind, count in flow(cohort, absent).items())
        raise UsageError(
            f"a classifier needs two classes, but {settings.level}s with features have {present}",
            where="mil.label",
            fix=f"slides by fate: {lost}",
        )
    if settings.positive is not None and settings.positive not in classes:
        raise UsageError(
            f"no {settings.level} has the label {settings.positive!r}",
            where="mil.positive",
            fix=f"labels: {', '.join(classes)}",
        )
    return Roster(units, classes, settings.positive or classes[-1])


def flow(cohort: Cohort, absent: Mapping[str, Absence]) -> dict[str, int]:
    """Slides by fate: ``cohort`` is the sum of all others."""
    lost = Counter(absence.kind for absence in absent.values())
    used = len(cohort.rows) - len(absent)
    return {"cohort": len(cohort.rows), **{kind: lost[kind] for kind in KINDS}, "used": used}


def _named(rows: list[SlideRow]) -> str:
    names = [f"line {row.line}" if row.line else row.slide_id for row in rows[:5]]
    return ", ".join(names) + (", ..." if len(rows) > 5 else "")
