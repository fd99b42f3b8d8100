"""Predictions beside the truth to the numbers of ``metrics.json``: the same way for every model, control, level and subgroup.

Bags without a target take no part, the order of bags never matters, and what cannot be said is None with its reason.

Legend: B bags, P prediction columns, T target columns, G groups, M models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import UsageError
from pathfm.mil import measures
from pathfm.mil.measures import CHANCE, LOWER_IS_BETTER, MAIN, Measure, Measures, Sample
from pathfm.mil.tasks.contract import Floats, Task
from pathfm.mil_settings import NumberSettings
from pathfm.stats import comparison
from pathfm.stats.comparison import Difference
from pathfm.stats.intervals import (
    NO_SPREAD,
    Interval,
    Patients,
    bootstrap_draws,
    distance_interval,
    logit_interval,
    percentile_interval,
)
from pathfm.stats.metrics import Statistic, value_of
from pathfm.stats.seeds import derive_seed

LEAST_PATIENTS = 5
"""Patients of each class (with event, and without; of numbers twice as many) that a subgroup needs to be given a number."""
Record = dict[str, Any]
Group = TypeVar("Group", str, tuple[str, ...])
CENTRED = " centred"
RANGE = {"auroc": (0.0, 1.0), "c_index": (0.0, 1.0), "kappa": (-1.0, 1.0), "r2": (-math.inf, 1.0)}
"""Least and most that a main metric can be."""
CLIPPED = " The t-test knows no bounds: limits beyond what the metric can be are cut there."


class Answers(NamedTuple):
    """A model by name, and its predictions."""

    name: str
    prediction_BP: Floats


class FoldPart(NamedTuple):
    """What the networks of one fold said of its test bags, and how many patients they were trained on (stopping included)."""

    prediction_BP: Floats
    target_BT: Floats
    patient_B: Sequence[str]
    train_patients: int


def judge(
    task: Task, prediction_BP: Floats, target_BT: Floats, patient_B: Sequence[str], numbers: NumberSettings, seed: int
) -> Record:
    """All metrics of a task, each as ``value``, ``low``, ``high``, ``method``.

    The AUROC of two classes and one bag per patient has the DeLong interval on the logit scale; everything else resamples
    patients, class by class. ``n_bags`` and ``n_patients`` count what was judged. More than two classes: ``per_class``, each
    against the rest; several columns: ``per_column``. ``notes`` say why a value or a limit is None.

    Raises:
        ValueError: a prediction is not finite.
    """
    sample = _sample(task, prediction_BP, target_BT, patient_B)
    if not sample.patient_B:
        nothing = _entry(Interval(math.nan, math.nan, math.nan, "undefined"))
        return {MAIN[task.kind]: nothing, "notes": ["no bag has a target"], "n_bags": 0, "n_patients": 0}
    result = _judged(measures.measures_of(task, sample), measures.resampling(task, sample), numbers, seed)
    result |= {"n_bags": len(sample.patient_B), "n_patients": len(set(sample.patient_B))}
    if task.kind == "multilabel":
        result["per_column"] = {name: _column(task, sample, place, numbers, seed) for place, name in enumerate(task.classes)}
    elif len(task.classes) > 2:
        patients = measures.resampling(task, sample)
        found = {name: measures.one_class_measures(task, sample, place) for place, name in enumerate(task.classes)}
        result["per_class"] = {name: _judged(each, patients, numbers, seed) for name, each in found.items()}
    return result


def _column(task: Task, sample: Sample, number: int, numbers: NumberSettings, seed: int) -> Record:
    column, alone = measures.column_sample(sample, number), measures.column_task(task, number)
    return judge(alone, column.prediction_BP, column.target_BT, column.patient_B, numbers, seed)


def _judged(found: Measures, patients: Patients, numbers: NumberSettings, seed: int) -> Record:
    """Values and limits of all measures, from one set of resamples."""
    value_of_name = {name: value_of(each.statistic, len(patients.group_N)) for name, each in found.items()}
    defined = {name: found[name] for name, value in value_of_name.items() if not found[name].absent and math.isfinite(value)}
    statistics: dict[str, Statistic] = {name: each.statistic for name, each in defined.items() if not each.exact}
    statistics |= {name + CENTRED: each.centred for name, each in defined.items() if each.centred}
    draws = bootstrap_draws(statistics, patients, numbers.bootstrap, derive_seed("patients", seed))
    result: Record = {}
    notes = []
    for name, measure in found.items():
        if name not in defined:
            notes.append(f"{name}: {measure.absent or 'undefined for these bags'}")
            result[name] = _entry(Interval(math.nan, math.nan, math.nan, "undefined"))
            continue
        interval = measure.exact() if measure.exact else _interval(measure, value_of_name[name], name, draws, patients)
        result[name] = _entry(interval)
        if not interval.known:
            notes.append(f"{name}: no interval: {interval.method}")
    return result | {"notes": notes}


def _interval(measure: Measure, value: float, name: str, draws: Mapping[str, Floats], patients: Patients) -> Interval:
    if measure.interval == "distance":
        interval = distance_interval(value, draws[name + CENTRED], patients.smallest)
    else:
        make = logit_interval if measure.interval == "order" else percentile_interval
        interval = make(value, draws[name], patients.smallest)
    return measure.certain(value) if measure.certain and interval.method == NO_SPREAD else interval


def aggregate(prediction_BP: Floats, target_BT: Floats, group_B: Sequence[Group]) -> tuple[Floats, Floats, tuple[Group, ...]]:
    """Mean prediction [G, P], target [G, T] and name of every specimen or patient, sorted by name.

    A target that only some bags of a group have is the group's.

    Args:
        prediction_BP: of the bags.
        target_BT: of the bags; NaN where unknown.
        group_B: the patient of each bag, or patient and specimen, which joined to one text could be read in two ways.

    Raises:
        UsageError: bags of a group have different targets.
    """
    names = sorted(set(group_B))
    number_of = {name: number for number, name in enumerate(names)}
    place_B = np.array([number_of[name] for name in group_B], dtype=np.intp)
    order = np.lexsort((*prediction_BP.T, place_B))  # equal sums whatever the order of bags
    starts = np.searchsorted(place_B[order], np.arange(len(names)))
    count_G1 = np.bincount(place_B, minlength=len(names))[:, None]
    prediction_GP = np.add.reduceat(prediction_BP[order], starts, axis=0) / count_G1
    low_GT = np.fmin.reduceat(target_BT[order], starts, axis=0)
    high_GT = np.fmax.reduceat(target_BT[order], starts, axis=0)
    torn = np.flatnonzero((low_GT < high_GT).any(axis=1))
    if len(torn):
        low, high = low_GT[torn[0]], high_GT[torn[0]]
        between = [f"{least:g} and {most:g}" for least, most in zip(low, high, strict=True) if least < most]
        name = names[torn[0]]
        raise UsageError(
            f"bags of {name if isinstance(name, str) else ' / '.join(name)!r} have different targets: {'; '.join(between)}",
            where=f"{len(torn)} of {len(names)} groups",
            fix="judge this label at the level at which it was given",
        )
    return prediction_GP, low_GT, tuple(names)


def main_value(task: Task, prediction_BP: Floats, target_BT: Floats, patient_B: Sequence[str]) -> float | None:
    """The main metric of a task without an interval (a shuffled training, a fold); None where it is undefined."""
    sample = _sample(task, prediction_BP, target_BT, patient_B)
    if not sample.patient_B:
        return None
    measure = measures.measures_of(task, sample)[MAIN[task.kind]]
    return None if measure.absent else _plain(value_of(measure.statistic, len(sample.patient_B)))


def fold_table(task: Task, parts: Sequence[FoldPart], others: Sequence[FoldPart] | None = None) -> Record:
    """The main metric fold by fold, its mean, and the corrected resampled t-test against chance.

    ``others``: the same folds of another model; then values are differences, tested against none (``p``, else
    ``p_vs_chance``). Folds in which the metric is undefined are None, and left out of the mean.
    """
    metric = MAIN[task.kind]
    values = [main_value(task, part.prediction_BP, part.target_BT, part.patient_B) for part in parts]
    if others is not None:
        second = [main_value(task, part.prediction_BP, part.target_BT, part.patient_B) for part in others]
        pairs = zip(values, second, strict=True)
        values = [None if one is None or other is None else one - other for one, other in pairs]
    known = [(value, part) for value, part in zip(values, parts, strict=True) if value is not None]
    share = float(np.mean([len(set(part.patient_B)) / part.train_patients for _, part in known])) if known else 0.0
    chance = CHANCE[metric] if others is None else 0.0
    test = comparison.corrected_t([value for value, _ in known], share, chance)
    least, most = (
        RANGE[metric] if others is None else (RANGE[metric][0] - RANGE[metric][1], RANGE[metric][1] - RANGE[metric][0])
    )
    low, high = (None if math.isnan(limit) else min(max(limit, least), most) for limit in (test.low, test.high))
    return {
        "metric": metric,
        "values": values,
        "mean": _plain(test.mean),
        "low": low,
        "high": high,
        "p_vs_chance" if others is None else "p": _plain(test.p),
        "note": comparison.SHARED_FOLDS + (CLIPPED if (low, high) != (_plain(test.low), _plain(test.high)) else ""),
    }


def compare(
    task: Task,
    model: Answers,
    other: Answers,
    target_BT: Floats,
    patient_B: Sequence[str],
    numbers: NumberSettings,
    seed: int,
) -> Record:
    """The main metric of one model minus that of another one on the same bags, with limits, p, and the verdict in words.

    Two classes and one bag per patient: paired DeLong. Otherwise both are resampled with the same patients.
    """
    metric, width = MAIN[task.kind], model.prediction_BP.shape[1]
    both = np.concatenate([model.prediction_BP, other.prediction_BP], axis=1)
    sample = _sample(task, both, target_BT, patient_B)
    first = Sample(sample.prediction_BP[:, :width], sample.target_BT, sample.patient_B)
    second = Sample(sample.prediction_BP[:, width:], sample.target_BT, sample.patient_B)
    difference = _difference(task, first, second, numbers, seed)
    return {
        "model": model.name,
        "other": other.name,
        "metric": metric,
        "difference": _plain(difference.value),
        "low": _plain(difference.low),
        "high": _plain(difference.high),
        "p": _plain(difference.p),
        "method": difference.method,
        "verdict": comparison.verdict(model.name, other.name, difference, metric not in LOWER_IS_BETTER),
    }


def corrected(found: Sequence[Record]) -> list[Record]:
    """Comparisons with ``p_holm``: p corrected for their number (Holm 1979). Verdicts follow it; limits stay single ones."""
    adjusted = comparison.holm([_number(each["p"]) for each in found])
    made = []
    for each, p in zip(found, adjusted, strict=True):
        value, low, high = (_number(each[name]) for name in ("difference", "low", "high"))
        difference = Difference(value, low, high, p, each["method"])
        words = comparison.verdict(each["model"], each["other"], difference, each["metric"] not in LOWER_IS_BETTER)
        made.append(each | {"p_holm": _plain(p), "verdict": words})
    return made


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _difference(task: Task, first: Sample, second: Sample, numbers: NumberSettings, seed: int) -> Difference:
    if not first.patient_B:
        return Difference(math.nan, math.nan, math.nan, math.nan, "no bag has a target")
    one, two = (measures.measures_of(task, each)[MAIN[task.kind]] for each in (first, second))
    if one.absent or two.absent:
        return Difference(math.nan, math.nan, math.nan, math.nan, one.absent or two.absent)
    if one.exact and task.kind == "binary":
        one_B, two_B = (each.prediction_BP[:, task.positive] for each in (first, second))
        return comparison.paired_delong(one_B, two_B, first.target_BT[:, 0] == task.positive)
    patients, stream = measures.resampling(task, first), derive_seed("patients", seed)
    return comparison.paired_bootstrap(one.statistic, two.statistic, patients, numbers.bootstrap, stream)


def subgroup_table(
    task: Task,
    prediction_BP: Floats,
    target_BT: Floats,
    patient_B: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    numbers: NumberSettings,
    seed: int,
) -> list[Record]:
    """The numbers of ``judge`` for every value of every column: rows ``column``, ``value``, counts, metrics.

    Args:
        groups: column -> its text for each bag; empty text counts as ``unknown``. Patients with bags of two values count in
            both.

    Groups with fewer than ``LEAST_PATIENTS`` patients of a class are given with their counts; the main metric is None.
    """
    known = ~(np.isnan(target_BT).all(axis=1) if task.kind == "multilabel" else np.isnan(target_BT).any(axis=1))
    rows = []
    for column, texts in groups.items():
        value_B = np.array([text or "unknown" for text in texts])
        for value in sorted(set(value_B[known].tolist())):
            inside = known & (value_B == value)
            patients = np.asarray(patient_B)[inside].tolist()
            row = {"column": column, "value": value} | _counts(task, target_BT[inside], patients)
            if row["note"]:
                row[MAIN[task.kind]] = None
            else:
                row |= judge(task, prediction_BP[inside], target_BT[inside], patients, numbers, seed)
            rows.append(row)
    return rows


def _counts(task: Task, target_BT: Floats, patients: Sequence[str]) -> Record:
    """Patients (bags) of a group, of each class, and why they are too few."""
    names = np.asarray(patients)
    if task.kind == "multilabel":
        parts = {name: names[target_BT[:, place] == 1] for place, name in enumerate(task.classes)}
        parts |= {f"no {name}": names[target_BT[:, place] == 0] for place, name in enumerate(task.classes)}
    elif task.kind == "regression":
        parts = {}
    elif task.classes:
        parts = {name: names[target_BT[:, 0] == place] for place, name in enumerate(task.classes)}
    else:
        parts = {"event": names[target_BT[:, 1] == 1], "censored": names[target_BT[:, 1] == 0]}
    counts = {name: len(set(part.tolist())) for name, part in parts.items()}
    asked = {name: count for name, count in counts.items() if name != "censored"} or {"patients": len(set(patients)) // 2}
    few = [name for name, count in asked.items() if count < LEAST_PATIENTS]
    positive = {"n_positive": counts[task.classes[task.positive]]} if task.kind == "binary" else {}
    note = f"too few patients for a number: {', '.join(few)}" if few else ""
    return {"n_patients": len(set(patients)), "n_bags": len(patients), **positive, "counts": counts, "note": note}


def permutation_record(values: Sequence[float | None], observed: float | None) -> Record | None:
    """The main metric of trainings with shuffled labels: values, spread (2.5 to 97.5 %), and p = (b + 1) / (m + 1).

    None when no value is defined.
    """
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not known or observed is None:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    p = comparison.permutation_p(known, observed)
    return {"values": known, "observed": float(observed), "p": p, "low": float(low), "high": float(high)}


def _sample(task: Task, prediction_BP: Floats, target_BT: Floats, patient_B: Sequence[str]) -> Sample:
    patients: NDArray[np.str_] = np.asarray(patient_B, dtype=str)
    return measures.sample_of(task, np.asarray(prediction_BP, float), np.asarray(target_BT, float), patients)


def _entry(interval: Interval) -> Record:
    return {name: value if isinstance(value, str) else _plain(value) for name, value in interval._asdict().items()}


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
