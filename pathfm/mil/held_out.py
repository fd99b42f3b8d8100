"""The split that is made before pretraining (``mil.seen_in_pretraining: exclude``): from the cohort table alone."""

from __future__ import annotations

from pathfm.errors import UsageError
from pathfm.mil.roster import Absence, check_cohort, has_label, make_units, patient_ids, stratum_of
from pathfm.mil.splits import make_splits, patient_facts
from pathfm.mil.tasks import make_tasks
from pathfm.store.cohort import Cohort
from pathfm.study import Study

TEST = "test"
"""The value of the column ``split`` that holds a patient back."""


def held_out_patients(study: Study, cohort: Cohort) -> frozenset[str]:
    """Patients whom the study's own encoder must not see and the numbers rest on.

    They are those with ``split`` test in the cohort table; without any, the test part of the first split that the settings
    make, so that a study with ``mark`` judges the same patients in that fold.

    Raises:
        UsageError: no patients, no labels, too few of either, or a patient on both sides of the column ``split``.
    """
    patients = patient_ids(cohort, study.cohort)
    check_cohort(cohort, study.mil)
    sides: dict[str, set[bool]] = {}
    for row in cohort.rows:
        sides.setdefault(patients[row.slide_id], set()).add((row.split or "").strip().casefold() == TEST)
    torn = sorted(patient for patient, found in sides.items() if len(found) > 1)
    if torn:
        what = f"patients on both sides of the split: {', '.join(torn[:5])}{', ...' if len(torn) > 5 else ''}"
        raise UsageError(what, where="cohort, column split", fix=f"give all slides of a patient {TEST!r}, or none")
    named = frozenset(patient for patient, found in sides.items() if found == {True})
    if named:
        return named
    absent = {row.slide_id: Absence("no label", "") for row in cohort.rows if not has_label(row, study.mil)}
    units = make_units(cohort, patients, absent, study.mil)
    tasks = make_tasks(study.mil, [unit.labels for unit in units])
    columns = tasks.slice_of(tasks.main).targets
    strata = [tasks.main.stratum(target_T[columns]) for target_T in tasks.encode([unit.labels for unit in units])]
    splits = make_splits(stratum_of(units, strata), patient_facts(cohort.rows, patients), (), study.mil, tasks.main.kind)
    return frozenset(splits.folds[0].test)


def held_out_slides(study: Study, cohort: Cohort) -> frozenset[str]:
    """Their slides; none unless the study excludes and pretrains an encoder of its own.

    Raises:
        UsageError: the split cannot be made.
    """
    if study.mil.seen_in_pretraining != "exclude" or not study.has_own_encoder:
        return frozenset()
    test, patients = held_out_patients(study, cohort), patient_ids(cohort, study.cohort)
    return frozenset(slide_id for slide_id, patient in patients.items() if patient in test)
