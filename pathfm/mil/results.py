"""Out-of-fold answers to the numbers of ``metrics.json`` and the decisions of ``predictions.csv``.

Legend: B judged bags, P prediction columns, T target columns, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import UsageError
from pathfm.mil.controls import COLOUR, SHUFFLED, UNTRAINED
from pathfm.mil.inputs import MilInputs
from pathfm.mil.judging import (
    Answers,
    FoldPart,
    aggregate,
    compare,
    corrected,
    fold_table,
    judge,
    main_value,
    permutation_record,
    subgroup_table,
)
from pathfm.mil.measures import MAIN
from pathfm.mil.models import Judged
from pathfm.mil.outputs import Looker, numbers_of_tiles
from pathfm.mil.plan import Plan, subgroup_columns
from pathfm.mil.roster import flow, patient_flow
from pathfm.mil.tasks.contract import Task
from pathfm.mil.trust import Decision, Trust, TrustJudged, fit_trust
from pathfm.stats.curves import decision_curve

Floats = NDArray[np.float64]
Cell = str | int | float


@dataclass(frozen=True)
class Results:
    """Everything that was found.

    Attributes:
        plan: who was compared.
        inputs: where from.
        main: the model of the study.
        rivals: controls on the same splits.
        fractions: share of the training patients, the model, and how many patients that were.
        permuted: models of permuted labels.
        trust: by task name, what makes decisions, and how it did on patients it was not fitted on.
    """

    plan: Plan
    inputs: MilInputs
    main: Judged
    rivals: tuple[Judged, ...]
    fractions: tuple[tuple[float, Judged, float], ...]
    permuted: tuple[Judged, ...]
    trust: Mapping[str, tuple[Trust, TrustJudged]]

    @cached_property
    def row_of(self) -> dict[int, Floats]:
        """Prediction columns of each judged bag, by its place."""
        return dict(zip(self.plan.tested, self.main.prediction_BP, strict=True))

    @cached_property
    def decision_of(self) -> dict[int, Decision]:
        """What is decided about each judged bag, by its place."""
        return dict(zip(self.plan.tested, self.trust[self.plan.tasks.main.name][1].decisions, strict=True))

    @property
    def locked(self) -> dict[str, Trust]:
        """What a bundle decides by, by task."""
        return {name: trust for name, (trust, _) in self.trust.items()}

    @property
    def decision_columns(self) -> tuple[str, ...]:
        """Columns of ``predictions.csv`` about decisions of the main task."""
        trust = self.trust[self.plan.tasks.main.name][0]
        calibrated = tuple(f"calibrated_{name}" for name in trust.classes) if trust.calibrator else ()
        return (*calibrated, "decision", "conformal_set", "doubts", "distance")

    def cells(self, place: int) -> tuple[list[Cell], list[Cell]]:
        """Of one bag: predictions and the most probable class; and under ``decision_columns``. Empty for bags not judged."""
        tasks = self.plan.tasks
        if place not in self.row_of:
            return [""] * (len(tasks.columns) + 1), [""] * len(self.decision_columns)
        row_P = self.row_of[place]
        own_P = row_P[tasks.slice_of(tasks.main).columns]
        one_of = tasks.main.kind in {"binary", "multiclass", "ordinal"}
        predicted = tasks.main.classes[int(own_P.argmax())] if one_of else ""
        trust, said = self.trust[tasks.main.name][0], self.decision_of[place]
        calibrated: list[Cell] = list(said.calibrated_C)
        if trust.calibrator and not calibrated:
            calibrated = [""] * len(trust.classes)
        distance: Cell = "" if said.distance is None else said.distance
        decided: list[Cell] = [said.decision, "|".join(said.set), "; ".join(said.reasons), distance]
        return [*row_P.tolist(), predicted], [*calibrated, *decided]

    @property
    def patient_columns(self) -> tuple[str, ...]:
        """Columns of ``patients.csv`` about decisions; none where bags are decided one by one."""
        return self.decision_columns if self.trust[self.plan.tasks.main.name][0].unit == "patient" else ()

    def patient_cells(self, places: Sequence[int]) -> list[Cell]:
        """Under ``patient_columns``, of the patient whose bags these are: all of them have the patient's decision."""
        if not self.patient_columns:
            return []
        return self.cells(places[0])[1] if places else [""] * len(self.decision_columns)

    def metrics(self, searched: Sequence[Mapping[str, Any]], looker: Looker) -> dict[str, Any]:
        """Content of ``metrics.json`` but the fingerprint."""
        plan, main = self.plan, self.plan.tasks.main
        return {
            "format": 2,
            "primary": self.main.name,
            "primary_metric": MAIN[main.kind],
            "level": plan.settings.level,
            "aggregator": plan.settings.aggregator,
            "n_slides": sum(len(unit.slide_ids) for unit in plan.judged),
            "n_patients": len(set(plan.judged_persons)),
            **self._about(main),
            "also": {task.name: self._about(task) for task in plan.tasks.tasks[1:]},
            "looks": {"kind": looker.kind, "deletion_insertion": looker.curves},
            "label_fractions": self._fractions(),
            "permutations": self._permutations(),
            "flow": {
                "slides": flow(plan.cohort, plan.gathered.absent),
                "patients": patient_flow(plan.cohort, plan.patients, plan.gathered.absent),
            },
            "splits": {
                "scheme": plan.splits.scheme,
                "hash": plan.splits.hash,
                "names": list(plan.splits.names),
                "notes": list(plan.splits.notes),
            },
            "leaks": [leak.record() for leak in plan.leaks],
            "seen_in_pretraining": plan.seen.record(plan.judged_patients),
            "search": list(searched),
            "notes": self._notes(),
        }

    def _about(self, task: Task) -> dict[str, Any]:
        """Everything about one task."""
        settings, patients = self.plan.settings, self.plan.judged_persons
        prediction_BP, target_BT = self._of(self.main, task)
        positive = task.classes[task.positive] if task.classes and task.positive >= 0 else None
        about: dict[str, Any] = {"label": task.name, "kind": task.kind, "classes": list(task.classes), "positive": positive}
        about["models"] = {model.name: self._entry(model, task) for model in (self.main, *self.rivals)}
        own = Answers(self.main.name, prediction_BP)
        about["comparisons"] = corrected(
            [
                compare(
                    task,
                    own,
                    Answers(rival.name, self._of(rival, task)[0]),
                    target_BT,
                    patients,
                    settings.numbers,
                    settings.seed,
                )
                for rival in self.rivals
                if rival.name != SHUFFLED
            ]
        )
        names = [name for name, fold in zip(self.plan.splits.names, self.plan.places, strict=True) if fold.test]
        about["folds"] = {**fold_table(task, self._parts(task)), "names": names}
        about["trust"] = self.trust[task.name][1].metrics()
        groups = {
            name: [_joined(value_of[slide_id] for slide_id in unit.slide_ids) for unit in self.plan.judged]
            for name, value_of in subgroup_columns(self.plan.cohort, settings).items()
        }
        about["subgroups"] = subgroup_table(task, prediction_BP, target_BT, patients, groups, settings.numbers, settings.seed)
        if task.kind == "binary":
            known = np.isfinite(target_BT[:, 0])
            said = [decision.calibrated_C for decision in self.trust[task.name][1].decisions]
            # Calibrated ones, nested, where everybody has them: net benefit takes probabilities at their word.
            is_calibrated = all(said)
            score_B = np.array(said)[:, task.positive] if is_calibrated else prediction_BP[:, task.positive]
            about["decision_curve"] = decision_curve(score_B[known], target_BT[known, 0] == task.positive)
            about["decision_curve_calibrated"] = is_calibrated
        return about

    def _of(self, model: Judged, task: Task) -> tuple[Floats, Floats]:
        """A task's own columns of predictions and targets."""
        parts = self.plan.tasks.slice_of(task)
        return model.prediction_BP[:, parts.columns], model.target_BT[:, parts.targets]

    def _entry(self, model: Judged, task: Task) -> dict[str, Any]:
        """The numbers of one model: at the level of the bags, at all levels above, and what its tiles say."""
        settings, patients = self.plan.settings, self.plan.judged_persons
        prediction_BP, target_BT = self._of(model, task)
        entry: dict[str, Any] = judge(task, prediction_BP, target_BT, patients, settings.numbers, settings.seed)
        entry["levels"] = {level: self._level(model, task, names) for level, names in self._levels().items()}
        if task.name == self.plan.tasks.main.name:
            entry |= numbers_of_tiles(model.tiles.localised() if model.tiles else None)
        if task.name in model.direction:
            entry["direction"] = model.direction[task.name]
        return entry | {"transductive": model.seen_share > 0, "patients_seen_share": model.seen_share}

    def _levels(self) -> dict[str, list[tuple[str, ...]]]:
        """Levels above that of the bags: each bag's patient, and specimen where that is the group."""
        units, level = self.plan.judged, self.plan.settings.level
        found: dict[str, list[tuple[str, ...]]] = {}
        if level == "slide" and all(unit.specimen_id for unit in units):
            found["specimen"] = [(unit.patient_id, unit.specimen_id) for unit in units]
        if level != "patient":
            found["patient"] = [(unit.patient_id,) for unit in units]
        return found

    def _level(self, model: Judged, task: Task, group_B: Sequence[tuple[str, ...]]) -> dict[str, Any]:
        """Numbers of the mean of a group's bags; why there are none where its labels differ."""
        settings = self.plan.settings
        try:
            prediction_GP, target_GT, groups = aggregate(*self._of(model, task), group_B)
        except UsageError as error:
            return {"refused": error.what}
        person = self.plan.person_of
        patients = [person[patient] for patient, *_ in groups]
        found: dict[str, Any] = judge(task, prediction_GP, target_GT, patients, settings.numbers, settings.seed)
        return found

    def _parts(self, task: Task) -> list[FoldPart]:
        parts, units, person = self.plan.tasks.slice_of(task), self.plan.units, self.plan.person_of
        return [
            FoldPart(
                said_BP[:, parts.columns],
                self.plan.target_BT[list(fold.test)][:, parts.targets],
                [person[units[place].patient_id] for place in fold.test],
                len({person[units[place].patient_id] for place in fold.train + fold.validation}),
            )
            for fold, said_BP in zip(self.plan.places, self.main.by_fold, strict=True)
            if fold.test
        ]

    def _fractions(self) -> list[dict[str, Any]]:
        """The learning curve, up to the model itself."""
        task, settings = self.plan.tasks.main, self.plan.settings
        if not self.fractions:
            return []
        everyone = float(np.mean([part.train_patients for part in self._parts(task)]))
        rows = []
        for fraction, model, count in (*self.fractions, (1.0, self.main, everyone)):
            numbers = judge(task, *self._of(model, task), self.plan.judged_persons, settings.numbers, settings.seed)
            rows.append({"fraction": fraction, "n_patients": count, MAIN[task.kind]: numbers[MAIN[task.kind]]})
        return rows

    def _permutations(self) -> dict[str, Any] | None:
        task = self.plan.tasks.main
        values = [main_value(task, *self._of(model, task), self.plan.judged_persons) for model in self.permuted]
        return permutation_record(values, main_value(task, *self._of(self.main, task), self.plan.judged_persons))

    def _notes(self) -> list[str]:
        plan = self.plan
        notes = [*plan.gathered.notes, *plan.seen.notes(plan.judged_patients)]
        if merged := len(set(plan.judged_patients)) - len(set(plan.judged_persons)):
            notes.append(f"patients who share data count as one person in all numbers: {merged} fewer than the table has")
        for name, fold in zip(plan.splits.names, plan.places, strict=True):
            for part in ("train", "validation"):
                found = plan.tasks.notes(plan.target_BT[list(getattr(fold, part))])
                notes += [f"{name}, {part}: {note}" for note in found]
        if len(plan.tasks.main.classes) > 2 and plan.tasks.main.kind == "multiclass":
            named = plan.tasks.main.classes[plan.tasks.main.positive]
            notes.append(f"AUROC is the mean over classes, each against the rest; the ROC curve is that of {named!r}")
        if not plan.gathered.stores:
            notes.append("no pictures of slides: there are no tile stores to draw on")
        if plan.settings.controls:
            given = {model.name for model in self.rivals}
            given |= {name for name in (COLOUR, UNTRAINED) if any(f"control {name!r}" in note for note in notes)}
            missing = [name for name in (COLOUR, UNTRAINED) if name not in given]
            notes += [f"control {name!r} was not run: there are no features for it" for name in missing]
            notes.append("shuffled labels: dealt out anew once, within the test parts of the folds, unrelated to the true ones")
        return notes


def gather_results(
    plan: Plan,
    inputs: MilInputs,
    main: Judged,
    rivals: Sequence[Judged],
    fractions: Sequence[tuple[float, Judged, float]],
    permuted: Sequence[Judged],
) -> Results:
    """Everything that was found, with what makes decisions, fitted on the out-of-fold answers of the main model."""
    tested = plan.tested
    patients = plan.judged_persons
    fold_B = [next(number for number, fold in enumerate(plan.places) if place in fold.test) for place in tested]
    mean_BD = np.stack([plan.bags.mean(place) for place in tested])
    trust = {}
    for task in plan.tasks.tasks:
        parts = plan.tasks.slice_of(task)
        said, truth = main.prediction_BP[:, parts.columns], main.target_BT[:, parts.targets]
        trust[task.name] = fit_trust(task, said, truth, patients, fold_B, mean_BD, plan.settings.numbers)
    return Results(plan, inputs, main, tuple(rivals), tuple(fractions), tuple(permuted), trust)


def _joined(values: Iterable[str]) -> str:
    """The value of several slides: one where they agree."""
    return " + ".join(sorted({value for value in values if value}))
