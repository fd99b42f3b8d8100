"""Stage 3: tiles x encoders -> feature files, as one stream over all slides. Tiles are decoded once for all encoders."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pathfm.compute import device_names, pick_device, use_threads
from pathfm.errors import StoreError, UsageError
from pathfm.events import Events
from pathfm.extract.crew import joined, on_devices
from pathfm.extract.sets import DENSE, MAIN, FeatureSet, FeatureSets, load_sets
from pathfm.extract.slide_level import write_slide_vectors
from pathfm.extract.stream import Device, Pace, run_stream
from pathfm.extract.tiles import Batches, PixelsOf, SlideWork
from pathfm.extract.writing import Writer, WriterThread
from pathfm.log import say
from pathfm.models.slide_encoders import SlideEncoder, load_slide_encoder
from pathfm.store.cohort import Cohort, SlideRow, shard_of
from pathfm.store.commit import sweep
from pathfm.store.dense_store import DenseWriter, patch_frame
from pathfm.store.feature_file import FeatureWriter
from pathfm.store.layout import Layout
from pathfm.store.lease import POLL_S, LeaseLostError, Leases
from pathfm.store.record import Outcome, StageReport, library_versions, write_record
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import Study

STAGE = "extract"
PATIENCE = 3
"""How often a slide is tried again whose lease another process took over meanwhile."""


@dataclass(frozen=True)
class Extraction:
    """What the stage did, where its feature sets lie, by role, and what became of the vectors of whole slides, if any."""

    report: StageReport
    sets: Mapping[str, FeatureSet]
    vectors: StageReport | None = None


def run_extract(
    study: Study,
    cohort: Cohort,
    layout: Layout,
    own_encoder: Path | None = None,
    stale_tiles: Collection[str] = (),
    pixels_of: PixelsOf | None = None,
    sets: FeatureSets | None = None,
) -> Extraction:
    """Writes the feature files of every slide that has tiles and whose files are absent or stale.

    Other processes and machines may do the same at the same time: each slide is made by one of them.

    Args:
        study: all settings.
        cohort: the slides.
        layout: where stores are and features go.
        own_encoder: folder of the study's own encoder, for ``extract.encoder=pretrained``.
        stale_tiles: slides whose store is not what tiling would make now; they count as failed.
        pixels_of: reads the tiles of stores without pixels from their slides.
        sets: encoders of these settings that are loaded already; where several devices work, each loads its own.

    Raises:
        UsageError: no such encoder, or one that does not suit any slide's tiles.
    """
    started, devices = datetime.datetime.now(datetime.UTC), device_names(study.compute)
    # Before hours of work: what is missing here is told at once.
    vectors = [load_slide_encoder(name, torch.device(devices[0])) for name in study.extract.slide_vectors]
    if len(devices) > 1:
        work = partial(
            run_extract, cohort=cohort, layout=layout, own_encoder=own_encoder, stale_tiles=stale_tiles, pixels_of=pixels_of
        )
        without = study.extract.model_copy(update={"slide_vectors": ()})
        found = on_devices(work, study.model_copy(update={"extract": without}), devices)
        extraction = Extraction(joined([each.report for each in found]), found[0].sets)
    else:
        threads = use_threads(study.compute)
        sets = sets or load_sets(study, layout, own_encoder, pick_device(study.compute))
        run = _Run(study, sets, pixels_of, threads)
        rows = shard_of(cohort.rows, study.compute.shard)
        extraction = Extraction(_extracted(rows, layout, stale_tiles, run), sets.by_role)
    if extraction.report.worked:
        for features in extraction.sets.values():
            write_record(features.folder, extraction.report, study.extract, started, study.compute.shard)
    if not vectors:
        return extraction
    paths = _current_paths(cohort, layout, extraction.sets[MAIN])
    return replace(extraction, vectors=_slide_vectors(paths, vectors, study.compute.lease_s))


def _extracted(rows: Sequence[SlideRow], layout: Layout, stale_tiles: Collection[str], run: _Run) -> StageReport:
    for features in run.sets.sets:
        sweep(features.folder)
    works = _suited(list(_stale(rows, layout, stale_tiles, run)), run)
    if works:
        run.extract(works)
    return StageReport(STAGE, tuple(run.outcomes[row.slide_id] for row in rows), run.note, len(works))


def _current_paths(cohort: Cohort, layout: Layout, main: FeatureSet) -> list[Path]:
    """Features that are up to date by now, also those that other jobs made."""
    paths = []
    for row in cohort.rows:
        with suppress(StoreError):
            if main.is_current(open_tiles(layout.store(row.slide_id))):
                paths.append(main.path(row.slide_id))
    return paths


def _slide_vectors(paths: Sequence[Path], encoders: Sequence[SlideEncoder], lease_s: float) -> StageReport:
    made = [
        outcome
        for encoder in encoders
        for outcome in (write_slide_vectors(paths, paths[0].parent / "slides", encoder, lease_s) if paths else ())
    ]
    return StageReport("slide vectors", tuple(made))


def _stale(rows: Sequence[SlideRow], layout: Layout, stale_tiles: Collection[str], run: _Run) -> Iterator[SlideWork]:
    """The slides that need work; the others get their outcome at once."""
    for row in rows:
        store = _usable(row.slide_id, layout, stale_tiles, run.outcomes)
        if store is None:
            continue
        stale = run.sets.stale(store)
        if stale:
            yield SlideWork(store, stale)
        else:
            run.outcomes[row.slide_id] = Outcome(row.slide_id, "kept", counts={"tiles": len(store)})


def _usable(slide_id: str, layout: Layout, stale_tiles: Collection[str], outcomes: dict[str, Outcome]) -> TileStore | None:
    """The slide's tile store if it has tiles and is up to date; else its outcome is noted."""
    if slide_id in stale_tiles:
        outcomes[slide_id] = Outcome(slide_id, "failed", "its tiles are stale (run `pathfm tile`)")
        return None
    try:
        store = open_tiles(layout.store(slide_id))
    except StoreError:
        outcomes[slide_id] = Outcome(slide_id, "failed", "no tile store: tiling failed or was not run")
        return None
    if not len(store):
        outcomes[slide_id] = Outcome(slide_id, "empty", str(store.attrs.get("empty_reason") or "no tiles"))
        return None
    return store


def _suited(works: Sequence[SlideWork], run: _Run) -> list[SlideWork]:
    """The slides whose tiles suit the encoder; what it will see of them is said once for each kind.

    Raises:
        UsageError: it suits none of them.
    """
    suited: list[SlideWork] = []
    said: dict[str, None] = {}
    refused: list[UsageError] = []
    for work in works:
        try:
            for encoder in run.sets.asked:
                said[encoder.check_tiles(work.store.mpp, work.store.tile_px)] = None
        except UsageError as error:
            refused.append(error)
            run.outcomes[work.slide_id] = Outcome(work.slide_id, "failed", error.reason)
        else:
            suited.append(work)
    if refused and not suited:
        raise refused[0]
    if suited:
        main = run.sets.main
        near = "" if main.fidelity is None else f", cosine with float32 at least {main.fidelity:.5f} on built-in tiles"
        say(f"{run.sets.sets[0].name}: {main.dim} numbers a tile, computed in {main.recipe.precision}{near}")
    for line in said:
        say(line)
    scales = {work.store.scales for work in suited if work.store.scales}
    for asked in sorted(scales):
        say(f"note: the stores hold {len(asked)} resolutions; these are the features of the first ({asked[0]:g} mpp)")
    return suited


class _Run:
    """The work on the slides that need it.

    Args:
        study: all settings.
        sets: what is made of each.
        pixels_of: tiles of stores without pixels.
        threads: that decode.
    """

    def __init__(self, study: Study, sets: FeatureSets, pixels_of: PixelsOf | None, threads: int) -> None:
        self._compute, self._dtype, self._threads = study.compute, study.extract.dtype, threads
        self._pixels_of, self.sets = pixels_of, sets
        self._device = Device(sets.main.device, sets.device)
        self.outcomes: dict[str, Outcome] = {}
        self.note = ""
        self._again: list[SlideWork] = []
        self._losses: Counter[str] = Counter()
        self._broken = ""

    def extract(self, works: Sequence[SlideWork]) -> None:
        """Makes the features of all slides; each gets its outcome."""
        started = time.monotonic()
        folders = {features.folder for features in self.sets.sets}
        size = self._device.fitting_size(self._compute.batch_size, max(work.store.tile_px for work in works))
        paces: list[Pace] = []
        with Events(self.sets.sets[0].folder) as self._events, Leases(self._compute.lease_s) as self._leases:
            about = {"versions": library_versions(), "slides": len(works)}
            self._events.write("run_started", stage=STAGE, **about)
            for folder in folders:
                self._leases.sweep(folder)
            waiting = list(works)
            while waiting and not self._broken:
                self._again = []
                pace = self._pass(waiting, size)
                paces += [pace] if pace.tiles else []
                waiting = self._again
                if waiting and not pace.tiles:
                    time.sleep(min(POLL_S, self._compute.lease_s / 6))
            for folder in folders:
                self._leases.sweep(folder)
            why = self._broken or "other processes keep taking it over (run the same command again)"
            for work in works:
                self.outcomes.setdefault(work.slide_id, Outcome(work.slide_id, "failed", why))
            counts = Counter(self.outcomes[work.slide_id].status for work in works)
            self._events.write("run_ended", stage=STAGE, seconds=round(time.monotonic() - started, 3), counts=dict(counts))
        self.note = str(paces[0]) if paces else ""

    def _pass(self, works: Sequence[SlideWork], size: int) -> Pace:
        """One stream over the slides that no other process holds. It waits for none of them: what is in a batch with tiles of
        a slide that is waited for would not be finished, and two processes might wait for each other."""
        left = sum(len(work.store) for work in works)
        batches = Batches(
            self._held(works), size, self._threads, self.sets.host, pixels_of=self._pixels_of, pinned=self._device.is_gpu
        )
        with batches, WriterThread(self._open_writer, self._finished) as writer:
            return run_stream(batches, self._device, writer, -(-left // size))

    def _held(self, works: Sequence[SlideWork]) -> Iterator[SlideWork]:
        """The slides whose lease is had; the others are for the next pass."""
        main = self.sets.sets[0]
        for work in works:
            if self._broken:
                return
            try:
                lease = self._leases.take(main.path(work.slide_id))
            except StoreError as error:
                self._broken = error.reason
                return
            if lease is None:
                self._again.append(work)
                continue
            stale = self.sets.stale(work.store)
            if not stale:
                self.outcomes[work.slide_id] = Outcome(work.slide_id, "kept", counts={"tiles": len(work.store)})
                lease.release()
                continue
            self._events.write("slide_started", stage=STAGE, slide_id=work.slide_id)
            # Opened anew, so that what it has read is forgotten with it.
            yield SlideWork(open_tiles(work.store.path), stale, lease)

    def _open_writer(self, work: SlideWork, number: int, shape: tuple[int, ...]) -> Writer:
        features, store = self.sets.sets[number], work.store
        path, attributes, rows = features.path(work.slide_id), features.attributes(store), len(store)
        assert work.lease is not None
        if features.role != DENSE:
            return FeatureWriter(path, rows, shape[0], self._dtype, store.xy_level0, attributes, work.lease.check)
        height, width, dim = shape
        recipe = self.sets.main.recipe
        frame = patch_frame(store.tile_side_level0, recipe.resize_px, recipe.input_px, width)
        return DenseWriter(
            path, rows, (height, width, dim), self._dtype, store.xy_level0, {**attributes, **frame}, work.lease.check
        )

    def _finished(self, work: SlideWork) -> None:
        """In the writer's thread: the slide's files are there, or it has an error."""
        error, slide_id = work.error, work.slide_id
        assert work.lease is not None
        work.lease.release()
        self._losses[slide_id] += 1
        if isinstance(error, LeaseLostError) and self._losses[slide_id] <= PATIENCE:
            self._again.append(SlideWork(work.store, work.sets))
            return
        unread = int((~work.valid).sum())
        counts = {"tiles": len(work.store), **({"unreadable": unread} if unread else {})}
        outcome = Outcome(slide_id, "failed", error.reason) if error else Outcome(slide_id, "done", counts=counts)
        self.outcomes[slide_id] = outcome
        if error is not None and work.is_unwritable and isinstance(error.__cause__, OSError):
            # A drive that cannot be written takes no other slide either; what is made stays made.
            self._broken = error.reason
        self._events.write(
            f"slide_{outcome.status}", stage=STAGE, slide_id=slide_id, counts=dict(outcome.counts), reason=outcome.reason
        )
