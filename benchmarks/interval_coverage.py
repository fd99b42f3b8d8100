"""How often 95 % intervals hold the truth, and tests cry wolf, in simulated cohorts of which the truth is known.

Scores of both classes are normal, one deviation wide, so far apart as the true AUROC says; probabilities are those that Bayes
would give. The code that makes the intervals is the one that makes those of a study.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from benchmarks.measure import Options, Table
from pathfm.mil.judging import judge
from pathfm.mil.tasks.classes import Binary
from pathfm.mil_settings import NumberSettings
from pathfm.stats.comparison import paired_bootstrap, paired_delong
from pathfm.stats.intervals import auroc_interval, patients_of
from pathfm.stats.metrics import weighted_auroc

PATIENTS = (24, 40, 155, 500)
AUROCS = (0.6, 0.8, 0.95)
METRICS = ("auprc", "balanced_accuracy", "sensitivity", "specificity", "f1", "brier", "ece")
TASK = Binary(name="label", classes=("no", "yes"), positive=1)
RESAMPLES = 400


class Coverage(NamedTuple):
    """Shares [%] of intervals that held the truth, lay above it, lay below it; and their mean width."""

    held: float
    above: float
    below: float
    width: float


def auroc_coverage(positives: int, negatives: int, truth: float, simulations: int, seed: int = 0) -> Coverage:
    """Of the logit-DeLong interval."""
    rng = np.random.default_rng([seed, positives, negatives, round(100 * truth)])
    label = np.arange(positives + negatives) < positives
    apart = math.sqrt(2) * norm.ppf(truth)
    found = [auroc_interval(rng.normal(size=len(label)) + apart * label, label) for _ in range(simulations)]
    low, high = np.array([interval.low for interval in found]), np.array([interval.high for interval in found])
    above, below = float((low > truth).mean()), float((high < truth).mean())
    return Coverage(100 * (1 - above - below), 100 * above, 100 * below, float((high - low).mean()))


def bootstrap_coverage(positives: int, negatives: int, truth: float, simulations: int, seed: int = 0) -> dict[str, float]:
    """Share [%] of the intervals of ``judge`` that held the truth, which a cohort of 100,000 tells; by metric."""
    rng = np.random.default_rng([seed, positives, negatives, round(100 * truth), 1])
    many = 100_000 / (positives + negatives)
    prediction, label = _cohort(rng, round(positives * many), round(negatives * many), truth, positives / negatives)
    numbers = NumberSettings(bootstrap=2)
    whole = judge(TASK, prediction, label, [f"p{place}" for place in range(len(label))], numbers, 0)
    right = {name: whole[name]["value"] for name in METRICS} | {"ece": 0.0}
    numbers, patients = NumberSettings(bootstrap=RESAMPLES), [f"p{place}" for place in range(positives + negatives)]
    held, told = dict.fromkeys(METRICS, 0), dict.fromkeys(METRICS, 0)
    for _ in range(simulations):
        prediction, label = _cohort(rng, positives, negatives, truth, positives / negatives)
        found = judge(TASK, prediction, label, patients, numbers, 0)
        for name in METRICS:
            if found[name]["low"] is not None:  # of few patients some numbers have no interval
                told[name] += 1
                held[name] += found[name]["low"] - 1e-9 <= right[name] <= found[name]["high"] + 1e-9
    return {name: 100 * count / told[name] for name, count in held.items() if told[name]}


def false_alarms(patients: int, truth: float, simulations: int, seed: int = 0) -> tuple[float, float]:
    """Share [%] of p < 0.05 for two equally good models (scores correlate by .5): paired DeLong, paired bootstrap."""
    rng = np.random.default_rng([seed, patients, round(100 * truth), 2])
    label = np.arange(patients) < patients // 2
    everyone = patients_of([f"p{place}" for place in range(patients)], label.tolist())
    apart, alarms = math.sqrt(2) * norm.ppf(truth), np.zeros(2)
    for _ in range(simulations):
        shared = rng.normal(size=patients) * math.sqrt(0.5)
        first, second = (shared + rng.normal(size=patients) * math.sqrt(0.5) + apart * label for _ in range(2))
        alarms[0] += paired_delong(first, second, label).significant
        pair = (weighted_auroc(first, label), weighted_auroc(second, label))
        alarms[1] += paired_bootstrap(*pair, everyone, RESAMPLES, 0).significant
    return float(100 * alarms[0] / simulations), float(100 * alarms[1] / simulations)


def _cohort(
    rng: np.random.Generator, positives: int, negatives: int, truth: float, odds: float
) -> tuple[np.ndarray, np.ndarray]:
    label = (np.arange(positives + negatives) < positives).astype(float)
    apart = math.sqrt(2) * norm.ppf(truth)
    score = rng.normal(size=len(label)) + apart * label
    chance = 1 / (1 + np.exp(-(apart * score - apart**2 / 2 + math.log(odds))))
    return np.stack([1 - chance, chance], axis=1), label[:, None]


def run(options: Options) -> list[Table]:
    """Coverage of the AUROC's interval and of the others, and false alarms of the tests."""
    many, some = (200, 20) if options.quick else (5000, 300)
    columns = ("patients", "positive", "true AUROC")
    cohorts = [(each, each // share, truth) for share in (2, 5) for each in PATIENTS for truth in AUROCS]
    auroc = Table("AUROC: logit-DeLong, coverage [%]", (*columns, "held", "truth below", "truth above", "mean width"))
    others = Table(f"bootstrap ({RESAMPLES} resamples), coverage [%]", (*columns, *METRICS))
    alarms = Table("equal models: p < 0.05 [%]", (columns[0], columns[2], "DeLong", "bootstrap"))
    for patients, positives, truth in cohorts:
        held = auroc_coverage(positives, patients - positives, truth, many)
        shares = (round(held.held, 1), round(held.above, 1), round(held.below, 1))
        auroc.rows.append((patients, positives, truth, *shares, round(held.width, 3)))
        found = bootstrap_coverage(positives, patients - positives, truth, some)
        others.rows.append((patients, positives, truth, *(round(found[name], 1) if name in found else "-" for name in METRICS)))
    for patients in PATIENTS:
        for truth in AUROCS:
            alarms.rows.append((patients, truth, *(round(each, 1) for each in false_alarms(patients, truth, some))))
    return [auroc, others, alarms]


if __name__ == "__main__":
    from pathlib import Path

    print("\n\n".join(map(str, run(Options(Path(), quick="--quick" in sys.argv)))))
