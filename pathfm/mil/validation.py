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
from pathfm.mil.roster import Unit
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
    chosen = [
        (unit, verdict)
        for unit, verdict in zip(answers.order, answers.units, strict=True)
        if unit.patient_id not in left_out and any(unit.labels.values())
    ]
    settings, main = ensemble.bundle.settings, ensemble.tasks.main
    also = {task.name: _of_task(ensemble, task, chosen) for task in ensemble.tasks.tasks[1:]}
    return {
        "format": 2,
        "validation_of": ensemble.bundle.digest,
        "primary": MODEL,
        "label": main.name,
        "level": settings.level,
        "n_slides": sum(len(unit.slide_ids) for unit, _ in chosen),
        "n_patients": len({unit.patient_id for unit, _ in chosen}),
        **_of_task(ensemble, main, chosen),
        "also": also,
        "notes": [NOTE],
    }


def headline(metrics: Mapping[str, Any]) -> str:
    """The main number with its interval, in a few words."""
    said = metrics["models"].get(MODEL) or {}
    name = MAIN.get(metrics["kind"], "")
    return f"{name} {number(said.get(name))}" if name else "no number"


def _of_task(ensemble: Ensemble, task: Task, chosen: Sequence[tuple[Unit, Verdict]]) -> dict[str, Any]:
    """Kind, classes, numbers and trust of one task."""
    settings, place = ensemble.bundle.settings, ensemble.tasks.slice_of(task)
    about: dict[str, Any] = {"kind": task.kind, "classes": list(task.classes)}
    about["positive"] = task.classes[task.positive] if task.classes and task.positive >= 0 else None
    target_BT = task.encode([unit.labels for unit, _ in chosen]) if chosen else np.empty((0, task.targets))
    known = [index for index, target_T in enumerate(target_BT) if np.isfinite(target_T).any()]
    if not known:
        return {**about, "models": {}, "trust": {}}
    labelled = [chosen[index] for index in known]
    patient_B = [unit.patient_id for unit, _ in labelled]
    prediction_BP = np.stack([verdict.prediction_P[place.columns] for _, verdict in labelled])
    numbers = judge(task, prediction_BP, target_BT[known], patient_B, settings.numbers, settings.seed)
    if settings.level != "patient":
        numbers["levels"] = {"patient": _of_patients(ensemble, task, prediction_BP, target_BT[known], patient_B)}
    trust = ensemble.trust.get(task.name)
    judged = _trust_numbers(ensemble, task, labelled, target_BT[known]) if trust and trust.classes else {}
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


def _trust_numbers(
    ensemble: Ensemble, task: Task, labelled: Sequence[tuple[Unit, Verdict]], target_BT: Floats
) -> dict[str, Any]:
    """How the locked calibration, thresholds and sets do: patient by patient, as they were fitted."""
    groups: dict[str, list[int]] = {}
    for index, (unit, _) in enumerate(labelled):
        groups.setdefault(unit.patient_id, []).append(index)
    torn = any(len({target_BT[index, 0] for index in group}) > 1 for group in groups.values())
    is_bag = torn or ensemble.trust[task.name].unit == "bag"
    parts = [[index] for index in range(len(labelled))] if is_bag else [groups[patient] for patient in sorted(groups)]
    verdicts = [ensemble.mean([labelled[index][1] for index in part]) for part in parts]
    columns = ensemble.tasks.slice_of(task).columns
    cases = Cases(
        np.stack([verdict.prediction_P[columns] for verdict in verdicts]),
        np.array([int(target_BT[part[0], 0]) for part in parts], dtype=np.intp),
        np.array([labelled[part[0]][0].patient_id for part in parts]),
        np.zeros(len(parts), dtype=np.intp),
        tuple(np.array(part, dtype=np.intp) for part in parts),
        None,
        is_bag,
    )
    trust, decisions = ensemble.trust[task.name], tuple(verdict.decisions[task.name] for verdict in verdicts)
    settings = ensemble.bundle.settings.numbers
    judged = TrustJudged(trust, {0: trust}, np.zeros(len(parts), dtype=np.intp), cases, decisions, decisions, settings)
    return {**judged.metrics(), "nested": LOCKED}
