"""What the mil stage found, read back from disk: estimates, curves and predictions. No drawing here."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfm.errors import StoreError
from pathfm.store.commit import read_json

Row = Mapping[str, str]

EXPLANATIONS: Mapping[str, str] = {
    "colour histogram": "only the colours of the tiles: what the stain alone gives away",
    "tile count": "only how many tiles there are: what the amount of tissue gives away",
    "untrained encoder": "the same network before pretraining: the difference is what pretraining adds",
    "shuffled labels": "the main model on shuffled labels: should lie near 0.5, else information leaks",
}
"""What each control is for, in the words of the page."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval (``low``, ``high``), and how the interval was found."""

    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a value; unknown bounds count as the value itself."""
        return self._low <= other._high and other._low <= self._high

    def covers(self, number: float) -> bool:
        """Whether the interval holds ``number``."""
        return self._low <= number <= self._high

    @property
    def _low(self) -> float:
        return self.value if self.low is None else self.low

    @property
    def _high(self) -> float:
        return self.value if self.high is None else self.high


def seen_words(share: float) -> str:
    """How numbers are marked that rest on an encoder which has seen this share of the patients; empty for none."""
    return f"transductive: {share:.0%} of patients seen in pretraining" if share else ""


@dataclass(frozen=True)
class Seen:
    """What the encoder had seen in pretraining of the patients whom the numbers rest on; None where nobody knows.

    Attributes:
        rule: ``mil.seen_in_pretraining`` as it was applied.
        patients: seen patients.
        share: of all judged patients.
        left_out: patients who were not judged because they had been seen.
    """

    rule: str
    patients: int | None = None
    share: float | None = None
    left_out: int = 0

    @property
    def transductive(self) -> bool:
        """Whether any was seen: then numbers of this encoder are not those of new patients."""
        return bool(self.patients)

    @property
    def words(self) -> str:
        """What stands beside every such number; empty when none was seen."""
        return seen_words(self.share or 0)


@dataclass(frozen=True)
class ModelScore:
    """One model or control, judged on the same folds as all others.

    ``seen_share``: of the patients, seen by the encoder it rests on.
    """

    name: str
    is_primary: bool
    explanation: str
    auroc: Estimate | None
    balanced_accuracy: Estimate | None
    localisation: Estimate | None
    localisation_slides: int | None
    seen_share: float = 0.0

    @property
    def transductive(self) -> bool:
        """Whether it rests on an encoder that has seen some of the patients."""
        return self.seen_share > 0

    @property
    def seen_words(self) -> str:
        """What stands beside its numbers; empty when it is not transductive."""
        return seen_words(self.seen_share)


@dataclass(frozen=True)
class MilResult:
    """Everything the mil folder says.

    Attributes:
        scores: the primary model first, then the controls in the order of the file.
        predictions: rows of ``predictions.csv``.
        curves: rows of ``curves.csv``.
        roc: rows of ``roc.csv``.
        seen: what the encoder had seen of these patients; None in results of older versions.
    """

    label: str
    classes: tuple[str, ...]
    positive: str
    level: str
    n_slides: int
    n_patients: int
    primary: str
    scores: tuple[ModelScore, ...]
    notes: tuple[str, ...]
    seen: Seen | None = None
    predictions: tuple[Row, ...] = field(default=(), repr=False)
    curves: tuple[Row, ...] = field(default=(), repr=False)
    roc: tuple[Row, ...] = field(default=(), repr=False)

    @property
    def main(self) -> ModelScore:
        """The model the study is about."""
        return self.scores[0]

    @property
    def controls(self) -> tuple[ModelScore, ...]:
        """All other rows of the table."""
        return self.scores[1:]


def read_mil(folder: Path) -> MilResult | None:
    """Reads a mil folder; None when no classifier was trained there.

    Raises:
        StoreError: ``metrics.json`` is damaged or lacks a part.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        return MilResult(
            label=str(content["label"]),
            classes=tuple(str(name) for name in content["classes"]),
            positive=str(content["positive"]),
            level=str(content["level"]),
            n_slides=int(content["n_slides"]),
            n_patients=int(content["n_patients"]),
            primary=str(content["primary"]),
            scores=_scores(content["models"], str(content["primary"]), _seen(content.get("seen_in_pretraining"))),
            notes=tuple(str(note) for note in content["notes"]),
            seen=_seen(content.get("seen_in_pretraining")),
            predictions=read_rows(folder / "predictions.csv"),
            curves=read_rows(folder / "curves.csv"),
            roc=read_rows(folder / "roc.csv"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"cannot be understood ({error!r})", where=str(path), fix="run `pathfm mil` again") from error


def _scores(models: Mapping[str, Any], primary: str, seen: Seen | None) -> tuple[ModelScore, ...]:
    # JSON sorts names; the page wants a fixed, telling order: the model, the known controls, anything else.
    known = [primary, *(name for name in EXPLANATIONS if name != primary)]
    names = [name for name in known if name in models] + sorted(set(models) - set(known))
    if primary not in models:
        raise KeyError(primary)
    share = (seen.share if seen else None) or 0.0
    return tuple(_score(name, models[name], name == primary, share) for name in names)


def _score(name: str, content: Mapping[str, Any], is_primary: bool, share: float) -> ModelScore:
    localisation = content.get("localisation_auroc")
    return ModelScore(
        name=name,
        is_primary=is_primary,
        explanation="the model of this study" if is_primary else EXPLANATIONS.get(name, ""),
        auroc=_estimate(content.get("auroc")),
        balanced_accuracy=_estimate(content.get("balanced_accuracy")),
        localisation=_estimate(localisation),
        localisation_slides=int(localisation["n_slides"]) if localisation and "n_slides" in localisation else None,
        # Results of older versions have one share for all.
        seen_share=(to_number(content.get("patients_seen_share", share)) or 0.0) if content.get("transductive") else 0.0,
    )


def _seen(content: Mapping[str, Any] | None) -> Seen | None:
    if content is None:
        return None
    patients = content["patients_seen"]
    return Seen(
        str(content["rule"]),
        None if patients is None else int(patients),
        to_number(content["share"]),
        int(content["left_out"]),
    )


def _estimate(content: Mapping[str, Any] | None) -> Estimate | None:
    value = to_number((content or {}).get("value"))
    if content is None or value is None:
        return None
    return Estimate(value, to_number(content.get("low")), to_number(content.get("high")), str(content.get("method") or ""))


def to_number(value: object) -> float | None:
    """A finite number, or None for anything else (empty cells, NaN, words)."""
    if not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_rows(path: Path) -> tuple[Row, ...]:
    """Rows of a CSV file with a header; none when the file is absent.

    Raises:
        StoreError: the file is not text.
    """
    if not path.is_file():
        return ()
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return tuple(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise StoreError("not a CSV file", where=str(path), fix="run the stage that wrote it again") from error
