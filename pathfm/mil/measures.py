"""What each kind of task is judged by: metrics of weighted bags, and what is known of them when no bag is wrong.

Legend: B bags, P prediction columns, T target columns, C classes, R rows of weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathfm.mil.tasks.classes import Binary
from pathfm.mil.tasks.contract import Floats, Task
from pathfm.mil.tasks.survival import Survival
from pathfm.stats import metrics
from pathfm.stats.intervals import (
    LEAST_FOR_PERCENTILES,
    Interval,
    Patients,
    auroc_interval,
    pairs_interval,
    patients_of,
    share_interval,
    strata,
)
from pathfm.stats.metrics import Statistic
from pathfm.stats.survival import censoring_curve

MAIN = {
    "binary": "auroc",
    "multiclass": "auroc",
    "multilabel": "auroc",
    "ordinal": "kappa",
    "regression": "r2",
    "cox": "c_index",
    "discrete": "c_index",
}
"""The metric that models are compared by, of each kind of task; higher is better."""
CHANCE = {"auroc": 0.5, "kappa": 0.0, "r2": 0.0, "c_index": 0.5}
"""What it is without knowledge."""
LOWER_IS_BETTER = frozenset({"brier", "ece", "mae"})


class Sample(NamedTuple):
    """Bags that have a target, in an order that depends on nothing but themselves."""

    prediction_BP: Floats
    target_BT: Floats
    patient_B: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """A metric of a sample.

    Attributes:
        statistic: the metric of weighted bags.
        interval: how its interval is made: order (of pairs), plain, or distance (with ``centred``: its errors alone).
        exact: the interval of independent bags, where there is a better one than the bootstrap.
        certain: the interval when no resample differs from the sample, where it is known.
        absent: why the metric is undefined here; empty where it is not.
    """

    statistic: Statistic
    interval: Literal["order", "plain", "distance"] = "plain"
    centred: Statistic | None = None
    exact: Callable[[], Interval] | None = None
    certain: Callable[[float], Interval] | None = None
    absent: str = ""


Measures = dict[str, Measure]


def sample_of(task: Task, prediction_BP: Floats, target_BT: Floats, patient_B: NDArray[np.str_]) -> Sample:
    """Bags with a known target (of a multilabel task: with any), sorted by patient, target and prediction.

    Raises:
        ValueError: a prediction is not finite.
    """
    unknown_BT = np.isnan(target_BT)
    keep = ~(unknown_BT.all(axis=1) if task.kind == "multilabel" else unknown_BT.any(axis=1))
    prediction, target, patient = prediction_BP[keep], target_BT[keep], patient_B[keep]
    if not np.isfinite(prediction).all():
        raise ValueError("predictions must be finite")
    order = np.lexsort((*prediction.T, *target.T, patient))
    return Sample(prediction[order], target[order], tuple(patient[order].tolist()))


def column_sample(sample: Sample, number: int) -> Sample:
    """One column of a multilabel sample as two classes, without the bags that lack it."""
    known = ~np.isnan(sample.target_BT[:, number])
    chance = sample.prediction_BP[known, number]
    patients = tuple(name for name, keep in zip(sample.patient_B, known, strict=True) if keep)
    return Sample(np.stack([1.0 - chance, chance], axis=1), sample.target_BT[known, number : number + 1], patients)


def resampling(task: Task, sample: Sample) -> Patients:
    """Patients, drawn class by class (survival: with and without event; numbers and several columns: from all)."""
    if task.kind in ("regression", "multilabel"):
        return patients_of(sample.patient_B, [0] * len(sample.patient_B))
    label = sample.target_BT[:, -1].astype(int).tolist()  # of survival the event
    return patients_of(sample.patient_B, strata(label, sample.patient_B))


def measures_of(task: Task, sample: Sample) -> Measures:
    """All metrics of a task by name."""
    if task.kind == "regression":
        return _number_measures(sample)
    if isinstance(task, Survival):
        return _survival_measures(task, sample)
    if task.kind == "multilabel":
        return _macro_measures(task, sample)
    return _with_certainty(task, sample, class_measures(task, sample))


def _with_certainty(task: Task, sample: Sample, found: Measures) -> Measures:
    """Of a perfect or a constant model every resample is the same: what may have stayed unseen is known all the same."""
    made: list[tuple[Measures, Floats]] = []

    def certain(name: str, value: float) -> Interval:
        if not made:
            grown, weight_RB = _with_unseen(sample, len(task.classes))
            made.append((class_measures(task, grown), weight_RB))
        values = made[0][0][name].statistic(made[0][1]).tolist()
        return Interval(value, min(value, *values), max(value, *values), "exact, mistakes not seen")

    return {name: replace(measure, certain=partial(certain, name)) for name, measure in found.items()}


def class_measures(task: Task, sample: Sample) -> Measures:
    """Metrics of exclusive classes: of the positive class where there are two, else means over the classes."""
    probability_BC, label_B = sample.prediction_BP, sample.target_BT[:, 0].astype(int)
    classes, predicted_B = probability_BC.shape[1], probability_BC.argmax(axis=1)
    absent = [name for number, name in enumerate(task.classes) if not (label_B == number).any()]
    reason = f"no patient of class {', '.join(absent)}" if absent else ""

    def confusion(summary: metrics.Summary, reason: str = reason) -> Measure:
        return Measure(metrics.weighted_confusion(predicted_B, label_B, classes, summary), absent=reason)

    if classes == 2:
        one = task.positive if task.positive in (0, 1) else 1
        found = _ranking(probability_BC[:, one], label_B == one, sample, reason)
        shares = {"sensitivity": one, "specificity": 1 - one}
        for name, of in shares.items():
            found[name] = confusion(metrics.recall_of(of), reason if not (label_B == of).any() else "")
        if (
            len(set(sample.patient_B)) == len(sample.patient_B)
            and min(np.bincount(label_B, minlength=2)) < LEAST_FOR_PERCENTILES
        ):
            found |= {name: _with_exact_share(found[name], predicted_B[label_B == of] == of) for name, of in shares.items()}
        found["f1"] = confusion(metrics.f1_of([one]))
        sure_B, right_B = probability_BC[:, one], label_B == one
    else:
        parts = [_ranking(probability_BC[:, number], label_B == number, sample, reason) for number in range(classes)]
        found = {name: _mean([part[name] for part in parts], reason) for name in ("auroc", "auprc")}
        summaries = [metrics.specificity_of(number) for number in range(classes)]
        found["sensitivity"] = confusion(metrics.mean_recall)
        found["specificity"] = confusion(lambda matrix: np.mean([each(matrix) for each in summaries], axis=0))
        found["f1"] = confusion(metrics.f1_of(range(classes)))
        sure_B, right_B = probability_BC.max(axis=1), predicted_B == label_B
    found["balanced_accuracy"] = confusion(metrics.mean_recall)
    found["brier"] = Measure(metrics.weighted_mean(metrics.squared_distances(probability_BC, label_B)))
    error, centred = metrics.weighted_calibration_error(sure_B, right_B), metrics.weighted_calibration_drift(sure_B, right_B)
    found["ece"] = Measure(error, "distance", centred, absent=metrics.too_few_bins(sure_B))
    if task.kind == "ordinal":
        found["kappa"] = confusion(metrics.quadratic_kappa, "")
    return found


def _with_exact_share(measure: Measure, right_B: NDArray[np.bool_]) -> Measure:
    """The share of bags that are right, with limits that need no resampling: there are too few patients of a class for that."""
    return replace(measure, exact=partial(share_interval, int(right_B.sum()), len(right_B)))


def one_class_measures(task: Task, sample: Sample, number: int) -> Measures:
    """One class against all others: how it is ranked, found, and not called where it is not."""
    label_B, predicted_B = sample.target_BT[:, 0].astype(int), sample.prediction_BP.argmax(axis=1)
    classes, here = len(task.classes), label_B == number
    reason = "" if here.any() and not here.all() else f"no patient of {'class' if not here.any() else 'any class but'} "
    reason += task.classes[number] if reason else ""
    found = _ranking(sample.prediction_BP[:, number], here, sample, reason)
    for name, summary in (("sensitivity", metrics.recall_of(number)), ("specificity", metrics.specificity_of(number))):
        found[name] = Measure(metrics.weighted_confusion(predicted_B, label_B, classes, summary), absent=reason)
    return found


def _ranking(score_B: Floats, positive_B: NDArray[np.bool_], sample: Sample, reason: str) -> Measures:
    """AUROC and average precision; with one bag per patient the AUROC has an interval of its own."""
    exact = None
    if len(set(sample.patient_B)) == len(sample.patient_B):
        exact = lambda: auroc_interval(score_B, positive_B)  # noqa: E731
    return {
        "auroc": Measure(metrics.weighted_auroc(score_B, positive_B), "order", exact=exact, absent=reason),
        "auprc": Measure(metrics.weighted_average_precision(score_B, positive_B), "order", absent=reason),
    }


def _macro_measures(task: Task, sample: Sample) -> Measures:
    """Means over the columns, each counting the same."""
    whole: list[Measures] = []
    for number in range(len(task.classes)):
        column, known = column_sample(sample, number), ~np.isnan(sample.target_BT[:, number])
        found = class_measures(column_task(task, number), column)
        whole.append({name: _on_part(measure, known) for name, measure in found.items()})
    return {name: _mean([part[name] for part in whole], _first_reason(name, whole, task)) for name in whole[0]}


def column_task(task: Task, number: int) -> Task:
    """A column of a multilabel task as a task of two classes."""
    name = task.classes[number]
    return Binary(name=name, classes=(f"no {name}", name), positive=1)


def _first_reason(name: str, parts: list[Measures], task: Task) -> str:
    reasons = [f"column {task.classes[number]}: {part[name].absent}" for number, part in enumerate(parts) if part[name].absent]
    return reasons[0] if reasons else ""


def _on_part(measure: Measure, known_B: NDArray[np.bool_]) -> Measure:
    def part(statistic: Statistic) -> Statistic:
        return lambda weight_RB: statistic(weight_RB[:, known_B])

    centred = part(measure.centred) if measure.centred else None
    return replace(measure, statistic=part(measure.statistic), centred=centred)


def _mean(measures: list[Measure], reason: str) -> Measure:
    centred = [measure.centred for measure in measures if measure.centred]
    return Measure(
        metrics.weighted_macro([measure.statistic for measure in measures]),
        measures[0].interval,
        metrics.weighted_macro(centred) if centred else None,
        absent=reason,
    )


def _number_measures(sample: Sample) -> Measures:
    predicted, truth = sample.prediction_BP[:, 0], sample.target_BT[:, 0]
    reason = "" if len(np.unique(truth)) > 1 else "no two bags with different values"
    flat = reason or ("" if len(np.unique(predicted)) > 1 else "all predictions are the same")
    return {
        "r2": Measure(metrics.weighted_r2(predicted, truth), absent=reason),
        "mae": Measure(metrics.weighted_mean(np.abs(predicted - truth))),
        "pearson": Measure(metrics.weighted_pearson(predicted, truth), absent=flat),
    }


def _survival_measures(task: Survival, sample: Sample) -> Measures:
    risk, (time, event) = sample.prediction_BP[:, 0], (sample.target_BT[:, 0], sample.target_BT[:, 1] == 1)
    pairs = max(1, len(np.unique(time[event])) // 2)  # events next to each other in time: that many pairs have none in common
    comparable = bool(event.any()) and bool(((time > time[event].min()) | ((time == time[event].min()) & ~event)).any())
    found = {
        "c_index": Measure(
            metrics.weighted_concordance(risk, time, event),
            "order",
            certain=lambda value: pairs_interval(value, pairs) if value in (0.0, 1.0) else Interval(value, 0.0, 1.0, "none"),
            absent="" if comparable else "no event with somebody who was followed longer",
        )
    }
    weight = 1.0 / np.maximum(censoring_curve(time, event).at(time, before=True), 1e-300)
    parts = []
    for number, horizon in enumerate(task.horizons):
        case, control = event & (time <= horizon), time > horizon
        reason = "" if case.any() and control.any() else f"nobody with an event until {horizon:g}, or nobody followed beyond"
        score = -sample.prediction_BP[:, 1 + number]
        statistic = metrics.weighted_order(score, case * np.where(case, weight, 0.0), control)
        parts.append(Measure(statistic, "order", absent=reason))
        found[f"auc_{horizon:.12g}"] = parts[-1]
    reasons = [part.absent for part in parts if part.absent]
    found["auc_t"] = _mean(parts, reasons[0] if reasons else "")
    return found


def _with_unseen(sample: Sample, classes: int) -> tuple[Sample, Floats]:
    """The sample with one wholly wrong and one wholly right bag of each class added, and weights [R, B + 2 C] under which as
    many of them are there as may have stayed unseen: with m patients, a share of 1 - .025 ** (1 / m) does so in 2.5 %.

    In turn each class has unseen bags, and all at once.
    """
    label_B = sample.target_BT[:, 0].astype(int)
    groups = Counter(dict(zip(sample.patient_B, strata(label_B.tolist(), sample.patient_B), strict=True)).values())
    bags = np.bincount(label_B, minlength=classes)
    farthest = [classes - 1 if 2 * number < classes - 1 or number == 0 else 0 for number in range(classes)]
    extra = np.concatenate([np.eye(classes)[farthest], np.eye(classes)])
    target = np.concatenate([sample.target_BT[:, 0], np.arange(classes), np.arange(classes)])[:, None]
    rows = []
    for kind in (0, classes):
        shares = [(number,) for number in range(classes) if groups[number]] + [tuple(sorted(groups))]
        for numbers in shares:
            odds = 0.025 ** (-1.0 / sum(groups[number] for number in numbers)) - 1.0
            row = np.append(np.ones(len(label_B)), np.zeros(2 * classes))
            row[[len(label_B) + kind + number for number in numbers]] = bags[list(numbers)] * odds
            rows.append(row)
    return Sample(np.concatenate([sample.prediction_BP, extra]), target, ()), np.stack(rows)
