"""Rows of features on their way to disk, in a thread of their own: the device never waits for a drive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from pathfm.errors import PathfmError
from pathfm.extract.tiles import SlideWork
from pathfm.faults import crash_point

WAITING_BYTES = 2**28
"""Rows that may wait for the drive; when more do, the device waits after all, and memory stays bounded."""

Rows = npt.NDArray[np.float32]


class Writer(Protocol):
    """A file that takes rows as they come; it appears when it is committed, whole."""

    def write(self, start: int, rows: Rows, valid_N: npt.NDArray[np.bool_]) -> None:
        """Rows of tiles ``start`` and following, and which of these tiles could be read."""

    def commit(self) -> None:
        """The file appears."""

    def abort(self) -> None:
        """Nothing appears. Calling it after another end is allowed."""


OpenWriter = Callable[[SlideWork, int, tuple[int, ...]], Writer]
"""Opens the file of one slide and feature set, whose rows have this shape."""


class _Part(NamedTuple):
    work: SlideWork
    number: int
    start: int
    rows: Rows


class WriterThread:
    """Writes what it is given, slide by slide, and tells which slides have come to an end.

    Args:
        open_writer: opens the file of a slide and feature set.
        finished: called in this thread once for each slide: all its rows are on disk, or ``work.error`` says why not.
    """

    def __init__(self, open_writer: OpenWriter, finished: Callable[[SlideWork], None]) -> None:
        self._open_writer, self._finished = open_writer, finished
        self._queue: queue.SimpleQueue[_Part | SlideWork | None] = queue.SimpleQueue()
        self._waiting, self._room = 0, threading.Condition()
        self._files: dict[SlideWork, dict[int, Writer]] = {}
        self._left: dict[SlideWork, int] = {}
        self._defect: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write")

    def put(self, work: SlideWork, number: int, start: int, rows: Rows) -> None:
        """Rows [n, D] of tiles ``start`` and following, for one feature set of a slide."""
        with self._room:
            self._room.wait_for(lambda: self._waiting == 0 or self._waiting + rows.nbytes <= WAITING_BYTES)
            self._waiting += rows.nbytes
        self._give(_Part(work, number, start, rows))

    def fail(self, work: SlideWork) -> None:
        """The slide has an error: nothing of it will be written. May be said more than once."""
        self._give(work)

    def _give(self, part: _Part | SlideWork) -> None:
        if self._defect is not None:
            raise self._defect
        self._queue.put(part)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        for work in list(self._files):
            self._abort(work)
        if self._defect is not None and error is None:
            raise self._defect

    def _run(self) -> None:
        while (part := self._queue.get()) is not None:
            try:
                if self._defect is None:  # else whoever puts more is told
                    self._take(part)
            except BaseException as error:  # noqa: BLE001 - raised again by put() or at the end
                self._defect = error
            if isinstance(part, _Part):
                with self._room:
                    self._waiting -= part.rows.nbytes
                    self._room.notify()

    def _take(self, part: _Part | SlideWork) -> None:
        work = part.work if isinstance(part, _Part) else part
        if work.is_over:
            return
        try:
            if work.error is None and isinstance(part, _Part):
                self._write(part)
        except PathfmError as error:
            work.error, work.is_unwritable = error, True
        if work.error is not None:
            self._abort(work)
        if work.error is not None or not self._left[work]:
            work.is_over = True
            for known in (self._files, self._left):  # with it goes what it has read of its store
                known.pop(work, None)
            self._finished(work)

    def _write(self, part: _Part) -> None:
        work, number, start, rows = part
        files = self._files.setdefault(work, {})
        if number not in files:
            files[number] = self._open_writer(work, number, rows.shape[1:])
        files[number].write(start, rows, work.valid[start : start + len(rows)])
        crash_point("extract.rows")
        self._left[work] = self._left.get(work, len(work.sets) * len(work.store)) - len(rows)
        if not self._left[work]:
            crash_point("extract.slide")
            for each in work.sets:
                files[each].commit()

    def _abort(self, work: SlideWork) -> None:
        for file in self._files.pop(work, {}).values():
            file.abort()
