"""What surrounds the mil stage: whose features it takes, what it needs to know of them, and the report that follows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.config import fingerprint
from pathfm.errors import ExitCode, UsageError
from pathfm.log import say
from pathfm.run_manifest import recorded
from pathfm.store.commit import read_json
from pathfm.store.feature_file import read_feature_attrs
from pathfm.store.record import Outcome, StageReport, read_record
from pathfm.study import Study
from pathfm.workflow import PRETRAINED, Run, begin, keep_settings, own_encoder, upstream_outcomes

if TYPE_CHECKING:
    from pathfm.extract.stage import Extraction
    from pathfm.mil.inputs import MilInputs


def mil_train(study: Study) -> ExitCode:
    """``pathfm mil train``: features must be there; ends with the locked bundle and the report."""
    return recorded("mil train", study, lambda: _mil_train(study))


def _mil_train(study: Study) -> ExitCode:
    run = begin(study, needs_slides=study.mil.features is None)
    check_for_mil(run)
    if study.mil.features is not None:
        _train_on_features(run, study.mil.features)
        keep_settings(run)
        return run.exit_code
    from pathfm.extraction import run_extraction

    kept, slides = read_record(run.layout.tiles), {row.slide_id for row in run.cohort.rows}
    if kept:
        mine = tuple(outcome for outcome in kept.outcomes if outcome.slide_id in slides)
        run.reports[kept.stage] = StageReport(kept.stage, mine)
    _train_and_report(run, inputs_of(run, run_extraction(run)))
    # Settings that were refused are not worth keeping.
    keep_settings(run)
    return run.exit_code


def check_for_mil(run: Run) -> None:
    """What only ``mil`` needs, checked before hours of tiling.

    Raises:
        UsageError: no patients, or labels that nothing can be learned from.
    """
    from pathfm.mil.held_out import held_out_slides
    from pathfm.mil.roster import check_cohort, labelled_units, patient_ids
    from pathfm.mil.tasks import make_tasks

    check_cohort(run.cohort, run.study.mil)
    if not run.study.cohort.patient_is_slide and any(row.patient_id is None for row in run.cohort.rows):
        raise UsageError(
            "mil refuses to split without patients: slides of one patient on both sides of a split make every number too good",
            where="cohort",
            fix="add a patient_id column, or pass --patient-is-slide if every slide is another patient",
        )
    patients = patient_ids(run.cohort, run.study.cohort)
    make_tasks(run.study.mil, [unit.labels for unit in labelled_units(run.cohort, patients, run.study.mil)])
    held_out_slides(run.study, run.cohort)


def inputs_of(run: Run, extraction: Extraction) -> MilInputs:
    """What the mil stage starts from, with the study's own features."""
    from pathfm.mil.inputs import Deploy, MilInputs

    own = own_encoder(run)
    main, upstream = extraction.sets["main"], upstream_outcomes(run, extraction)
    folders = {role: extraction.sets[role].folder for role in ("main", "untrained", "colour") if role in extraction.sets}
    scheme, _, place = run.study.extract.encoder.partition(":")
    # What "auto" came to here must hold for new slides too, on whatever machine.
    extract = run.study.extract.model_copy(update={"precision": main.recipe["precision"]})
    return MilInputs(
        features_dirs=folders,
        stores_dir=run.layout.tiles,
        mil_dir=run.layout.mil,
        encoder_dir=own / "teacher" if own else None,
        upstream=upstream,
        main_name=PRETRAINED if run.study.extract.encoder == "pretrained" else main.name,
        fingerprint=_fingerprint(run, folders, upstream),
        deploy=Deploy(run.study.tile, extract, own / "teacher" if own else Path(place) if scheme == "local-dir" else None),
    )


def _train_on_features(run: Run, folder: Path) -> None:
    """The mil stage on feature files that were made elsewhere: no tiles, no encoder, no controls that need pixels."""
    from pathfm.mil.foreign_inputs import ForeignFolder
    from pathfm.mil.inputs import MilInputs

    inputs = MilInputs(
        features_dirs={"main": folder},
        stores_dir=run.layout.tiles,
        mil_dir=run.layout.mil,
        upstream={},
        main_name=f"features in {folder.name}",
        fingerprint=_fingerprint(run, {}, {}),
        foreign=ForeignFolder(folder),
    )
    _train_and_report(run, inputs)


def _train_and_report(run: Run, inputs: MilInputs) -> None:
    train(run, inputs)
    report_on(run, inputs.features_dirs["main"], own_encoder(run) or run.layout.out / "encoder", run.reports)


def train(run: Run, inputs: MilInputs) -> None:
    """The mil stage, noted."""
    from pathfm.mil.stage import run_mil

    run.note(run_mil(run.study, run.cohort, inputs))
    say(f"bundle: {run.layout.mil / 'bundle'}" if inputs.deploy else "no bundle: features of new slides cannot be made here")


def report_on(run: Run, features_dir: Path, encoder_dir: Path, upstream: Mapping[str, StageReport]) -> None:
    """The report, noted, and its key numbers.

    Args:
        run: the study, trained.
        features_dir: the main features.
        encoder_dir: of the study's own encoder; absent for others.
        upstream: what became of slides in tile and extract.
    """
    from pathfm.report.stage import ReportInputs, run_report
    from pathfm.report.summary import key_numbers

    trained = run.reports.get("mil") or read_record(run.layout.mil)
    records = {stage: upstream[stage] for stage in ("tile", "extract") if stage in upstream}
    records |= {"mil": trained} if trained else {}
    metrics = read_json(run.layout.mil / "metrics.json")
    shown = ReportInputs(
        out=run.layout.out,
        report_dir=run.layout.report,
        mil_dir=run.layout.mil,
        encoder_dir=encoder_dir,
        stores_dir=run.layout.tiles,
        features_dir=features_dir,
        records=records,
        fingerprint=fingerprint(str(metrics["fingerprint"]), run.study.report, _outcome_rows(records)),
        cohort=run.cohort,
    )
    run.note(run_report(run.study, shown))
    for line in key_numbers(read_json(run.layout.report / "summary.json")):
        say(line)


def _fingerprint(run: Run, folders: Mapping[str, Path], upstream: Mapping[str, Outcome]) -> str:
    """Features, labels, patients, truth and settings: what predictions depend on."""
    from pathfm.mil.ensemble import VERSION
    from pathfm.mil.roster import all_columns

    slides = [
        {
            "slide_id": row.slide_id,
            "patient_id": row.patient_id,
            "specimen_id": row.specimen_id,
            "labels": {name: row.labels.get(name, "") for name in all_columns(run.study.mil)},
            "split": row.split,
            "site": row.site,
            "truth": _file_digest(row.lesion_mask),
            "outcome": _fate(upstream.get(row.slide_id)),
            "features": {role: _feature_fingerprint(folder / f"{row.slide_id}.h5") for role, folder in folders.items()},
        }
        for row in sorted(run.cohort.rows, key=lambda row: row.slide_id)
    ]
    truth = _file_digest(run.study.cohort.tile_labels)
    inputs = {"version": VERSION, "slides": slides, "truth": truth, "patient_is_slide": run.study.cohort.patient_is_slide}
    return fingerprint(inputs, run.study.mil.model_dump(mode="json", exclude={"features": True, "split": {"file", "keep"}}))


def _fate(outcome: Outcome | None) -> str:
    return outcome.status if outcome and outcome.status in {"failed", "empty"} else "used"


def _feature_fingerprint(path: Path) -> str:
    attrs = read_feature_attrs(path)
    return str(attrs.get("fingerprint", "")) if attrs else ""


def _file_digest(path: Path | None) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def _outcome_rows(records: Mapping[str, StageReport]) -> list[list[str]]:
    """What the report says of each slide, without the difference between done now and done before."""
    plain = {"kept": "done"}
    return sorted(
        [stage, outcome.slide_id, plain.get(outcome.status, outcome.status), outcome.reason]
        for stage, report in records.items()
        for outcome in report.outcomes
    )
