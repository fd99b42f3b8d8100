"""The split that is made before pretraining (``mil.seen_in_pretraining: exclude``): from the cohort table alone."""

from __future__ import annotations

from collections.abc import Mapping

from pathfm.errors import UsageError
from pathfm.mil.roster import check_cohort, labelled_units, patient_ids, stratum_of
from pathfm.mil.saved_splits import kept_splits
from pathfm.mil.splits import make_splits, patient_facts
from pathfm.mil.tasks import make_tasks
from pathfm.store.cohort import Cohort
from pathfm.store.pinned import Pinned, read_pinned
from pathfm.study import Study

TEST = "test"
"""The value of the column ``split`` that holds a patient back."""


def held_out_patients(study: Study, cohort: Cohort) -> frozenset[str]:
    """Patients whom the study's own encoder must not see and the numbers rest on.

    They are those with ``split`` test in the cohort table; without any, the test part of the first split that the settings
    make, so that a study with ``mark`` judges the same patients in that fold. Once an encoder was pretrained without them they
    stay the same: new patients do not join them, but those of a site that is held out whole.

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
    pinned = read_pinned(study.out)
    if pinned and pinned.held_out:
        return _as_before(study, cohort, patients, pinned)
    units = labelled_units(cohort, patients, study.mil)
    tasks = make_tasks(study.mil, [unit.labels for unit in units])
    columns = tasks.slice_of(tasks.main).targets
    strata = [tasks.main.stratum(target_T[columns]) for target_T in tasks.encode([unit.labels for unit in units])]
    facts, before = patient_facts(cohort.rows, patients), kept_splits(study.out / "mil", study.mil)
    splits = make_splits(stratum_of(units, strata), facts, (), study.mil, tasks.main.kind, before)
    return frozenset(splits.folds[0].test)


def _as_before(study: Study, cohort: Cohort, patients: Mapping[str, str], pinned: Pinned) -> frozenset[str]:
    """Those who were held out before, and newcomers of their sites where whole sites are tested."""
    known = frozenset(pinned.held_out) & frozenset(patients.values())
    if study.mil.split.scheme not in {"site", "site-preserved"}:
        return known
    learned = {patients[row.slide_id] for row in cohort.rows if row.slide_id in pinned.slides}
    sites = {row.site for row in cohort.rows if patients[row.slide_id] in known}
    return known | {patients[row.slide_id] for row in cohort.rows if row.site in sites} - learned


def held_out_slides(study: Study, cohort: Cohort) -> frozenset[str]:
    """Their slides; none unless the study excludes and pretrains an encoder of its own.

    Raises:
        UsageError: the split cannot be made.
    """
    if study.mil.seen_in_pretraining != "exclude" or not study.has_own_encoder:
        return frozenset()
    test, patients = held_out_patients(study, cohort), patient_ids(cohort, study.cohort)
    return frozenset(slide_id for slide_id, patient in patients.items() if patient in test)
