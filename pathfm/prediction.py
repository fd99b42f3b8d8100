"""New slides through the tiles, encoder, networks and thresholds of a bundle. Nothing is fitted.

``pathfm mil predict`` is here; the night batch (``pathfm.batch``) asks the same functions.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pathfm.config import load_study
from pathfm.errors import ExitCode, MissingExtraError, StoreError, UsageError
from pathfm.events import Events
from pathfm.extraction import run_extraction
from pathfm.faults import crash_point
from pathfm.log import plural, say, status
from pathfm.run_manifest import RunManifest
from pathfm.store.commit import commit_file, partial, read_json, write_json
from pathfm.store.interop.label_tables import named
from pathfm.store.record import Outcome, StageReport, library_versions, write_record
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import Study
from pathfm.workflow import STUDY_SUFFIXES, Run, begin, cohort_of, open_study, run_tiling, upstream_outcomes

if TYPE_CHECKING:
    from pathfm.extract.sets import FeatureSets
    from pathfm.extract.stage import Extraction
    from pathfm.mil.bundle import Bundle
    from pathfm.mil.known import TrainedRule
    from pathfm.mil.predict import Ensemble
    from pathfm.mil.prediction_table import Known, Result
    from pathfm.mil.seen import Seen

STAGE = "mil predict"
PREDICTIONS, PATIENTS, METRICS, PAGE = "predictions.csv", "patients.csv", "metrics.json", "index.html"
ASSUME_MPP = "tile.assume_mpp"
"""Said of the new slides' files, not of the classifier: a bundle has none of its own."""
MAY_BE_SET = (
    "compute.",
    "report.",
    "extract.encoder",
    "extract.weights",
    "mil.seen_in_pretraining",
    "cohort.folder_of_tiles",
    ASSUME_MPP,
)
"""What may be set besides folders that the bundle asks for: nothing that changes the classifier (nor its encoder)."""
NO_PATIENTS = "slides without patient_id count as patients of their own: intervals are too narrow if some belong together"


class Predicted(NamedTuple):
    """What was made of new slides.

    Attributes:
        result: everything that tables tell.
        report: one outcome per slide; the failed, empty and left out ones have reasons.
        features: files of the slides that were asked about.
    """

    result: Result
    report: StageReport
    features: Mapping[str, Path]


def mil_predict(
    sources: Sequence[str],
    out: Path,
    bundle: Path | None = None,
    overrides: Sequence[str] = (),
    trained: TrainedRule = "refuse",
) -> ExitCode:
    """Predicts new slides, and judges them where the table has labels.

    Args:
        sources: slides, folders, globs or one cohort table; without ``bundle`` a trained study comes first.
        out: where predictions, tiles without pixels, features and pictures go.
        bundle: of ``pathfm mil train``.
        overrides: of ``compute`` and the few others of ``MAY_BE_SET``.
        trained: what is done about labelled slides of patients whom the networks learned from.

    Raises:
        UsageError: the bundle is damaged, or does not go with these slides, this encoder or this machine.
    """
    from pathfm.compute import pick_device
    from pathfm.mil.bundle import open_bundle
    from pathfm.mil.known import check_known
    from pathfm.mil.predict import Ensemble

    started = datetime.datetime.now(datetime.UTC)
    place, slides = _place_of_bundle(sources, bundle)
    locked = open_bundle(place)
    say(f"bundle {locked.digest}")
    if out.resolve().is_relative_to(place.resolve()):
        raise UsageError("nothing is written into a bundle", where=str(out), fix="name another folder for the predictions")
    if (out / "mil").exists() or out.resolve() == place.resolve().parent.parent:
        raise UsageError("this folder holds a study of its own", where=str(out), fix="name another folder for the predictions")
    run = begin(locked_study(locked, cohort_of(slides), out, overrides))
    # Before hours of work: all that could be refused later.
    ensemble = Ensemble(locked, pick_device(run.study.compute))
    known = check_known(run.study, run.cohort, ensemble, trained)
    sets = check_locked_encoder(run, locked)
    with RunManifest(run.layout.out, STAGE, run.study) as manifest, Events(run.layout.out) as events:
        manifest.models({"bundle": locked.digest})
        manifest.inputs(known.identity)
        about = {"versions": library_versions(), "settings": locked.digest, "slides": len(run.cohort.rows)}
        events.write("run_started", stage=STAGE, **about)
        _forget_earlier(run)
        result, report, _ = predict_slides(run, ensemble, known, sets)
        _write(result, run.layout.out, trained)
        say(f"{len(result.answers.slides)} of {len(run.cohort.rows)} slides predicted: {run.layout.out / PREDICTIONS}")
        for outcome in report.outcomes:
            kind = f"slide_{outcome.status}"
            events.write(kind, stage=STAGE, slide_id=outcome.slide_id, counts=dict(outcome.counts), reason=outcome.reason)
        events.write("run_ended", stage=STAGE, counts=dict(report.statuses))
        run.reports[STAGE] = report
        write_record(run.layout.out, report, run.study.extract, started)
        manifest.outputs(run.layout.out / PREDICTIONS)
        manifest.exit_code = run.exit_code
    return run.exit_code


def _forget_earlier(run: Run) -> None:
    """Removes what was said before: it must not lie beside new pictures if this run is interrupted. Lost slides are named."""
    out, here = run.layout.out, {row.slide_id for row in run.cohort.rows}
    with suppress(FileNotFoundError), (out / PREDICTIONS).open(newline="", encoding="utf-8", errors="replace") as stream:
        lost = {row["slide_id"] for row in csv.DictReader(stream) if row.get("slide_id")} - here
        if lost:
            are = "are" if len(lost) > 1 else "is"
            what = f"{plural(len(lost), 'slide')} of an earlier prediction {are} not among these"
            say(f"note: {what}: their rows and pictures are removed ({named(sorted(lost))})")
    for name in (PREDICTIONS, METRICS, PATIENTS, PAGE):
        (out / name).unlink(missing_ok=True)


def _place_of_bundle(sources: Sequence[str], bundle: Path | None) -> tuple[Path, Sequence[str]]:
    """The bundle, and the slides; a study stands for its bundle."""
    from pathfm.mil.bundle import FILE

    if bundle is None:
        study, *slides = sources
        is_bundle = (Path(study) / FILE).is_file()
        is_study = (Path(study) / "study.yaml").is_file() or Path(study).suffix.lower() in STUDY_SUFFIXES
        if not is_bundle and not is_study:
            raise UsageError("neither a trained study nor a bundle", where=study, fix="add --bundle FOLDER before the slides")
        bundle, sources = Path(study) if is_bundle else open_study(Path(study)).out / "mil" / "bundle", slides
        if not is_bundle and not bundle.is_dir():
            if (bundle.parent / "metrics.json").is_file():
                what = "this study has no bundle: its features were made elsewhere, so new slides cannot be treated alike"
                raise UsageError(what, where=study, fix="extract the features with pathfm, and train on those")
            raise UsageError("this study has no trained classifier", where=study, fix="run `pathfm mil train` first")
    if not sources:
        raise UsageError("no slides are given", fix="name slides, folders or one cohort table")
    return bundle, sources


def locked_study(bundle: Bundle, cohort: Mapping[str, object], out: Path, overrides: Sequence[str]) -> Study:
    """The settings of the bundle, for new slides.

    Args:
        bundle: opened.
        cohort: cohort settings that name the slides.
        out: where everything goes.
        overrides: of the settings that are not locked.

    Raises:
        UsageError: something is to be set that is locked, or not set that is needed.
    """
    from pathfm.mil.bundle import locked_settings

    names = [override.partition("=")[0].strip() for override in overrides]
    locked = [name for name in names if not name.startswith(MAY_BE_SET) and name not in bundle.facts["needs"]]
    if locked:
        fix = "leave it out, or train a classifier with it"
        raise UsageError("the settings of a bundle are locked", where=locked[0], fix=fix)
    given = load_study(None, overrides)
    places = {"tile.coords": given.tile.coords, "tile.tissue.annotations": given.tile.tissue.annotations}
    said = {**places, ASSUME_MPP: given.tile.assume_mpp}
    tile, extract = locked_settings(bundle, {name: str(value) for name, value in said.items() if value})
    encoder = given.extract.encoder if "extract.encoder" in names else extract.encoder
    if bundle.encoder_dir and "extract.encoder" not in names:
        encoder = f"local-dir:{bundle.encoder_dir.absolute()}"
    if encoder == "pretrained":
        what = f"the encoder ({bundle.facts['encoder']['name']}) is not inside this bundle, and has no public name"
        raise UsageError(what, where=str(bundle.folder), fix="add --set extract.encoder=local-dir:FOLDER")
    mil = bundle.settings
    if "mil.seen_in_pretraining" in names:
        mil = mil.model_copy(update={"seen_in_pretraining": given.mil.seen_in_pretraining})
    changed = {
        "out": out.absolute(),
        "cohort": given.cohort.model_copy(update={**cohort, "patient_is_slide": True}),
        "tile": tile,
        "extract": extract.model_copy(update={"encoder": encoder, "weights": given.extract.weights}),
        "mil": mil,
    }
    return given.model_copy(update=changed)


def check_locked_encoder(run: Run, bundle: Bundle) -> FeatureSets:
    """Loads the encoder, and refuses one that is not the bundle's by all that decides features, as computed on this machine.

    Raises:
        UsageError: another encoder, or one that is not to be had here.
    """
    from pathfm.compute import pick_device
    from pathfm.extract.sets import load_sets
    from pathfm.mil.bundle import check_encoder
    from pathfm.mil.feature_cache import encoder_identity

    sets = load_sets(run.study, run.layout, None, pick_device(run.study.compute))
    sets.main.check_precision()
    recipe = {f"recipe_{name}": value for name, value in sets.by_role["main"].recipe.items()}
    check_encoder(bundle, encoder_identity(recipe), sets.main.dim, run.study.extract.encoder)
    return sets


def predict_slides(run: Run, ensemble: Ensemble, known: Known, sets: FeatureSets) -> Predicted:
    """Tiles, features and answers of all slides, and a table and pictures of each; the tables of all are left to the caller.

    Args:
        run: the slides, and the settings of the bundle.
        ensemble: of the bundle.
        known: of the slides.
        sets: the encoder, loaded.

    Raises:
        UsageError: the encoder has seen labelled slides, and that is refused.
        StoreError: the drive fails.
    """
    from pathfm.mil.feature_cache import FeatureCache
    from pathfm.mil.known import check_seen
    from pathfm.mil.predict import predict
    from pathfm.mil.prediction_pictures import Pictures
    from pathfm.mil.prediction_table import Result

    cohort = run.cohort
    run_tiling(run)
    seen = check_seen(run.study, cohort, run.layout.tiles, known)
    unfit = _unfit(run, ensemble.bundle)
    run.cohort = replace(cohort, rows=tuple(row for row in cohort.rows if row.slide_id not in unfit))
    extraction = run_extraction(run, sets)
    outcomes = {**upstream_outcomes(run, extraction), **unfit}
    run.cohort = cohort
    paths = _feature_paths(extraction, outcomes, known, seen)
    scratch = partial(run.layout.out / "scratch")
    pictures = Pictures(run.layout.out, run.layout.tiles, cohort, layers=run.study.report.heat_layers)
    with FeatureCache(int(run.study.compute.feature_cache_gb * 1e9), scratch) as cache:
        answers = predict(ensemble, paths, cohort, known.patients, cache, pictures.look)
    with suppress(OSError):
        scratch.rmdir()
    outcomes |= {slide_id: Outcome(slide_id, "failed", reason) for slide_id, reason in answers.failed.items()}
    for slide_id, reason in answers.failed.items():
        status(slide_id, "failed", reason)
    result = Result(cohort, run.layout.tiles, ensemble, known, seen, answers, outcomes)
    report = StageReport(STAGE, tuple(result.outcome(row.slide_id) for row in cohort.rows), worked=len(paths))
    return Predicted(result, report, paths)


def _feature_paths(extraction: Extraction, outcomes: Mapping[str, Outcome], known: Known, seen: Seen) -> dict[str, Path]:
    """Feature files of the slides that are asked about."""
    left_out = seen.left_out()
    return {
        slide_id: extraction.sets["main"].path(slide_id)
        for slide_id, outcome in outcomes.items()
        if outcome.status in {"done", "kept"} and known.patients[slide_id] not in left_out
    }


def _unfit(run: Run, bundle: Bundle) -> dict[str, Outcome]:
    """Slides whose tiles have another resolution than any the networks learned from."""
    from pathfm.tile.scene import GIVE_MPP

    trained, tolerance = bundle.facts["trained_with"]["mpp"], run.study.tile.mpp_tolerance
    if not trained:
        return {}
    low, high = trained[0] * (1 - tolerance), trained[1] * (1 + tolerance)
    unfit = {}
    for row in run.cohort.rows:
        store = _store(run, row.slide_id)
        if store is None or not len(store) or (store.mpp is not None and low <= store.mpp <= high):
            continue
        shown = "unknown mpp" if store.mpp is None else f"{store.mpp:.4g} mpp"
        reason = f"its tiles have {shown}, and the networks learned from {trained[0]:.4g} to {trained[1]:.4g}"
        reason += f" ({GIVE_MPP})" if store.mpp is None else ""
        status(row.slide_id, "failed", reason)
        unfit[row.slide_id] = Outcome(row.slide_id, "failed", reason)
    return unfit


def _store(run: Run, slide_id: str) -> TileStore | None:
    try:
        return open_tiles(run.layout.store(slide_id))
    except StoreError:
        return None


def _write(result: Result, out: Path, rule: TrainedRule) -> None:
    """All tables; the one that everybody looks for comes last."""
    from pathfm.mil.prediction_table import flow, patient_rows, slide_rows
    from pathfm.mil.validation import headline, validation_metrics

    known, seen = result.known, result.seen
    if known.has_labels:
        left_out = known.trained_patients if rule == "exclude" else frozenset()
        metrics = validation_metrics(result.ensemble, result.answers, left_out)
        judged = {unit.patient_id for unit in result.answers.order} - left_out
        trained = {"rule": rule, "patients": len(known.trained_patients)}
        about = {"seen_in_pretraining": seen.record(judged), "trained_on": trained, "flow": flow(result, left_out)}
        notes = [*metrics["notes"], *seen.notes(judged)]
        notes += [] if all(row.patient_id for row in result.cohort.rows) else [NO_PATIENTS]
        write_json(out / METRICS, {**metrics, **about, "notes": notes})
        say(f"external validation on {metrics['n_patients']} patients, nothing fitted: {headline(metrics)}")
    if any(row.patient_id for row in result.cohort.rows):
        write_rows(out / PATIENTS, patient_rows(result))
    crash_point("mil.predict.before_commit")
    write_rows(out / PREDICTIONS, slide_rows(result))
    if known.has_labels:
        _write_page(result, out)


def _write_page(result: Result, out: Path) -> None:
    """The page of an external validation, where somebody was judged and the libraries for pages are there."""
    from pathfm.report.mil_validation import validation_page

    if not read_json(out / METRICS).get("models"):
        return
    try:
        say(f"page: {validation_page(out, result.ensemble.bundle.settings)}")
    except MissingExtraError as error:
        say(f"no page: {error}")


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Writes a CSV table of at least one row, whole or not at all; a column that only some rows have is empty in the others."""
    listed = list(rows)
    columns = dict.fromkeys(name for row in listed for name in row)
    with commit_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(listed)
