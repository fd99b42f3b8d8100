"""External validation: a bundle's predictions of labelled slides, judged as they are. Nothing is fitted or chosen here.

Legend: B units, U cases (mostly patients), P prediction columns, T target columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import UsageError
from pathfm.mil.card import number
from pathfm.mil.judging import aggregate, judge
from pathfm.mil.measures import MAIN
from pathfm.mil.predict import Answers, Ensemble, Verdict
from pathfm.mil.roster import Unit, has_label
from pathfm.mil.tasks.contract import Task
from pathfm.mil.trust import Cases, TrustJudged

Floats = NDArray[np.float64]
MODEL = "bundle"
"""What the classifier is called among the models of ``metrics.json``."""
LOCKED = "locked when the bundle was made, and counted on these patients, of whom nothing was learned"
NOTE = "external validation: calibration, thresholds and conformal sets are those of the bundle, and nothing was fitted"


def validation_metrics(ensemble: Ensemble, answers: Answers, left_out: Collection[str]) -> dict[str, Any]:
    """Numbers on all labelled units, in the form of the ``metrics.json`` of a training.

    Args:
        ensemble: that was asked.
        answers: what it said.
        left_out: patients who are not to be judged.
    """
    pairs = zip(answers.order, answers.units, strict=True)
    asked = [(unit, verdict) for unit, verdict in pairs if unit.patient_id not in left_out]
    settings, main = ensemble.bundle.settings, ensemble.tasks.main
    labelled = [unit for unit, _ in asked if has_label(unit.labels, settings)]
    also = {task.name: _of_task(ensemble, task, asked) for task in ensemble.tasks.tasks[1:]}
    return {
        "format": 2,
        "validation_of": ensemble.bundle.digest,
        "primary": MODEL,
        "label": main.name,
        "level": settings.level,
        "n_slides": sum(len(unit.slide_ids) for unit in labelled),
        "n_patients": len({unit.patient_id for unit in labelled}),
        **_of_task(ensemble, main, asked),
        "also": also,
        "notes": [NOTE],
    }


def headline(metrics: Mapping[str, Any]) -> str:
    """The main number with its interval, in a few words."""
    said = metrics["models"].get(MODEL) or {}
    name = MAIN.get(metrics["kind"], "")
    return f"{name} {number(said.get(name))}" if name else "no number"


def _of_task(ensemble: Ensemble, task: Task, asked: Sequence[tuple[Unit, Verdict]]) -> dict[str, Any]:
    """Kind, classes, numbers and trust of one task.

    Numbers of bags are those of bags with a label. What is said of a patient rests on all units, with a label or without.
    """
    settings, place = ensemble.bundle.settings, ensemble.tasks.slice_of(task)
    about: dict[str, Any] = {"kind": task.kind, "classes": list(task.classes)}
    about["positive"] = task.classes[task.positive] if task.classes and task.positive >= 0 else None
    target_BT = task.encode([unit.labels for unit, _ in asked]) if asked else np.empty((0, task.targets))
    known = {unit.patient_id for (unit, _), target_T in zip(asked, target_BT, strict=True) if np.isfinite(target_T).any()}
    if not known:
        return {**about, "models": {}, "trust": {}}
    chosen = [index for index, (unit, _) in enumerate(asked) if unit.patient_id in known]
    units, target_BT = [asked[index] for index in chosen], target_BT[chosen]
    patient_B = [unit.patient_id for unit, _ in units]
    prediction_BP = np.stack([verdict.prediction_P[place.columns] for _, verdict in units])
    numbers = judge(task, prediction_BP, target_BT, patient_B, settings.numbers, settings.seed)
    if settings.level != "patient":
        numbers["levels"] = {"patient": _of_patients(ensemble, task, prediction_BP, target_BT, patient_B)}
    trust = ensemble.trust.get(task.name)
    judged = _trust_numbers(ensemble, task, units, target_BT) if trust and trust.classes else {}
    return {**about, "models": {MODEL: numbers}, "trust": judged}


def _of_patients(
    ensemble: Ensemble, task: Task, prediction_BP: Floats, target_BT: Floats, patient_B: Sequence[str]
) -> dict[str, Any]:
    """Numbers of the mean over each patient's units; why there are none where its labels differ."""
    settings = ensemble.bundle.settings
    try:
        prediction_GP, target_GT, names = aggregate(prediction_BP, target_BT, patient_B)
    except UsageError as error:
        return {"refused": error.what}
    found: dict[str, Any] = judge(task, prediction_GP, target_GT, names, settings.numbers, settings.seed)
    return found


def _trust_numbers(ensemble: Ensemble, task: Task, units: Sequence[tuple[Unit, Verdict]], target_BT: Floats) -> dict[str, Any]:
    """How the locked calibration, thresholds and sets do: patient by patient, as they were fitted."""
    groups: dict[str, list[int]] = {}
    for index, (unit, _) in enumerate(units):
        groups.setdefault(unit.patient_id, []).append(index)
    known_B = np.isfinite(target_BT[:, 0])
    torn = any(len({target_BT[index, 0] for index in group if known_B[index]}) > 1 for group in groups.values())
    is_bag = torn or ensemble.trust[task.name].unit == "bag"
    singles = [[index] for index in np.flatnonzero(known_B).tolist()]
    parts = singles if is_bag else [groups[patient] for patient in sorted(groups)]
    verdicts = [ensemble.mean([units[index][1] for index in part]) for part in parts]
    columns = ensemble.tasks.slice_of(task).columns
    cases = Cases(
        np.stack([verdict.prediction_P[columns] for verdict in verdicts]),
        np.array([int(np.nanmax(target_BT[part, 0])) for part in parts], dtype=np.intp),
        np.array([units[part[0]][0].patient_id for part in parts]),
        np.zeros(len(parts), dtype=np.intp),
        tuple(np.array(part, dtype=np.intp) for part in parts),
        None,
        is_bag,
    )
    trust, decisions = ensemble.trust[task.name], tuple(verdict.decisions[task.name] for verdict in verdicts)
    settings = ensemble.bundle.settings.numbers
    judged = TrustJudged(trust, {0: trust}, np.zeros(len(parts), dtype=np.intp), cases, decisions, decisions, settings)
    return {**judged.metrics(), "nested": LOCKED}
