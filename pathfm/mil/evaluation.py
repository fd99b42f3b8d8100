"""Out-of-fold probabilities to the numbers of ``metrics.json``, the same way for the model and for every control.

Legend: B bags, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfm.stats.intervals import Interval, auroc_interval, balanced_accuracy_interval, bootstrap_interval, strata
from pathfm.stats.localisation import Localisation
from pathfm.stats.metrics import auroc, macro_auroc, roc_curve
from pathfm.stats.seeds import derive_seed
from pathfm.study import MilSettings


@dataclass(frozen=True)
class Judged:
    """A model's out-of-fold answers beside the truth it is held to.

    Attributes:
        name: as in ``metrics.json``.
        probability_BC: class probabilities.
        label_B: class numbers (shuffled ones for the shuffled control).
        localisation: how well tile scores find the lesion, None where that cannot be said.
        seen_share: share of these patients whom the encoder it rests on has seen; above 0, the numbers are transductive.
    """

    name: str
    probability_BC: NDArray[np.float64]
    label_B: tuple[int, ...]
    localisation: Localisation | None = None
    seen_share: float = 0.0


def model_metrics(judged: Judged, patient_B: Sequence[str], positive: int, settings: MilSettings) -> dict[str, Any]:
    """The entry of one model: AUROC, balanced accuracy, localisation, each with its 95 % interval.

    Two classes and one bag per patient: DeLong. Otherwise bags are not independent, or the AUROC is a mean over classes, and
    patients are resampled.
    """
    return {
        "auroc": _auroc(judged, patient_B, positive, settings)._asdict(),
        "balanced_accuracy": balanced_accuracy_interval(
            judged.probability_BC.argmax(axis=1),
            judged.label_B,
            patient_B,
            settings.bootstrap,
            derive_seed("balanced accuracy", settings.seed),
        )._asdict(),
        "localisation_auroc": judged.localisation._asdict() if judged.localisation else None,
        "transductive": judged.seen_share > 0,
        "patients_seen_share": judged.seen_share,
    }


def _auroc(judged: Judged, patient_B: Sequence[str], positive: int, settings: MilSettings) -> Interval:
    label_B, probability_BC = np.asarray(judged.label_B), judged.probability_BC
    binary = probability_BC.shape[1] == 2
    positive_B, score_B = label_B == positive, probability_BC[:, positive]
    if binary and len(set(patient_B)) == len(patient_B):
        return auroc_interval(score_B, positive_B)

    def area(index: NDArray[np.intp]) -> float:
        return auroc(score_B[index], positive_B[index]) if binary else macro_auroc(probability_BC[index], label_B[index])

    seed = derive_seed("auroc", settings.seed)
    return bootstrap_interval(area, patient_B, strata(judged.label_B, patient_B), settings.bootstrap, seed)


def roc_rows(judged: Judged, positive: int) -> list[tuple[str, float, float]]:
    """Rows (model, false positive rate, true positive rate) of the positive class against the rest."""
    curve = roc_curve(judged.probability_BC[:, positive], np.asarray(judged.label_B) == positive)
    return [(judged.name, float(false), float(true)) for false, true in zip(*curve, strict=True)]
