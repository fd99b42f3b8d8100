"""Who of the new slides is known to a bundle: patients whom its networks learned from, or whom its encoder was pretrained on.

All of this is asked before slides are tiled; only the search by pictures needs tiles, and follows them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pathfm.config import bullet_list
from pathfm.errors import SlideError, UsageError
from pathfm.log import plural, say
from pathfm.mil.predict import Ensemble
from pathfm.mil.prediction_table import Known
from pathfm.mil.roster import all_columns, labelled_units, patient_ids
from pathfm.mil.seen import Seen, check_refusal, encoder_folder, look_for_seen, rule_of
from pathfm.slides.reader import slide_identity
from pathfm.store.cohort import Cohort, check_labels
from pathfm.store.manifest import find_by_identity, manifest_of, name_key
from pathfm.study import Study

TrainedRule = Literal["refuse", "mark", "exclude"]
SHOWN = 20
"""Slides that a refusal names."""


def check_known(study: Study, cohort: Cohort, ensemble: Ensemble, rule: TrainedRule) -> Known:
    """Labels, and whether the networks or the encoder have met these patients, as far as files and names tell.

    Raises:
        UsageError: labels that the bundle does not know, or labelled slides of patients whom the networks learned from or the
            encoder has seen, where that is refused.
    """
    bundle, rows, patients = ensemble.bundle, cohort.rows, patient_ids(cohort, study.cohort)
    units = labelled_units(cohort, patients, bundle.settings)
    labelled = {slide_id for unit in units for slide_id in unit.slide_ids}
    for name in all_columns(bundle.settings) if labelled else ():
        if any(row.labels.get(name) for row in rows):
            check_labels(cohort, name, bundle.settings.level)
    if labelled:
        ensemble.tasks.encode([unit.labels for unit in units])
    identity = {row.slide_id: _identity(row.path) for row in rows}
    found = {slide_id: bundle.trained_on(patient, identity[slide_id]) for slide_id, patient in patients.items()}
    same = {patients[slide_id] for slide_id, why in found.items() if why}
    trained = {slide_id: found[slide_id] or "same patient" for slide_id, patient in patients.items() if patient in same}
    known = Known(patients, identity, trained, bool(labelled))
    seen = _seen_by_name(study, cohort, known)
    if trained:
        _check_trained(known, labelled, rule, seen)
    check_refusal(seen, set(patients.values()))
    return known


def check_seen(study: Study, cohort: Cohort, stores_dir: Path, known: Known) -> Seen:
    """What the encoder has seen of the new slides, by their pictures too, looked at before the hours of extraction.

    A table with labels is there to be judged by, and then ``mil.seen_in_pretraining`` decides (refuse by default). Without
    labels the predictions are merely marked.

    Raises:
        UsageError: the encoder has seen labelled slides, and that is refused.
    """
    if not known.has_labels:
        study = study.model_copy(update={"mil": study.mil.model_copy(update={"seen_in_pretraining": "mark"})})
    seen = look_for_seen(study, cohort, stores_dir)
    patients = set(seen.patients.values())
    check_refusal(seen, patients)
    for note in seen.notes(patients - seen.left_out()):
        say(note)
    return seen


def _check_trained(known: Known, labelled: Collection[str], rule: TrainedRule, seen: Seen) -> None:
    same, patients = known.trained_patients, known.patients
    if labelled and rule == "refuse":
        shown = bullet_list([f"{slide_id}: {why}" for slide_id, why in sorted(known.trained.items())], SHOWN)
        who = f"{len(same)} of {len(set(patients.values()))} patients"
        what = f"the networks learned from {who}, so numbers on them would be too good: {shown}"
        fix = "take them out; or add --trained exclude to judge the others, or --trained mark if their ids mean other people"
        if seen.rule == "refuse" and seen.evidence:
            count = plural(len(seen.seen_patients), "patient")
            fix += f"; the encoder has seen {count} too: add --set mil.seen_in_pretraining=mark (or =exclude) as well"
        raise UsageError(what, where="slides", fix=fix)
    if labelled and rule == "exclude" and not {patients[slide_id] for slide_id in labelled} - same:
        raise UsageError("nobody is left to judge: the networks learned from all of these patients", where="--trained exclude")
    say(f"note: the networks learned from {len(same)} of these patients (column trained_on)")


def _seen_by_name(study: Study, cohort: Cohort, known: Known) -> Seen:
    """What the encoder has seen by files and patients alone; nothing is looked for where nothing would be refused."""
    rule, folder = rule_of(study), encoder_folder(study, None)
    seen = Seen(rule, False, known.patients)
    manifest = manifest_of(folder) if folder and known.has_labels and rule == "refuse" else None
    if manifest is None:
        return seen
    names = {name_key("slide", row.slide_id): row.slide_id for row in cohort.rows}
    evidence = find_by_identity(manifest, known.identity, {row.slide_id: row.patient_id for row in cohort.rows})
    return replace(seen, known=True, evidence=evidence, names=names)


def _identity(path: Path) -> str:
    try:
        return slide_identity(path)
    except SlideError:  # tiling tells why
        return ""
