"""From a probability to a decision, or to none with a reason; everything here is fitted on out-of-fold scores.

The numbers about it are nested: what is said about a patient was fitted on the patients of the other folds.
Legend: B bags, U cases, C classes (prediction columns), D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathfm.errors import SlideError
from pathfm.mil.tasks.contract import Floats, Task
from pathfm.mil.trust_numbers import trust_numbers
from pathfm.mil_settings import NumberSettings
from pathfm.stats.calibration import Calibrator, calibrator_from_record, fit_calibrator
from pathfm.stats.conformal import Conformal, TooFewPatientsError, conformal_from_record, fit_conformal
from pathfm.stats.novelty import Novelty, fit_novelty, novelty_from_record
from pathfm.stats.seeds import derive_seed
from pathfm.stats.thresholds import choose_threshold

WITH_CLASSES, CALIBRATED = ("binary", "multiclass", "ordinal"), ("binary", "multiclass")
"""Kinds of tasks of which one class is decided, and those whose probabilities are calibrated."""
UNCERTAIN, UNLIKE, FAR = "abstain:uncertain", "abstain:unlike any class", "abstain:out of distribution"
PARTS = 5
"""Into how many parts the patients of a single test part are cut for nesting."""


@dataclass(frozen=True)
class Decision:
    """What is said about one patient (or bag).

    Attributes:
        calibrated_C: calibrated probabilities; empty where nothing is calibrated.
        decision: a class, ``abstain:<reason>``, or "" of a task without classes.
        set: the conformal set; empty as well where there are no sets.
        reasons: why, in words.
        distance: to the training bags; None where it is not known.
    """

    calibrated_C: tuple[float, ...]
    decision: str
    set: tuple[str, ...]
    reasons: tuple[str, ...]
    distance: float | None = None

    @property
    def abstains(self) -> bool:
        """Nothing is decided."""
        return self.decision.startswith("abstain:")


class OperatingPoint(NamedTuple):
    """A positive has at least this (uncalibrated) probability; the note says what is wrong with it, if anything."""

    name: str
    threshold: float
    note: str = ""


@dataclass(frozen=True)
class Trust:
    """What turns probabilities of one task into decisions: plain values, so that a bundle can hold it.

    Attributes:
        classes: of the task; empty where none is decided.
        positive: number of the positive class, -1 where there is none.
        calibrator: None: probabilities are not calibrated.
        points: operating points; decisions follow the first. Without any, the most probable class is meant.
        conformal: None: there are no sets, and nobody is abstained from for doubt.
        refusal: why there are no sets.
        novelty: None: nobody is out of distribution.
        n_patients: fitted on.
        notes: what a reader must know.
        unit: whom it decides about: a patient (mean of the bags), or each bag where those of a patient have different classes.
    """

    classes: tuple[str, ...]
    positive: int
    calibrator: Calibrator | None
    points: tuple[OperatingPoint, ...]
    conformal: Conformal | None
    refusal: str
    novelty: Novelty | None
    n_patients: int
    notes: tuple[str, ...]
    unit: str = "patient"

    def distance(self, mean_ND: ArrayLike) -> float | None:
        """Distance of a patient to the training bags: the largest of its bags', by their mean features [N, D]."""
        return None if self.novelty is None else float(self.novelty.distance(mean_ND).max())

    def decide(self, probability_C: ArrayLike, distance: float | None = None) -> Decision:
        """The decision about one patient: mean of its bags' probabilities, and ``distance``.

        A class is decided when it alone is in the conformal set and the first operating point agrees, so that both keep what
        they promise. Sets and operating points see the uncalibrated probabilities.

        Raises:
            SlideError: a probability is not finite.
        """
        probability = np.asarray(probability_C, dtype=np.float64)
        if not np.isfinite(probability).all():
            raise SlideError("the prediction is not a finite number")
        calibrated = () if self.calibrator is None else tuple(self.calibrator.apply(probability[None])[0].tolist())
        decision, members, reasons = self._class_of(probability) if self.classes else ("", (), ())
        if self.novelty is not None and distance is not None and not distance <= self.novelty.limit:
            decision = FAR
            reasons = (f"distance {distance:.4g} to the training bags, limit {self.novelty.limit:.4g}", *reasons)
        return Decision(calibrated, decision, members, reasons, distance)

    def _class_of(self, probability_C: Floats) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        meant = self.classes[int(probability_C.argmax())]
        if self.points:
            is_positive = probability_C[self.positive] >= self.points[0].threshold
            meant = self.classes[self.positive if is_positive else 1 - self.positive]
        if self.conformal is None:
            return meant, (), (f"no conformal set: {self.refusal}",)
        inside = self.conformal.contains(probability_C[None])[0]
        members = tuple(name for name, is_member in zip(self.classes, inside, strict=True) if is_member)
        promise = f"set at an error rate of {self.conformal.alpha:g}"
        if not members:
            return UNLIKE, members, (f"{promise}: no class",)
        if len(members) > 1:
            return UNCERTAIN, members, (f"{promise}: {', '.join(members)}",)
        if members[0] != meant:
            return UNCERTAIN, members, (f"{promise}: {members[0]}, but the operating point {self.points[0].name} says {meant}",)
        return meant, members, ()

    def record(self) -> dict[str, Any]:
        """JSON values; ``trust_from_record`` gives the same back exactly, floats to the last bit. No patient is named."""
        return {
            "classes": list(self.classes),
            "positive": self.positive,
            "calibrator": self.calibrator.record() if self.calibrator else None,
            "points": [point._asdict() for point in self.points],
            "conformal": self.conformal.record() if self.conformal else None,
            "refusal": self.refusal,
            "novelty": self.novelty.record() if self.novelty else None,
            "n_patients": self.n_patients,
            "notes": list(self.notes),
            "unit": self.unit,
        }


def trust_from_record(record: Mapping[str, Any]) -> Trust:
    """What ``Trust.record`` recorded."""
    return Trust(
        tuple(record["classes"]),
        record["positive"],
        calibrator_from_record(record["calibrator"]) if record["calibrator"] else None,
        tuple(OperatingPoint(**point) for point in record["points"]),
        conformal_from_record(record["conformal"]) if record["conformal"] else None,
        record["refusal"],
        novelty_from_record(record["novelty"]) if record["novelty"] else None,
        record["n_patients"],
        tuple(record["notes"]),
        record.get("unit", "patient"),
    )


@dataclass(frozen=True)
class Cases:
    """What is judged: patients, each the mean of its bags, sorted.

    Where a patient has bags of different classes, every bag is a case of its own.

    Attributes:
        probability_UC: out-of-fold predictions.
        label_U: class numbers, -1 where unknown.
        patient_U: whose they are.
        fold_U: which fold scored them.
        bags: places of the bags of each case in the rows that were given.
        mean_BD: mean features of the bags; None: not known.
        is_bag: every case is a single bag.
    """

    probability_UC: Floats
    label_U: NDArray[np.intp]
    patient_U: NDArray[np.str_]
    fold_U: NDArray[np.intp]
    bags: tuple[NDArray[np.intp], ...]
    mean_BD: Floats | None
    is_bag: bool

    def where(self, chosen_U: NDArray[np.bool_]) -> Cases:
        """Some of the cases."""
        bags = tuple(bag for bag, is_chosen in zip(self.bags, chosen_U, strict=True) if is_chosen)
        columns = (self.probability_UC[chosen_U], self.label_U[chosen_U], self.patient_U[chosen_U], self.fold_U[chosen_U])
        return Cases(*columns, bags, self.mean_BD, self.is_bag)


@dataclass(frozen=True)
class TrustJudged:
    """What trust fitted on the other folds says about each case.

    Attributes:
        trust: fitted on all, for a bundle.
        nested: by part (mostly a fold), fitted on all other parts.
        part_U: the part of each case.
        cases: who was judged.
        decision_U: by the ``nested`` of the part.
        decisions: [B], the same for each bag that was given: that of its case.
        settings: how.
    """

    trust: Trust
    nested: Mapping[int, Trust]
    part_U: NDArray[np.intp]
    cases: Cases
    decision_U: tuple[Decision, ...]
    decisions: tuple[Decision, ...]
    settings: NumberSettings

    def metrics(self) -> dict[str, Any]:
        """The table ``trust`` of ``metrics.json``: calibration, operating points, conformal sets, novelty, decisions."""
        return trust_numbers(self)


def fit_trust(
    task: Task,
    probability_BC: ArrayLike,
    target_B: ArrayLike,
    patient_B: Sequence[str],
    fold_B: Sequence[int],
    mean_BD: ArrayLike | None,
    numbers: NumberSettings,
) -> tuple[Trust, TrustJudged]:
    """Fits everything on all patients, and once more without each fold to judge it. The order of the rows does not matter.

    Args:
        task: what is predicted; tasks without classes only learn what is out of distribution.
        probability_BC: out-of-fold predictions, by networks that have neither learned nor stopped from the patient.
        target_B: class numbers; NaN where unknown: such a bag gets a decision and takes no part otherwise.
        patient_B: whose bag it is.
        fold_B: which fold scored the patient. If it is the same for all, patients are cut into five parts for nesting.
        mean_BD: mean features of the bags; None: nothing is out of distribution.
        numbers: settings.
    """
    cases = _cases(task, np.asarray(probability_BC, dtype=np.float64), target_B, patient_B, fold_B, mean_BD)
    part = _parts(cases)
    trust = _fit(task, cases, numbers)
    nested = {int(number): _fit(task, cases.where(part != number), numbers) for number in np.unique(part)}
    said: list[Decision] = []
    for probability, number, bags in zip(cases.probability_UC, part.tolist(), cases.bags, strict=True):
        means = None if cases.mean_BD is None else cases.mean_BD[bags]
        said.append(nested[number].decide(probability, None if means is None else nested[number].distance(means)))
    by_bag = {int(bag): decision for bags, decision in zip(cases.bags, said, strict=True) for bag in bags}
    decisions = tuple(by_bag[bag] for bag in range(len(by_bag)))
    return trust, TrustJudged(trust, nested, part, cases, tuple(said), decisions, numbers)


def _cases(
    task: Task,
    probability_BC: Floats,
    target_B: ArrayLike,
    patient_B: Sequence[str],
    fold_B: Sequence[int],
    mean_BD: ArrayLike | None,
) -> Cases:
    has_classes = task.kind in WITH_CLASSES
    target = np.asarray(target_B, dtype=np.float64).reshape(len(patient_B), -1)[:, 0]
    label = np.where(np.isfinite(target) & has_classes, np.nan_to_num(target), -1).astype(np.intp)
    mean = None if mean_BD is None else np.asarray(mean_BD, dtype=np.float64)
    # Bags of a patient are summed in an order of their own, not that of the table.
    content = [probability_BC[b].tobytes() + (b"" if mean is None else mean[b].tobytes()) for b in range(len(label))]
    order = sorted(range(len(label)), key=lambda b: (patient_B[b], label[b], content[b]))
    classes_of: dict[str, set[int]] = {}
    for b in order:
        classes_of.setdefault(patient_B[b], set()).update({int(label[b])} - {-1})
    is_bag = any(len(found) > 1 for found in classes_of.values())
    groups: dict[str | int, list[int]] = {}
    for b in order:
        groups.setdefault(b if is_bag else patient_B[b], []).append(b)
    bags = tuple(np.array(group, dtype=np.intp) for group in groups.values())
    firsts = [int(group[0]) for group in bags]
    return Cases(
        np.stack([probability_BC[group].mean(axis=0) for group in bags]),
        np.array([label[group].max() for group in bags], dtype=np.intp),
        np.array([patient_B[b] for b in firsts]),
        np.array([fold_B[b] for b in firsts], dtype=np.intp),
        bags,
        mean,
        is_bag,
    )


def _parts(cases: Cases) -> NDArray[np.intp]:
    """The part of each case: its fold, or a fifth of its class where one set of networks scored everyone."""
    if len(np.unique(cases.fold_U)) > 1:
        return cases.fold_U
    label_of = dict(zip(cases.patient_U.tolist(), cases.label_U.tolist(), strict=True))
    shuffled = sorted(label_of, key=lambda patient: (label_of[patient], derive_seed("trust", patient)))
    part_of = {patient: place % PARTS for place, patient in enumerate(shuffled)}
    return np.array([part_of[patient] for patient in cases.patient_U.tolist()], dtype=np.intp)


def _fit(task: Task, cases: Cases, numbers: NumberSettings) -> Trust:
    """Fits on labelled cases; what cannot be fitted is absent, and a note or the refusal says why."""
    known, notes = cases.where(cases.label_U >= 0), list[str]()
    if task.kind not in WITH_CLASSES:
        novelty = _fit_novelty(cases, numbers, notes)
        notes.append(f"not calibrated, and nothing is decided: the task is {task.kind}")
        return Trust((), -1, None, (), None, f"the task is {task.kind}", novelty, len(set(cases.patient_U)), tuple(notes))
    if cases.is_bag:
        notes.append("patients have bags of different classes: every bag counts, though those of a patient are not independent")
    calibrator = _fit_calibrator(task, known, numbers, notes)
    conformal, refusal = _fit_conformal(task, known, numbers)
    return Trust(
        task.classes,
        task.positive,
        calibrator,
        _fit_points(task, known, numbers, notes),
        conformal,
        refusal,
        _fit_novelty(cases, numbers, notes),
        len(set(known.patient_U.tolist())),
        tuple(notes),
        "bag" if cases.is_bag else "patient",
    )


def _fit_calibrator(task: Task, known: Cases, numbers: NumberSettings, notes: list[str]) -> Calibrator | None:
    if task.kind not in CALIBRATED or numbers.calibration == "none":
        notes.append(f"not calibrated: {'as set' if task.kind in CALIBRATED else f'the task is {task.kind}'}")
        return None
    if len(np.unique(known.label_U)) < 2:
        notes.append("not calibrated: fewer than two classes")
        return None
    calibrator = fit_calibrator(numbers.calibration, known.probability_UC, known.label_U, max(task.positive, 0))
    if calibrator.kind != numbers.calibration:
        notes.append(f"{len(task.classes)} classes: calibrated by {calibrator.kind} instead of {numbers.calibration}")
    return calibrator


def _fit_points(task: Task, known: Cases, numbers: NumberSettings, notes: list[str]) -> tuple[OperatingPoint, ...]:
    if task.kind != "binary":
        return ()
    if len(np.unique(known.label_U)) < 2:
        notes.append("no operating points: fewer than two classes; the more probable class is meant")
        return ()
    score, positive = known.probability_UC[:, task.positive], known.label_U == task.positive
    found = [(name, choose_threshold(name, score, positive)) for name in numbers.operating_points]
    return tuple(OperatingPoint(name, threshold.value, threshold.note) for name, threshold in found)


def _fit_conformal(task: Task, known: Cases, numbers: NumberSettings) -> tuple[Conformal | None, str]:
    if numbers.alpha is None:
        return None, "mil.numbers.alpha is null"
    patients = known.patient_U.tolist()
    try:
        return fit_conformal(
            known.probability_UC, known.label_U, patients, task.classes, numbers.alpha, class_wise=numbers.class_wise
        ), ""
    except TooFewPatientsError as error:
        return None, error.reason


def _fit_novelty(cases: Cases, numbers: NumberSettings, notes: list[str]) -> Novelty | None:
    if numbers.max_distance is None or cases.mean_BD is None:
        notes.append("nobody is out of distribution: " + ("as set" if numbers.max_distance is None else "no features"))
        return None
    places = np.concatenate([*cases.bags, np.empty(0, dtype=np.intp)])
    patients = [patient for patient, bags in zip(cases.patient_U.tolist(), cases.bags, strict=True) for _ in bags]
    if len(set(patients)) < 3:
        notes.append("nobody is out of distribution: fewer than three patients")
        return None
    return fit_novelty(cases.mean_BD[places], patients, numbers.max_distance)
