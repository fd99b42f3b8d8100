"""Stage 4: features and labels -> slide classifier, judged on patients it never met, beside its controls, and locked."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pathfm.compute import use_threads
from pathfm.config import fingerprint
from pathfm.errors import StoreError, UsageError
from pathfm.faults import crash_point
from pathfm.log import say
from pathfm.mil.aggregators.pretrained import Pretrained
from pathfm.mil.controls import COLOUR, UNTRAINED
from pathfm.mil.ensemble import VERSION
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.inputs import MilInputs
from pathfm.mil.locking import is_locked, lock
from pathfm.mil.models import Judged, Models
from pathfm.mil.network import build_network, spec_of
from pathfm.mil.outputs import Looker, write_patients, write_predictions, write_table
from pathfm.mil.plan import Plan, make_plan
from pathfm.mil.results import Results, gather_results
from pathfm.mil.saved_splits import SPLITS
from pathfm.mil.searching import chosen_settings
from pathfm.mil.seen import HEADER, check_refusal
from pathfm.stats.metrics import roc_curve
from pathfm.store.cohort import Cohort
from pathfm.store.commit import partial, read_json, sweep, write_json
from pathfm.store.feature_file import read_feature_attrs
from pathfm.store.record import Outcome, StageReport, write_record
from pathfm.study import Study

__all__ = ["VERSION", "MilInputs", "run_mil"]

SEEN, REFUSED = "seen.csv", "refused.csv"
"""What the encoder has seen of these slides; and the same, where numbers were refused for it."""
TABLES = ("metrics.json", SPLITS, "predictions.csv", "patients.csv", "curves.csv", "roc.csv", SEEN)
OUTPUTS = (*TABLES, "top_tiles.json", "bottom_tiles.json", "attention", "heatmaps", "geojson")
STATUS = {"no file": "failed", "failed": "failed", "empty": "empty", "no label": "empty"}
"""The outcome of a slide that takes no part, by the kind of its absence."""
NAMES = {"colour": COLOUR, "untrained": UNTRAINED}
GB = 1_000_000_000


def run_mil(study: Study, cohort: Cohort, inputs: MilInputs) -> StageReport:
    """Trains, judges, locks and writes the mil folder; what is up to date is kept, a killed run goes on where it was.

    Raises:
        UsageError: the cohort cannot be split (no patients, contradicting labels, too few patients per class), patients share
            data, or the encoder has seen some of them and that is refused: nothing that is there changes but ``refused.csv``.
        StoreError: features of different encoders, or of a control that do not fit.
        TrainingError: a loss is not finite.
    """
    started = datetime.datetime.now(datetime.UTC)
    use_threads(study.compute)
    sweep(inputs.mil_dir)
    with FeatureCache(_budget(study), _scratch(inputs)) as cache:
        plan = make_plan(study, cohort, inputs, cache)
        _check_seen(plan, inputs)
        _check_controls(plan, inputs)
        _check_aggregator(plan, inputs)
        wanted = fingerprint(VERSION, inputs.fingerprint, inputs.main_name, plan.fingerprint)
        if _is_current(inputs, wanted):
            return _report(plan, "kept")
        if plan.tasks.main.kind == "binary" and plan.settings.positive is None:
            say(f"positive: {plan.tasks.main.classes[plan.tasks.main.positive]} (the last in sorted order; set mil.positive)")
        # Old numbers must not lie beside new networks if this run is interrupted.
        (inputs.mil_dir / "metrics.json").unlink(missing_ok=True)
        for folder in (inputs.mil_dir, *inputs.mil_dir.rglob("*/")):
            sweep(folder)
        _run(plan, inputs, cache, wanted)
    shutil.rmtree(_scratch(inputs), ignore_errors=True)
    report = _report(plan, "done")
    write_record(inputs.mil_dir, report, study.mil, started)
    return report


def _scratch(inputs: MilInputs) -> Path:
    """A folder of this process alone: two runs may be in one folder, and what a dead one left is swept."""
    return partial(inputs.mil_dir / "scratch")


def _budget(study: Study) -> int:
    return int(study.compute.feature_cache_gb * GB)


def _check_seen(plan: Plan, inputs: MilInputs) -> None:
    refused = inputs.mil_dir / REFUSED
    try:
        check_refusal(plan.seen, {unit.patient_id for unit in plan.units})
    except UsageError:
        write_table(refused, HEADER, plan.seen.rows())
        raise
    refused.unlink(missing_ok=True)


def _check_controls(plan: Plan, inputs: MilInputs) -> None:
    """Their features must be there before anything is trained."""
    for role in wanted_controls(plan, inputs):
        for slide_id in sorted(plan.gathered.slides):
            path = inputs.feature_file(role, slide_id)
            if not path.is_file():
                raise StoreError("a control has no features of this slide", where=str(path), fix="run `pathfm extract` again")


def _check_aggregator(plan: Plan, inputs: MilInputs) -> None:
    """It must exist, and a pretrained slide encoder must be given the features that it was trained on."""
    aggregator = build_network(spec_of(plan.settings, plan.bags.dim, plan.tasks.outputs)).aggregator
    if isinstance(aggregator, Pretrained) and plan.settings.features is None:
        path = inputs.feature_file("main", plan.units[0].slide_ids[0])
        aggregator.check_features(read_feature_attrs(path) or {}, plan.bags.dim)


def wanted_controls(plan: Plan, inputs: MilInputs) -> tuple[str, ...]:
    """The controls with features of their own, where they are wanted and given."""
    return tuple(role for role in ("colour", "untrained") if plan.settings.controls and role in inputs.features_dirs)


def _is_current(inputs: MilInputs, wanted: str) -> bool:
    try:
        metrics = read_json(inputs.mil_dir / "metrics.json")
    except StoreError:
        return False
    if metrics.get("fingerprint") != wanted or not all((inputs.mil_dir / name).exists() for name in OUTPUTS):
        return False
    return inputs.deploy is None or is_locked(inputs)


def _report(plan: Plan, used: str) -> StageReport:
    outcomes = []
    for row in plan.cohort.rows:
        absence = plan.gathered.absent.get(row.slide_id)
        if absence:
            outcomes.append(Outcome(row.slide_id, STATUS[absence.kind], absence.reason))  # type: ignore[arg-type]
        else:
            tiles = len(plan.gathered.slides[row.slide_id])
            outcomes.append(Outcome(row.slide_id, used, counts={"tiles": tiles}))  # type: ignore[arg-type]
    return StageReport("mil", tuple(outcomes))


def _run(plan: Plan, inputs: MilInputs, cache: FeatureCache, wanted: str) -> None:
    folder = inputs.mil_dir
    # First of all: a run that was killed goes on with the same folds, whoever has joined the cohort meanwhile.
    write_json(folder / SPLITS, plan.splits.record())
    crash_point("mil.stage.after_splits")
    chosen, searched = chosen_settings(plan, inputs)
    models = Models(plan, inputs, chosen)
    with Looker(plan, folder) as looker:
        main = models.main(looker.look, looker.tiles)
    rivals = _rivals(models, plan, inputs)
    fractions = [(fraction, *models.with_fraction(fraction)) for fraction in plan.settings.numbers.label_fractions]
    permuted = [models.permuted(number) for number in range(plan.settings.numbers.permutations)]
    cache.close()
    rivals = [*_controls(models, plan, inputs), *rivals]
    results = gather_results(plan, inputs, main, rivals, fractions, permuted)
    _write_tables(plan, folder, results, [main, *rivals])
    metrics = {**results.metrics(searched, looker), "fingerprint": wanted}
    if inputs.deploy is not None:
        lock(plan, inputs, inputs.deploy, results.locked, metrics)
    crash_point("mil.stage.before_metrics")
    write_json(folder / "metrics.json", metrics)


def _rivals(models: Models, plan: Plan, inputs: MilInputs) -> list[Judged]:
    """Controls on the main features."""
    return [models.count(), models.shuffled()] if plan.settings.controls else []


def _controls(models: Models, plan: Plan, inputs: MilInputs) -> list[Judged]:
    """Controls with features of their own; the main ones have left memory by now."""
    train = {"colour": models.colour, "untrained": models.untrained}
    found = []
    for role in wanted_controls(plan, inputs):
        try:
            with FeatureCache(_budget(plan.study), _scratch(inputs)) as cache:
                found.append(train[role](cache))
        except StoreError as error:
            # One bad file of a control is no reason to throw away everything else; the page says that it is missing.
            plan.gathered.notes.append(f"control {NAMES[role]!r} was not run: {error.what}")
    return found


def _write_tables(plan: Plan, folder: Path, results: Results, judged: Sequence[Judged]) -> None:
    write_predictions(folder / "predictions.csv", plan, results)
    write_patients(folder / "patients.csv", plan, results)
    write_table(folder / SEEN, HEADER, plan.seen.rows())
    write_table(folder / "roc.csv", ("model", "fpr", "tpr"), [row for model in judged for row in roc_rows(plan, model)])
    curves = [
        (model.name, point.fold, point.member, point.epoch, point.loss.train, point.loss.validation)
        for model in judged
        for point in model.curves
    ]
    write_table(folder / "curves.csv", ("model", "fold", "member", "epoch", "train_loss", "validation_loss"), curves)


def roc_rows(plan: Plan, model: Judged) -> list[tuple[str, float, float]]:
    """Rows (model, false positive rate, true positive rate) of the main task's positive class against the rest."""
    task = plan.tasks.main
    if task.kind not in {"binary", "multiclass"}:
        return []
    parts = plan.tasks.slice_of(task)
    truth_B = model.target_BT[:, parts.targets][:, 0]
    known = np.isfinite(truth_B)
    positive_B = truth_B[known] == task.positive
    if positive_B.all() or not positive_B.any():
        return []
    curve = roc_curve(model.prediction_BP[known][:, parts.columns][:, task.positive], positive_B)
    return [(model.name, float(false), float(true)) for false, true in zip(*curve, strict=True)]
