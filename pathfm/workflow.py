"""Stages in order: what a command runs, what is stale, and how it ends. Stage code is imported when it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.addresses import is_remote, public_name, remote_url
from pathfm.config import dump_study, load_study, not_default
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.log import say, status
from pathfm.run_manifest import recorded
from pathfm.store.cohort import Cohort, load_cohort
from pathfm.store.commit import commit_file, sweep
from pathfm.store.layout import Layout, tile_spec
from pathfm.store.lease import WATCH, Leases, holder
from pathfm.store.pseudonyms import refuse_named_files
from pathfm.store.record import Outcome, StageReport
from pathfm.store.tile_store import open_tiles
from pathfm.study import CohortSettings, ComputeSettings, Study
from pathfm.workers import ProcessName

if TYPE_CHECKING:
    from pathfm.extract.stage import Extraction

STUDY_SUFFIXES = {".yaml", ".yml"}
TABLE_SUFFIXES = {".csv", ".tsv", ".xlsx"}
PRETRAINED = "pretrained encoder"
SHOWN = 8
"""Kept settings that are named."""


@dataclass
class Run:
    """A study under way: its cohort, its paths, and what the stages have reported so far.

    Attributes:
        stale: slides whose store is not what tiling would make now.
        stores: tile stores that are up to date, once they have been looked at.
        encoder: folder of the study's own encoder, where it is known without a look at the tiles that it was made of.
    """

    study: Study
    cohort: Cohort
    layout: Layout
    reports: dict[str, StageReport] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    stores: dict[str, Path] | None = None
    encoder: Path | None = None

    def note(self, report: StageReport) -> None:
        """Keeps a stage's report and says in one paragraph what became of it."""
        self.reports[report.stage] = report
        for outcome in report.outcomes:
            if outcome.status in {"failed", "empty"}:
                status(outcome.slide_id, outcome.status, outcome.reason)
        counts = ", ".join(f"{number} {name}" for name, number in sorted(report.statuses.items()))
        summary = counts or ("nothing to do" if report.did_nothing else "written")
        if report.did_nothing and counts:
            summary = f"nothing to do ({counts})"
        say(f"{report.stage}: {summary}{f' - {report.note}' if report.note else ''}")

    @property
    def exit_code(self) -> ExitCode:
        """The worst of the stages."""
        return max((report.exit_code for report in self.reports.values()), default=ExitCode.DONE)


def open_study(source: Path, overrides: Sequence[str] = (), stage: str = "") -> Study:
    """The study of a YAML file, or of the output folder of an earlier command (which keeps its ``study.yaml``).

    Args:
        source: the file or folder.
        overrides: as ``tile.mpp=0.5``.
        stage: tile, pretrain, extract or mil: what a folder keeps of its settings is said; empty: of none.

    Raises:
        UsageError: neither of the two.
    """
    if source.is_dir():
        file = source / "study.yaml"
        if not file.is_file():
            raise UsageError(
                "no study.yaml in this folder", where=str(source), fix="name a study file, or run `pathfm tile` first"
            )
        study = load_study(file, _one_cohort(overrides))
        _say_kept(file, study, overrides, stage)
        # The folder may have been moved since: it is the output folder, wherever its settings say it was.
        is_given = any(override.partition("=")[0].strip() == "out" for override in overrides)
        return study if is_given else study.model_copy(update={"out": source.absolute()})
    return load_study(source, _one_cohort(overrides))


def _say_kept(file: Path, study: Study, overrides: Sequence[str], stage: str) -> None:
    """Says which settings of a stage are neither defaults nor given now."""
    given = tuple(override.partition("=")[0].strip() for override in overrides)
    changed = not_default(study, stage) if stage else {}
    kept = [f"{name}={value}" for name, value in changed.items() if not f"{name}.".startswith(tuple(f"{it}." for it in given))]
    if kept:
        more = f" and {len(kept) - SHOWN} more" if len(kept) > SHOWN else ""
        say(f"kept settings of {file}: {', '.join(kept[:SHOWN])}{more} (change with --set)")


def _one_cohort(overrides: Sequence[str]) -> list[str]:
    """A cohort given on the command line replaces the kept one, of whichever kind that is."""
    given = {override.partition("=")[0].strip() for override in overrides}
    cleared = ["cohort.slides=[]"] * ("cohort.table" in given) + ["cohort.table=null"] * ("cohort.slides" in given)
    return [*cleared, *overrides]


def study_from_sources(sources: Sequence[str], overrides: Sequence[str], stage: str = "tile") -> Study:
    """The study that ``pathfm tile SOURCES`` means: a study file, a cohort table, or slides.

    Args:
        sources: of the command line.
        overrides: as ``tile.mpp=0.5``.
        stage: of ``open_study``.

    Raises:
        UsageError: slides without an output folder, a study file beside other sources, or slides in place of a cohort table.
    """
    suffixes = {Path(source).suffix.lower() for source in sources}
    if len(sources) == 1 and (suffixes & STUDY_SUFFIXES or (Path(sources[0]) / "study.yaml").is_file()):
        return open_study(Path(sources[0]), overrides, stage)
    if suffixes & (STUDY_SUFFIXES | TABLE_SUFFIXES) and len(sources) > 1:
        raise UsageError("a study file or cohort table stands alone", where=" ".join(sources), fix="name it and nothing else")
    out = next((Path(override.removeprefix("out=")) for override in overrides if override.startswith("out=")), None)
    if out is None:
        raise UsageError("no output folder", fix="add --out DIR")
    # An output folder that has settings keeps them: a table that brings the labels later must not undo how tiles were made.
    kept = (out / "study.yaml").is_file()
    # What kind of sources these are is said with them.
    plain = ["cohort.folder_of_tiles=false"] if kept else []
    study = open_study(out, [*plain, *overrides], stage) if kept else load_study(None, overrides)
    cohort = study.cohort.model_copy(update=cohort_of(sources))
    if kept:
        _compare_cohorts(study.cohort, cohort, out)
    return study.model_copy(update={"cohort": cohort})


def _compare_cohorts(was: CohortSettings, now: CohortSettings, out: Path) -> None:
    """Says that a folder gets another cohort; a table is not given up for slides, since labels would be lost."""
    if was.table and not now.table:
        fix = "name another --out; or add --set cohort.table=null, and the slides replace the table"
        raise UsageError(f"the cohort of this folder is {was.table.name}, with patients and labels", where=str(out), fix=fix)
    names = [it.table.name if it.table else ", ".join(Path(source).name for source in it.slides) for it in (was, now)]
    if names[0] and (was.table, was.slides) != (now.table, now.slides):
        say(f"the cohort of {out} is now {names[1]} (was {names[0]})")


def cohort_of(sources: Sequence[str]) -> dict[str, object]:
    """The cohort settings that sources on a command line mean: one table, or slides."""
    for source in sources:
        if is_remote(source) and public_name(source) != remote_url(source):
            raise UsageError(
                "an address with a user, a password or a query would be kept in study.yaml",
                where=public_name(source),
                fix="put it into a cohort table, or give credentials by the environment",
            )
    # abspath, not resolve: a symbolic link is named as the user named it.
    placed = [source if is_remote(source) else os.path.abspath(source) for source in sources]  # noqa: PTH100
    if len(sources) == 1 and Path(sources[0]).suffix.lower() in TABLE_SUFFIXES:
        return {"table": Path(placed[0]), "slides": ()}
    return {"table": None, "slides": tuple(placed)}


def begin(study: Study, needs_slides: bool = True) -> Run:
    """Checks the cohort, whole, before any work."""
    from pathfm.tile.stage import tile_settings_digest

    _check_places(study)
    refuse_named_files(study)
    cohort = load_cohort(study.cohort, Path.cwd(), _find_slides, needs_slides=needs_slides)
    layout = Layout(study.out, tile_spec(study.tile, tile_settings_digest(study.tile)))
    sweep(study.out)
    return Run(study, cohort, layout)


@contextmanager
def study_to_oneself(out: Path) -> Iterator[None]:
    """The right to run an engine on a study; a lease, so that it ends with its holder.

    Raises:
        UsageError: another engine has it.
    """
    target, ttl_s = out / "engine", ComputeSettings().lease_s
    here = f"host {ProcessName.here().host},"
    with Leases(ttl_s) as leases:
        lease = leases.take(target)
        # Whether a holder on another machine is alive shows after a while only.
        until = time.monotonic() + ttl_s * WATCH * 1.2
        while lease is None and not holder(target).startswith(here) and time.monotonic() < until:
            time.sleep(1.0)
            lease = leases.take(target)
        if lease is None:
            fix = f"wait for it, or end it; that of a machine that died is free after {ttl_s:g} s"
            raise UsageError(f"another engine works on this study ({holder(target)})", where=str(out), fix=fix)
        yield


@contextmanager
def alone_at(target: Path, lease_s: float) -> Iterator[None]:
    """The right to make something alone. A job whose engine was killed may still be at it: it is waited for, not doubled."""
    with Leases(lease_s) as leases:
        if leases.take(target) is None:
            say(f"another process makes {target.name} ({holder(target)}): waiting")
            next(leases.each([target], lambda it: it, lambda it: False))
        yield


def _check_places(study: Study) -> None:
    """Folders that settings name must be there, and the output must be a folder: a mistyped one must not mean "none"."""
    for name, folder in {"tile.tissue.annotations": study.tile.tissue.annotations, "tile.coords": study.tile.coords}.items():
        if folder is not None and not folder.is_dir():
            raise UsageError("there is no such folder", where=f"{name}={folder}", fix="check the path")
    existing = next(place for place in (study.out, *study.out.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise UsageError("not a folder", where=str(existing), fix="choose another output folder")


def keep_settings(run: Run) -> None:
    """Keeps the resolved settings in the output folder, for the commands that follow; called once they have proved usable."""
    # What concerns this run alone must not decide about the next: a shard would hide the other slides.
    compute = run.study.compute.model_copy(update={"shard": "", "cache_dir": None})
    text, file = dump_study(run.study.model_copy(update={"compute": compute}), keeps_preset=True), run.layout.study_file
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        with commit_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _find_slides(sources: Sequence[str], folder_of_tiles: bool) -> Sequence[tuple[str, Path]]:
    from pathfm.slides.discover import discover

    found = discover(sources, folder_of_tiles)
    for path in found.ignored:
        status(path.name, "ignored", "not a slide by its suffix; list it in a cohort table to use it")
    return found.slides


def tile(study: Study) -> ExitCode:
    """``pathfm tile``."""
    return recorded("tile", study, lambda: _tile(study))


def _tile(study: Study) -> ExitCode:
    from pathfm.tiling import say_keep_note

    run = begin(study)
    keep_settings(run)
    run_tiling(run)
    say_keep_note(study)
    return run.exit_code


def pretrain(study: Study) -> ExitCode:
    """``pathfm pretrain``; under torchrun or SLURM every process calls it, and the first of them writes and tells."""
    from pathfm.pretrain.launch import process_rank
    from pathfm.pretraining import run_pretraining

    def work() -> ExitCode:
        run = begin(study)
        run_pretraining(run)
        if process_rank() == 0:
            keep_settings(run)
        return run.exit_code

    return recorded("pretrain", study, work) if process_rank() == 0 else work()


def extract(study: Study, tiles_too: bool = False) -> ExitCode:
    """``pathfm extract``; ``tiles_too``: of slides that no command has tiled yet."""
    return recorded("extract", study, lambda: _extract(study, tiles_too))


def _extract(study: Study, tiles_too: bool) -> ExitCode:
    from pathfm.extraction import check_encoders, run_extraction

    run = begin(study)
    if tiles_too:
        check_encoders(run)
        keep_settings(run)
        run_tiling(run)
    # Settings that made nothing are not worth keeping.
    if any(outcome.status in {"done", "kept"} for outcome in run_extraction(run).report.outcomes):
        keep_settings(run)
    return run.exit_code


def run_tiling(run: Run) -> None:
    """The tile stage, noted."""
    from pathfm.tile.stage import run_tile
    from pathfm.tiling import show_tiles

    report = run_tile(run.study, run.cohort, run.layout)
    run.note(report)
    run.stores = None
    # Every job of an array would write the same page again.
    if not run.study.compute.shard:
        show_tiles(run.layout, report)


def stores_of(run: Run) -> dict[str, Path]:
    """Tile stores that hold tiles and are up to date, by slide; looked at once, since that reads a part of every slide."""
    from pathfm.tile.stage import store_is_current

    if run.stores is not None:
        return run.stores
    run.stores = stores = {}
    for row in run.cohort.rows:
        try:
            store = open_tiles(run.layout.store(row.slide_id))
        except StoreError:
            continue
        if not store_is_current(store, row, run.study.tile):
            run.stale.add(row.slide_id)
        elif len(store):
            stores[row.slide_id] = store.path
    return stores


def own_encoder(run: Run) -> Path | None:
    """Folder of the study's own encoder, None when a public one is used."""
    if not run.study.has_own_encoder:
        return None
    from pathfm.pretraining import encoder_folder

    return run.encoder or encoder_folder(run)


def upstream_outcomes(run: Run, extraction: Extraction) -> dict[str, Outcome]:
    """What became of each slide before mil: the first stage it failed in has the reason."""
    upstream = {outcome.slide_id: outcome for outcome in extraction.report.outcomes}
    tiled = run.reports["tile"].outcomes if "tile" in run.reports else ()
    return {**upstream, **{outcome.slide_id: outcome for outcome in tiled if outcome.status == "failed"}}
