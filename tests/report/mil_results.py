"""Mil folders of every kind of task, judged by the real code on invented predictions; nothing is trained."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from pathfm.mil.judging import Answers, FoldPart, compare, fold_table, judge, permutation_record, subgroup_table
from pathfm.mil.measures import MAIN
from pathfm.mil.tasks.making import make_tasks
from pathfm.mil.tasks.task_set import TaskSet
from pathfm.mil.trust import fit_trust
from pathfm.mil_settings import MilSettings
from pathfm.stats.curves import decision_curve
from pathfm.stats.metrics import roc_curve

KINDS = ("binary", "multiclass", "multilabel", "ordinal", "regression", "cox", "discrete")
SETTINGS: dict[str, dict[str, Any]] = {
    "binary": {"label": "state", "positive": "sick"},
    "multiclass": {"label": "grade", "kind": "multiclass"},
    "ordinal": {"label": "grade", "kind": "ordinal", "order": ("low", "mid", "high")},
    "multilabel": {"label": "markers", "kind": "multilabel", "columns": ("er", "pr")},
    "regression": {"label": "size", "kind": "regression"},
    "cox": {"label": "os", "kind": "cox", "time": "months", "event": "dead"},
    "discrete": {"label": "os", "kind": "discrete", "time": "months", "event": "dead"},
}
FOLDS, PATIENTS = 4, 48


def settings_of(kind: str) -> MilSettings:
    return MilSettings.model_validate({**SETTINGS[kind], "numbers": {"bootstrap": 40}})


def labels() -> list[dict[str, str]]:
    rng = np.random.default_rng(5)
    rows = []
    for patient in range(PATIENTS):
        sick = patient % 2
        months, followed = rng.exponential(10 if sick else 40), rng.uniform(5, 60)
        rows.append(
            {
                "state": "sick" if sick else "well",
                "grade": ("mid", "high")[int(rng.random() < 0.6)] if sick else ("mid", "low")[int(rng.random() < 0.6)],
                "size": f"{8 + 10 * sick + rng.normal():.2f}",
                "er": str(sick),
                "pr": str(int(rng.random() < 0.5)),
                "months": f"{max(0.5, min(months, followed)):.2f}",
                "dead": str(int(months < followed)),
            }
        )
    return rows


def answers(tasks: TaskSet, target_BT: np.ndarray, skill: float, seed: int) -> np.ndarray:
    """Predictions [B, P] that know the more the higher the skill."""
    rng, kind = np.random.default_rng(seed), tasks.main.kind
    noise = rng.normal(size=(len(target_BT), len(tasks.columns)))
    if kind == "regression":
        return skill * target_BT + 3 * noise + (1 - skill) * 13
    if kind in {"cox", "discrete"}:
        risk = -skill * target_BT[:, :1] / 10 + noise[:, :1]
        return np.concatenate([risk, 1 / (1 + np.exp(risk + np.arange(noise.shape[1] - 1)))], axis=1)
    if kind == "multilabel":
        return 1 / (1 + np.exp(-skill * 3 * (target_BT - 0.5) - noise))
    logit = skill * 2 * np.eye(noise.shape[1])[target_BT[:, 0].astype(int)] + noise
    return np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True)


def content_of(kind: str, *, skill: float = 1.0, controls: bool = True) -> tuple[dict[str, Any], TaskSet, np.ndarray]:
    """Content of ``metrics.json``, the task, and the predictions [B, P] of the model."""
    settings, rows = settings_of(kind), labels()
    tasks = make_tasks(settings, rows)
    task, target_BT, numbers = tasks.main, tasks.encode(rows), settings.numbers
    patients = [f"P{patient:02d}" for patient in range(PATIENTS)]
    said = answers(tasks, target_BT, skill, 0)
    models = {"our encoder": said} | ({"colour histogram": answers(tasks, target_BT, 0.0, 1)} if controls else {})
    judged = {
        name: {**judge(task, each, target_BT, patients, numbers, 0), "levels": {}, "localisation_auroc": None}
        | {"transductive": False, "patients_seen_share": 0.0}
        for name, each in models.items()
    }
    fold_B = [patient // 2 % FOLDS for patient in range(PATIENTS)]
    inside = [[place for place in range(PATIENTS) if fold_B[place] == fold] for fold in range(FOLDS)]
    parts = [FoldPart(said[places], target_BT[places], [patients[place] for place in places], 36) for places in inside]
    _, trusted = fit_trust(
        task, said, target_BT, patients, fold_B, np.random.default_rng(2).normal(size=(PATIENTS, 4)), numbers
    )
    sites = {"site": ["Rome" if patient < 4 else "Oslo" for patient in range(PATIENTS)]}
    own, metric = Answers("our encoder", said), MAIN[kind]
    content: dict[str, Any] = {
        "format": 2,
        "primary": "our encoder",
        "primary_metric": metric,
        "level": "patient",
        "n_slides": PATIENTS,
        "n_patients": PATIENTS,
        "label": task.name,
        "kind": kind,
        "classes": list(task.classes),
        "positive": task.classes[task.positive] if task.classes and task.positive >= 0 else None,
        "models": judged,
        "comparisons": [
            compare(task, own, Answers(name, each), target_BT, patients, numbers, 0)
            for name, each in models.items()
            if name != "our encoder"
        ],
        "folds": fold_table(task, parts),
        "trust": trusted.metrics(),
        "subgroups": subgroup_table(task, said, target_BT, patients, sites, numbers, 0),
        "also": {},
        "looks": {"kind": "attention", "deletion_insertion": {"P01": looks()}},
        "label_fractions": [
            {"fraction": share, "n_patients": 36 * share, metric: judged["our encoder"][metric]} for share in (0.5, 1.0)
        ],
        "permutations": permutation_record([0.4 + 0.01 * number for number in range(20)], 0.8),
        "flow": {
            "slides": {"cohort": 50, "no file": 1, "failed": 0, "empty": 0, "no label": 1, "used": 48},
            "patients": {"cohort": 50, "no file": 1, "failed": 0, "empty": 0, "no label": 1, "used": 48},
        },
        "splits": {"scheme": "folds", "hash": "a" * 64, "notes": ["one patient is in no test part"]},
        "leaks": [],
        "seen_in_pretraining": {"rule": "refuse", "patients_seen": 0, "share": 0.0, "left_out": 0},
        "search": [
            {
                "fold": 0,
                "chosen": {"lr": 0.01},
                "candidates": [
                    {"values": {"lr": 0.01}, "scores": [0.8], "mean": 0.8},
                    {"values": {"lr": 0.1}, "scores": [0.7], "mean": 0.7},
                ],
            }
        ],
        "notes": [],
    }
    if kind == "binary":
        content["decision_curve"] = decision_curve(said[:, task.positive], target_BT[:, 0] == task.positive)
    return content, tasks, said


def looks() -> dict[str, Any]:
    curve = {"kept_K": [1, 3, 5], "deletion_K": [0.2, 0.4, 0.8], "insertion_K": [0.9, 0.85, 0.8], "random_K": [0.5, 0.7, 0.8]}
    return {**curve, "deletion_area": 0.5, "insertion_area": 0.85, "random_area": 0.7}


def label_of(tasks: TaskSet, row: dict[str, str]) -> str:
    settings = SETTINGS[tasks.main.kind]
    columns = settings.get("columns") or ([settings["time"], settings["event"]] if "time" in settings else None)
    return " ".join(f"{name}={row[name]}" for name in columns) if columns else row[settings["label"]]


def write_folder(folder: Path, kind: str, **options: Any) -> Path:
    """A mil folder as the stage would leave it."""
    content, tasks, said = content_of(kind, **options)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["patient_id", "slide_id", "fold", "label", *tasks.columns, "predicted"])
        for patient, (row, each) in enumerate(zip(labels(), said, strict=True)):
            predicted = tasks.main.classes[int(each.argmax())] if kind in {"binary", "multiclass", "ordinal"} else ""
            writer.writerow(
                [f"P{patient:02d}", f"S{patient:02d}", patient // 2 % FOLDS, label_of(tasks, row), *each, predicted]
            )
    if kind == "binary":
        truth_B = tasks.encode(labels())[:, 0] == tasks.main.positive
        points = zip(*roc_curve(said[:, tasks.main.positive], truth_B), strict=True)
        with (folder / "roc.csv").open("w", newline="", encoding="utf-8") as stream:
            rows = [["our encoder", *point] for point in points]
            csv.writer(stream, lineterminator="\n").writerows([["model", "fpr", "tpr"], *rows])
    return folder
