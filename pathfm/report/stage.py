"""The report: one page that opens anywhere, and the key numbers beside it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pathfm.config import fingerprint
from pathfm.errors import StoreError
from pathfm.report.fates import Fate, slide_fates
from pathfm.report.feature_map import feature_map_chart
from pathfm.report.figures import Chart, pretraining_chart, training_chart
from pathfm.report.gallery import Gallery, build_gallery, choose, listed_tiles
from pathfm.report.mil_figures import looks_chart
from pathfm.report.page import Page, render, setting_rows, title_of
from pathfm.report.results import MilResult, read_mil, read_rows
from pathfm.report.summary import summarise
from pathfm.store.cohort import Cohort
from pathfm.store.commit import commit_file, read_json, write_json
from pathfm.store.record import Outcome, StageReport, read_record, write_record
from pathfm.study import Study

VERSION = 8
"""Goes up when the same inputs give another page."""


@dataclass(frozen=True)
class ReportInputs:
    """Where the other stages left their work, and what they said of each slide.

    Attributes:
        out: output folder of the study.
        report_dir: folder the page is written to.
        mil_dir: what mil wrote; may be absent.
        encoder_dir: what pretrain wrote; absent with a public encoder.
        stores_dir: folder of tile stores.
        features_dir: the main features.
        records: outcome rows by stage (tile, extract, mil).
        fingerprint: what the study's result depends on.
        cohort: all slides of the study.
    """

    out: Path
    report_dir: Path
    mil_dir: Path
    encoder_dir: Path
    stores_dir: Path
    features_dir: Path
    records: Mapping[str, StageReport]
    fingerprint: str
    cohort: Cohort


def run_report(study: Study, inputs: ReportInputs) -> StageReport:
    """Writes ``index.html`` (self-contained), ``summary.json`` and the record; the first two depend on the inputs only.

    Missing parts are left out with a sentence in their place. A slide whose pictures cannot be read is a failed row of the
    returned report.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        StoreError: a table of the mil or encoder folder is damaged.
    """
    result = read_mil(inputs.mil_dir)
    fates = slide_fates(inputs.cohort, inputs.records, *_label_columns(study))
    digest = _digest(study, inputs, fates)
    kept = _kept(inputs.report_dir, digest)
    if kept:
        return kept
    started = datetime.datetime.now(datetime.UTC)
    gallery = _gallery(study, inputs, fates, result)
    html = render(_page(study, inputs, fates, result, gallery))
    with commit_file(inputs.report_dir / "index.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    summary = summarise(title_of(study), inputs.fingerprint, fates, result, study.mil)
    shown = [Outcome(slide.fate.slide_id, "done") for slide in gallery.slides]
    failed = [Outcome(slide_id, "failed", reason) for slide_id, reason in gallery.broken.items()]
    outcomes = sorted(shown + failed, key=lambda outcome: outcome.slide_id)
    report = StageReport("report", tuple(outcomes), _where(inputs.report_dir), worked=1)
    # The record lies beside the page, and travels with it.
    write_record(inputs.report_dir, replace(report, note=""), study.report, started)
    # Last: with it the page counts as made.
    write_json(inputs.report_dir / "summary.json", {**summary, "page_fingerprint": digest})
    return report


def _label_columns(study: Study) -> tuple[str, ...]:
    """The label columns of the main task."""
    mil = study.mil
    return (mil.time, mil.event) if mil.time and mil.event else mil.columns or (mil.label,)


def _digest(study: Study, inputs: ReportInputs, fates: tuple[Fate, ...]) -> str:
    """Everything the page depends on."""
    settings = [[row.name, row.value] for _, rows in setting_rows(study) for row in rows]
    return fingerprint({"version": VERSION}, inputs.fingerprint, title_of(study), settings, [asdict(fate) for fate in fates])


def _kept(report_dir: Path, digest: str) -> StageReport | None:
    """The report of the page that is there, if nothing it depends on has changed and all its pictures were readable."""
    if not (report_dir / "summary.json").is_file() or not (report_dir / "index.html").is_file():
        return None
    record = read_record(report_dir)
    if record is None or record.statuses["failed"] or read_json(report_dir / "summary.json").get("page_fingerprint") != digest:
        return None
    return StageReport("report", tuple(replace(outcome, status="kept") for outcome in record.outcomes), _where(report_dir))


def _where(report_dir: Path) -> str:
    return f"page: {report_dir / 'index.html'}"


def _page(study: Study, inputs: ReportInputs, fates: tuple[Fate, ...], result: MilResult | None, gallery: Gallery) -> Page:
    own = study.has_own_encoder  # else a log that lies there belongs to another encoder
    features, without = _feature_map(inputs, study.mil.label)
    return Page(
        study=study,
        fingerprint=inputs.fingerprint,
        fates=fates,
        result=result,
        charts={
            "looks": looks_chart(result) if result else None,
            "training": training_chart(result) if result else None,
            "features": features,
            "pretraining": pretraining_chart(read_rows(inputs.encoder_dir / "metrics.csv")) if own else None,
        },
        gallery=gallery,
        without_features=without,
    )


def _feature_map(inputs: ReportInputs, label: str) -> tuple[Chart | None, str]:
    """The map of the features, or why there is none: a picture on the side must never cost the page."""
    try:
        return feature_map_chart(inputs.features_dir, inputs.cohort, label), ""
    except StoreError as error:
        return None, error.what


def _gallery(study: Study, inputs: ReportInputs, fates: tuple[Fate, ...], result: MilResult | None) -> Gallery:
    heatmaps = inputs.mil_dir / "heatmaps"
    if result is None or not heatmaps.is_dir():
        return Gallery()
    drawn = [fate for fate in fates if (heatmaps / f"{fate.slide_id}.png").is_file()]
    # Without classes there are no labels to be taken in turn.
    chosen = choose(drawn, result.positive, study.report.heatmaps) if result.task.one_of else drawn[: study.report.heatmaps]
    looks = str((result.content.get("looks") or {}).get("kind", "attention"))
    listed = listed_tiles(inputs.mil_dir, study.report.top_tiles, looks)
    return build_gallery(chosen, (inputs.stores_dir, heatmaps), listed)
