"""The page: what the template shows, gathered into plain values, and the template turned into HTML."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pathfm import __version__
from pathfm.errors import MissingExtraError
from pathfm.log import plural
from pathfm.mil_settings import MilSettings
from pathfm.report.fates import Fate, flow, without_folders
from pathfm.report.figures import Chart
from pathfm.report.gallery import Gallery
from pathfm.report.mil_blocks import limits, numeral, scale_of
from pathfm.report.mil_predictions import said_by_slide
from pathfm.report.mil_sections import bundle_section, cards, described, design_items, methods, result_sections
from pathfm.report.results import Estimate, MilResult
from pathfm.report.summary import warnings
from pathfm.settings import Settings
from pathfm.study import Study

LONG_TABLE = 30
"""Rows above which a table is folded away."""
UNHASHED = ("out", "compute")
"""Settings that say where and how the work was done; they change no result and differ between machines."""


@dataclass(frozen=True)
class SettingRow:
    """One setting of the study: its dotted name, value, whether it differs from the default, and what it does."""

    name: str
    value: str
    changed: bool
    meaning: str


def title_of(study: Study) -> str:
    """The study's name, or that of its output folder where nobody gave it one."""
    unnamed = study.name == Study.model_fields["name"].default
    return (unnamed and study.out.name) or study.name


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
        charts: by section: features, training, pretraining, looks.
        gallery: slides with pictures.
        without_features: why there is no map of the features though there are features; else empty.
    """

    study: Study
    fingerprint: str
    fates: tuple[Fate, ...]
    result: MilResult | None
    charts: Mapping[str, Chart | None]
    gallery: Gallery
    without_features: str = ""

    def of_status(self, *statuses: str) -> tuple[Fate, ...]:
        """Slides that ended in one of these ways."""
        return tuple(fate for fate in self.fates if fate.status in statuses)

    def context(self) -> dict[str, Any]:
        """Names of the template."""
        result = self.result
        return {
            "page": self,
            "study": self.study,
            "title": title_of(self.study),
            "level": result.level if result else self.study.mil.level,
            "said": said_by_slide(result) if result else {},
            "flow": flow(self.fates),
            "failures": self.of_status("failed", "empty"),
            "unlabelled": self.of_status("no label"),
            "settings": setting_rows(self.study),
            "long_table": LONG_TABLE,
            "design": design_items(result) if result else (),
            "looks": str((result.content.get("looks") or {}).get("kind", "attention")) if result else "attention",
            "bundle": bundle_section(result) if result else None,
            **result_context(result, self.study.mil),
        }


def result_context(result: MilResult | None, settings: MilSettings | None) -> dict[str, Any]:
    """Names of the template's parts about a slide classifier."""
    shown = cards(result) if result else []
    scale = scale_of((card.estimate for card in shown), [card.chance for card in shown if card.chance is not None])
    return {
        "result": result,
        "sections": result_sections(result, settings) if result else (),
        "described": described(result) if result else "",
        "cards": shown,
        "scale": scale,
        "warnings": warnings(result, settings) if result else (),
        "methods": methods(result) if result else "",
        "version": __version__,
    }


def number(estimate: Estimate | None, digits: int = 2) -> str:
    """An estimate as text, a dash when there is none."""
    return numeral(estimate.value if estimate else None, digits)


def render(page: Page) -> str:
    """The page as HTML. Everything that came from a file is escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    return render_template("template.html.j2", page.context())


def render_template(name: str, context: Mapping[str, Any]) -> str:
    """One of this package's templates as HTML. Everything that came from a file is escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup, escape
    except ImportError as error:
        raise MissingExtraError("the report needs jinja2", extra="report") from error

    def breakable(text: str) -> Markup:
        """A name that may be broken, but only behind its separators."""
        # Escaped before: nothing of the text is read as HTML.
        return Markup(re.sub(r"([:/])(?=\w)", r"\1<wbr>", str(escape(text))))

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_template),
    )
    filters: Sequence[Any] = (number, limits, plural, without_folders, breakable)
    environment.filters.update({function.__name__: function for function in filters})
    return environment.get_template(name).render(context) + "\n"


def _template(name: str) -> str:
    return importlib.resources.files("pathfm.report").joinpath(name).read_text(encoding="utf-8")
