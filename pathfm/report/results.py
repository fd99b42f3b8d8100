"""What the mil stage found, read back from disk: estimates, curves and predictions. No drawing here."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfm.errors import StoreError
from pathfm.report.mil_words import PRIMARY, SECOND
from pathfm.store.commit import read_json

Row = Mapping[str, str]
Content = Mapping[str, Any]

SHUFFLED = "shuffled labels"
EXPLANATIONS: Mapping[str, str] = {
    "colour histogram": "only the colours of the tiles: what the stain alone gives away",
    "tile count": "only how many tiles there are: what the amount of tissue gives away",
    "untrained encoder": "the same network before pretraining: the difference is what pretraining adds",
    SHUFFLED: "the main model on labels shuffled once: near chance; one shuffle misses it more often than one in twenty",
    "bundle": "the locked classifier: nothing was fitted to these patients",
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
    """One model or control, judged on the same splits as all others.

    Attributes:
        numbers: metric -> estimate, without those that are undefined.
        content: everything that ``metrics.json`` says of it (levels, classes, notes).
        seen_share: of the patients, seen by the encoder it rests on.
    """

    name: str
    is_primary: bool
    explanation: str
    numbers: Mapping[str, Estimate]
    content: Content = field(repr=False)
    seen_share: float = 0.0

    @property
    def auroc(self) -> Estimate | None:
        """None where the task has none."""
        return self.numbers.get("auroc")

    @property
    def balanced_accuracy(self) -> Estimate | None:
        """None where the task has none."""
        return self.numbers.get("balanced_accuracy")

    @property
    def localisation(self) -> Estimate | None:
        """None where no tiles are marked."""
        return self.numbers.get("localisation_auroc")

    @property
    def localisation_slides(self) -> int | None:
        """How many slides that rests on."""
        content = self.content.get("localisation_auroc") or {}
        return int(content["n_slides"]) if "n_slides" in content else None

    @property
    def transductive(self) -> bool:
        """Whether it rests on an encoder that has seen some of the patients."""
        return self.seen_share > 0

    @property
    def seen_words(self) -> str:
        """What stands beside its numbers; empty when it is not transductive."""
        return seen_words(self.seen_share)


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        kind: binary, multiclass, multilabel, ordinal, regression, cox or discrete.
        positive: the class that counts as positive; empty where there is none.
        metric: the one that models are compared by.
        scores: the primary model first, then the controls in a fixed order.
        content: everything else that ``metrics.json`` says of it (comparisons, folds, trust, subgroups).
    """

    label: str
    kind: str
    classes: tuple[str, ...]
    positive: str
    metric: str
    scores: tuple[ModelScore, ...]
    content: Content = field(repr=False)

    @property
    def main(self) -> ModelScore:
        """The model the study is about."""
        return self.scores[0]

    @property
    def controls(self) -> tuple[ModelScore, ...]:
        """All other rows of the table."""
        return self.scores[1:]

    @property
    def positive_of_two(self) -> str:
        """The class that sensitivity and specificity are about; empty where they are means over several classes."""
        return self.positive if self.kind == "binary" else ""

    @property
    def second(self) -> str:
        """The metric that stands beside the main one."""
        return SECOND.get(self.kind, "balanced_accuracy")

    @property
    def headline(self) -> Estimate | None:
        """The main model's main number."""
        return self.main.numbers.get(self.metric)

    @property
    def one_of(self) -> bool:
        """Whether everyone has exactly one of the classes."""
        return self.kind in {"binary", "multiclass", "ordinal"}


@dataclass(frozen=True)
class MilResult:
    """Everything the mil folder says.

    Attributes:
        task: the main task.
        also: further tasks of the same network.
        predictions: the rows that the numbers were counted on: of ``predictions.csv``, or of ``patients.csv`` of a
            validation per patient.
        curves: rows of ``curves.csv``.
        roc: rows of ``roc.csv``.
        seen: what the encoder had seen of these patients; None in results of older versions.
        content: all of ``metrics.json``.
        bundle: SHA-256 of the locked classifier, empty where there is none.
    """

    task: TaskResult
    also: tuple[TaskResult, ...]
    level: str
    n_slides: int
    n_patients: int
    primary: str
    notes: tuple[str, ...]
    seen: Seen | None
    content: Content = field(repr=False)
    predictions: tuple[Row, ...] = field(default=(), repr=False)
    curves: tuple[Row, ...] = field(default=(), repr=False)
    roc: tuple[Row, ...] = field(default=(), repr=False)
    bundle: str = ""

    @property
    def label(self) -> str:
        """Name of the main task."""
        return self.task.label

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the main task; none of numbers and survival."""
        return self.task.classes

    @property
    def positive(self) -> str:
        """The class that counts as positive; empty where there is none."""
        return self.task.positive

    @property
    def scores(self) -> tuple[ModelScore, ...]:
        """The model and its controls on the main task."""
        return self.task.scores

    @property
    def main(self) -> ModelScore:
        """The model the study is about."""
        return self.task.main

    @property
    def controls(self) -> tuple[ModelScore, ...]:
        """All other rows of the table."""
        return self.task.controls


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
        return _result(content, folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"cannot be understood ({error!r})", where=str(path), fix="run `pathfm mil` again") from error


def _result(content: Content, folder: Path) -> MilResult:
    primary, seen = str(content["primary"]), _seen(content.get("seen_in_pretraining"))
    also = [{"label": name, **about} for name, about in (content.get("also") or {}).items()]
    return MilResult(
        task=_task(content, primary, seen),
        also=tuple(_task(about, primary, seen) for about in also if about["models"]),
        level=str(content["level"]),
        n_slides=int(content["n_slides"]),
        n_patients=int(content["n_patients"]),
        primary=primary,
        notes=tuple(str(note) for note in content["notes"]),
        seen=seen,
        content=content,
        predictions=_predictions(content, folder),
        curves=read_rows(folder / "curves.csv"),
        roc=read_rows(folder / "roc.csv"),
        bundle=_bundle(content, folder),
    )


def _task(content: Content, primary: str, seen: Seen | None) -> TaskResult:
    classes = tuple(str(name) for name in content["classes"])
    # Results of older versions know exclusive classes only, and do not name the kind.
    kind = str(content.get("kind") or ("binary" if len(classes) == 2 else "multiclass"))
    return TaskResult(
        label=str(content["label"]),
        kind=kind,
        classes=classes,
        positive=str(content["positive"] or ""),
        metric=str(content.get("primary_metric") or PRIMARY[kind]),
        scores=_scores(content["models"], primary, seen),
        content=content,
    )


def _predictions(content: Content, folder: Path) -> tuple[Row, ...]:
    """Of a training the judged bags; of a validation, whose tables name everybody, those who were judged at its level."""
    rows = read_rows(folder / "predictions.csv")
    if not content.get("validation_of"):
        return rows
    if content["level"] == "specimen":
        return ()  # no table has them
    by_patient = read_rows(folder / "patients.csv") if content["level"] == "patient" else ()
    # Without patients in the table there is no second file: every slide is a patient of its own.
    rows = by_patient or rows
    excludes = (content.get("trained_on") or {}).get("rule") == "exclude"
    return tuple(row for row in rows if not (excludes and row.get("trained_on")))


def _bundle(content: Content, folder: Path) -> str:
    """SHA-256 of the classifier that was locked here, or asked for these predictions."""
    path = folder / "bundle" / "bundle.json"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return str(content.get("validation_of") or "")


def _scores(models: Content, primary: str, seen: Seen | None) -> tuple[ModelScore, ...]:
    # JSON sorts names; the page wants a fixed, telling order: the model, the known controls, anything else.
    known = [primary, *(name for name in EXPLANATIONS if name != primary)]
    names = [name for name in known if name in models] + sorted(set(models) - set(known))
    if primary not in models:
        raise KeyError(primary)
    share = (seen.share if seen else None) or 0.0
    return tuple(_score(name, models[name], name == primary, share) for name in names)


def _score(name: str, content: Content, is_primary: bool, share: float) -> ModelScore:
    return ModelScore(
        name=name,
        is_primary=is_primary,
        explanation="the model of this study" if is_primary and name != "bundle" else _why(name, content),
        numbers=estimates(content),
        content=content,
        # Results of older versions have one share for all.
        seen_share=(to_number(content.get("patients_seen_share", share)) or 0.0) if content.get("transductive") else 0.0,
    )


def _why(name: str, content: Content) -> str:
    direction = content.get("direction")
    return "; ".join(filter(None, (EXPLANATIONS.get(name, ""), f"here {direction}" if direction else "")))


def _seen(content: Content | None) -> Seen | None:
    if content is None:
        return None
    patients = content["patients_seen"]
    return Seen(
        str(content["rule"]),
        None if patients is None else int(patients),
        to_number(content["share"]),
        int(content["left_out"]),
    )


def estimates(content: Content) -> dict[str, Estimate]:
    """All numbers of a model, a level, a class or a group by the name of the metric."""
    found = {name: estimate(each) for name, each in content.items() if isinstance(each, Mapping) and "value" in each}
    return {name: each for name, each in found.items() if each is not None}


def estimate(content: Content | None) -> Estimate | None:
    """A number with its limits, None where it is undefined."""
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
