"""Stages in order: what a command runs, what is stale, and how it ends. Stage code is imported when it runs."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.config import dump_study, fingerprint, load_study
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.log import say, status
from pathfm.store.cohort import Cohort, check_labels, load_cohort
from pathfm.store.commit import commit_file, read_json, sweep, write_json
from pathfm.store.feature_file import read_feature_attrs
from pathfm.store.layout import Layout, tile_spec
from pathfm.store.record import Outcome, StageReport, read_record
from pathfm.store.tile_store import open_tiles
from pathfm.study import Study

if TYPE_CHECKING:
    from pathfm.extract.stage import Extraction
    from pathfm.mil.predict import Prediction

STUDY_SUFFIXES = {".yaml", ".yml"}
TABLE_SUFFIXES = {".csv", ".tsv"}
PRETRAINED = "pretrained encoder"
ENCODER_FILE = "encoder.json"
"""Beside the trained classifier: the encoder its features came from."""


@dataclass
class Run:
    """A study under way: its cohort, its paths, and what the stages have reported so far."""

    study: Study
    cohort: Cohort
    layout: Layout
    reports: dict[str, StageReport] = field(default_factory=dict)

    def note(self, report: StageReport) -> None:
        """Keeps a stage's report and says in one paragraph what became of it."""
        self.reports[report.stage] = report
        for outcome in report.outcomes:
            if outcome.status in {"failed", "empty"}:
                status(outcome.slide_id, outcome.status, outcome.reason)
        counts = ", ".join(f"{number} {name}" for name, number in sorted(report.statuses.items()))
        summary = "nothing to do" if report.did_nothing and not counts else counts
        if report.did_nothing and counts:
            summary = f"nothing to do ({counts})"
        say(f"{report.stage}: {summary}{f' - {report.note}' if report.note else ''}")

    @property
    def exit_code(self) -> ExitCode:
        """The worst of the stages."""
        return max((report.exit_code for report in self.reports.values()), default=ExitCode.DONE)


def open_study(source: Path, overrides: Sequence[str] = ()) -> Study:
    """The study of a YAML file, or of the output folder of an earlier command (which keeps its ``study.yaml``).

    Raises:
        UsageError: neither of the two.
    """
    if source.is_dir():
        file = source / "study.yaml"
        if not file.is_file():
            raise UsageError(
                "no study.yaml in this folder", where=str(source), fix="name a study file, or run `pathfm tile` first"
            )
        return load_study(file, overrides)
    return load_study(source, overrides)


def study_from_sources(sources: Sequence[str], overrides: Sequence[str]) -> Study:
    """The study that ``pathfm tile SOURCES`` means: a study file, a cohort table, or slides.

    Raises:
        UsageError: slides without an output folder, or a study file beside other sources.
    """
    suffixes = {Path(source).suffix.lower() for source in sources}
    if len(sources) == 1 and (suffixes & STUDY_SUFFIXES or (Path(sources[0]) / "study.yaml").is_file()):
        return open_study(Path(sources[0]), overrides)
    if suffixes & (STUDY_SUFFIXES | TABLE_SUFFIXES) and len(sources) > 1:
        raise UsageError("a study file or cohort table stands alone", where=" ".join(sources), fix="name it and nothing else")
    if not any(override.startswith("out=") for override in overrides):
        raise UsageError("no output folder", fix="add --out DIR")
    study = load_study(None, overrides)
    return study.model_copy(update={"cohort": study.cohort.model_copy(update=_cohort_of(sources))})


def _cohort_of(sources: Sequence[str]) -> dict[str, object]:
    # abspath, not resolve: a symbolic link is named as the user named it.
    placed = [os.path.abspath(source) for source in sources]  # noqa: PTH100
    if len(sources) == 1 and Path(sources[0]).suffix.lower() in TABLE_SUFFIXES:
        return {"table": Path(placed[0]), "slides": ()}
    return {"table": None, "slides": tuple(placed)}


def begin(study: Study) -> Run:
    """Checks the cohort, whole, before any work, and keeps the resolved settings in the output folder."""
    from pathfm.tile.stage import tile_settings_digest

    cohort = load_cohort(study.cohort, Path.cwd(), _find_slides)
    layout = Layout(study.out, tile_spec(study.tile, tile_settings_digest(study.tile)))
    sweep(study.out)
    text = dump_study(study)
    if not layout.study_file.is_file() or layout.study_file.read_text(encoding="utf-8") != text:
        with commit_file(layout.study_file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return Run(study, cohort, layout)


def _find_slides(sources: Sequence[str], folder_of_tiles: bool) -> Sequence[tuple[str, Path]]:
    from pathfm.slides.discover import discover

    found = discover(sources, folder_of_tiles)
    for path in found.ignored:
        status(path.name, "ignored", "not a slide by its suffix; list it in a cohort table to use it")
    return found.slides


def tile(study: Study) -> ExitCode:
    """``pathfm tile``."""
    run = begin(study)
    _tile(run)
    return run.exit_code


def pretrain(study: Study) -> ExitCode:
    """``pathfm pretrain``."""
    run = begin(study)
    _pretrain(run)
    return run.exit_code


def extract(study: Study) -> ExitCode:
    """``pathfm extract``."""
    run = begin(study)
    _extract(run)
    return run.exit_code


def mil_train(study: Study) -> ExitCode:
    """``pathfm mil train``: features must be there; ends with the report."""
    run = begin(study)
    _check_for_mil(run)
    for folder in (run.layout.tiles,):
        kept = read_record(folder)
        if kept:
            run.reports[kept.stage] = kept
    _mil(run, _extract(run))
    _report(run)
    return run.exit_code


def run(study: Study) -> ExitCode:
    """``pathfm run``: every stage in order, each doing only what is stale."""
    run = begin(study)
    _check_for_mil(run)
    _tile(run)
    if study.extract.encoder == "pretrained":
        _pretrain(run)
    _mil(run, _extract(run))
    _report(run)
    if all(report.did_nothing for report in run.reports.values()):
        say("everything is up to date: nothing was done")
    return run.exit_code


def _check_for_mil(run: Run) -> None:
    """What only ``mil`` needs, checked before hours of tiling."""
    check_labels(run.cohort, run.study.mil.label, run.study.mil.level)
    if not run.study.cohort.patient_is_slide and any(row.patient_id is None for row in run.cohort.rows):
        raise UsageError(
            "mil refuses to split without patients: slides of one patient on both sides of a split make every number too good",
            where="cohort",
            fix="add a patient_id column, or pass --patient-is-slide if every slide is another patient",
        )


def _tile(run: Run) -> None:
    from pathfm.tile.stage import run_tile

    run.note(run_tile(run.study, run.cohort, run.layout))


def _stores(run: Run) -> dict[str, Path]:
    """Tile stores that hold tiles, by slide."""
    stores = {}
    for row in run.cohort.rows:
        try:
            store = open_tiles(run.layout.store(row.slide_id))
        except StoreError:
            continue
        if len(store):
            stores[row.slide_id] = store.path
    if not stores:
        raise StoreError(
            "no slide has tiles", where=str(run.layout.tiles), fix="run `pathfm tile`, and see its record for the reasons"
        )
    return stores


def _pretrain(run: Run) -> None:
    from pathfm.pretrain.stage import VERSION, run_pretrain

    stores = _stores(run)
    digest = _pretrain_fingerprint(run, VERSION, stores)
    folder = run.layout.encoder(run.study.pretrain.backbone, digest)
    run.note(run_pretrain(run.study, [stores[slide_id] for slide_id in sorted(stores)], folder, digest))


def _pretrain_fingerprint(run: Run, version: int, stores: Mapping[str, Path]) -> str:
    inputs = {slide_id: open_tiles(path).fingerprint for slide_id, path in stores.items()}
    return fingerprint({"version": version, "stores": inputs}, run.study.pretrain)


def _own_encoder(run: Run) -> Path | None:
    """Folder of the study's own encoder, None when a public one is used."""
    if run.study.extract.encoder != "pretrained":
        return None
    from pathfm.pretrain.stage import VERSION

    digest = _pretrain_fingerprint(run, VERSION, _stores(run))
    return run.layout.encoder(run.study.pretrain.backbone, digest)


def _extract(run: Run) -> Extraction:
    from pathfm.extract.stage import run_extract

    extraction = run_extract(run.study, run.cohort, run.layout, _own_encoder(run))
    run.note(extraction.report)
    return extraction


def _mil(run: Run, extraction: Extraction) -> None:
    from pathfm.mil.inputs import MilInputs
    from pathfm.mil.stage import VERSION, run_mil

    main = extraction.sets["main"]
    upstream = {outcome.slide_id: outcome for outcome in extraction.report.outcomes}
    for outcome in run.reports["tile"].outcomes if "tile" in run.reports else ():
        if outcome.status == "failed":
            upstream[outcome.slide_id] = outcome
    folders = {role: features.folder for role, features in extraction.sets.items()}
    inputs = MilInputs(
        features_dirs=folders,
        stores_dir=run.layout.tiles,
        mil_dir=run.layout.mil,
        upstream=upstream,
        main_name=PRETRAINED if run.study.extract.encoder == "pretrained" else main.name,
        fingerprint=_mil_fingerprint(run, VERSION, folders, upstream),
    )
    run.note(run_mil(run.study, run.cohort, inputs))
    own = _own_encoder(run)
    name = f"local-dir:{(own / 'teacher').relative_to(run.layout.out)}" if own else run.study.extract.encoder
    write_json(run.layout.mil / ENCODER_FILE, {"encoder": name})


def _mil_fingerprint(run: Run, version: int, folders: Mapping[str, Path], upstream: Mapping[str, Outcome]) -> str:
    """Features, labels, patients, truth and settings: what predictions depend on."""
    rows = sorted(run.cohort.rows, key=lambda row: row.slide_id)
    label = run.study.mil.label
    slides = [
        {
            "slide_id": row.slide_id,
            "patient_id": row.patient_id,
            "label": row.labels.get(label, ""),
            "split": row.split,
            "truth": _file_digest(row.lesion_mask),
            "outcome": upstream[row.slide_id].status if upstream[row.slide_id].status in {"failed", "empty"} else "used",
            "features": {role: _feature_fingerprint(folder / f"{row.slide_id}.h5") for role, folder in folders.items()},
        }
        for row in rows
    ]
    truth = _file_digest(run.study.cohort.tile_labels)
    inputs = {"version": version, "slides": slides, "truth": truth, "patient_is_slide": run.study.cohort.patient_is_slide}
    return fingerprint(inputs, run.study.mil, run.study.report.top_tiles)


def _feature_fingerprint(path: Path) -> str:
    attrs = read_feature_attrs(path)
    return str(attrs.get("fingerprint", "")) if attrs else ""


def _file_digest(path: Path | None) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def _report(run: Run) -> None:
    from pathfm.report.stage import ReportInputs, run_report

    metrics = read_json(run.layout.mil / "metrics.json")
    inputs = ReportInputs(
        out=run.layout.out,
        report_dir=run.layout.report,
        mil_dir=run.layout.mil,
        encoder_dir=_own_encoder(run) or run.layout.out / "encoder",
        stores_dir=run.layout.tiles,
        records=dict(run.reports),
        fingerprint=fingerprint(str(metrics["fingerprint"]), run.study.report, _outcome_rows(run)),
        cohort=run.cohort,
    )
    run.note(run_report(run.study, inputs))


def _outcome_rows(run: Run) -> list[list[str]]:
    """What the report says of each slide, without the difference between done now and done before."""
    plain = {"kept": "done"}
    return [
        [stage, outcome.slide_id, plain.get(outcome.status, outcome.status), outcome.reason]
        for stage, report in sorted(run.reports.items())
        for outcome in report.outcomes
    ]


def mil_predict(study: Study, sources: Sequence[str], out: Path) -> ExitCode:
    """``pathfm mil predict``: new slides through the tiles, encoder and networks of a trained study."""
    from pathfm.mil.predict import predict

    trained = study.out
    if not (trained / "mil" / "metrics.json").is_file():
        raise UsageError("this study has no trained classifier", where=str(trained), fix="run `pathfm mil train` first")
    encoder = str(read_json(trained / "mil" / ENCODER_FILE)["encoder"])
    if study.extract.encoder == "pretrained":
        encoder = f"local-dir:{trained / encoder.removeprefix('local-dir:')}"
    cohort = study.cohort.model_copy(update={**_cohort_of(sources), "tile_labels": None})
    extract = study.extract.model_copy(update={"encoder": encoder, "controls": False})
    run = begin(study.model_copy(update={"out": out.absolute(), "cohort": cohort, "extract": extract}))
    _tile(run)
    extraction = _extract(run)
    usable = [outcome.slide_id for outcome in extraction.report.outcomes if outcome.status in {"done", "kept"}]
    folder = extraction.sets["main"].folder
    predictions = predict(trained / "mil", [folder / f"{slide_id}.h5" for slide_id in usable])
    with (
        commit_file(run.layout.out / "predictions.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        csv.writer(stream).writerows(_prediction_rows(predictions, extraction.report))
    say(f"{len(usable)} of {len(run.cohort.rows)} slides predicted: {run.layout.out / 'predictions.csv'}")
    return run.exit_code


def _prediction_rows(predictions: Sequence[Prediction], report: StageReport) -> Iterator[list[str]]:
    """One row per slide, the failed and empty ones with their reason."""
    by_slide = {prediction.slide_id: prediction for prediction in predictions}
    classes = list(predictions[0].probability) if predictions else []
    yield ["slide_id", "outcome", "predicted", *(f"p_{name}" for name in classes), "lowest", "highest", "reason"]
    for outcome in report.outcomes:
        found = by_slide.get(outcome.slide_id)
        if found is None:
            yield [outcome.slide_id, outcome.status, *[""] * (len(classes) + 3), outcome.reason]
            continue
        numbers = [*found.probability.values(), found.lowest, found.highest]
        yield [outcome.slide_id, "predicted", found.predicted, *(f"{number:.6f}" for number in numbers), ""]
