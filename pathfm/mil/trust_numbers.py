"""How calibration, operating points, conformal sets and the mark for odd slides did on patients they were not fitted on.

Legend: U cases (mostly patients), C classes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathfm.stats.conformal import coverage_limits
from pathfm.stats.curves import reliability_bins
from pathfm.stats.metrics import brier, calibration_error, too_few_bins
from pathfm.stats.thresholds import share_limits

if TYPE_CHECKING:
    from pathfm.mil.trust import TrustJudged

Table = dict[str, Any]
APPROXIMATE = (
    "coverage holds for patients like these and is approximate: sets are calibrated on scores of single folds' networks, and a "
    "bundle answers with all of them together; on another scanner or site nothing is promised"
)
FLAT = 0.005
"""A Platt slope below this leaves no difference between patients that shows."""
EXPECTED = "Beta-binomial: where it lies by chance when the promise holds"


def trust_numbers(judged: TrustJudged) -> Table:
    """The table ``trust`` of ``metrics.json``, ready to print.

    Shares have ``value``, ``low``, ``high``, ``method`` and the counts behind them. What does not exist is None, or has a
    reason under ``refused``.
    """
    return {
        "nested": "fitted on the other folds, counted on the fold that was left out; the values of a bundle are fitted on all",
        "unit": "bag" if judged.cases.is_bag else "patient",
        "n_fitted": judged.trust.n_patients,
        "n_patients": len(set(judged.cases.patient_U.tolist())),
        "calibration": _calibration(judged),
        "operating_points": [_operating_point(judged, place) for place in range(len(judged.trust.points))],
        "conformal": _conformal(judged),
        "novelty": _novelty(judged),
        "decisions": _decisions(judged),
        "notes": [*judged.trust.notes, *_notes_of_parts(judged)],
    }


def share(hits: int, count: int) -> Table | None:
    """A share with its exact limits, None of nobody."""
    if not count:
        return None
    low, high = share_limits(hits, count)
    return {"value": hits / count, "low": low, "high": high, "method": "Clopper-Pearson", "hits": hits, "count": count}


def _calibration(judged: TrustJudged) -> Table:
    """Raw and calibrated probabilities of the same cases: those whose other folds could calibrate, or all where none could."""
    trust, cases = judged.trust, judged.cases
    if not trust.classes:
        return {"kind": "none"}
    calibrated = np.array([bool(said.calibrated_C) for said in judged.decision_U])
    chosen = (cases.label_U >= 0) & (calibrated | (not calibrated.any()))
    label, before = cases.label_U[chosen], cases.probability_UC[chosen]
    table: Table = {"kind": trust.calibrator.kind if trust.calibrator else "none", "n": len(label)}
    table["event"] = trust.classes[trust.positive] if trust.positive >= 0 and before.shape[1] == 2 else "most probable class"
    if trust.calibrator is not None:
        table |= {"slope": trust.calibrator.slope, "intercept": trust.calibrator.intercept}
    if not len(label):
        return table
    states = {"before": before}
    if calibrated.any():
        said = [said.calibrated_C for said, is_chosen in zip(judged.decision_U, chosen, strict=True) if is_chosen]
        states["after"] = np.array(said)
    event = {name: _event(values, label, trust.positive) for name, values in states.items()}
    rows = {name: [_bin(row) for row in reliability_bins(*values)] for name, values in event.items()}
    few = {name: too_few_bins(values[0]) for name, values in event.items()}
    notes = [f"calibration error {name} calibration not given: {why}" for name, why in few.items() if why]
    if trust.calibrator is not None and trust.calibrator.kind == "platt" and trust.calibrator.slope < FLAT:
        notes.append("slope 0: the calibrated probability is the same for everyone")
    return table | {
        "brier": {name: brier(values, label) for name, values in states.items()},
        "ece": {name: None if few[name] else calibration_error(*values) for name, values in event.items()},
        **({"note": "; ".join(notes)} if notes else {}),
        "reliability_before": rows["before"],
        "reliability": rows.get("after", rows["before"]),
    }


def _event(
    probability_UC: NDArray[np.float64], label_U: NDArray[np.intp], positive: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Probability and outcome of what a reliability table is about: the positive of two classes, else the most probable one."""
    if probability_UC.shape[1] == 2 and positive >= 0:
        return probability_UC[:, positive], label_U == positive
    return probability_UC.max(axis=1), probability_UC.argmax(axis=1) == label_U


def _bin(row: Table) -> Table:
    low, high = share_limits(round(row["observed"] * row["count"]), row["count"])
    return row | {"observed_low": low, "observed_high": high}


def _operating_point(judged: TrustJudged, place: int) -> Table:
    trust, cases = judged.trust, judged.cases
    point = trust.points[place]
    thresholds = {part: nested.points[place].threshold for part, nested in judged.nested.items() if nested.points}
    judged_U = np.array([part in thresholds for part in judged.part_U.tolist()]) & (cases.label_U >= 0)
    limit = np.array([thresholds.get(part, np.nan) for part in judged.part_U.tolist()])
    called = cases.probability_UC[:, trust.positive] >= limit
    positive = cases.label_U == trust.positive
    calibrated = None
    if trust.calibrator is not None:
        pair = np.empty((1, 2))
        pair[0, trust.positive], pair[0, 1 - trust.positive] = point.threshold, 1 - point.threshold
        calibrated = float(trust.calibrator.apply(pair)[0, trust.positive])
    return {
        "name": point.name,
        "threshold": point.threshold,
        "threshold_calibrated": calibrated,
        "threshold_low": min(thresholds.values(), default=None),
        "threshold_high": max(thresholds.values(), default=None),
        "sensitivity": share(int((judged_U & positive & called).sum()), int((judged_U & positive).sum())),
        "specificity": share(int((judged_U & ~positive & ~called).sum()), int((judged_U & ~positive).sum())),
        "note": point.note,
    }


def _conformal(judged: TrustJudged) -> Table:
    trust, cases = judged.trust, judged.cases
    if trust.conformal is None:
        return {"refused": trust.refusal}
    has_set = np.array([judged.nested[part].conformal is not None for part in judged.part_U.tolist()]) & (cases.label_U >= 0)
    covered = np.array(
        [trust.classes[label] in said.set for label, said in zip(cases.label_U, judged.decision_U, strict=True)], dtype=bool
    )
    parts = sorted(part for part, nested in judged.nested.items() if nested.conformal is not None)
    sizes = Counter(len(said.set) for said, has in zip(judged.decision_U, has_set, strict=True) if has)
    table: Table = {
        "alpha": trust.conformal.alpha,
        "class_wise": trust.conformal.class_wise,
        "quantiles": dict(zip(trust.classes, trust.conformal.quantile_C, strict=True)),
        "calibration_patients": dict(zip(trust.classes, trust.conformal.count_C, strict=True)),
        "promised": 1 - trust.conformal.alpha,
        "coverage": _coverage(judged, covered, has_set, parts),
        "folds": [{"fold": part} | _coverage(judged, covered, has_set & (judged.part_U == part), [part]) for part in parts],
        "classes": [
            {"class": name} | _coverage(judged, covered, has_set & (cases.label_U == number), parts, number)
            for number, name in enumerate(trust.classes)
        ],
        "set_sizes": {str(size): sizes[size] for size in sorted(sizes)},
        "notes": [APPROXIMATE],
    }
    if not parts:
        table["note"] = f"coverage not measured: {_why_no_part(judged)}"
    without = int(((cases.label_U >= 0) & ~has_set).sum())
    if without:
        table["notes"].append(f"{without} have no set: the other folds have too few calibration patients")
    return table


def _why_no_part(judged: TrustJudged) -> str:
    """Why no fold could be given sets by the others."""
    reasons = sorted({nested.refusal for nested in judged.nested.values() if nested.refusal})
    return f"without the patients of a fold, {reasons[0]}" if reasons else "nobody has a known label"


def _coverage(
    judged: TrustJudged, covered_U: NDArray[np.bool_], chosen_U: NDArray[np.bool_], parts: list[int], number: int | None = None
) -> Table:
    """Share of the chosen whose set has their class, with the limits in which chance alone leaves it.

    Folds calibrate on partly the same patients, so that pooled coverage varies less than these limits. Where no single promise
    was made (a class without ``class_wise``; several classes with it) the limits are those of the share itself.
    """
    hits, count = int((covered_U & chosen_U).sum()), int(chosen_U.sum())
    made = judged.trust.conformal
    table = share(hits, count)
    if made is None or table is None:
        return {"value": None, "hits": hits, "count": count}
    if made.class_wise != (number is not None):
        return table
    nested = [judged.nested[part].conformal for part in parts]
    fewest = min(conformal.count_C[number or 0] for conformal in nested if conformal is not None)
    low, high = coverage_limits(count, fewest, made.alpha)
    return table | {"low": low, "high": high, "method": EXPECTED, "inside": low <= hits / count <= high}


def _novelty(judged: TrustJudged) -> Table:
    trust = judged.trust
    if trust.novelty is None:
        return {"refused": next((note for note in trust.notes if "out of distribution" in note), "")}
    known = [part for part in judged.part_U.tolist() if judged.nested[part].novelty is not None]
    far = sum(said.decision == "abstain:out of distribution" for said in judged.decision_U)
    return {
        "max_distance": judged.settings.max_distance,
        "limit": trust.novelty.limit,
        "neighbours": trust.novelty.neighbours,
        "references": len(trust.novelty.reference_RD),
        "expected": trust.novelty.expected,
        "flagged": share(far, len(known)),
    }


def _decisions(judged: TrustJudged) -> Table:
    """How many were decided, and how often rightly; ``sensitivity`` and ``specificity`` are of the decided."""
    trust, cases = judged.trust, judged.cases
    counts = Counter(said.decision for said in judged.decision_U if said.decision)
    table: Table = {"counts": {name: counts[name] for name in sorted(counts)}}
    if not trust.classes:
        return table
    decided = np.array([not said.abstains for said in judged.decision_U])
    number_of = {name: number for number, name in enumerate(trust.classes)}
    chosen = np.array([number_of.get(said.decision, -1) for said in judged.decision_U])
    known, right = decided & (cases.label_U >= 0), chosen == cases.label_U
    table["abstained"] = share(int((~decided).sum()), len(decided))
    table["errors"] = share(int((known & ~right).sum()), int(known.sum()))
    if trust.points:
        positive = cases.label_U == trust.positive
        table["sensitivity"] = share(int((known & positive & right).sum()), int((known & positive).sum()))
        table["specificity"] = share(int((known & ~positive & right).sum()), int((known & ~positive).sum()))
    return table


def _notes_of_parts(judged: TrustJudged) -> list[str]:
    """What could be fitted on all patients but not without some fold."""
    parts = judged.nested.items()
    return [f"without fold {part}: {note}" for part, nested in parts for note in nested.notes if note not in judged.trust.notes]
