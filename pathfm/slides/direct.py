"""Reads JPEG tiles straight from a TIFF, several times faster than OpenSlide, and only where that is proved to be the same.

OpenSlide spends most of a read on moving pixels between canvases. Here a stored tile is one positioned read and one decode, and
shrinking by 2, 4 or 8 happens inside the decoder. The slide is still opened by another reader (the reference), which knows its
levels and scale, reads what cannot be read directly, and at opening is compared with, tile by tile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tifffile

from pathfm.errors import UnreadableSlideError
from pathfm.geometry import Box, Size
from pathfm.log import get_log
from pathfm.slides.openslide_reader import OpenSlideReader
from pathfm.slides.reader import Pixels, Region, SlideReader, unreadable
from pathfm.slides.source import ByteSource, LostSourceError, open_source
from pathfm.slides.stored import StoredLevel, matching_pages, stored_levels
from pathfm.slides.tiff_reader import TIFF_ERRORS, TiffReader

VENDORS = {"aperio", "generic-tiff"}
"""Drivers of OpenSlide that show stored tiles where they lie; others join overlapping tiles or several pictures."""
PROVED_TILES, TRIED_TILES = 4, 32
"""Tiles of each level that are compared with the reference; damaged ones prove nothing, so more are tried."""
SHIFT_TOLERANCE = 60.0
"""Mean difference allowed per pixel of shift, where the reference draws between pixels [grey levels per px]."""
CACHE_BYTES = 64 * 2**20
"""Decoded tiles kept for ``read`` [bytes]; the tile stage has its own, exact order (``tile_reading``)."""
DAMAGED = (ValueError, OSError, UnreadableSlideError)
"""What reading a damaged stored tile raises."""

log = get_log(__name__)


class DirectReader(SlideReader):
    """A slide whose stored JPEG tiles are read directly.

    Args:
        reference: the slide opened by another reader, which this one takes over and closes.
        stored: how each level is stored; None for a level that only the reference can read.
        source: the file's bytes.
    """

    name = "direct"

    def __init__(self, reference: SlideReader, stored: list[StoredLevel | None], source: ByteSource) -> None:
        self.metadata, self.stored, self.is_remote = reference.metadata, stored, source.is_remote
        self._reference, self._source = reference, source
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], Pixels | None] = OrderedDict()
        self._cached_bytes = 0

    def read(self, x: int, y: int, level: int, size: Size) -> Region:
        """See ``SlideReader.read``."""
        stored = self.stored[level]
        if stored is None:
            return self._reference.read(x, y, level, size)
        box = Box(x, y, x + size.width, y + size.height)
        numbers = stored.numbers(box, 1)
        stored.fetch(number for number in numbers if (level, number) not in self._cache)
        try:
            tiles = {number: self._decoded(level, number) for number in numbers}
        except LostSourceError:
            raise
        except DAMAGED as error:
            place = f"the region at x={x} y={y} of level {level}"
            raise unreadable(f"{place} cannot be decoded: {damage(error)}", self._source.name) from error
        return assemble(stored, 1, box, tiles)

    def _decoded(self, level: int, number: int) -> Pixels | None:
        key, stored = (level, number), self.stored[level]
        assert stored is not None
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        pixels = stored.decode(number, 1)
        with self._lock:
            self._cache[key] = pixels
            self._cached_bytes += pixels.nbytes if pixels is not None else 0
            while self._cached_bytes > CACHE_BYTES:
                dropped = self._cache.popitem(last=False)[1]
                self._cached_bytes -= dropped.nbytes if dropped is not None else 0
        return pixels

    def icc_profile(self) -> bytes | None:
        """See ``SlideReader.icc_profile``."""
        return self._reference.icc_profile()

    def close(self) -> None:
        """Let go of the file."""
        self._reference.close()
        self._source.close()


def damage(error: Exception) -> str:
    """What is wrong with a stored tile, in a few words."""
    return error.what if isinstance(error, UnreadableSlideError) else str(error).partition("\n")[0][:120]


def assemble(stored: StoredLevel, shrink: int, box: Box, tiles: Mapping[int, Pixels | None]) -> Region:
    """A box, in pixels of the shrunk level, put together from decoded stored tiles (None: left out by the scanner)."""
    parts: list[tuple[Box, Box, Pixels]] = []
    covered = 0
    for number, pixels in tiles.items():
        if pixels is None:
            continue
        whole = stored.box(number, shrink)
        if whole == box and pixels.shape[:2] == (box.bottom - box.top, box.right - box.left):
            return Region(pixels, 0.0)
        left, top = max(whole.left, box.left), max(whole.top, box.top)
        right, bottom = min(whole.right, box.right), min(whole.bottom, box.bottom)
        if left < right and top < bottom:
            covered += (right - left) * (bottom - top)
            parts.append((Box(left, top, right, bottom), whole, pixels))
    width, height = box.right - box.left, box.bottom - box.top
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    if covered < width * height:
        canvas.fill(255)
    for part, whole, pixels in parts:
        rows, columns = slice(part.top - box.top, part.bottom - box.top), slice(part.left - box.left, part.right - box.left)
        canvas[rows, columns] = pixels[
            part.top - whole.top : part.bottom - whole.top, part.left - whole.left : part.right - whole.left
        ]
    return Region(canvas, 1 - covered / (width * height))


def read_directly(reference: SlideReader, path: Path) -> SlideReader:
    """The slide with its JPEG tiles read directly, or the reference itself where that is impossible or not the same.

    Raises:
        UnreadableSlideError: the directory of the tiles is damaged.
    """
    if not isinstance(reference, TiffReader) and reference.metadata.vendor not in VENDORS:
        return reference
    source = open_source(path)
    try:
        stored = _stored(reference, source)
    except UnreadableSlideError:
        reference.close()
        source.close()
        raise
    direct = DirectReader(reference, stored, source)
    if not stored or stored[0] is None:
        source.close()
        return reference
    for level in range(len(stored)):
        difference = _difference(direct, reference, level) if stored[level] is not None else ""
        if difference:
            _log_fallback(reference, difference)
            source.close()
            return reference
    return direct


def _stored(reference: SlideReader, source: ByteSource) -> list[StoredLevel | None]:
    """How each level is stored; nothing for a file whose directories cannot be parsed."""
    if isinstance(reference, TiffReader):
        return stored_levels(reference.pages, source)
    try:
        with source.open_file() as file, tifffile.TiffFile(file, name=source.name) as tiff:
            return stored_levels(matching_pages(tiff, [level.size for level in reference.metadata.levels]), source)
    except TIFF_ERRORS as error:
        _log_fallback(reference, f"its directories cannot be parsed ({type(error).__name__})")
        return []


def _log_fallback(reference: SlideReader, why: str) -> None:
    """Without the file's name, which may be a patient's: the store of the slide says how it was read."""
    width, height = reference.metadata.size_level0
    log.warning("a slide of %d x %d px is read by %s, not directly: %s", width, height, reference.name, why)


def _difference(direct: DirectReader, reference: SlideReader, level: int) -> str:
    """How a level read directly differs from the reference; empty when it does not."""
    stored = direct.stored[level]
    assert stored is not None
    places = [(stored.box(number, 1), number) for number in _spread(len(stored))]
    shifts = {number: _shift(reference, box, level) for box, number in places}
    compared = 0
    for box, number in sorted(places, key=lambda place: shifts[place[1]]):
        try:
            ours = direct.read(box.left, box.top, level, box.size).pixels
            theirs = reference.read(box.left, box.top, level, box.size).pixels
        except LostSourceError:
            raise
        except UnreadableSlideError:
            continue
        compared += 1
        apart = float(np.abs(ours.astype(np.int16) - theirs).mean())
        if apart > SHIFT_TOLERANCE * shifts[number]:
            return f"tile {number} of level {level} differs by {apart:.2f} grey levels"
        if compared == PROVED_TILES:
            break
    return ""


def _shift(reference: SlideReader, box: Box, level: int) -> float:
    return reference.between_pixels(box.left, box.top, level) if isinstance(reference, OpenSlideReader) else 0.0


def _spread(count: int) -> list[int]:
    """Numbers spread over a level, those of its middle first: that is where tissue mostly is."""
    numbers = {count * (2 * index + 1) // (2 * TRIED_TILES) for index in range(TRIED_TILES)}
    return sorted(numbers, key=lambda number: (abs(2 * number - count) > count // 2, number % 7, number))
