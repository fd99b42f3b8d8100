"""Who is compared with whom: the cohort, its units, its tasks and its splits, fixed before anything is trained.

Legend: B bags (units), T target columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathfm.config import fingerprint
from pathfm.errors import UsageError
from pathfm.log import say
from pathfm.mil.aggregators.registry import AGGREGATORS, check_options, find_aggregator
from pathfm.mil.bags import Bags
from pathfm.mil.ensemble import FoldPlaces, tested_places
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.groupings import find_groupings
from pathfm.mil.grown_splits import changed_settings
from pathfm.mil.held_out import held_out_patients
from pathfm.mil.inputs import Gathered, MilInputs, gather
from pathfm.mil.leaks import Leak, SlideTrace, check_leaks, find_leaks, together
from pathfm.mil.network import build_network, spec_of
from pathfm.mil.roster import (
    Unit,
    all_columns,
    check_cohort,
    labelled_units,
    make_units,
    patient_ids,
    said_label,
    stratum_of,
)
from pathfm.mil.saved_splits import kept_splits, read_splits
from pathfm.mil.search import candidate_settings, inner_folds
from pathfm.mil.seen import Seen, look_for_seen, rule_of
from pathfm.mil.splits import CLASS_KINDS, Splits, held_out_splits, make_splits, patient_facts
from pathfm.mil.tasks import TaskSet, make_tasks
from pathfm.mil_settings import MilSettings
from pathfm.stats.folds import Fold, held_out_fold
from pathfm.store.cohort import Cohort
from pathfm.store.tile_store import open_tiles
from pathfm.study import Study

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """Everything about the comparison but the results.

    Attributes:
        patients: slide_id -> patient.
        gathered: facts, stores and truth of the slides that take part, and the reasons of the others.
        units: what is classified, in the order of all bags.
        bags: their features.
        tasks: what is predicted.
        target_BT: the targets of the units.
        splits: by patient.
        places: the same, by place in ``units``; test parts without the patients whom ``exclude`` leaves out.
        leaks: what different patients share.
        seen: what the encoder has seen of the slides.
    """

    study: Study
    cohort: Cohort
    patients: Mapping[str, str]
    gathered: Gathered
    units: tuple[Unit, ...]
    bags: Bags
    tasks: TaskSet
    target_BT: Floats
    splits: Splits
    places: tuple[FoldPlaces, ...]
    leaks: tuple[Leak, ...]
    seen: Seen

    @property
    def settings(self) -> MilSettings:
        """Settings of the stage."""
        return self.study.mil

    @property
    def tested(self) -> tuple[int, ...]:
        """Places of those whom the numbers rest on: the units of all test parts, in their order."""
        return tested_places(self.places)

    @property
    def judged(self) -> tuple[Unit, ...]:
        """Those whom the numbers rest on."""
        return tuple(self.units[place] for place in self.tested)

    @property
    def judged_patients(self) -> list[str]:
        """The patient of each judged unit."""
        return [unit.patient_id for unit in self.judged]

    @property
    def person_of(self) -> dict[str, str]:
        """Patient -> whom he counts as in statistics: patients who share data are one person (by the first of their names)."""
        person = {patient: min(group) for group in together(self.leaks) for patient in group}
        return {unit.patient_id: person.get(unit.patient_id, unit.patient_id) for unit in self.units}

    @property
    def judged_persons(self) -> list[str]:
        """Whom each judged unit counts as in statistics."""
        person = self.person_of
        return [person[patient] for patient in self.judged_patients]

    @property
    def strata(self) -> dict[str, str]:
        """Patient -> stratum."""
        return stratum_of(self.units, _strata(self.tasks, self.target_BT))

    @property
    def label_B(self) -> list[str]:
        """What the main task is to say of each unit, in words."""
        return [said_label(self.settings.tasks[0], unit.labels) for unit in self.units]

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the results besides the features of the controls."""
        truth = {slide_id: hashlib.sha256(values.tobytes()).hexdigest() for slide_id, values in self.gathered.truth.items()}
        return fingerprint(
            # Where files lie is not what they hold, and what is kept of earlier splits is in the splits.
            self.settings.model_dump(mode="json", exclude={"features": True, "split": {"file", "keep"}}),
            self.study.report,
            [[unit.unit_id, unit.patient_id, unit.specimen_id, dict(unit.labels), *unit.slide_ids] for unit in self.units],
            [self.bags.digest(place) for place in range(len(self.units))],
            self.tasks.record(),
            {slide_id: list(absence) for slide_id, absence in self.gathered.absent.items()},
            {slide_id: store.fingerprint for slide_id, store in self.gathered.stores.items()},
            truth,
            self.gathered.notes,
            [self.seen.rule, self.seen.known, [list(row) for row in self.seen.rows()], *sorted(self.seen.initial)],
            self.splits.record(),
            subgroup_columns(self.cohort, self.settings),
        )


def make_plan(study: Study, cohort: Cohort, inputs: MilInputs, cache: FeatureCache) -> Plan:
    """Checks the cohort, reads the features into the cache, looks for leaks and makes the splits.

    Raises:
        UsageError: no patients, labels that are absent or contradict each other, too few patients per class, patients who share
            data, or ``exclude`` leaves nobody to judge.
        StoreError: features of different encoders, or a damaged manifest of the encoder.
    """
    patients = patient_ids(cohort, study.cohort)
    check_cohort(cohort, study.mil)
    gathered = gather(study, cohort, inputs, cache)
    units = make_units(cohort, patients, gathered.absent, study.mil)
    if not units:
        lost = sorted({absence.reason for absence in gathered.absent.values()})
        raise UsageError("no slide can take part", where="mil", fix="; ".join(lost[:5]))
    tasks = make_tasks(study.mil, [unit.labels for unit in units])
    target_BT = tasks.encode([unit.labels for unit in units])
    label_of = {slide_id: unit.labels for unit in units for slide_id in unit.slide_ids}
    used = [row for row in cohort.rows if row.slide_id in label_of]
    labelled = [replace(row, labels={**row.labels, **label_of[row.slide_id]}) for row in used]
    groupings = find_groupings(labelled, patients, all_columns(study.mil))
    gathered.notes += groupings.notes
    leaks = (*find_leaks(_traces(gathered, patients)), *groupings.leaks)
    seen = look_for_seen(study, cohort, inputs.stores_dir, inputs.encoder_dir)
    strata = stratum_of(units, _strata(tasks, target_BT))
    before = kept_splits(inputs.mil_dir, study.mil)
    splits = _split(study, cohort, strata, tasks, together(leaks), before)
    if before is not None and before.folds != splits.folds:
        changed = ", ".join(changed_settings(before, splits))
        say(f"splits: {splits.origin or f'cut anew, since other settings made the earlier ones ({changed})'}")
    gathered.notes += check_leaks(leaks, splits.folds, study.mil.split.leaks)
    left_out = seen.left_out()
    places = tuple(fold_places(fold, units, left_out) for fold in splits.folds)
    bags = Bags(cache, [unit.slide_ids for unit in units])
    plan = Plan(study, cohort, patients, gathered, units, bags, tasks, target_BT, splits, places, leaks, seen)
    _check_judged(plan, left_out)
    _check_events(tasks, target_BT, splits, places)
    # Millions of hashes that nobody asks for any more.
    for slide_id, facts in gathered.slides.items():
        gathered.slides[slide_id] = cache.facts[slide_id] = replace(facts, row_hashes=facts.row_hashes[:0])
    return plan


def check_plan(study: Study, cohort: Cohort, mil_dir: Path) -> None:
    """Refuses, before there are features, what settings and cohort show to be impossible; as if no slide will fail.

    Which patients share data is not known yet, and not asked. Saved splits are read; whether they are of the patients who
    take part shows later.

    Args:
        study: the study.
        cohort: all its slides.
        mil_dir: the stage's folder, with the splits of an earlier run.

    Raises:
        UsageError: an aggregator, option, value of a search or column that is not there, labels that nothing can be learned
            from, or a cohort that cannot be split so.
    """
    settings, patients = study.mil, patient_ids(cohort, study.cohort)
    check_cohort(cohort, settings)
    units = labelled_units(cohort, patients, settings)
    tasks = make_tasks(settings, [unit.labels for unit in units])
    for _, each in candidate_settings(settings):
        _check_aggregator(each, tasks.outputs)
    subgroup_columns(cohort, settings)
    if settings.split.file is not None:
        read_splits(settings.split.file, patients)
        return
    target_BT = tasks.encode([unit.labels for unit in units])
    strata = stratum_of(units, _strata(tasks, target_BT))
    splits = _split(study, cohort, strata, tasks, (), kept_splits(mil_dir, settings))
    _check_events(tasks, target_BT, splits, [fold_places(fold, units) for fold in splits.folds])
    for number, fold in enumerate(splits.folds if settings.search else ()):
        inside = {patient: strata[patient] for patient in (*fold.train, *fold.validation)}
        inner_folds(inside, number, settings, classes=tasks.main.kind in CLASS_KINDS)


def fold_places(fold: Fold, units: Sequence[Unit], left_out: Collection[str] = ()) -> FoldPlaces:
    """A fold of patients as places of their units."""

    def places(patients: Collection[str]) -> tuple[int, ...]:
        wanted = set(patients)
        return tuple(place for place, unit in enumerate(units) if unit.patient_id in wanted)

    test = [patient for patient in fold.test if patient not in left_out]
    return FoldPlaces(places(fold.train), places(fold.validation), places(test))


def subgroup_columns(cohort: Cohort, settings: MilSettings) -> dict[str, dict[str, str]]:
    """Column -> slide_id -> value, of the columns by which numbers are given group by group.

    Raises:
        UsageError: the table has no such column.
    """
    known = {*cohort.label_names, "site"}
    for name in settings.numbers.subgroups:
        if name not in known:
            fix = f"columns: {', '.join(sorted(known))}"
            raise UsageError(f"the cohort has no column {name!r}", where="mil.numbers.subgroups", fix=fix)
    return {
        name: {row.slide_id: (row.site if name == "site" else row.labels.get(name)) or "" for row in cohort.rows}
        for name in settings.numbers.subgroups
    }


def _strata(tasks: TaskSet, target_BT: Floats) -> list[str]:
    columns = tasks.slice_of(tasks.main).targets
    return [tasks.main.stratum(target_T[columns]) for target_T in target_BT]


def _traces(gathered: Gathered, patients: Mapping[str, str]) -> Iterator[SlideTrace]:
    for slide_id, facts in sorted(gathered.slides.items()):
        store = gathered.stores.get(slide_id)
        identity = str(store.attrs.get("identity") or "") if store else ""
        # Opened anew, because a store keeps the thumbnail that it was asked for.
        thumbnail = open_tiles(store.path).thumbnail if store is not None and not store.coords_synthetic else None
        yield SlideTrace(slide_id, patients[slide_id], identity or None, thumbnail, facts.digest, facts.row_hashes)


def _check_aggregator(settings: MilSettings, outputs: int) -> None:
    """It must exist and take its options. Others' are not built: theirs may need weights, or the length of the features."""
    kind, arguments = find_aggregator(settings.aggregator)
    check_options(settings.aggregator, kind, settings.options, arguments)
    if settings.aggregator in AGGREGATORS:
        build_network(spec_of(settings, settings.hidden, outputs))


def _split(
    study: Study,
    cohort: Cohort,
    strata: Mapping[str, str],
    tasks: TaskSet,
    joined: Collection[frozenset[str]],
    before: Splits | None,
) -> Splits:
    """The splits of a study. One that was made before the study's own encoder was pretrained is the only one that counts."""
    if rule_of(study) == "exclude" and study.has_own_encoder:
        return _own_split(study, cohort, strata, joined, before, classes=tasks.main.kind in CLASS_KINDS)
    facts = patient_facts(cohort.rows, patient_ids(cohort, study.cohort))
    merged = joined if study.mil.split.leaks == "merge" else ()
    return make_splits(strata, facts, merged, study.mil, tasks.main.kind, before)


def _own_split(
    study: Study,
    cohort: Cohort,
    strata: Mapping[str, str],
    joined: Collection[frozenset[str]],
    before: Splits | None,
    *,
    classes: bool,
) -> Splits:
    """The split before pretraining; if leaks are merged, nobody who shares data with a tested patient is learned from."""
    settings, test = study.mil, held_out_patients(study, cohort)
    dropped = {patient for group in joined if group & test for patient in group - test}
    if settings.split.leaks == "refuse":
        dropped = set()
    learned = {patient: stratum for patient, stratum in strata.items() if patient not in dropped}
    fold = held_out_fold(learned, test, settings.inner_fraction, settings.seed, classes=classes)
    notes = (f"not learned from, because they share data with patients who are tested: {', '.join(sorted(dropped))}",)
    return held_out_splits(fold, learned, settings, notes if dropped else (), before, classes=classes)


def _check_judged(plan: Plan, left_out: Collection[str]) -> None:
    """There must be somebody to judge, of both kinds where there are kinds."""
    targets = plan.target_BT[list(plan.tested)][:, plan.tasks.slice_of(plan.tasks.main).targets]
    strata = {plan.tasks.main.stratum(target_T) for target_T in targets} - {""}
    if len(strata) > 1 or (strata and not plan.tasks.main.classes):
        return
    if left_out:
        what = f"without the {len(left_out)} patients seen in pretraining there are not two classes left to tell apart"
        raise UsageError(what, where="mil.seen_in_pretraining", fix="judge other patients, or set it to mark")
    raise UsageError("the test parts do not hold two classes to tell apart", where="mil.split", fix="choose another split")


def _check_events(tasks: TaskSet, target_BT: Floats, splits: Splits, folds: Sequence[FoldPlaces]) -> None:
    """Cox needs an event to learn from and one to stop by: without any, every epoch would look equally good."""
    task = tasks.main
    if task.kind != "cox":
        return
    event_B = target_BT[:, tasks.slice_of(task).targets][:, 1]
    for name, fold in zip(splits.names, folds, strict=True):
        for part, places in (("training", fold.train), ("validation", fold.validation)):
            if not (event_B[list(places)] == 1).any():
                fix = "use fewer folds, a larger mil.inner_fraction, or kind: discrete"
                raise UsageError(f"the {part} part of {name} has no event", where="mil.split", fix=fix)
