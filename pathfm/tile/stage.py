"""Stage 1: slides -> tile stores, a worker process per slide."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2

from pathfm.config import fingerprint
from pathfm.errors import PathfmError, SlideError, StoreError
from pathfm.log import get_log, track
from pathfm.slides.reader import slide_identity
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.commit import sweep
from pathfm.store.layout import Layout
from pathfm.store.record import Outcome, StageReport, write_record
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import Study, TileSettings
from pathfm.tile.slide import tile_slide
from pathfm.workers import InternalError, map_isolated

VERSION = 1
"""Raised whenever the content of a store changes for the same settings."""

log = get_log(__name__)


@dataclass(frozen=True)
class TileTask:
    """What a worker needs to tile one slide.

    Attributes:
        row: the slide's row of the cohort table.
        settings: the stage's settings.
        store: where the store goes.
        identity: hash of the slide file.
        fingerprints: what the store depends on: when the slide's own mpp is used, and when the assumed one is.
    """

    row: SlideRow
    settings: TileSettings
    store: Path
    identity: str
    fingerprints: tuple[str, str]


def run_tile(study: Study, cohort: Cohort, layout: Layout) -> StageReport:
    """Makes the tile store of every slide whose store is absent or stale; one bad slide is a row, never an end."""
    started = datetime.datetime.now(datetime.UTC)
    outcomes: dict[str, Outcome] = {}
    sweep(layout.tiles)
    tasks = list(_stale(study, cohort, layout, outcomes))
    results: Iterable[tuple[TileTask, Outcome | PathfmError]] = (
        map_isolated(_work, tasks, study.compute.workers) if tasks else ()
    )
    for task, result in track(results, "tile", len(tasks)):
        if isinstance(result, InternalError):
            log.error("%s: %s", task.row.slide_id, result.traceback)
        outcome = result if isinstance(result, Outcome) else Outcome(task.row.slide_id, "failed", result.reason)
        outcomes[outcome.slide_id] = outcome
        log.info("%s", describe(outcome))
    report = StageReport("tile", tuple(outcomes[row.slide_id] for row in cohort.rows))
    if not report.did_nothing:
        write_record(layout.tiles, report, study.tile, started)
    return report


def describe(outcome: Outcome) -> str:
    """One status line."""
    counts = ", ".join(f"{name} {value}" for name, value in outcome.counts.items())
    return f"{outcome.slide_id}: {outcome.status}" + (
        f" ({outcome.reason})" if outcome.reason else f" [{counts}]" if counts else ""
    )


def _stale(study: Study, cohort: Cohort, layout: Layout, outcomes: dict[str, Outcome]) -> Iterator[TileTask]:
    """Tasks of slides that need work; the others get their outcome at once."""
    for row in cohort.rows:
        try:
            identity = slide_identity(row.path)
        except SlideError as error:
            outcomes[row.slide_id] = Outcome(row.slide_id, "failed", error.reason)
            continue
        task = TileTask(row, study.tile, layout.store(row.slide_id), identity, _fingerprints(row, study.tile, identity))
        kept = _kept(task)
        if kept:
            outcomes[row.slide_id] = kept
        else:
            yield task


def tile_settings_digest(settings: TileSettings) -> str:
    """Fingerprint of the settings that concern every slide: an assumed mpp only concerns slides that have none."""
    return fingerprint({"version": VERSION}, settings.model_copy(update={"assume_mpp": None}))


def store_is_current(store: TileStore, row: SlideRow, settings: TileSettings) -> bool:
    """Whether a store is what tiling would make now; False also when the slide cannot be read any more."""
    try:
        return store.fingerprint in _fingerprints(row, settings, slide_identity(row.path))
    except SlideError:
        return False


def _fingerprints(row: SlideRow, settings: TileSettings, identity: str) -> tuple[str, str]:
    own = {"settings": tile_settings_digest(settings), "identity": identity, "mpp": row.mpp}
    return fingerprint(own), fingerprint({**own, "assumed_mpp": settings.assume_mpp})


def _kept(task: TileTask) -> Outcome | None:
    """The outcome of a store that is up to date, None when it must be made."""
    try:
        store = open_tiles(task.store)
    except StoreError:
        return None
    if store.fingerprint not in task.fingerprints:
        return None
    reason = store.attrs.get("empty_reason", "")
    return Outcome(task.row.slide_id, "empty" if reason else "kept", reason, store.attrs.get("counts", {}))


def _work(task: TileTask) -> Outcome:
    cv2.setNumThreads(1)  # the slides are the parallelism
    try:
        counts, empty_reason = tile_slide(task.row, task.settings, task.store, task.identity, task.fingerprints)
    except PathfmError as error:
        return Outcome(task.row.slide_id, "failed", error.reason)
    return Outcome(task.row.slide_id, "empty" if empty_reason else "done", empty_reason, counts)
