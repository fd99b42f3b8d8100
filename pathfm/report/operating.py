"""How often the decisions were right, class by class, counted from the pooled predictions of the test folds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pathfm.report.results import MilResult


@dataclass(frozen=True)
class Operating:
    """A confusion table.

    Attributes:
        classes: the labels.
        counts: (true label, predicted label) -> how many patients or slides.
    """

    classes: tuple[str, ...]
    counts: Mapping[tuple[str, str], int]

    def row(self, truth: str) -> tuple[int, ...]:
        """Counts of one true label, by predicted label."""
        return tuple(self.counts.get((truth, predicted), 0) for predicted in self.classes)

    def recall(self, truth: str) -> str:
        """Share of a true label that was recognised (sensitivity of that label), as text."""
        total = sum(self.row(truth))
        return f"{100 * self.counts.get((truth, truth), 0) / total:.0f} %" if total else "–"


def operating(result: MilResult) -> Operating | None:
    """Counts the primary model's decisions; None when ``predictions.csv`` has no columns ``label`` and ``predicted``."""
    pairs = Counter(
        (row["label"], row["predicted"])
        for row in result.predictions
        if row.get("label") in result.classes and row.get("predicted") in result.classes
    )
    return Operating(result.classes, pairs) if pairs else None
