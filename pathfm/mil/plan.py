"""Who is compared with whom: the cohort, its units and its folds, fixed before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from pathfm.config import fingerprint
from pathfm.errors import UsageError
from pathfm.mil.bags import SlideFeatures, make_bag
from pathfm.mil.controls import shuffled_labels
from pathfm.mil.ensemble import FoldPlaces, tested_places
from pathfm.mil.held_out import held_out_patients
from pathfm.mil.inputs import Gathered, MilInputs, gather
from pathfm.mil.roster import Roster, check_cohort, make_roster, patient_ids
from pathfm.mil.seen import Seen, look_for_seen
from pathfm.stats.folds import Fold, held_out_fold, stratified_group_folds
from pathfm.store.cohort import Cohort
from pathfm.study import MilSettings, Study


@dataclass(frozen=True)
class Plan:
    """Everything about the comparison but the results.

    Attributes:
        patients: slide_id -> patient.
        gathered: features, stores and truth of the slides that take part, and the reasons of the others.
        roster: units and classes.
        folds: by patient.
        places: the same folds, by place in ``roster.units``; test parts without the patients whom ``exclude`` leaves out.
        seen: what the encoder has seen of the slides.
    """

    study: Study
    cohort: Cohort
    patients: Mapping[str, str]
    gathered: Gathered
    roster: Roster
    folds: tuple[Fold, ...]
    places: tuple[FoldPlaces, ...]
    seen: Seen

    @property
    def settings(self) -> MilSettings:
        """Settings of the stage."""
        return self.study.mil

    @property
    def patient_B(self) -> list[str]:
        """The patient of each unit."""
        return [unit.patient_id for unit in self.roster.units]

    @property
    def judged(self) -> Roster:
        """Those whom the numbers rest on: the units of all test parts, in their order. Without ``exclude`` that is everyone."""
        return replace(self.roster, units=tuple(self.roster.units[place] for place in tested_places(self.places)))

    @property
    def judged_patients(self) -> list[str]:
        """The patient of each judged unit."""
        return [unit.patient_id for unit in self.judged.units]

    @property
    def positive(self) -> int:
        """The number of the positive class."""
        return self.roster.classes.index(self.roster.positive)

    @property
    def shuffled_B(self) -> tuple[int, ...]:
        """Class numbers of the units after labels were permuted among patients."""
        stratum_of = self.roster.stratum_of
        parts = [fold.test for fold in self.folds]
        rest = tuple(sorted(set(stratum_of).difference(*parts)))
        shuffled = shuffled_labels(stratum_of, [*parts, rest] if rest else parts, self.settings.seed)
        return tuple(self.roster.classes.index(shuffled[patient]) for patient in self.patient_B)

    @property
    def tiles_B(self) -> list[int]:
        """Tiles of each unit."""
        slides = self.gathered.slides
        return [sum(len(slides[slide_id].feature_ND) for slide_id in unit.slide_ids) for unit in self.roster.units]

    def bags(self, slides: Mapping[str, SlideFeatures]) -> tuple[Tensor, ...]:
        """The bag of each unit from one set of features."""
        return tuple(make_bag(unit, slides) for unit in self.roster.units)

    def digest_B(self, slides: Mapping[str, SlideFeatures]) -> tuple[str, ...]:
        """Content hash of the bag of each unit."""
        return tuple(fingerprint([slides[slide_id].digest for slide_id in unit.slide_ids]) for unit in self.roster.units)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the results besides the features of the controls."""
        truth = {slide_id: hashlib.sha256(values.tobytes()).hexdigest() for slide_id, values in self.gathered.truth.items()}
        return fingerprint(
            self.settings,
            self.study.report,
            [[unit.unit_id, unit.patient_id, unit.label, *unit.slide_ids] for unit in self.roster.units],
            self.digest_B(self.gathered.slides),
            {slide_id: list(absence) for slide_id, absence in self.gathered.absent.items()},
            {slide_id: store.fingerprint for slide_id, store in self.gathered.stores.items()},
            truth,
            self.gathered.notes,
            [self.seen.rule, self.seen.known, [list(row) for row in self.seen.rows()], *sorted(self.seen.initial)],
            [list(fold.test) for fold in self.folds],
        )


def make_plan(study: Study, cohort: Cohort, inputs: MilInputs) -> Plan:
    """Checks the cohort, reads the features, and cuts the folds.

    Raises:
        UsageError: no patients, labels that are absent or contradict each other, too few patients per class, or
            ``exclude`` leaves nobody to judge.
        StoreError: features of different encoders, or a damaged manifest of the encoder.
    """
    patients = patient_ids(cohort, study.cohort)
    check_cohort(cohort, study.mil)
    gathered = gather(study, cohort, inputs)
    roster = make_roster(cohort, patients, gathered.absent, study.mil)
    seen = look_for_seen(study, cohort, inputs.stores_dir, inputs.encoder_dir)
    folds = _folds(study, cohort, roster, seen)
    left_out = seen.left_out()
    places = tuple(_places(fold, roster, left_out) for fold in folds)
    plan = Plan(study, cohort, patients, gathered, roster, folds, places, seen)
    if len({unit.label for unit in plan.judged.units}) < 2:
        what = f"without the {len(left_out)} patients seen in pretraining there are not two classes left to tell apart"
        raise UsageError(what, where="mil.seen_in_pretraining", fix="judge other patients, or set it to mark")
    return plan


def _folds(study: Study, cohort: Cohort, roster: Roster, seen: Seen) -> tuple[Fold, ...]:
    """The folds; where the split was made before pretraining, that one alone."""
    settings = study.mil
    if seen.rule == "exclude" and study.extract.encoder == "pretrained":
        test = held_out_patients(study, cohort)
        return (held_out_fold(roster.stratum_of, test, settings.inner_fraction, settings.seed),)
    return stratified_group_folds(roster.stratum_of, settings.folds, settings.inner_fraction, settings.seed)


def _places(fold: Fold, roster: Roster, left_out: Collection[str]) -> FoldPlaces:
    def places(patients: tuple[str, ...]) -> tuple[int, ...]:
        wanted = set(patients)
        return tuple(place for place, unit in enumerate(roster.units) if unit.patient_id in wanted)

    test = tuple(patient for patient in fold.test if patient not in left_out)
    return FoldPlaces(places(fold.train), places(fold.validation), places(test))
