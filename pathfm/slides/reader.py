"""What a slide reader is, which readers exist, and how a file finds its own.

All readers give RGB pixels as they are stored: orientation tags and colour profiles are not applied, and what lies outside the
scan (or was left out by the scanner) is white, and said to be outside. Nothing of a file's metadata leaves a reader except the
fields of ``SlideMetadata``: image descriptions, users, dates, barcodes and DICOM patient tags do not, and label and macro
images are never opened.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.addresses import is_remote, public_name
from pathfm.errors import UnreadableSlideError
from pathfm.geometry import Box, Mpp, Size, best_level, fit_within, mpp_is_sane, tile_corners, tiles_along
from pathfm.slides.scale import refusal
from pathfm.slides.source import LostSourceError, file_identity, open_source

Pixels = npt.NDArray[np.uint8]
"""RGB [height, width, 3]."""

DIRECT = "pathfm.slides.direct:read_directly"
"""What makes a slide that one of these has opened faster to read, where that is proved to be the same."""
READERS: dict[str, str] = {
    "openslide": "pathfm.slides.openslide_reader:open_with_openslide",
    "tiff": "pathfm.slides.tiff_reader:open_tiff",
    "image": "pathfm.slides.image_reader:open_image",
}
"""Asked in this order; each opener returns None for a file of another kind, and raises for a damaged file of its own kind."""

NOT_DECODED = (205, 150, 185)
"""Colour of thumbnail places that cannot be decoded: that of tissue, so that no tile there is silently taken for glass."""
THUMBNAIL_READ_PX = 1024
"""Side of the regions a thumbnail is put together from, which bounds its memory [px of the level read]."""
NO_KIND = "not a slide or image of a known kind"
THUMBNAIL_BLOCKS = 8
"""Regions along each side at least: what cannot be decoded in one place must not cost a small slide its thumbnail."""
QUOTED = re.compile(r"(['\"])(?!imagecodecs).*?\1")
"""What foreign messages quote of a file, or of its name."""
TILE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})


class Level(NamedTuple):
    """One pyramid level: its size in its own pixels, and level-0 pixels per pixel."""

    size: Size
    downsample: float


class Region(NamedTuple):
    """Pixels [h, w, 3] of a level, and the share of them that lies outside the scan (white)."""

    pixels: Pixels
    outside: float


@dataclass(frozen=True)
class SlideMetadata:
    """All that is ever told about a slide (an allow-list).

    Attributes:
        vendor: scanner family or file kind.
        mpp: micrometres per level-0 pixel, None when not known or not a microscope's.
        mpp_source: the key the value comes from; for a value that was refused, the key and why; empty when there is none.
        objective: objective power.
        levels: pyramid levels, finest first.
        size_level0: width and height [level-0 px].
        icc_sha256: hash of the embedded colour profile, None without one.
        notes: what witnesses of the scale contradict each other about.
    """

    vendor: str
    mpp: Mpp | None
    mpp_source: str
    objective: float | None
    levels: tuple[Level, ...]
    size_level0: Size
    icc_sha256: str | None = None
    notes: tuple[str, ...] = ()


class SlideReader(ABC):
    """An open slide. May be read from several threads at once."""

    name: str
    """How the slide is read: openslide, direct, tiff or image."""
    metadata: SlideMetadata
    """The slide's size, scale and levels."""

    @abstractmethod
    def read(self, x: int, y: int, level: int, size: Size) -> Region:
        """A region of a level from its upper left corner, all in pixels of that level.

        Raises:
            UnreadableSlideError: the data there cannot be decoded; the reader stays usable.
            IndexError: there is no such level.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file. Closing twice is allowed."""

    def read_region(self, x: int, y: int, level: int, size: Size) -> Pixels:
        """The pixels [size.height, size.width, 3] of ``read``; white outside the scan."""
        return self.read(x, y, level, size).pixels

    def thumbnail(self, longest_px: int) -> tuple[Pixels, float]:
        """The whole slide with its longer side at most ``longest_px``, and its downsample; see ``make_thumbnail``."""
        return make_thumbnail(self, longest_px)

    def icc_profile(self) -> bytes | None:
        """The embedded colour profile, for a transform to be made from; it is never stored."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_slide(path: Path | str, engine: Literal["auto", "openslide"] = "auto") -> SlideReader:
    """Open a slide with the first reader that knows its kind. A folder that holds a DICOM series is one slide.

    Args:
        path: a file, a folder with a DICOM series, or the address of a TIFF (http, https, s3, gs).
        engine: auto: JPEG tiles are read directly where that is proved equal to OpenSlide; openslide: never.

    Raises:
        UnreadableSlideError: the file is absent, empty, damaged, or of no kind that can be read.
    """
    path, remote = Path(path), is_remote(path)
    file = _dicom_file(path) if not remote and path.is_dir() else path
    if not remote:
        _check_file(file)
    for name, opener in READERS.items():
        reader: SlideReader | None = _load(opener)(file) if not remote or name == "tiff" else None
        if reader is not None:
            fast: SlideReader = _load(DIRECT)(reader, file) if engine == "auto" else reader
            return fast
    fix = "copy it here first, or set compute.cache_dir" if remote else ""
    raise unreadable("not a TIFF, the only kind that is read from afar" if remote else NO_KIND, path, fix)


def _load(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def unreadable(what: str, path: Path | str, fix: str = "") -> UnreadableSlideError:
    """The error of a slide that cannot be used, with the advice that fits most."""
    return UnreadableSlideError(what, where=public_name(path), fix=fix or "get a new copy of the file, or leave the slide out")


def _dicom_file(folder: Path) -> Path:
    files = dicom_files(folder)
    if not files:
        raise unreadable("a folder that holds no DICOM slide", folder, "name a file, or set cohort.folder_of_tiles=true")
    return files[0]


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".dcm" and not path.name.startswith("."))


def is_tile_name(name: str) -> bool:
    """Whether a file is a tile picture by its suffix."""
    return Path(name).suffix.lower() in TILE_SUFFIXES


def is_tile_folder(path: Path) -> bool:
    """Whether a path is a folder of pre-cut tiles, not a file and not a DICOM series."""
    return path.is_dir() and not dicom_files(path)


def _check_kind(path: Path) -> None:
    """Refuses what would block whoever opens it."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise unreadable("no file but a pipe, socket or device", path, "leave it out")


def _check_file(path: Path) -> None:
    _check_kind(path)
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise unreadable("the file is empty", path)
    except FileNotFoundError:
        raise unreadable("there is no such file", path, "check the path") from None
    except OSError as error:
        raise unreadable(f"the file cannot be read: {error.strerror}", path, "check its permissions and its drive") from error


def checked_mpp(x: float | None, y: float | None, source: str) -> tuple[Mpp | None, str]:
    """Scale and source for ``SlideMetadata``: None, and why, when the values are not a microscope's.

    A value for one axis stands for both; differing values are kept as they are.
    """
    x, y = x if x is not None else y, y if y is not None else x
    if x is None or y is None:
        return None, ""
    if mpp_is_sane(x) and mpp_is_sane(y):
        return Mpp(x, y), source
    return None, refusal(source, x)


def on_white(rgba: Pixels) -> Pixels:
    """Composite RGBA pixels [H, W, 4] over white [H, W, 3]."""
    alpha = rgba[..., 3:]
    if alpha.size and alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weight = alpha.astype(np.uint16)
    mixed: Pixels = ((rgba[..., :3] * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
    return mixed


def make_thumbnail(reader: SlideReader, longest_px: int) -> tuple[Pixels, float]:
    """Area-filtered picture of a whole slide, put together from bounded regions of the best level.

    Places that cannot be decoded get the colour ``NOT_DECODED``.

    Returns:
        The picture [h, w, 3] and level-0 pixels per pixel of its longer side.

    Raises:
        UnreadableSlideError: more than half of the regions cannot be decoded.
    """
    facts = reader.metadata
    size, downsample = fit_within(facts.size_level0, longest_px)
    level = best_level([each.downsample for each in facts.levels], downsample)
    level_size = facts.levels[level].size
    picture = np.full((size.height, size.width, 3), 255, dtype=np.uint8)
    boxes = list(_paired_blocks(level_size, size))
    failed = 0
    for source, target in boxes:
        try:
            block = reader.read_region(source.left, source.top, level, source.size)
        except LostSourceError:
            raise
        except UnreadableSlideError:
            failed += 1
            if 2 * failed > len(boxes):
                raise
            picture[target.top : target.bottom, target.left : target.right] = NOT_DECODED
        else:
            smaller = cv2.resize(block, tuple(target.size), interpolation=cv2.INTER_AREA)
            picture[target.top : target.bottom, target.left : target.right] = smaller
    return picture, downsample


def _paired_blocks(source: Size, target: Size) -> list[tuple[Box, Box]]:
    """Blocks of a level, each with the block of the thumbnail it becomes."""
    columns = _paired_edges(source.width, target.width)
    rows = _paired_edges(source.height, target.height)
    return [
        (Box(left, top, right, bottom), Box(to_left, to_top, to_right, to_bottom))
        for (top, bottom), (to_top, to_bottom) in rows
        for (left, right), (to_left, to_right) in columns
    ]


def _paired_edges(source: int, target: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    ratio = source / target
    step = max(1, math.floor(min(THUMBNAIL_READ_PX, source / THUMBNAIL_BLOCKS) / ratio))
    edges = [*range(0, target, step), target]
    # The exact position of every target pixel's edge, so that rounding never adds up.
    corners = tile_corners(source, ratio, tiles_along(source, ratio))
    return [((corners[a], corners[b]), (a, b)) for a, b in itertools.pairwise(edges)]


def slide_identity(path: Path) -> str:
    """SHA-256 of a slide's content, from samples: never of its path or times.

    A file, near or far, counts with its size, head, tail and 64 evenly spaced blocks; a folder with the relative names and
    identities of its files; a MIRAX file with the folder beside it.

    Raises:
        UnreadableSlideError: the file is absent or cannot be read.
    """
    companion = path.with_suffix("")
    digest = hashlib.sha256()
    if is_remote(path):
        return _file_identity(path)
    _check_kind(path)
    try:
        if path.suffix.lower() == ".mrxs" and companion.is_dir():
            digest.update((_file_identity(path) + _folder_identity(companion)).encode())
        elif path.is_dir():
            digest.update(_folder_identity(path, tiles_only=is_tile_folder(path)).encode())
        else:
            return _file_identity(path)
    except FileNotFoundError:
        raise unreadable("there is no such file", path, "check the path") from None
    except OSError as error:
        raise unreadable(f"the file cannot be read: {error.strerror}", path, "check its permissions and its drive") from error
    return digest.hexdigest()


def _folder_identity(folder: Path, *, tiles_only: bool = False) -> str:
    files: Sequence[Path] = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    if tiles_only:
        # What the system or a person leaves beside the pictures (Thumbs.db, notes) is no part of the slide.
        files = [path for path in files if is_tile_name(path.name)] or files
    named = sorted((path.relative_to(folder).as_posix(), path) for path in files)
    digest = hashlib.sha256()
    for name, path in named:
        digest.update(f"{name}\0{_file_identity(path)}\n".encode())
    return digest.hexdigest()


def _file_identity(path: Path) -> str:
    with open_source(path) as source:
        return file_identity(source)
