"""Stage 4: features and labels -> slide classifier, with its controls on the same folds."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfm.compute import pick_device, usable_cores, use_threads
from pathfm.config import fingerprint
from pathfm.errors import StoreError, UsageError
from pathfm.faults import crash_point
from pathfm.mil.bags import SlideFeatures, split_by_slide
from pathfm.mil.controls import COLOUR, COUNT, SHUFFLED, UNTRAINED, colour_baseline, count_baseline
from pathfm.mil.ensemble import VERSION, Experiment, OutOfFold, out_of_fold, tested_places
from pathfm.mil.evaluation import Judged, model_metrics, roc_rows
from pathfm.mil.fit import Bags
from pathfm.mil.inputs import MilInputs, read_control
from pathfm.mil.outputs import (
    attention_by_slide,
    shown_slides,
    write_attention,
    write_heatmaps,
    write_predictions,
    write_table,
    write_top_tiles,
)
from pathfm.mil.plan import Plan, make_plan
from pathfm.mil.roster import flow
from pathfm.mil.seen import HEADER, check_refusal
from pathfm.stats.folds import folds_record
from pathfm.stats.localisation import Localisation, ScoredSlide, localisation_auroc
from pathfm.stats.seeds import derive_seed
from pathfm.store.cohort import Cohort
from pathfm.store.commit import read_json, sweep, write_json
from pathfm.store.record import Outcome, StageReport, write_record
from pathfm.study import Study

__all__ = ["VERSION", "MilInputs", "run_mil"]

SEEN, REFUSED = "seen.csv", "refused.csv"
"""What the encoder has seen of these slides; and the same, where numbers were refused for it."""
TABLES = ("metrics.json", "folds.json", "predictions.csv", "curves.csv", "roc.csv", "top_tiles.json", SEEN)
OUTPUTS = (*TABLES, "attention", "heatmaps")
STATUS = {"no file": "failed", "failed": "failed", "empty": "empty", "no label": "empty"}
"""The outcome of a slide that takes no part, by the kind of its absence."""


@dataclass(frozen=True)
class Features:
    """Feature sets by role; the controls only where they are wanted and given."""

    main: Mapping[str, SlideFeatures]
    colour: Mapping[str, SlideFeatures] | None = None
    untrained: Mapping[str, SlideFeatures] | None = None


def run_mil(study: Study, cohort: Cohort, inputs: MilInputs) -> StageReport:
    """Trains, judges and writes the mil folder; what is up to date is kept, and a killed run goes on where it was.

    Raises:
        UsageError: the cohort cannot be split (no patients, contradicting labels, too few patients per class), or the encoder
            has seen some of it and that is refused: nothing that is there changes but ``refused.csv``, the list of them.
        StoreError: features of different encoders, or of a control that do not fit.
        TrainingError: a loss is not finite.
    """
    started = datetime.datetime.now(datetime.UTC)
    use_threads(study.compute)
    plan = make_plan(study, cohort, inputs)
    _check_seen(plan, inputs)
    features = _features(plan, inputs)
    controls = [plan.digest_B(slides) if slides else None for slides in (features.colour, features.untrained)]
    wanted = fingerprint(VERSION, inputs.fingerprint, inputs.main_name, plan.fingerprint, controls)
    if _is_current(inputs, wanted):
        return _report(plan, "kept")
    # Old numbers must not lie beside new networks if this run is interrupted.
    (inputs.mil_dir / "metrics.json").unlink(missing_ok=True)
    for folder in (inputs.mil_dir, *inputs.mil_dir.rglob("*/")):
        sweep(folder)
    _run(plan, features, inputs, wanted)
    report = _report(plan, "done")
    write_record(inputs.mil_dir, report, study.mil, started)
    return report


def _check_seen(plan: Plan, inputs: MilInputs) -> None:
    refused = inputs.mil_dir / REFUSED
    try:
        check_refusal(plan.seen, set(plan.patient_B))
    except UsageError:
        write_table(refused, HEADER, plan.seen.rows())
        raise
    refused.unlink(missing_ok=True)


def _features(plan: Plan, inputs: MilInputs) -> Features:
    main = plan.gathered.slides
    if not plan.settings.controls:
        return Features(main)
    found = {
        role: read_control(inputs.features_dirs[role], main, sorted(main)) if role in inputs.features_dirs else None
        for role in ("colour", "untrained")
    }
    return Features(main, **found)


def _is_current(inputs: MilInputs, wanted: str) -> bool:
    try:
        metrics = read_json(inputs.mil_dir / "metrics.json")
    except StoreError:
        return False
    return metrics.get("fingerprint") == wanted and all((inputs.mil_dir / name).exists() for name in OUTPUTS)


def _report(plan: Plan, used: str) -> StageReport:
    outcomes = []
    for row in plan.cohort.rows:
        absence = plan.gathered.absent.get(row.slide_id)
        if absence:
            outcomes.append(Outcome(row.slide_id, STATUS[absence.kind], absence.reason))  # type: ignore[arg-type]
        else:
            tiles = len(plan.gathered.slides[row.slide_id].feature_ND)
            outcomes.append(Outcome(row.slide_id, used, counts={"tiles": tiles}))  # type: ignore[arg-type]
    return StageReport("mil", tuple(outcomes))


def _run(plan: Plan, features: Features, inputs: MilInputs, wanted: str) -> None:
    folder, report = inputs.mil_dir, plan.study.report
    write_json(folder / "folds.json", folds_record(plan.folds, plan.settings.seed))
    answers: dict[str, OutOfFold] = {}
    judged = _judge(plan, features, inputs, answers)
    main = answers[inputs.main_name]
    attention = attention_by_slide(plan, main)
    shown = shown_slides(plan.judged, report.heatmaps)
    write_attention(folder / "attention", plan.gathered, attention)
    write_heatmaps(folder / "heatmaps", shown, plan, attention)
    write_top_tiles(folder / "top_tiles.json", shown, attention, report.top_tiles)
    write_predictions(folder / "predictions.csv", plan, main)
    write_table(folder / SEEN, HEADER, plan.seen.rows())
    write_table(
        folder / "roc.csv", ("model", "fpr", "tpr"), [row for model in judged for row in roc_rows(model, plan.positive)]
    )
    curves = [
        (name, point.fold, point.member, point.epoch, point.loss.train, point.loss.validation)
        for name, found in answers.items()
        for point in found.curves
    ]
    write_table(folder / "curves.csv", ("model", "fold", "member", "epoch", "train_loss", "validation_loss"), curves)
    metrics = _metrics(plan, judged, features, inputs)
    crash_point("mil.stage.before_metrics")
    write_json(folder / "metrics.json", {**metrics, "fingerprint": wanted})


def _judge(plan: Plan, features: Features, inputs: MilInputs, answers: dict[str, OutOfFold]) -> list[Judged]:
    """The model and its controls on the same folds; what their networks said goes into ``answers``."""
    label_B, positive = plan.roster.label_B, plan.positive
    truth_B = plan.judged.label_B
    dealt_B = plan.shuffled_B
    shuffled_B = tuple(dealt_B[place] for place in tested_places(plan.places))
    seen, seen_before = (share(plan.judged_patients) for share in (plan.seen.share, plan.seen.initial_share))

    def networks(name: str, place: str, slides: Mapping[str, SlideFeatures], label_B: tuple[int, ...]) -> OutOfFold:
        answers[name] = out_of_fold(_experiment(plan, inputs, (name, place), slides, label_B), plan.places)
        return answers[name]

    def attended(found: OutOfFold) -> Localisation | None:
        return _localisation(plan, found.attention)

    main = networks(inputs.main_name, "models", features.main, label_B)
    judged = [Judged(inputs.main_name, main.probability_BC, truth_B, attended(main), seen)]
    if not plan.settings.controls:
        return judged
    if features.colour:
        bags = [bag.double().numpy() for bag in plan.bags(features.colour)]
        colour = colour_baseline(bags, label_B, plan.places, positive)
        judged.append(Judged(COLOUR, colour.probability_BC, truth_B, _localisation(plan, colour.tile_score)))
    judged.append(Judged(COUNT, count_baseline(plan.tiles_B, label_B, plan.places, positive), truth_B))
    if features.untrained:
        untrained = networks(UNTRAINED, "controls/untrained", features.untrained, label_B)
        judged.append(Judged(UNTRAINED, untrained.probability_BC, truth_B, attended(untrained), seen_before))
    shuffled = networks(SHUFFLED, "controls/shuffled", features.main, dealt_B)
    return [*judged, Judged(SHUFFLED, shuffled.probability_BC, shuffled_B, seen_share=seen)]


def _experiment(
    plan: Plan, inputs: MilInputs, names: tuple[str, str], slides: Mapping[str, SlideFeatures], label_B: tuple[int, ...]
) -> Experiment:
    device = pick_device(plan.study.compute)
    first = slides[plan.roster.units[0].slide_ids[0]]
    facts: dict[str, Any] = {
        "model": names[0],
        "label": plan.settings.label,
        "classes": list(plan.roster.classes),
        "positive": plan.roster.positive,
        "level": plan.settings.level,
        "encoder": dict(first.encoder),
    }
    return Experiment(
        name=names[0],
        folder=inputs.mil_dir / names[1],
        bags=Bags(plan.bags(slides), label_B),
        digest_B=plan.digest_B(slides),
        settings=plan.settings,
        facts=facts,
        fingerprint=inputs.fingerprint,
        device=device,
        workers=plan.study.compute.workers or usable_cores() if device.type == "cpu" else 1,
    )


def _localisation(plan: Plan, score: Sequence[NDArray[np.float64]]) -> Localisation | None:
    """How well tile scores find the lesion in the slides of the positive class."""
    scored = []
    for unit, score_N in zip(plan.judged.units, score, strict=True):
        if unit.label == plan.roster.positive:
            parts = split_by_slide(unit, plan.gathered.slides, score_N)
            known = [slide_id for slide_id in unit.slide_ids if slide_id in plan.gathered.truth]
            scored += [ScoredSlide(s, unit.patient_id, parts[s], plan.gathered.truth[s]) for s in known]
    seed = derive_seed("localisation", plan.settings.seed)
    return localisation_auroc(scored, plan.settings.bootstrap, seed)


def _metrics(plan: Plan, judged: Sequence[Judged], features: Features, inputs: MilInputs) -> dict[str, Any]:
    roster, patients = plan.roster, plan.judged_patients
    return {
        "label": plan.settings.label,
        "classes": list(roster.classes),
        "positive": roster.positive,
        "level": plan.settings.level,
        "n_slides": sum(len(unit.slide_ids) for unit in plan.judged.units),
        "n_patients": len(set(patients)),
        "models": {model.name: model_metrics(model, patients, plan.positive, plan.settings) for model in judged},
        "primary": inputs.main_name,
        "flow": flow(plan.cohort, plan.gathered.absent),
        "seen_in_pretraining": plan.seen.record(patients),
        "notes": [*plan.gathered.notes, *plan.seen.notes(patients), *_notes(plan, features)],
    }


def _notes(plan: Plan, features: Features) -> list[str]:
    notes = []
    if any(not row.patient_id for row in plan.cohort.rows):
        notes.append(
            "slides without patient_id count as patients of their own: two slides of one patient may lie in different folds"
        )
    if len(plan.roster.classes) > 2:
        notes.append(
            f"AUROC is the mean over classes, each against the rest; the ROC curve is that of {plan.roster.positive!r}"
        )
    if plan.settings.controls:
        given = {COLOUR: features.colour, UNTRAINED: features.untrained}
        notes += [f"control {name!r} was not run: there are no features for it" for name, found in given.items() if not found]
        notes.append("shuffled labels: dealt out anew once, within the test parts of the folds, unrelated to the true ones")
    return notes
