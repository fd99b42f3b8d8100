"""The stages of a study as jobs: each leaves receipts of what it made. Both engines run these, so both make the same.

A job of a workflow engine is one process for one stage and one group of slides (``run_job``). The engine inside ``pathfm run``
does each stage for all slides at once and then writes the receipts of all its groups (``write_receipts``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pathfm.config import fingerprint
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.events import Events
from pathfm.faults import crash_point
from pathfm.job_history import DONE, DROPPED
from pathfm.report.fates import without_folders
from pathfm.run_manifest import receipt_digest
from pathfm.store.cohort import shard_of
from pathfm.store.commit import content_digest, content_files
from pathfm.store.receipts import (
    ALL,
    BY_GROUP,
    STAGES,
    Receipt,
    SlideReceipt,
    read_receipt,
    receipt_path,
    write_receipt,
)
from pathfm.store.record import Outcome, StageReport
from pathfm.store.tile_store import open_tiles
from pathfm.study_plan import Planned, StudyPlan, read_plan, settings_digest
from pathfm.workflow import Run, alone_at, begin, open_study, own_encoder, run_tiling

if TYPE_CHECKING:
    from pathfm.extract.stage import Extraction

HASHERS = 4
"""Artifacts that are hashed side by side."""
Known = Mapping[tuple[str, str], tuple[str, int]]
"""Path and fingerprint of an artifact -> its content digest, and when a receipt said so [ns]."""


class Made(NamedTuple):
    """What a stage made: outcomes and files by slide, things of the whole job, and where later jobs look."""

    outcomes: Mapping[str, Outcome] = {}
    files: Callable[[str], tuple[str, tuple[Path, ...]]] = lambda slide_id: ("", ())
    whole: tuple[Path, ...] = ()
    places: Mapping[str, Path] = {}


@dataclass
class Jobs:
    """The stages of one study in this process, each usable once those before it have run, here or in other processes.

    Attributes:
        run: the study.
        extraction: what the extract stage did in this process.
    """

    run: Run
    extraction: Extraction | None = None

    def work(self, stage: str) -> Made:
        """Does a stage for the slides of the run."""
        works = {
            "check": self.check,
            "tile": self.tile,
            "pretrain": self.pretrain,
            "extract": self.extract,
            "mil": self.mil,
            "report": self.report,
        }
        return works[stage]()

    def has_worked(self, job: Planned, made: Made) -> bool:
        """Whether a stage that has run has made something of a job anew: stages see what no plan does, as a user's code."""
        if made.outcomes:
            return any(made.outcomes[slide].status == "done" for slide in job.slide_ids if slide in made.outcomes)
        report = self.run.reports.get(job.stage)
        return report is not None and not report.did_nothing

    def check(self) -> Made:
        """Everything that can be refused before hours of work."""
        from pathfm.classification import check_for_mil
        from pathfm.extraction import check_encoders

        check_for_mil(self.run)
        if not self.run.study.has_own_encoder:
            check_encoders(self.run)
        return Made()

    def tile(self) -> Made:
        """Tile stores."""
        run_tiling(self.run)
        return Made(_by_slide(self.run.reports["tile"]), self._store)

    def pretrain(self) -> Made:
        """The study's own encoder."""
        from pathfm.pretraining import encoder_folder, run_pretraining

        run_pretraining(self.run)
        folder = encoder_folder(self.run)
        whole = tuple(path for path in (folder / "teacher", folder / "untrained") if path.is_dir())
        return Made(whole=whole, places={"encoder": folder})

    def extract(self) -> Made:
        """Feature files."""
        from pathfm.extraction import run_extraction

        self._find_encoder()
        self.extraction = run_extraction(self.run)
        return Made(_by_slide(self.extraction.report), self._features)

    def mil(self) -> Made:
        """The classifier and its bundle."""
        from pathfm.classification import inputs_of, train

        if self.extraction is None:
            self.run.reports["tile"] = _reported(self.run, "tile")
            self.extract()
        assert self.extraction is not None
        with alone_at(self.run.layout.mil, self.run.study.compute.lease_s):
            train(self.run, inputs_of(self.run, self.extraction))
        own = own_encoder(self.run)
        places = {"features": self.extraction.sets["main"].folder, **({"encoder": own} if own else {})}
        # File by file: what was changed later can be named.
        return Made(whole=tuple(content_files(self.run.layout.mil)), places=places)

    def report(self) -> Made:
        """The page."""
        from pathfm.classification import report_on
        from pathfm.tiling import page_is_old, show_tiles

        out, layout = self.run.layout.out, self.run.layout
        places = _places(out, "mil")
        records = {stage: _reported(self.run, stage) for stage in BY_GROUP}
        if page_is_old(layout):
            show_tiles(layout, records["tile"])
        with alone_at(layout.report, self.run.study.compute.lease_s):
            report_on(self.run, out / places["features"], out / places.get("encoder", "encoder"), records)
        return Made(whole=(layout.report / "index.html", layout.report / "summary.json"))

    def _find_encoder(self) -> None:
        """Takes the encoder that the pretraining job left, without a look at all the tiles that it was made of."""
        if self.run.study.has_own_encoder and self.run.encoder is None:
            place = _places(self.run.layout.out, "pretrain").get("encoder")
            self.run.encoder = self.run.layout.out / place if place else None

    def _store(self, slide_id: str) -> tuple[str, tuple[Path, ...]]:
        store = open_tiles(self.run.layout.store(slide_id))
        return store.fingerprint, (store.path,)

    def _features(self, slide_id: str) -> tuple[str, tuple[Path, ...]]:
        assert self.extraction is not None
        store, sets = open_tiles(self.run.layout.store(slide_id)), self.extraction.sets.values()
        prints = {features.role: features.fingerprint(store) for features in sets}
        return fingerprint(prints), tuple(features.path(slide_id) for features in sets)


def run_job(out: Path, stage: str, group: str = ALL, overrides: Sequence[str] = ()) -> ExitCode:
    """One job of a workflow: a planned stage of a planned group, and its receipt.

    Slides that fail are in the receipt, and do not fail the job: the others go on.

    Raises:
        UsageError: nothing is planned, or the settings are not those that were planned.
    """
    plan = read_plan(out)
    planned, study = plan.job(stage, group), open_study(out, overrides)
    if settings_digest(study) != plan.settings:
        raise UsageError("these settings are not those that were planned", where=str(out), fix="run `pathfm plan STUDY` again")
    here: dict[str, object] = {"shard": group} if stage in BY_GROUP else {}
    if plan.cache_dir and study.compute.cache_dir is None:
        here |= {"cache_dir": Path(plan.cache_dir)}
    run = begin(study.model_copy(update={"compute": study.compute.model_copy(update=here)}))
    if stage == "extract":
        run.cohort = replace(run.cohort, rows=shard_of(run.cohort.rows, group))
    write_receipts(run, [planned], Jobs(run).work(stage))
    if stage == "mil":
        drop_old_receipts(out, plan)
    return ExitCode.DONE


def write_receipts(run: Run, jobs: Iterable[Planned], made: Made) -> None:
    """Writes the receipts of jobs of one stage, by what the stage made.

    The event comes first: a receipt that none tells of was written by no job. A kill between the two leaves a job that is still
    to be done.
    """
    jobs = list(jobs)
    known = {} if any(job.state == "forced" for job in jobs) else _known(run.layout.out, {job.stage for job in jobs})
    crash_point("job.before_receipts")
    if not jobs:
        return
    with Events(run.layout.out) as events:
        for job in jobs:
            receipt = _receipt(run, job, made, known)
            about = {"stage": receipt.stage, "group": receipt.group, "fingerprint": receipt.fingerprint}
            of_slides = {
                slide.slide_id: {"fingerprint": slide.fingerprint, "content": slide.content}
                for slide in receipt.slides
                if slide.fingerprint
            }
            hashes = {"content": receipt.content, "receipt": receipt_digest(receipt), "slides": of_slides}
            events.write(DONE, **about, **hashes)
            events.flush()
            crash_point("job.told")
            write_receipt(run.layout.out, receipt)


def drop_old_receipts(out: Path, plan: StudyPlan) -> None:
    """Removes receipts of groups that there are no more, as a cohort has grown; to be called once the new ones are there.

    The events come first: a receipt that is missing without one was removed by somebody.
    """
    old: list[tuple[str, Path]] = []
    for stage in BY_GROUP:
        current = {receipt_path(out, stage, job.group) for job in plan.of(stage)}
        if all(path.is_file() for path in current):
            old += [(stage, path) for path in sorted(set(receipt_path(out, stage, ALL).parent.glob("*.json")) - current)]
    if not old:
        return
    with Events(out) as events:
        for stage, path in old:
            events.write(DROPPED, stage=stage, group=path.stem)
        events.flush()
    for _, path in old:
        path.unlink(missing_ok=True)


def _receipt(run: Run, job: Planned, made: Made, known: Known) -> Receipt:
    out = run.layout.out
    with ThreadPoolExecutor(HASHERS) as pool:
        wanted = job.slide_ids if made.outcomes else ()
        slides = tuple(pool.map(lambda slide_id: _slide(out, slide_id, made, known), wanted))
    return Receipt(
        stage=job.stage,
        group=job.group,
        fingerprint=job.fingerprint,
        settings=job.settings,
        inputs=job.inputs,
        slides=slides,
        artifacts={_inside(path, out): content_digest(path) for path in made.whole},
        places={name: _inside(path, out) for name, path in made.places.items()},
    )


def _slide(out: Path, slide_id: str, made: Made, known: Known) -> SlideReceipt:
    """What became of a slide. What is empty has a tile store too, but no features."""
    outcome = made.outcomes.get(slide_id) or Outcome(slide_id, "failed", "it has gone since the study was planned")
    if outcome.status == "failed":
        return SlideReceipt(slide_id, "failed", without_folders(outcome.reason))
    try:
        digest, paths = made.files(slide_id)
        artifacts = {_inside(path, out): _digest(path, out, digest, known) for path in paths if path.exists()}
    except StoreError as error:  # gone or damaged since
        return SlideReceipt(slide_id, "failed", error.reason)
    return SlideReceipt(
        slide_id, "empty" if outcome.status == "empty" else "done", outcome.reason, fingerprint=digest, artifacts=artifacts
    )


def _digest(path: Path, out: Path, made_of: str, known: Known) -> str:
    """The content digest of an artifact; what a receipt that is younger than it says of the same fingerprint is believed."""
    digest, since = known.get((_inside(path, out), made_of), ("", 0))
    return digest if digest and path.stat().st_mtime_ns < since else content_digest(path)


def _known(out: Path, stages: Iterable[str]) -> Known:
    """What receipts say: what was hashed when it was made is not read again."""
    known: dict[tuple[str, str], tuple[str, int]] = {}
    for path in [path for stage in stages for path in receipt_path(out, stage, ALL).parent.glob("*.json")]:
        try:
            receipt = read_receipt(path)
        except StoreError:
            continue
        for slide in receipt.slides if receipt else ():
            since = path.stat().st_mtime_ns
            known |= {(name, slide.fingerprint): (digest, since) for name, digest in slide.artifacts.items()}
    return known


def _inside(path: Path, out: Path) -> str:
    return path.relative_to(out).as_posix()


def _by_slide(report: StageReport) -> dict[str, Outcome]:
    return {outcome.slide_id: outcome for outcome in report.outcomes}


def _places(out: Path, stage: str) -> Mapping[str, str]:
    """Where a job of all slides left its work.

    Raises:
        UsageError: it has not run.
    """
    receipt = read_receipt(receipt_path(out, stage, ALL))
    if receipt is None:
        raise UsageError(f"the stage {stage} has not run", where=str(out), fix="run the study from the start")
    return receipt.places


def _reported(run: Run, stage: str) -> StageReport:
    """What the receipts of a stage say of the slides of the cohort."""
    out = run.layout.out
    receipts = [read_receipt(receipt_path(out, stage, job.group)) for job in read_plan(out).of(stage)]
    found = {slide.slide_id: slide for receipt in receipts if receipt for slide in receipt.slides}
    rows = [found[row.slide_id] for row in run.cohort.rows if row.slide_id in found]
    return StageReport(stage, tuple(Outcome(row.slide_id, row.status, row.reason) for row in rows))


def failed_slides(out: Path, plan: StudyPlan) -> dict[str, tuple[str, str]]:
    """Slide -> stage and reason of the first stage that it failed in, by the receipts of a plan."""
    failed: dict[str, tuple[str, str]] = {}
    for stage in STAGES:
        for job in plan.of(stage):
            receipt = read_receipt(receipt_path(out, stage, job.group))
            for slide in receipt.failed if receipt else ():
                failed.setdefault(slide.slide_id, (stage, slide.reason))
    return failed
