"""Nested cross-validation of a study: what each outer fold chose for itself; the choice is made in ``search``."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pathfm.config import fingerprint
from pathfm.errors import StoreError, TrainingError
from pathfm.mil.ensemble import VERSION, Experiment, learning, out_of_fold
from pathfm.mil.inputs import MilInputs
from pathfm.mil.judging import main_value
from pathfm.mil.leaks import together
from pathfm.mil.models import experiment_of
from pathfm.mil.network import build_network, spec_of
from pathfm.mil.plan import Plan, fold_places
from pathfm.mil.search import Choice, candidate_settings, choose, inner_folds
from pathfm.mil.splits import CLASS_KINDS
from pathfm.mil_settings import MilSettings
from pathfm.stats.folds import Fold
from pathfm.store.commit import read_json, write_json

FOLDER, SCORES = "search", "search.json"


def chosen_settings(plan: Plan, inputs: MilInputs) -> tuple[tuple[MilSettings, ...], list[dict[str, Any]]]:
    """Settings by outer fold, and how they were chosen; the study's own where nothing is searched.

    Raises:
        UsageError: a value that a setting cannot have, too few patients, or no candidate with a score.
    """
    if not plan.settings.search:
        return (plan.settings,) * len(plan.places), []
    for _, settings in candidate_settings(plan.settings):
        build_network(spec_of(settings, plan.bags.dim, plan.tasks.outputs))
    scores = _Scores(inputs.mil_dir / SCORES)
    choices = [_choose(plan, inputs, number, scores) for number in range(len(plan.splits.folds))]
    scores.keep()
    return tuple(choice.settings for choice in choices), [choice.record() for choice in choices]


class _Scores:
    """Scores of trainings, kept on disk as they come, so that an interrupted search goes on; null: it diverged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, float | None] = read_json(path) if path.is_file() else {}
        except StoreError:
            self.known = {}
        self.asked: dict[str, float | None] = {}

    def get(self, key: str) -> float | None:
        """A score that is known; nan for a training that diverged, None if nobody knows."""
        if key not in self.known:
            return None
        self.asked[key] = value = self.known[key]
        return math.nan if value is None else value

    def add(self, key: str, score: float) -> None:
        """Keeps a score."""
        self.known[key] = self.asked[key] = score if math.isfinite(score) else None
        write_json(self.path, self.known)

    def keep(self) -> None:
        """Forgets what nobody asks for any more."""
        if self.asked != self.known or not self.path.is_file():
            write_json(self.path, self.asked)


def _choose(plan: Plan, inputs: MilInputs, number: int, scores: _Scores) -> Choice:
    fold, strata = plan.splits.folds[number], plan.strata
    inside: Mapping[str, str] = {patient: strata[patient] for patient in (*fold.train, *fold.validation)}
    classes = plan.tasks.main.kind in CLASS_KINDS
    folds = inner_folds(inside, number, plan.settings, together=together(plan.leaks), classes=classes)

    def score(settings: MilSettings, train: Sequence[str], validation: Sequence[str], test: Sequence[str]) -> float:
        parts = Fold(tuple(train), tuple(validation), tuple(test))
        place = f"{FOLDER}/fold-{number}"
        experiment = experiment_of(plan, inputs, f"search in fold {number}", place, (settings,))
        key = _key(plan, experiment, parts)
        known = scores.get(key)
        if known is None:
            known = _score(plan, experiment, parts)
            scores.add(key, known)
            shutil.rmtree(inputs.mil_dir / FOLDER, ignore_errors=True)
        return known

    return choose(plan.settings, number, folds, score)


def _key(plan: Plan, experiment: Experiment, fold: Fold) -> str:
    """What a score depends on."""
    places = fold_places(fold, plan.units)
    mine = [*places.train, *places.validation, *places.test]
    return fingerprint(
        {"version": VERSION, "place": experiment.place, "precision": experiment.precision(0), "bags": len(plan.bags)},
        learning(experiment.settings[0]),
        plan.tasks.record(),
        [list(places.train), list(places.validation), list(places.test)],
        [plan.bags.digest(place) for place in mine],
        plan.target_BT[mine].tobytes().hex(),
    )


def _score(plan: Plan, experiment: Experiment, fold: Fold) -> float:
    """The main number of one network on the inner test part; nan where it has none, or training diverges."""
    places = fold_places(fold, plan.units)
    if not places.test:
        return math.nan
    try:
        found = out_of_fold(experiment, [places])
    except TrainingError:
        return math.nan
    parts, task = plan.tasks.slice_of(plan.tasks.main), plan.tasks.main
    test = sorted(places.test)
    patients = [plan.units[place].patient_id for place in test]
    value = main_value(task, found.prediction_BP[:, parts.columns], plan.target_BT[test][:, parts.targets], patients)
    return math.nan if value is None else value
