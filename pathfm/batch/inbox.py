"""The inbox of a night batch: which slides lie there, which are whole, and what identifies them. Nothing in it is changed."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from pathfm.errors import PathfmError
from pathfm.slides.discover import COMPANIONS, FoundSlide, discover
from pathfm.slides.reader import dicom_files

LOOKS = 2
"""A slide must have been seen unchanged so often, however long ago it was written: clocks of network drives may be wrong."""

USUAL = frozenset(
    {".xml", ".json", ".geojson", ".txt", ".csv", ".tsv", ".xlsx", ".docx", ".pdf", ".htm", ".html", ".md", ".log", ".ini"}
    | {".db", ".dat", ".md5", ".sha1", ".sha256", ".ndpa", ".ndpis", ".qpdata", ".annotations", ".url", ".lnk"}
    | {".part", ".partial", ".filepart", ".crdownload", ".tmp", ".done", ".ok", ".ready"}
)
"""Suffixes of what scanners, viewers and copying leave beside slides."""
USUAL_NAMES = frozenset({"dicomdir", "readme", "license", "sha256sums", "md5sums"})


class InboxError(PathfmError):
    """The inbox cannot be looked at now: its drive is away."""


class Glance(NamedTuple):
    """A slide as it lies in the inbox.

    Attributes:
        slide_id: as ``pathfm mil predict`` would call it.
        path: the file or folder.
        file: the path below the inbox.
        stamp: changes when any of its files is written, replaced, added or removed.
        changed_ns: when it was written last, as its drive says.
        is_namesake: another slide in the inbox has the same slide_id.
    """

    slide_id: str
    path: Path
    file: str
    stamp: str
    changed_ns: int
    is_namesake: bool = False


class Look(NamedTuple):
    """What a look found.

    Attributes:
        whole: slides that are whole, the oldest first.
        unsettled: those that may still be written, the oldest first.
        ignored: files below the inbox that are no slides by their suffix, by name; hidden files and sentinels are none of them.
    """

    whole: tuple[Glance, ...]
    unsettled: tuple[Glance, ...]
    ignored: tuple[str, ...] = ()


def is_usual(file: str) -> bool:
    """Whether a file that is no slide is one that often lies beside slides; others may be slides that cannot be read."""
    path = PurePath(file.lower())
    return path.suffix in USUAL or path.name in USUAL_NAMES


@dataclass
class Inbox:
    """Remembers what it has seen, to tell slides that are whole from those still being copied.

    Attributes:
        folder: searched recursively, as ``pathfm.slides.discover`` does.
        settle_s: a slide is whole when it was unchanged for so long [s], in at least ``LOOKS`` looks.
        sentinel: instead, a slide is whole when the file of its name with this at the end is there; empty: none.
        clock: seconds that never go back.
        outbox: pictures in it are no slides, whatever link leads there.
    """

    folder: Path
    settle_s: float = 30.0
    sentinel: str = ""
    clock: Callable[[], float] = time.monotonic
    outbox: Path | None = None
    _seen: dict[str, tuple[str, float, int]] = field(default_factory=dict)

    def look(self) -> Look:
        """Looks once.

        Raises:
            InboxError: the inbox cannot be searched.
        """
        try:  # a drive that is away may fail whatever is asked of it
            glances, ignored = self._glances()
            before, self._seen = self._seen, {}
            whole = {glance.file: self._is_whole(glance, before) for glance in glances}
        except OSError as error:
            raise InboxError(f"the inbox cannot be read ({error.strerror})", fix="check its drive and permissions") from error
        return Look(
            tuple(glance for glance in glances if whole[glance.file]),
            tuple(glance for glance in glances if not whole[glance.file]),
            ignored,
        )

    def _glances(self) -> tuple[list[Glance], tuple[str, ...]]:
        """All slides, the oldest first (of copies that arrive together, it gives the result its name), and all other files."""
        if not self.folder.is_dir():
            raise InboxError("the inbox cannot be read: there is no such folder", fix="check its drive")
        dicoms: set[Path] = set()

        def series_of(path: Path) -> str | None:
            dicoms.add(path)
            return series_uid(path)

        found, others = discover([self.folder], namesakes=True, series_of=series_of)
        for gone in _UIDS.keys() - dicoms:
            del _UIDS[gone]
        if self.outbox is not None:
            ours, places = self.outbox.resolve(), {path.parent for path in (*others, *(slide.path for slide in found))}
            inside = {place for place in places if place.resolve().is_relative_to(ours)}
            found = tuple(slide for slide in found if slide.path.parent not in inside)
            others = tuple(path for path in others if path.parent not in inside)
        named, groups = Counter(slide.slide_id for slide in found), Groups()
        glances = [self._glance(slide, groups, named[slide.slide_id] > 1) for slide in found]
        ignored = (path for path in others if not (self.sentinel and path.name.endswith(self.sentinel)))
        glances.sort(key=lambda glance: (glance.changed_ns, glance.file))
        return glances, tuple(path.relative_to(self.folder).as_posix() for path in ignored)

    def _glance(self, slide: FoundSlide, groups: Groups, is_namesake: bool) -> Glance:
        # A DICOM series that fills the inbox is the inbox itself, and is called by its folder.
        file = slide.path.relative_to(self.folder).as_posix() if slide.path != self.folder else slide.path.name
        return Glance(*slide, file, stamp_of(slide.path, groups), _changed_ns(slide.path), is_namesake)

    def _is_whole(self, glance: Glance, before: Mapping[str, tuple[str, float, int]]) -> bool:
        if self.sentinel:
            return glance.path.with_name(glance.path.name + self.sentinel).exists()
        now = self.clock()
        stamp, since, looks = before.get(glance.file, ("", now, 0))
        since, looks = (since, looks + 1) if stamp == glance.stamp else (now, 1)
        self._seen[glance.file] = glance.stamp, since, looks
        return looks >= LOOKS and now - since >= self.settle_s


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # gone, or a link to nothing: it cannot be hashed either
        return 0


class Groups(dict[Path, dict[str | None, list[Path]]]):
    """The DICOM files of folders by their series; each folder is looked at once, however many series ask for theirs."""

    def __missing__(self, folder: Path) -> dict[str | None, list[Path]]:
        found: dict[str | None, list[Path]] = {}
        for file in dicom_files(folder):
            found.setdefault(series_uid(file), []).append(file)
        self[folder] = found
        return found


def slide_files(path: Path, groups: Groups | None = None) -> dict[str, Path]:
    """All files of a slide, by names that a renamed copy has too.

    Args:
        path: the slide.
        groups: what is known of folders with several DICOM series.

    Raises:
        OSError: a folder cannot be read.
    """
    if path.is_dir():
        return _below(path)
    suffix, folder = path.suffix.lower(), path.with_suffix("")
    if suffix == ".mrxs" and folder.is_dir():
        return {suffix: path, **_below(folder)}
    if suffix in COMPANIONS:
        parts = [file for file in path.parent.iterdir() if file.suffix.lower() in COMPANIONS[suffix] | {suffix}]
        return {file.name.removeprefix(path.stem): file for file in parts if file.name.startswith(path.stem)}
    if suffix == ".dcm":
        return {file.name: file for file in series_files(path, groups) or [path]}
    return {suffix: path}


def _below(folder: Path) -> dict[str, Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path for path in files}


def series_files(path: Path, groups: Groups | None = None) -> list[Path]:
    """The files of one DICOM series among others, by name; none where the file cannot be opened.

    Raises:
        OSError: the folder cannot be read.
    """
    uid = series_uid(path)
    return (Groups() if groups is None else groups)[path.parent].get(uid, []) if uid else []


_UIDS: dict[Path, tuple[tuple[int, int, int], str]] = {}
"""Series of DICOM files in inboxes, with size, time of change and inode number of the file when it was opened."""


def series_uid(path: Path) -> str | None:
    """The series of a DICOM file, which is opened once until it changes; None where it cannot be."""
    from pathfm.slides.openslide_reader import dicom_series

    try:
        stat = path.stat()
    except OSError:  # gone, or a link to nothing
        return None
    now = stat.st_size, stat.st_mtime_ns, stat.st_ino
    before, known = _UIDS.get(path, (None, ""))
    if before == now:
        return known
    uid = dicom_series(path)
    if uid:  # what failed once may be read at the next look
        _UIDS[path] = now, uid
    return uid


def stamp_of(path: Path, groups: Groups | None = None) -> str:
    """Sizes, times and inode numbers of all files of a slide, as one hash; also of one that cannot be read or is gone.

    Args:
        path: the slide.
        groups: what is known of folders with several DICOM series.
    """
    try:
        found = {name: file.stat() for name, file in slide_files(path, groups).items()}
    except OSError as error:
        return f"unreadable ({error.strerror})"
    facts = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}" for name, stat in sorted(found.items())]
    return hashlib.sha256("\n".join(facts).encode(errors="surrogateescape")).hexdigest()


def content_identity(path: Path) -> str:
    """SHA-256 of all bytes of a slide: that of its file, or of the lines ``<sha256>  <name>`` of its files, by name.

    Raises:
        OSError: a file cannot be read.
    """
    hashes = {name: _digest(file) for name, file in slide_files(path).items()}
    if len(hashes) == 1 and not path.is_dir():
        return next(iter(hashes.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
