"""The page: what the template shows, gathered into plain values, and the template turned into HTML."""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pathfm import __version__
from pathfm.errors import MissingExtraError
from pathfm.report.fates import Fate, flow, without_folders
from pathfm.report.figures import Chart
from pathfm.report.gallery import Gallery
from pathfm.report.operating import Operating
from pathfm.report.results import Estimate, MilResult
from pathfm.report.summary import warnings
from pathfm.settings import Settings
from pathfm.study import Study

LONG_TABLE = 30
"""Rows above which a table is folded away."""
UNHASHED = ("out", "compute")
"""Settings that say where and how the work was done; they change no result and differ between machines."""


@dataclass(frozen=True)
class Scale:
    """The axis that all interval bars of the page share, from ``low`` to ``high``."""

    low: float
    high: float = 1.0

    def percent(self, value: float | None) -> str:
        """Where a value lies along the axis; empty when there is none."""
        if value is None:
            return ""
        return f"{100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))):.2f}%"

    @property
    def ticks(self) -> tuple[float, ...]:
        """Round numbers along the axis."""
        first, last = math.ceil(self.low * 10 - 1e-9), math.floor(self.high * 10 + 1e-9)
        every = 1 if last - first <= 6 else 2
        return tuple(tick / 10 for tick in range(last, first - 1, -every))[::-1]


def common_scale(result: MilResult) -> Scale:
    """An axis on which chance, every estimate and every interval can be seen."""
    lowest = [0.5, 1 / len(result.classes)]
    for score in result.scores:
        for estimate in (score.auroc, score.balanced_accuracy, score.localisation):
            lowest += [] if estimate is None else [estimate.value if estimate.low is None else estimate.low]
    return Scale(max(0.0, math.floor(min(lowest) * 10 - 0.5) / 10))


@dataclass(frozen=True)
class SettingRow:
    """One setting of the study: its dotted name, value, whether it differs from the default, and what it does."""

    name: str
    value: str
    changed: bool
    meaning: str


def setting_rows(study: Study) -> tuple[tuple[str, tuple[SettingRow, ...]], ...]:
    """The resolved settings, stage by stage, without what cannot change a result and without machine paths."""
    tables: list[tuple[str, tuple[SettingRow, ...]]] = []
    for name in type(study).model_fields:
        table = getattr(study, name)
        if name not in UNHASHED and isinstance(table, Settings):
            tables.append((name, tuple(_setting_rows(table, type(table)(), ""))))
    return tuple(tables)


def _setting_rows(table: Settings, default: Settings, prefix: str) -> Iterator[SettingRow]:
    plain = table.model_dump(mode="json")
    for name, field in type(table).model_fields.items():
        value, usual = getattr(table, name), getattr(default, name)
        if isinstance(value, Settings):
            yield from _setting_rows(value, usual, f"{prefix}{name}.")
        else:
            text = plain[name] if isinstance(plain[name], str) else json.dumps(plain[name], ensure_ascii=False)
            yield SettingRow(prefix + name, without_folders(text), value != usual, field.description or "")


@dataclass(frozen=True)
class Page:
    """Everything the template shows.

    Attributes:
        study: settings; only the name and what can change a result is shown.
        fingerprint: what the result depends on.
        fates: one row per slide of the cohort.
        result: what mil found, None when it has not run.
        operating: the decisions at the usual threshold, None when they cannot be counted.
        charts: by section: roc, features, training, pretraining.
        gallery: slides with pictures.
        probabilities: predicted probability of the positive label by patient id or slide id.
    """

    study: Study
    fingerprint: str
    fates: tuple[Fate, ...]
    result: MilResult | None
    operating: Operating | None
    charts: Mapping[str, Chart | None]
    gallery: Gallery
    probabilities: Mapping[str, float]

    def probability(self, fate: Fate) -> float | None:
        """Predicted probability of the positive label of a slide's patient, or of the slide, whichever was classified."""
        by_patient = self.result is not None and self.result.level == "patient"
        return self.probabilities.get(fate.patient_id or fate.slide_id if by_patient else fate.slide_id)

    def of_status(self, *statuses: str) -> tuple[Fate, ...]:
        """Slides that ended in one of these ways."""
        return tuple(fate for fate in self.fates if fate.status in statuses)

    def context(self) -> dict[str, Any]:
        """Names of the template."""
        result, mil = self.result, self.study.mil
        return {
            "page": self,
            "study": self.study,
            "result": result,
            "operating": self.operating,
            "scale": common_scale(result) if result else Scale(0.0),
            "warnings": warnings(result) if result else (),
            "methods": _methods(result) if result else "",
            "level": result.level if result else mil.level,
            "flow": flow(self.fates),
            "failures": self.of_status("failed", "empty"),
            "settings": setting_rows(self.study),
            "long_table": LONG_TABLE,
            "version": __version__,
        }


def _methods(result: MilResult) -> str:
    main = result.main
    named = [("AUROC", main.auroc), ("balanced accuracy", main.balanced_accuracy), ("localisation AUROC", main.localisation)]
    return "; ".join(f"{name}: {estimate.method}" for name, estimate in named if estimate and estimate.method)


def number(estimate: Estimate | None, digits: int = 2) -> str:
    """An estimate as text, a dash when there is none."""
    return "–" if estimate is None else f"{estimate.value:.{digits}f}"


def interval(estimate: Estimate | None, digits: int = 2) -> str:
    """Its interval as text, empty when unknown."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def plural(count: int, noun: str, many: str = "") -> str:
    """``1 slide``, ``2 slides``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {many or noun + 's'}"


def render(page: Page) -> str:
    """The page as HTML. Everything that came from a file is escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("the report needs jinja2", extra="report") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: Sequence[Any] = (number, interval, plural, without_folders)
    environment.filters.update({function.__name__: function for function in filters})
    text = importlib.resources.files("pathfm.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(page.context()) + "\n"
