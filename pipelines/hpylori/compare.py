"""Prints two finished runs of the study side by side: one that marks, one that excludes.

python pipelines/hpylori/compare.py out/hpylori out/hpylori-exclude
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfm.stats.intervals import bootstrap_interval, strata
from pathfm.stats.metrics import auroc


def main(marked: Path, excluded: Path) -> None:
    """Both AUROCs as their studies give them, then both on the same patients: those whom the second encoder has not seen."""
    for name, out in (("mark, all patients", marked), ("exclude, held-out patients", excluded)):
        summary = json.loads((out / "report" / "summary.json").read_text())
        share = summary["patients_seen_share"]
        said = f"transductive: {share:.0%} of patients seen" if summary["transductive"] else "no patient seen"
        print(f"{name} (n = {summary['n_patients']}): AUROC {_spoken(summary)}; {said}")
    left, right = _predictions(marked), _predictions(excluded)
    patients = sorted(set(left) & set(right))
    label_B = np.array([right[patient][0] for patient in patients])
    score_BM = np.array([[left[patient][1], right[patient][1]] for patient in patients])

    def gain(places: NDArray[np.intp]) -> float:
        one, other = (auroc(score_BM[places, model], label_B[places]) for model in (0, 1))
        return one - other

    found = bootstrap_interval(gain, patients, strata(label_B.astype(int).tolist(), patients), 2000, 0)
    areas = [auroc(score_BM[:, model], label_B) for model in (0, 1)]
    print(f"the same {len(patients)} patients: mark {areas[0]:.3f}, exclude {areas[1]:.3f}")
    print(f"gain from having seen them: {found.value:+.3f} (95 % interval {found.low:+.3f} to {found.high:+.3f})")


def _spoken(summary: dict[str, Any]) -> str:
    return f"{summary['auroc']:.3f} ({summary['auroc_low']:.3f} to {summary['auroc_high']:.3f})"


def _predictions(out: Path) -> dict[str, tuple[bool, float]]:
    """Patient -> (positive, predicted probability of it), of everyone who was judged."""
    positive = json.loads((out / "mil" / "metrics.json").read_text())["positive"]
    with (out / "mil" / "predictions.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["predicted"]]
    return {row["patient_id"]: (row["label"] == positive, float(row[f"probability_{positive}"])) for row in rows}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
