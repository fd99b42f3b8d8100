"""The compressed JPEG tiles of a TIFF pyramid: where they lie in the file, and each as a stream that decodes alone."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import tifffile

from pathfm import jpeg
from pathfm.geometry import Box, Size
from pathfm.slides.reader import Pixels
from pathfm.slides.source import ByteSource

JPEG_IN_TIFF = 7
"""Compression of JPEG with tables apart, as TIFF Technical Note 2 defines it; the older kind (6) is read by others."""
GREY, RGB, YCBCR = 1, 2, 6
CONTIGUOUS = 1
SHRINKS = (8, 4, 2, 1)
"""Powers of two by which libjpeg shrinks in the DCT domain with fast code."""


class StoredLevel:
    """One pyramid level as its file stores it.

    Attributes:
        size: of the level [px].
        tile: of its tiles [px].
        columns: tiles per row.

    Raises:
        UnreadableSlideError: the page's directory does not say where all tiles are.
    """

    def __init__(self, page: tifffile.TiffPage, source: ByteSource) -> None:
        self.size = Size(page.imagewidth, page.imagelength)
        self.tile = Size(page.tilewidth, page.tilelength)
        self.columns = -(-self.size.width // self.tile.width)
        self._rows = -(-self.size.height // self.tile.height)
        try:
            self._offsets = np.asarray(page.dataoffsets, dtype=np.int64)
            self._lengths = np.asarray(page.databytecounts, dtype=np.int64)
            self._wrapper = jpeg.Wrapper(page.jpegtables, rgb=page.photometric == RGB)
        except (ValueError, OverflowError) as error:
            raise source.unreadable(f"its directory is damaged: {error}") from error
        places = min(len(self._offsets), len(self._lengths))
        if places < len(self):
            raise source.unreadable(f"its directory is damaged: {len(self)} tiles, and places of {places}")
        self._source = source
        self._fetched = threading.local()

    def __len__(self) -> int:
        return self.columns * self._rows

    def box(self, number: int, shrink: int) -> Box:
        """Where a stored tile lies, in pixels of the shrunk level; what the tile holds beyond the level's edge is left out."""
        row, column = divmod(number, self.columns)
        width, height = self.tile.width // shrink, self.tile.height // shrink
        right, bottom = -(-self.size.width // shrink), -(-self.size.height // shrink)
        left, top = column * width, row * height
        return Box(left, top, min(left + width, right), min(top + height, bottom))

    def numbers(self, box: Box, shrink: int) -> list[int]:
        """Stored tiles, in raster order, that a box in pixels of the shrunk level needs; beyond its edges there are none."""
        width, height = self.tile.width // shrink, self.tile.height // shrink
        columns = range(max(0, box.left // width), min(self.columns, -(-box.right // width)))
        rows = range(max(0, box.top // height), min(self._rows, -(-box.bottom // height)))
        return [row * self.columns + column for row in rows for column in columns]

    def first_at(self, y: int, shrink: int) -> int:
        """The number of the first stored tile that reaches below ``y``, in pixels of the shrunk level."""
        return y // (self.tile.height // shrink) * self.columns

    def fetch(self, numbers: Iterable[int]) -> None:
        """Tells which stored tiles this thread will need next: a server sends them together, a local file costs nothing.

        Raises:
            LostSourceError: the server fails.
        """
        if not self._source.is_remote:
            return
        wanted = sorted({number for number in numbers if self._lengths[number] > 0 and self._is_within(number)})
        places = [(int(self._offsets[number]), int(self._lengths[number])) for number in wanted]
        self._fetched.tiles = dict(zip(wanted, self._source.read_many(places), strict=True))

    def _is_within(self, number: int) -> bool:
        return bool(0 <= self._offsets[number] <= self._source.size - self._lengths[number])

    def _read(self, number: int, length: int) -> bytes:
        fetched: dict[int, bytes] = getattr(self._fetched, "tiles", {}) if self._source.is_remote else {}
        return fetched.get(number) or self._source.read_at(int(self._offsets[number]), length)

    def stream(self, number: int) -> tuple[bytes, jpeg.Frame] | None:
        """A stored tile as a JPEG stream that decodes alone, with its header; None when the scanner left it out (no bytes).

        Raises:
            ValueError: the stream is damaged, or its picture is not the tile that the directory promises.
            UnreadableSlideError: the file ends too early.
            OSError: the file cannot be read.
        """
        length = int(self._lengths[number])
        if length == 0:
            return None
        stream, frame = self._wrapper.wrap(self._read(number, length))
        if (frame.width, frame.height) != self.tile or frame.components not in {1, 3}:
            raise ValueError(f"a tile of {frame.width} x {frame.height} px and {frame.components} components")
        return stream, frame

    def decode(self, number: int, shrink: int) -> Pixels | None:
        """A stored tile [h, w, 3] shrunk by a power of two, None when the scanner left it out.

        Raises:
            ValueError: the stream is damaged; a libjpeg warning counts as damage.
            UnreadableSlideError: the file ends too early.
            OSError: the file cannot be read.
        """
        found = self.stream(number)
        return jpeg.decode_shrunk(found[0], self.tile, shrink) if found else None


def stored_levels(pages: Sequence[tifffile.TiffPage | None], source: ByteSource) -> list[StoredLevel | None]:
    """The levels whose tiles can be read directly; None for the others."""
    return [StoredLevel(page, source) if page is not None and _is_direct(page) else None for page in pages]


def matching_pages(tiff: tifffile.TiffFile, sizes: Sequence[Size]) -> list[tifffile.TiffPage | None]:
    """The first tiled page of each size; only directories are read."""
    pages: dict[Size, tifffile.TiffPage] = {}
    for page in tiff.pages:
        full = page if isinstance(page, tifffile.TiffPage) else page.aspage()
        if full.is_tiled:
            pages.setdefault(Size(full.imagewidth, full.imagelength), full)
    return [pages.get(size) for size in sizes]


def _is_direct(page: tifffile.TiffPage) -> bool:
    if not page.is_tiled or page.compression != JPEG_IN_TIFF or page.bitspersample != 8:
        return False
    colours = (page.samplesperpixel, page.photometric) in {(1, GREY), (3, RGB), (3, YCBCR)}
    whole_blocks = all(side > 0 and side % SHRINKS[0] == 0 for side in (page.tilewidth, page.tilelength))
    return bool(colours and whole_blocks and page.planarconfig == CONTIGUOUS and page.tiledepth == 1)
