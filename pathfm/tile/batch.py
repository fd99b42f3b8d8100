"""Many slides, several at a time, beside other machines that do the same: leases, cache, worker processes, events."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import cv2

from pathfm.config import fingerprint
from pathfm.errors import PathfmError, StoreError, UnreadableSlideError
from pathfm.events import Events
from pathfm.log import get_log, status, track
from pathfm.slides.cache import SlideCache
from pathfm.slides.reader import slide_identity
from pathfm.store.lease import LeaseLostError, Leases
from pathfm.store.record import Outcome, library_versions
from pathfm.store.tile_store import open_tiles
from pathfm.study import Study
from pathfm.tile.finish import KEPT
from pathfm.tile.slide import tile_slide
from pathfm.tile.task import TileTask
from pathfm.workers import InternalError, WorkerCrash, map_isolated, usable_cores

STAGE = "tile"

log = get_log(__name__)


class _Worked(NamedTuple):
    """What a worker tells of a slide, and how long it took [s]."""

    outcome: Outcome
    seconds: float


class Batch:
    """Makes the stores of slides, each in a worker process and by one machine alone.

    Args:
        study: how many workers, the cache, the time limit.
        folder: of the stores, leases and events.
        outcomes: gets the outcome of every slide.
    """

    def __init__(self, study: Study, folder: Path, outcomes: dict[str, Outcome]) -> None:
        self._compute, self._folder, self._outcomes = study.compute, folder, outcomes
        self._workers = study.compute.workers or usable_cores()
        self._stack = ExitStack()
        self._lost: list[TileTask] = []
        self._killed: set[str] = set()

    def __enter__(self) -> Self:
        self._events = self._stack.enter_context(Events(self._folder))
        place, size = self._compute.cache_dir, self._compute.cache_gb
        # Before the leases, so that it ends after them: its thread may be waiting for one.
        self._cache = self._stack.enter_context(SlideCache(place, size, self._workers)) if place else None
        self._leases = self._stack.enter_context(Leases(self._compute.lease_s))
        self._leases.sweep(self._folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def make(self, tasks: Sequence[TileTask]) -> None:
        """Works off the tasks; slides that others hold come last, and count as kept when those have made them."""
        started = time.monotonic()
        shard = {"shard": self._compute.shard} if self._compute.shard else {}
        digest = fingerprint(tasks[0].settings.model_dump(mode="json"))
        about = {"versions": library_versions(), "settings": digest, "slides": len(tasks), **shard}
        self._events.write("run_started", stage=STAGE, **about)
        self._started, self._done, self._total = started, 0, len(tasks)
        try:
            self._work_off(tasks, self._cache)
            # Who took a lease over has mostly made the slide by now.
            lost, self._lost = self._lost, []
            if lost:
                self._work_off(lost, None)
            self._leases.sweep(self._folder)
            why = "other processes keep taking it over (run the same command again)"
        except StoreError as error:
            # The folder cannot be written any more: what is made stays made, the rest says why it is not.
            why = error.reason
        for task in tasks:
            self._outcomes.setdefault(task.row.slide_id, Outcome(task.row.slide_id, "failed", why))
        counts = Counter(self._outcomes[task.row.slide_id].status for task in tasks)
        self._events.write("run_ended", stage=STAGE, seconds=round(time.monotonic() - started, 3), counts=dict(counts))

    def _work_off(self, tasks: Sequence[TileTask], cache: SlideCache | None) -> None:
        workers = min(self._workers, len(tasks))
        threads = max(1, (self._compute.threads or usable_cores()) // workers)
        ready = self._leased([replace(task, threads=threads) for task in tasks])
        if cache is not None:
            copied = cache.ahead(ready, lambda task: task.row.path, lambda task: task.row.slide_id)
            ready = (replace(task, local=local) for task, local in copied)
        results = map_isolated(_work, ready, workers, self._compute.slide_timeout_s or None)
        for task, result in track(results, STAGE, len(tasks)):
            if cache is not None:
                cache.done(task.path)
            self._take_note(task, result)

    def _leased(self, tasks: Sequence[TileTask]) -> Iterator[TileTask]:
        for task, lease in self._leases.each(tasks, lambda task: task.store, lambda task: is_made(task, self._outcomes)):
            self._events.write("slide_started", stage=STAGE, slide_id=task.row.slide_id)
            yield replace(task, lease=lease)

    def _take_note(self, task: TileTask, result: _Worked | PathfmError) -> None:
        if task.lease is not None:
            task.lease.release()
        # A kill says more of the machine than of the slide: it gets a second try, so that what follows does not miss it.
        killed = isinstance(result, WorkerCrash) and result.killed and task.row.slide_id not in self._killed
        if killed:
            self._killed.add(task.row.slide_id)
            status(task.row.slide_id, "again", "its worker process was killed")
        if killed or isinstance(result, LeaseLostError):
            self._lost.append(replace(task, lease=None, local=None))
            return
        if isinstance(result, InternalError):
            log.error("%s: %s", task.row.slide_id, result.traceback)
        if isinstance(result, PathfmError):
            result = _Worked(Outcome(task.row.slide_id, "failed", result.reason), 0.0)
        outcome = result.outcome
        self._outcomes[outcome.slide_id] = outcome
        if outcome.status == "done":  # the others are told with their reasons when all is done
            status(outcome.slide_id, "done", told(outcome.counts))
        about = {"seconds": round(result.seconds, 3), "counts": dict(outcome.counts), "reason": outcome.reason}
        self._events.write(f"slide_{outcome.status}", stage=STAGE, slide_id=outcome.slide_id, **about)
        self._done += 1
        eta_s = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        self._events.write("progress", stage=STAGE, done=self._done, total=self._total, eta_s=round(eta_s, 1))


def told(counts: Mapping[str, int | float]) -> str:
    """Counts of tiles in words, what occurred only: ``548 tiles of 972, no tissue 411, pen 13``."""
    told_apart = {KEPT, "grid", "files"}
    others = [f"{name} {count:,}" for name, count in counts.items() if count and name not in told_apart]
    places = counts.get("grid", 0) + counts.get("files", 0)
    # Other resolutions first: they are no reasons.
    others.sort(key=lambda other: not other.startswith(KEPT))
    return ", ".join([f"{counts.get(KEPT, 0):,} tiles of {places:,}", *others])


def is_made(task: TileTask, outcomes: dict[str, Outcome]) -> bool:
    """Whether a slide's store is there and up to date; if so, its outcome is noted."""
    try:
        store = open_tiles(task.store)
    except StoreError:
        return False
    if store.fingerprint not in task.fingerprints or not store.is_whole():
        return False
    reason = store.attrs.get("empty_reason", "")
    slide_id = task.row.slide_id
    outcomes[slide_id] = Outcome(slide_id, "empty" if reason else "kept", reason, store.attrs.get("counts", {}))
    return True


def _work(task: TileTask) -> _Worked:
    """Tiles one slide, in a worker process."""
    cv2.setNumThreads(1)  # the slides are the parallelism, and inside a slide our own threads
    started, slide_id = time.monotonic(), task.row.slide_id
    try:
        counts, reason = tile_slide(task, partial(_check, task))
        outcome = Outcome(slide_id, "empty" if reason else "done", reason, counts)
    except LeaseLostError:
        raise
    except PathfmError as error:
        outcome = Outcome(slide_id, "failed", error.reason)
    return _Worked(outcome, time.monotonic() - started)


def _check(task: TileTask) -> None:
    """What must still be true when a store is committed under the fingerprint that its slide had at the start.

    Raises:
        UnreadableSlideError: the slide (or its local copy) is another one by now, or has gone.
        LeaseLostError: another process makes it.
    """
    if slide_identity(task.path) != task.identity:
        raise UnreadableSlideError("the slide has changed since the run began", fix="run the same command again")
    if task.lease:
        task.lease.check()
