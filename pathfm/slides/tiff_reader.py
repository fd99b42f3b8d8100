"""The one door to tifffile's reading side: TIFFs that OpenSlide does not know or misreads (flat, OME, oriented).

Decodes only the tiles or strips a region needs. Eight-bit RGB or grey only: other samples would need a choice of window, and
fluorescence channels a choice of colour, that a reader must not make.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile

from pathfm import jpeg
from pathfm.geometry import Box, Size, level_downsample
from pathfm.slides.reader import QUOTED, Level, Pixels, Region, SlideMetadata, SlideReader, on_white, unreadable
from pathfm.slides.scale import find_scale
from pathfm.slides.source import ByteSource, open_source

# Its warnings quote tag values, and those may name a patient.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)

TIFF_ERRORS = (
    tifffile.TiffFileError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    NotImplementedError,
    AssertionError,
    MemoryError,
    ImportError,
    OSError,
    struct.error,
    zlib.error,
)
"""What tifffile and the codecs under it raise on damaged files."""
SILENT = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, MemoryError, struct.error)
"""Those of them that come from values that no directory can have."""

CACHE_BYTES = 128 * 2**20
"""Decoded strips and tiles kept, so that neighbouring regions do not decode them again [bytes]."""
MAX_SEGMENT_PX = 178_956_970
"""A larger strip or tile is refused: it can only be decoded whole [px]."""
INSTALL_CODECS = "pip install 'pathfm[formats]'"
TIFF_MAGIC = {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}
JPEG = {6, 7, 34892, 33007}
"""Compression codes of JPEG inside TIFF, whose tables stand in a tag of their own."""
JPEG_IN_TIFF = 7
"""The one with tables apart, as TIFF Technical Note 2 defines it."""
RGB = 2
"""PhotometricInterpretation of JPEG whose components are RGB."""
CONTIGUOUS, SEPARATE_PLANES = 1, 2
"""PlanarConfiguration: the colours of a pixel together, or in planes of their own."""
UNITS = {2: "inch", 3: "centimeter"}
"""Names of TIFF's resolution units."""


class Segment(NamedTuple):
    """One strip or tile: its number in the file, its colour plane (None: all), and the part of the level it covers."""

    number: int
    plane: int | None
    box: Box


class TiffReader(SlideReader):
    """The first series of a TIFF, with its pyramid if it has one.

    Args:
        source: the file's bytes.

    Raises:
        UnreadableSlideError: the file is damaged, or not 8-bit RGB or grey.
    """

    name = "tiff"

    def __init__(self, source: ByteSource) -> None:
        self._source, self._lock = source, threading.Lock()
        self._cache: OrderedDict[tuple[int, int], Pixels | None] = OrderedDict()
        self._cached_bytes = 0
        # Stays open, since tifffile reads large tags when they are asked for.
        self._file = source.open_file()
        try:
            tiff = tifffile.TiffFile(self._file, name=source.name)
            levels = tiff.series[0].levels
            problem = next(filter(None, map(_problem, levels)), "")
            if not problem:
                self.pages = [_checked_page(level.keyframe) for level in levels]
                self.metadata = _metadata(tiff, self.pages)
        except TIFF_ERRORS as error:
            self.close()
            raise unreadable(f"not a TIFF that can be read: {_reason(error)}", source.name) from error
        if problem:
            self.close()
            raise unreadable(problem, source.name, "convert it to an 8-bit RGB TIFF, tiled and pyramidal")

    def read(self, x: int, y: int, level: int, size: Size) -> Region:
        """See ``SlideReader.read``."""
        level_size, _ = self.metadata.levels[level]
        wanted = Box(x, y, x + size.width, y + size.height)
        page = self.pages[level]
        canvas = np.full((size.height, size.width, page.samplesperpixel), 255, dtype=np.uint8)
        covered = 0
        for segment in _segments(page, level_size, wanted):
            try:
                with self._lock:
                    pixels = self._decode(level, segment.number)
            except TIFF_ERRORS as error:
                place = f"the region at x={x} y={y} of level {level}"
                fix = INSTALL_CODECS if "imagecodecs" in str(error) and "requires" in str(error) else ""
                raise unreadable(f"{place} cannot be decoded: {_reason(error)}", self._source.name, fix) from error
            if pixels is not None:
                covered += _paste(canvas, wanted, pixels, segment)
        planes = page.samplesperpixel if page.planarconfig == SEPARATE_PLANES else 1
        return Region(_to_rgb(canvas), 1 - covered / (planes * size.width * size.height))

    def icc_profile(self) -> bytes | None:
        """See ``SlideReader.icc_profile``."""
        profile: bytes | None = self.pages[0].tags.valueof("InterColorProfile")
        return profile

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._source.close()

    def _decode(self, level: int, index: int) -> Pixels | None:
        """One strip or tile [h, w, samples], None when the file leaves it out; kept for the next region."""
        key = (level, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        pixels = self._decode_afresh(self.pages[level], index)
        self._cache[key] = pixels
        self._cached_bytes += pixels.nbytes if pixels is not None else 0
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.nbytes if dropped is not None else 0
        return pixels

    def _decode_afresh(self, page: tifffile.TiffPage, index: int) -> Pixels | None:
        length = page.databytecounts[index]
        if length == 0:
            return None
        data = self._source.read_at(page.dataoffsets[index], length)
        if page.compression == JPEG_IN_TIFF and page.planarconfig == CONTIGUOUS and page.samplesperpixel in {1, 3}:
            return _decode_jpeg(page, index, data)
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEG else {}
        decoded = page.decode(data, index, **tables)[0]
        if decoded is None:
            return None
        pixels: Pixels = np.asarray(decoded, dtype=np.uint8)[0]
        return pixels


def _decode_jpeg(page: tifffile.TiffPage, index: int, data: bytes) -> Pixels:
    """One JPEG strip or tile [h, w, samples]. tifffile's decoder hides libjpeg's warnings, which stand for made-up pixels."""
    stream, frame = jpeg.Wrapper(page.jpegtables, rgb=page.photometric == RGB).wrap(data)
    rows = page.tilelength if page.is_tiled else page.rowsperstrip
    rest = rows if page.is_tiled else min(rows, page.imagelength - index * rows)
    if frame.width != (page.tilewidth or page.imagewidth) or frame.height not in {rows, rest}:
        raise ValueError(f"a picture of {frame.width} x {frame.height} px")
    return jpeg.decode(stream)[..., : page.samplesperpixel]


def open_tiff(path: Path) -> TiffReader | None:
    """The TIFF opened by tifffile; None for a file that is no TIFF.

    Raises:
        UnreadableSlideError: the file is damaged, or not 8-bit RGB or grey.
    """
    source = open_source(path)
    if source.size < 4 or source.read_at(0, 4) not in TIFF_MAGIC:
        source.close()
        return None
    return TiffReader(source)


def openslide_misreads(path: Path) -> bool:
    """Whether OpenSlide's generic TIFF driver would give wrong pixels for a file.

    It takes the first channel of an OME-TIFF for the picture, narrows deep samples, and turns each tile of a file with an
    orientation tag by itself (seen with OpenSlide 4.0.1).
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            page = _full_page(tiff.pages[0])
            orientation = page.tags.valueof("Orientation", 1)
            return bool(tiff.is_ome or orientation != 1 or page.bitspersample != 8)
    except TIFF_ERRORS:
        return False


def _full_page(page: tifffile.TiffPage | tifffile.TiffFrame) -> tifffile.TiffPage:
    """A page with its own tags (tifffile thins out pages that are like another)."""
    return page if isinstance(page, tifffile.TiffPage) else page.aspage()


def _checked_page(page: tifffile.TiffPage | tifffile.TiffFrame) -> tifffile.TiffPage:
    """A full page without values that no directory can have, and that tifffile would take as they come."""
    full = _full_page(page)
    if full.planarconfig not in {CONTIGUOUS, SEPARATE_PLANES}:
        raise tifffile.TiffFileError("its directory is damaged: an unknown planar configuration")
    if min((full.tilewidth, full.tilelength) if full.is_tiled else (full.rowsperstrip, full.imagewidth)) < 1:
        raise tifffile.TiffFileError("its directory is damaged: strips or tiles without pixels")
    return full


def _problem(series: tifffile.TiffPageSeries) -> str:
    """Why the pixels of a level cannot be taken as RGB; empty text when they can."""
    page = _full_page(series.keyframe)
    if 0 in series.shape:
        return "the image has no pixels"
    if series.axes not in {"YX", "YXS", "SYX"}:
        extents = ", ".join(f"{axis}={length}" for axis, length in zip(series.axes, series.shape, strict=True))
        return f"not one RGB or grey picture but a stack of channels, planes or times ({extents}, {series.dtype})"
    if series.dtype != np.uint8 or page.bitspersample != 8:
        return f"samples are {page.bitspersample}-bit {series.dtype}, not 8-bit"
    if page.photometric not in {1, 2} and not (page.photometric == 6 and page.compression in JPEG):
        return f"colours are stored as {tifffile.PHOTOMETRIC(page.photometric).name}, not RGB or grey"
    if page.samplesperpixel not in {1, 3, 4}:
        return f"{page.samplesperpixel} samples per pixel, not 1, 3 or 4"
    tile = (page.tilelength * page.tilewidth) or page.rowsperstrip * page.imagewidth
    if min(tile, page.imagelength * page.imagewidth) > MAX_SEGMENT_PX:
        return f"stored in strips of more than {MAX_SEGMENT_PX} pixels, which can only be decoded whole"
    return ""


def _metadata(tiff: tifffile.TiffFile, pages: list[tifffile.TiffPage]) -> SlideMetadata:
    """The allowed facts, and no others."""
    sizes = [Size(page.imagewidth, page.imagelength) for page in pages]
    scale = find_scale(_scale_facts(tiff, pages[0]))
    profile = pages[0].tags.valueof("InterColorProfile")
    return SlideMetadata(
        vendor="ome-tiff" if tiff.is_ome else "tiff",
        mpp=scale.mpp,
        mpp_source=scale.source,
        objective=scale.objective,
        levels=tuple(Level(size, level_downsample(sizes[0], size)) for size in sizes),
        size_level0=sizes[0],
        icc_sha256=hashlib.sha256(profile).hexdigest() if profile else None,
        notes=scale.notes,
    )


def _scale_facts(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> dict[str, str]:
    """What a TIFF says about its scale, for ``find_scale``."""
    facts = {"tiff.ResolutionUnit": UNITS.get(int(page.tags.valueof("ResolutionUnit", 2)), "none")}
    for axis in "XY":
        over, under = page.tags.valueof(f"{axis}Resolution", (0, 1))
        facts[f"tiff.{axis}Resolution"] = str(over / under if under else 0)
    description = tiff.ome_metadata if tiff.is_ome else page.description
    return {**facts, "tiff.ImageDescription": description or ""}


def _segments(page: tifffile.TiffPage, size: Size, wanted: Box) -> Iterator[Segment]:
    """The strips or tiles that cover a part of a level."""
    width, height = (page.tilewidth, page.tilelength) if page.is_tiled else (size.width, min(page.rowsperstrip, size.height))
    across, down = -(-size.width // width), -(-size.height // height)
    columns = range(max(0, wanted.left // width), min(across, -(-wanted.right // width)))
    rows = range(max(0, wanted.top // height), min(down, -(-wanted.bottom // height)))
    planes = range(page.samplesperpixel) if page.planarconfig == SEPARATE_PLANES else [None]
    for plane in planes:
        for row in rows:
            for column in columns:
                left, top = column * width, row * height
                box = Box(left, top, min(left + width, size.width), min(top + height, size.height))
                yield Segment(((plane or 0) * down + row) * across + column, plane, box)


def _paste(canvas: Pixels, wanted: Box, pixels: Pixels, segment: Segment) -> int:
    """Puts a segment's pixels where they belong and tells how many were put."""
    box = segment.box
    left, top = max(box.left, wanted.left), max(box.top, wanted.top)
    right, bottom = min(box.right, wanted.right), min(box.bottom, wanted.bottom)
    part = pixels[top - box.top : bottom - box.top, left - box.left : right - box.left]
    channels = slice(None) if segment.plane is None else slice(segment.plane, segment.plane + 1)
    canvas[top - wanted.top : bottom - wanted.top, left - wanted.left : right - wanted.left, channels] = part
    return int(part.shape[0] * part.shape[1])


def _to_rgb(canvas: Pixels) -> Pixels:
    if canvas.shape[2] == 1:
        return np.repeat(canvas, 3, axis=2)
    return on_white(canvas) if canvas.shape[2] == 4 else canvas


def _reason(error: BaseException) -> str:
    """The first line of a foreign message; errors of Python itself tell a reader nothing, and quote what is in the file."""
    if isinstance(error, SILENT) or not str(error):
        return f"its directory is damaged ({type(error).__name__})"
    return QUOTED.sub("...", str(error).partition("\n")[0])[:120]
