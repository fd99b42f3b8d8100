"""The report: one page that opens anywhere, and the key numbers beside it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pathfm.config import fingerprint
from pathfm.report.fates import Fate, slide_fates
from pathfm.report.feature_map import feature_map_chart
from pathfm.report.figures import pretraining_chart, roc_chart, training_chart
from pathfm.report.gallery import Gallery, build_gallery, choose
from pathfm.report.operating import operating, probabilities
from pathfm.report.page import Page, render, setting_rows
from pathfm.report.results import MilResult, read_mil, read_rows
from pathfm.report.summary import summarise
from pathfm.store.cohort import Cohort
from pathfm.store.commit import commit_file, read_json, write_json
from pathfm.store.record import Outcome, StageReport, read_record, write_record
from pathfm.study import Study

VERSION = 3
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
    fates = slide_fates(inputs.cohort, inputs.records, result.label if result else study.mil.label)
    digest = _digest(study, inputs, fates)
    kept = _kept(inputs.report_dir, digest)
    if kept:
        return kept
    started = datetime.datetime.now(datetime.UTC)
    gallery = _gallery(study, inputs, fates, result)
    html = render(_page(study, inputs, fates, result, gallery))
    with commit_file(inputs.report_dir / "index.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    summary = summarise(study.name, inputs.fingerprint, fates, result)
    shown = [Outcome(slide.fate.slide_id, "done") for slide in gallery.slides]
    failed = [Outcome(slide_id, "failed", reason) for slide_id, reason in gallery.broken.items()]
    report = StageReport("report", tuple(sorted(shown + failed, key=lambda outcome: outcome.slide_id)))
    write_record(inputs.report_dir, report, study.report, started)
    # Last: with it the page counts as made.
    write_json(inputs.report_dir / "summary.json", {**summary, "page_fingerprint": digest})
    return report


def _digest(study: Study, inputs: ReportInputs, fates: tuple[Fate, ...]) -> str:
    """Everything the page depends on."""
    settings = [[row.name, row.value] for _, rows in setting_rows(study) for row in rows]
    return fingerprint({"version": VERSION}, inputs.fingerprint, study.name, settings, [asdict(fate) for fate in fates])


def _kept(report_dir: Path, digest: str) -> StageReport | None:
    """The report of the page that is there, if nothing it depends on has changed and all its pictures were readable."""
    if not (report_dir / "summary.json").is_file() or not (report_dir / "index.html").is_file():
        return None
    record = read_record(report_dir)
    if record is None or record.statuses["failed"] or read_json(report_dir / "summary.json").get("page_fingerprint") != digest:
        return None
    return StageReport("report", tuple(replace(outcome, status="kept") for outcome in record.outcomes))


def _page(study: Study, inputs: ReportInputs, fates: tuple[Fate, ...], result: MilResult | None, gallery: Gallery) -> Page:
    own = study.extract.encoder == "pretrained"  # else a log that lies there belongs to another encoder
    return Page(
        study=study,
        fingerprint=inputs.fingerprint,
        fates=fates,
        result=result,
        operating=operating(result) if result else None,
        charts={
            "roc": roc_chart(result) if result else None,
            "training": training_chart(result) if result else None,
            "features": feature_map_chart(inputs.features_dir, inputs.cohort, study.mil.label),
            "pretraining": pretraining_chart(read_rows(inputs.encoder_dir / "metrics.csv")) if own else None,
        },
        gallery=gallery,
        probabilities=probabilities(result) if result else {},
    )


def _gallery(study: Study, inputs: ReportInputs, fates: tuple[Fate, ...], result: MilResult | None) -> Gallery:
    heatmaps = inputs.mil_dir / "heatmaps"
    if result is None or not heatmaps.is_dir():
        return Gallery()
    drawn = [fate for fate in fates if (heatmaps / f"{fate.slide_id}.png").is_file()]
    chosen = choose(drawn, result.positive, study.report.heatmaps)
    top_file = inputs.mil_dir / "top_tiles.json"
    listed = read_json(top_file) if top_file.is_file() else {}
    top = {slide_id: [int(index) for index in indices][: study.report.top_tiles] for slide_id, indices in listed.items()}
    return build_gallery(chosen, (inputs.stores_dir, heatmaps), top)
