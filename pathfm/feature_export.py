"""``pathfm export features``: features in the layouts of CLAM, TRIDENT and STAMP.

The same rules as for tiles: files appear whole or not at all, the same features give the same bytes, and nothing that is there
is replaced. Specified in ``docs/interop.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from pathfm.errors import ExitCode, PathfmError, StoreError, UsageError
from pathfm.log import say, status, track
from pathfm.looking import find_features
from pathfm.store.cohort import id_problem
from pathfm.store.commit import commit_file
from pathfm.store.export import commit_new
from pathfm.store.feature_file import FeatureFile, open_features
from pathfm.store.interop import feature_writers
from pathfm.store.record import Outcome, StageReport, read_record
from pathfm.workflow import begin, open_study

Writer = Callable[[Path, str, FeatureFile], None]


def export_features(source: Path, out: Path, format: str, features: str = "") -> ExitCode:
    """Writes features as another tool does; one bad file does not stop the others.

    Args:
        source: a study file, its output folder, a folder of feature files, or one feature file.
        out: made if need be; what is there with other content stays, and fails that slide.
        format: one of ``FORMATS``.
        features: which of a study's features, by the name of their folder; default: those of its encoder.

    Returns:
        3 when a slide failed, or has no features.

    Raises:
        UsageError: an unknown format, no features in the source, or several and nothing tells which.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}", where="--format", fix=f"one of {', '.join(FORMATS)}")
    files, missing = _feature_files(source, features)
    outcomes = (*missing, *track((_export(file, out, format) for file in files), "export", len(files)))
    for outcome in outcomes:
        if outcome.status != "done":
            status(outcome.slide_id, outcome.status, outcome.reason)
    report = StageReport("export", outcomes)
    say(f"export: {', '.join(f'{number} {name}' for name, number in sorted(report.statuses.items()))} in {out}")
    return report.exit_code


def _export(path: Path, out: Path, format: str) -> Outcome:
    try:
        file = open_features(path)
        slide_id = str(file.attrs.get("slide_id", path.stem))
        if problem := id_problem(slide_id):
            raise StoreError(problem, where=str(path))
        if file.attrs.get("coords_synthetic"):
            raise StoreError("the tiles have no coordinates on a slide", where=str(path))
        for target, write in FORMATS[format](out, slide_id, file):
            _write(target, write, slide_id, file)
    except PathfmError as error:
        return Outcome(path.stem, "failed", error.reason)
    return Outcome(slide_id, "done", counts={"tiles": int(file.valid.sum())})


def _write(target: Path, write: Writer, slide_id: str, file: FeatureFile) -> None:
    try:
        with commit_new(commit_file, target) as temporary:
            write(temporary, slide_id, file)
    except OSError as error:
        raise StoreError(f"export broke off: {error.strerror or error}", where=str(target)) from error


def _clam(out: Path, slide_id: str, file: FeatureFile) -> Iterator[tuple[Path, Writer]]:
    yield out / "h5_files" / f"{slide_id}.h5", feature_writers.write_clam_features
    yield out / "pt_files" / f"{slide_id}.pt", _write_clam_pt


def _write_clam_pt(path: Path, slide_id: str, file: FeatureFile) -> None:
    from pathfm.models.pt_files import write_pt

    write_pt(path, file.features[file.valid])


def _trident(out: Path, slide_id: str, file: FeatureFile) -> Iterator[tuple[Path, Writer]]:
    name = feature_writers.encoder_name(file)
    yield out / f"features_{name}" / f"{slide_id}.h5", feature_writers.write_trident_features


def _stamp(out: Path, slide_id: str, file: FeatureFile) -> Iterator[tuple[Path, Writer]]:
    name = f"{feature_writers.encoder_name(file)}-{feature_writers.recipe_hash(file)}"
    yield out / name / f"{slide_id}.h5", feature_writers.write_stamp_features


FORMATS: dict[str, Callable[[Path, str, FeatureFile], Iterator[tuple[Path, Writer]]]] = {
    "clam": _clam,
    "trident": _trident,
    "stamp": _stamp,
}
"""What ``export_features`` can write: which files of a slide, and how."""


def _feature_files(source: Path, features: str) -> tuple[list[Path], list[Outcome]]:
    """One file, the files of a folder, or those of a study's encoder; and why the study's other slides have none."""
    if source.suffix == ".h5":
        return [source], []
    if source.is_dir() and (found := sorted(source.glob("*.h5"))):
        return found, []
    run = begin(open_study(source))
    folder = find_features(run, features)
    files = {row.slide_id: folder / f"{row.slide_id}.h5" for row in run.cohort.rows}
    record = read_record(folder)
    known = {each.slide_id: each for each in (record.outcomes if record else ()) if each.status in {"failed", "empty"}}
    missing = [slide_id for slide_id, file in files.items() if not file.is_file()]
    why = "no features (run `pathfm extract`)"
    outcomes = [known.get(slide_id, Outcome(slide_id, "failed", why)) for slide_id in missing]
    return [file for slide_id, file in files.items() if slide_id not in missing], outcomes
