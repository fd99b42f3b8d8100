"""A local cache for slides on slow drives and servers: the next ones are copied while others are worked on.

Every process has a folder of its own, ``pathfm-cache-PROCESS``, and in it a numbered folder per slide; a slide's own file name
stays, since readers go by it. What a killed process left is removed by the next one. Nothing ever waits for room that may not
come: a slide that does not fit is read where it is, and so is one that cannot be copied. A copy is used only when it is whole.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from pathfm.addresses import is_remote, public_name
from pathfm.errors import PathfmError, UsageError
from pathfm.log import get_log
from pathfm.slides.source import open_source
from pathfm.workers import ProcessName

BLOCK_BYTES, BLOCKS = 8 * 2**20, 4
"""Copied at a time, and of a server side by side."""
SCATTERED = frozenset({".dcm", ".vms", ".vmu"})
"""Slides of many files that are not told by their names: these are read where they are."""
_PREFIX = "pathfm-cache-"
_PATIENCE_S = 10.0

Task = TypeVar("Task")

log = get_log(__name__)


class _File(NamedTuple):
    """One file of a slide: where it is, what it is called below the copy's folder, and its size [bytes]."""

    path: Path
    name: str
    size: int


class SlideCache:
    """Copies of slides in a local folder, as many as fit.

    Args:
        folder: where; it is made if it is absent, and may be used by several processes at once.
        gigabytes: the most that this process keeps there at any moment [GB].
        lookahead: slides that are taken from the tasks before they are asked for, at most.

    Raises:
        UsageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, gigabytes: float, lookahead: int = 2) -> None:
        self._bound, self._lookahead = int(gigabytes * 1e9), max(1, lookahead)
        self._root = folder / f"{_PREFIX}{ProcessName.here()}"
        self._sizes: dict[Path, int] = {}
        self._ready: deque[tuple[Any, Path]] = deque()
        self._changed = threading.Condition()
        self._number, self._used = 0, 0
        self._is_wanted = self._is_over = self._is_closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            self._root.mkdir(exist_ok=True)
        except OSError as error:
            fix = "choose another local folder for compute.cache_dir"
            raise UsageError(f"the cache folder cannot be written: {error.strerror}", where=str(folder), fix=fix) from error

    def ahead(
        self, tasks: Iterable[Task], path_of: Callable[[Task], Path], name_of: Callable[[Task], str] | None = None
    ) -> Iterator[tuple[Task, Path]]:
        """Yield every task, in order, and the path to read its slide from: a copy, or its own path. To be called once.

        Tasks are drawn in a thread, some before they are asked for; what drawing them raises is raised here. Each yielded path
        must be handed to ``done`` when its slide is done with. The log calls slides by ``name_of``, else by their path.
        """
        name_of = name_of or (lambda task: public_name(path_of(task)))
        self._thread = threading.Thread(target=self._fill, args=(tasks, path_of, name_of), daemon=True)
        self._thread.start()
        while True:
            with self._changed:
                self._is_wanted = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._ready or self._is_over or self._is_closed)
                self._is_wanted = False
                if not self._ready or self._is_closed:
                    break
                task, path = self._ready.popleft()
                self._changed.notify_all()
            yield task, path
        if self._error:
            raise self._error

    def done(self, path: Path) -> None:
        """Remove the copy that is ``path``; a path that is no copy is left alone."""
        with self._changed:
            size = self._sizes.pop(path, None)
        if size is not None:
            self._drop(path.parent, size)

    def close(self) -> None:
        """Stop copying and remove all copies. Closing twice is allowed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join(_PATIENCE_S)  # it may hang on a drive that does not answer
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fill(self, tasks: Iterable[Task], path_of: Callable[[Task], Path], name_of: Callable[[Task], str]) -> None:
        try:
            for task in self._in_time(tasks):
                path = self._bring(path_of(task), name_of(task))
                with self._changed:
                    self._ready.append((task, path))
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised again by ahead()
            self._error = error
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _in_time(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The tasks, each drawn when no more than ``lookahead`` would be waiting: a task may be one that others go without."""
        drawn = iter(tasks)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._lookahead or self._is_closed)
                if self._is_closed:
                    return
            try:
                task = next(drawn)
            except StopIteration:
                return
            yield task

    def _bring(self, path: Path, name: str) -> Path:
        """The path of a copy, or the slide's own."""
        try:
            files = _files(path)
            size = sum(file.size for file in files)
            if not files or size > self._bound:
                log.warning("%s: read where it is: %s", name, "larger than compute.cache_gb" if files else "of many files")
                return path
            return self._copy(files, Path(public_name(path)).name, size) or path
        except (OSError, PathfmError) as error:
            why = error.reason if isinstance(error, PathfmError) else error.strerror or error
            log.warning("%s: read where it is: %s", name, why)
            return path

    def _reserve(self, size: int) -> bool:
        """Wait for room; False when a worker waits for this very slide, so that it had better read it where it is."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._used + size <= self._bound or (self._is_wanted and not self._ready) or self._is_closed
            )
            if self._used + size > self._bound or self._is_closed:
                return False
            self._used += size
            return True

    def _drop(self, folder: Path, size: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def _copy(self, files: list[_File], name: str, size: int) -> Path | None:
        """The path of a copy; None without room for it."""
        if not self._reserve(size):
            return None
        self._number += 1
        folder = self._root / str(self._number)
        partial = folder.with_suffix(".partial")
        try:
            for file in files:
                (partial / file.name).parent.mkdir(parents=True, exist_ok=True)
                self._copy_file(file, partial / file.name)
            partial.rename(folder)
        except (OSError, PathfmError):
            self._drop(partial, size)
            raise
        with self._changed:
            self._sizes[folder / name] = size
        return folder / name

    def _copy_file(self, file: _File, target: Path) -> None:
        with open_source(file.path) as source, target.open("wb") as copy:
            if source.size != file.size:
                raise source.unreadable("its size changes while it is copied")
            for start in range(0, file.size, BLOCK_BYTES * BLOCKS):
                if self._is_closed:
                    raise OSError("the run has ended")
                stop = min(file.size, start + BLOCK_BYTES * BLOCKS)
                pieces = [(place, min(BLOCK_BYTES, stop - place)) for place in range(start, stop, BLOCK_BYTES)]
                for data in source.read_many(pieces):
                    copy.write(data)


def _files(path: Path) -> list[_File]:
    """All files of a slide; none when they are not known.

    Raises:
        OSError: a file is absent or cannot be read.
        PathfmError: the same, of a server.
    """
    if is_remote(path):
        if path.suffix.lower() in SCATTERED | {".mrxs"}:
            return []
        with open_source(path) as source:
            return [] if _names_others(path) else [_File(path, Path(public_name(path)).name, source.size)]
    if path.is_dir():
        return _tree(path)
    if path.suffix.lower() in SCATTERED or _names_others(path):
        return []
    own = _File(path, path.name, path.stat().st_size)
    return [own, *(_tree(path.with_suffix("")) if path.suffix.lower() == ".mrxs" else [])]


def _tree(folder: Path) -> list[_File]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [_File(file, file.relative_to(folder.parent).as_posix(), file.stat().st_size) for file in files]


def _names_others(path: Path) -> bool:
    """Whether a TIFF is one of several OME files, whose others readers look for beside it."""
    if path.suffix.lower() not in {".tif", ".tiff", ".btf", ".tf8"}:
        return False
    from tifffile import TiffFile

    from pathfm.slides.tiff_reader import TIFF_ERRORS

    with open_source(path) as source, source.open_file() as file, suppress(*TIFF_ERRORS), TiffFile(file) as tiff:
        return any(name != path.name for name in re.findall(r'\bFileName="([^"]*)"', tiff.ome_metadata or ""))
    return False


def _sweep(folder: Path) -> None:
    """Remove what killed processes left."""
    for path in folder.glob(f"{_PREFIX}*"):
        owner = ProcessName.parse(path.name.removeprefix(_PREFIX))
        if owner and (owner.has_ended or owner.of_earlier_boot):
            shutil.rmtree(path, ignore_errors=True)
