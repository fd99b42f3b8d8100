"""How the numbers of ``mil/metrics.json`` are called on pages and in print, and what they are without knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

PRIMARY: Mapping[str, str] = {
    "binary": "auroc",
    "multiclass": "auroc",
    "multilabel": "auroc",
    "ordinal": "kappa",
    "regression": "r2",
    "cox": "c_index",
    "discrete": "c_index",
}
"""The metric that models are compared by, of each kind of task; files name it as well."""
SECOND: Mapping[str, str] = {
    "binary": "balanced_accuracy",
    "multiclass": "balanced_accuracy",
    "multilabel": "auprc",
    "ordinal": "balanced_accuracy",
    "regression": "mae",
    "cox": "auc_t",
    "discrete": "auc_t",
}
"""The metric that stands beside it."""


class Metric(NamedTuple):
    """A metric in words.

    Attributes:
        title: its name.
        detail: how to read it; ``{positive}`` stands for those of the positive class, see ``detail``.
        chance: what it is without knowledge; None where that depends on the cohort.
        lower_is_better: direction.
    """

    title: str
    detail: str = ""
    chance: float | None = None
    lower_is_better: bool = False


METRICS: Mapping[str, Metric] = {
    "auroc": Metric("AUROC", "0.5 is chance (dashed), 1 is perfect", 0.5),
    "kappa": Metric("quadratic kappa", "0 is chance (dashed), 1 is perfect; far misses count more than near ones", 0.0),
    "r2": Metric("R²", "share of the variance that is explained: 0 is guessing the mean (dashed), 1 is perfect", 0.0),
    "c_index": Metric("C-index", "chance that of two patients the one at higher risk comes first: 0.5 is chance (dashed)", 0.5),
    "auprc": Metric("average precision", "area under precision and recall of {positive}; chance is their share"),
    "balanced_accuracy": Metric("balanced accuracy", "mean share recognised per label"),
    "sensitivity": Metric("sensitivity", "share of {positive} that are called so (most probable class)"),
    "specificity": Metric("specificity", "share of all but {positive} that are not called so (most probable class)"),
    "f1": Metric("F1", "harmonic mean of precision and sensitivity"),
    "brier": Metric("Brier score", "mean squared error of the probabilities: lower is better", None, True),
    "ece": Metric("calibration error", "mean distance of probability and observed share: lower is better", None, True),
    "mae": Metric("mean absolute error", "in units of the label: lower is better", None, True),
    "pearson": Metric("Pearson r", "linear correlation of prediction and truth", 0.0),
    "auc_t": Metric("time-dependent AUC", "mean over the horizons; 0.5 is chance (dashed)", 0.5),
    "localisation_auroc": Metric("localisation AUROC", "tile scores against marked tiles, mean over slides", 0.5),
    "localisation_average_precision": Metric("localisation average precision", "tile scores against marked tiles"),
    "pointing_game": Metric("pointing game", "share of slides whose highest tile is marked"),
}
"""In the order in which tables list them."""


def metric(name: str) -> Metric:
    """What is known of a metric; ``auc_12.5`` is the AUC of events until 12.5."""
    known = METRICS.get(name)
    if known is None and name.startswith("auc_"):
        return Metric(f"AUC at {name.removeprefix('auc_')}", "events until this time against those followed longer", 0.5)
    return known or Metric(name.replace("_", " "))


def title(name: str) -> str:
    """A metric's name."""
    return metric(name).title


def detail(name: str, positive: str = "") -> str:
    """How to read a metric; ``positive``: the class that it is about, where there are two."""
    return metric(name).detail.replace("{positive}", f"“{positive}”" if positive else "positives")


def of_class(name: str, positive: str) -> str:
    """A metric's name with the class that it is about, if there is one: ``sensitivity for “tumour”``."""
    return f"{title(name)} for “{positive}”" if positive else title(name)


def headline(name: str) -> str:
    """Its name at the start of a line."""
    text = title(name)
    return text[0].upper() + text[1:]


def chance_of(name: str, classes: int) -> float | None:
    """What a metric is without knowledge, None where that is not known."""
    if name == "balanced_accuracy" and classes > 1:
        return 1 / classes
    return metric(name).chance


def corrected_p(comparison: Mapping[str, Any]) -> float | None:
    """The p value that a verdict follows: corrected for the number of comparisons, where numbers are not older than that."""
    p: float | None = comparison.get("p_holm", comparison["p"])
    return p
