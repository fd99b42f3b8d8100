"""Stage 1: slides -> tile stores, a worker process per slide."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pathfm.config import fingerprint
from pathfm.errors import SlideError, StoreError
from pathfm.log import track
from pathfm.slides.reader import slide_identity
from pathfm.store.cohort import Cohort, SlideRow, shard_of
from pathfm.store.commit import content_digest, read_json, sweep
from pathfm.store.interop import find_coords
from pathfm.store.layout import PICTURES, Layout
from pathfm.store.lease import Leases
from pathfm.store.record import Outcome, StageReport, record_file, write_record
from pathfm.store.tile_store import TileStore
from pathfm.study import Study, TileSettings
from pathfm.tile.batch import Batch, is_made, told
from pathfm.tile.scene import annotation_file
from pathfm.tile.task import TileTask

LOOKS = 8
"""Slides that are looked at side by side before any is worked on."""
VERSION = 2
"""Raised whenever the content of a store changes for the same settings."""


def run_tile(study: Study, cohort: Cohort, layout: Layout) -> StageReport:
    """Makes the tile store of every slide whose store is absent or stale; one bad slide is a row, never an end.

    Other processes and machines may do the same at the same time: each slide is made by one of them, and the others wait for
    what they do not make themselves.
    """
    started = datetime.datetime.now(datetime.UTC)
    outcomes: dict[str, Outcome] = {}
    for folder in (layout.tiles, layout.tiles / PICTURES):
        sweep(folder)
    rows = shard_of(cohort.rows, study.compute.shard)
    tasks = list(_stale(study, rows, layout, outcomes))
    with Leases(study.compute.lease_s) as leases:
        leases.sweep(layout.tiles)  # of a run that was killed right after its last store
    if tasks:
        with Batch(study, layout.tiles, outcomes) as batch:
            batch.make(tasks)
    made = tuple(outcomes[row.slide_id] for row in rows)
    totals: Counter[str] = Counter()
    for outcome in made:
        totals.update({name: int(count) for name, count in outcome.counts.items()})
    notes = [told(totals)] if totals else []
    others = {store.stem for store in layout.tiles.glob("*.zarr")} - {row.slide_id for row in cohort.rows}
    if others:
        notes.append(f"{len(others)} stores of slides outside this cohort lie here too")
    report = StageReport("tile", made, "; ".join(notes), len(tasks))
    if not report.did_nothing or not _is_told(report, record_file(layout.tiles, study.compute.shard)):
        write_record(layout.tiles, report, study.tile, started, study.compute.shard)
    return report


def _is_told(report: StageReport, record: Path) -> bool:
    """Whether the record says the same of the same slides; a kill after the last store, or another cohort, leaves it behind."""
    if not record.is_file():
        return False
    kept = {row["slide_id"]: (row["status"] in {"done", "kept"}, row["reason"]) for row in read_json(record)["outcomes"]}
    return kept == {each.slide_id: (each.status in {"done", "kept"}, each.reason) for each in report.outcomes}


def _stale(study: Study, rows: Sequence[SlideRow], layout: Layout, outcomes: dict[str, Outcome]) -> Iterator[TileTask]:
    """Tasks of slides that need work; the others get their outcome at once."""
    # A look at a slide is some dozens of small reads, which drives and servers answer side by side.
    with ThreadPoolExecutor(LOOKS) as pool:
        looks = pool.map(lambda row: _look(row, study.tile), rows)
        known = list(track(looks, "look at slides", len(rows)))
    for row, found in zip(rows, known, strict=True):
        if isinstance(found, str):
            outcomes[row.slide_id] = Outcome(row.slide_id, "failed", found)
            continue
        identity, fingerprints = found
        task = TileTask(row, study.tile, layout.store(row.slide_id), identity, fingerprints, layout.pictures(row.slide_id))
        if not is_made(task, outcomes):
            yield task


def _look(row: SlideRow, settings: TileSettings) -> tuple[str, tuple[str, str]] | str:
    """A slide's identity and fingerprints, or why it cannot be read."""
    try:
        identity = slide_identity(row.path)
        return identity, _fingerprints(row, settings, identity)
    except (SlideError, StoreError) as error:
        return error.reason


def tile_settings_digest(settings: TileSettings) -> str:
    """Fingerprint of the settings that concern every slide.

    An assumed mpp only concerns slides that have none; what lies in folders counts by content, and for its own slide.
    """
    tissue = settings.tissue.model_copy(update={"annotations": settings.tissue.annotations and "by slide"})
    changed = {"assume_mpp": None, "coords": settings.coords and "by slide", "tissue": tissue}
    return fingerprint({"version": VERSION}, settings.model_copy(update=changed))


def store_is_current(store: TileStore, row: SlideRow, settings: TileSettings) -> bool:
    """Whether a store is what tiling would make now; False also when the slide cannot be read any more."""
    try:
        return store.fingerprint in _fingerprints(row, settings, slide_identity(row.path)) and store.is_whole()
    except (SlideError, StoreError):
        return False


def slide_inputs(row: SlideRow, settings: TileSettings) -> dict[str, object]:
    """What a slide's tiles depend on besides the settings: its identity, its mpp in the cohort, its annotations or coordinates.

    Raises:
        SlideError: the slide cannot be read.
        StoreError: its annotations or coordinates cannot be read.
    """
    return _inputs(row, settings, slide_identity(row.path))


def _inputs(row: SlideRow, settings: TileSettings, identity: str) -> dict[str, object]:
    coords = find_coords(settings.coords, row.slide_id) if settings.coords else None
    annotations = _content(annotation_file(row, settings))
    return {"identity": identity, "mpp": row.mpp, "annotations": annotations, "coords": _content(coords)}


def _fingerprints(row: SlideRow, settings: TileSettings, identity: str) -> tuple[str, str]:
    own = {"settings": tile_settings_digest(settings), **_inputs(row, settings, identity)}
    return fingerprint(own), fingerprint({**own, "assumed_mpp": settings.assume_mpp})


def _content(path: Path | None) -> str | None:
    return content_digest(path) if path else None
