"""The one door to OpenSlide. Its errors become ours here."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import threading
from pathlib import Path

import numpy as np
import openslide

from pathfm.geometry import Size, level_downsample, scale_point
from pathfm.slides.reader import Level, Region, SlideMetadata, SlideReader, on_white, unreadable
from pathfm.slides.scale import find_scale
from pathfm.slides.tiff_reader import openslide_misreads

OPENSLIDE_ERRORS = (openslide.OpenSlideError, OSError, ValueError, ctypes.ArgumentError)
"""ValueError and ArgumentError come from its bindings: names and sizes the C interface cannot take."""
PRIVATE = re.compile(r' \([^)]*\)| ?["“][^"”]*["”]| ?(?<![\w.])(?!1\.2\.840\.10008\.)\d+(?:\.\d+){3,}')
"""What messages quote of a file, and UIDs but for those of the DICOM standard itself."""


class OpenSlideReader(SlideReader):
    """A slide opened by OpenSlide.

    Args:
        path: the slide, or one file of a DICOM series.

    Raises:
        UnreadableSlideError: OpenSlide knows the format but cannot open this file.
    """

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._own = threading.local()
        self._handles: list[openslide.OpenSlide] = []
        try:
            slide = self._handle()
            self.metadata = _metadata(slide)
            self._downsamples = slide.level_downsamples
        except OPENSLIDE_ERRORS as error:
            self.close()
            raise unreadable(f"cannot be opened: {_reason(error, path)}", path) from error
        if min(self.metadata.size_level0) < 1:
            self.close()
            raise unreadable("the image has no pixels", path)

    def _handle(self) -> openslide.OpenSlide:
        """This thread's handle. One that failed answers every later call with the same error, so each failure costs it."""
        slide = getattr(self._own, "slide", None)
        if slide is None:
            slide = self._own.slide = openslide.OpenSlide(self._path.absolute())
            self._handles.append(slide)
        return slide

    def read(self, x: int, y: int, level: int, size: Size) -> Region:
        """See ``SlideReader.read``."""
        # A level that is not there would be drawn as empty by OpenSlide; it is a mistake of the caller.
        corner = scale_point(x, y, self._downsamples[level])
        try:
            rgba = np.asarray(self._handle().read_region(corner, level, (size.width, size.height)))
        except OPENSLIDE_ERRORS as error:
            self._own.slide = None
            place = f"the region at x={x} y={y} of level {level}"
            raise unreadable(f"{place} cannot be decoded: {_reason(error, self._path)}", self._path) from error
        return Region(on_white(rgba), float((rgba[..., 3] == 0).mean()))

    def between_pixels(self, x: int, y: int, level: int) -> float:
        """How far off a whole pixel of the level a region from there is drawn [px of the level].

        OpenSlide is asked for places in whole level-0 pixels and divides them by the mean ratio of a level's sides.
        """
        downsample = self._downsamples[level]
        corner = scale_point(x, y, downsample)
        return max(abs(corner[0] / downsample - x), abs(corner[1] / downsample - y))

    def icc_profile(self) -> bytes | None:
        """See ``SlideReader.icc_profile``."""
        profile: bytes | None = self._handle()._profile
        return profile

    def close(self) -> None:
        """Let go of the file."""
        while self._handles:
            self._handles.pop().close()
        self._own = threading.local()


def open_with_openslide(path: Path) -> OpenSlideReader | None:
    """The slide opened by OpenSlide; None for a file it does not know, or is known to misread.

    Raises:
        UnreadableSlideError: OpenSlide knows the format but cannot open this file.
    """
    vendor = _vendor(path)
    if vendor is None or (vendor == "generic-tiff" and openslide_misreads(path)):
        return None
    return OpenSlideReader(path)


def dicom_series(path: Path) -> str | None:
    """The series a DICOM file belongs to; None when OpenSlide cannot open it."""
    try:
        with openslide.OpenSlide(path) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID")
    except OPENSLIDE_ERRORS:
        return None


def _vendor(path: Path) -> str | None:
    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path.absolute())
    except OPENSLIDE_ERRORS as error:
        raise unreadable(f"cannot be opened: {_reason(error, path)}", path) from error
    return vendor


def _metadata(slide: openslide.OpenSlide) -> SlideMetadata:
    """The allowed facts, and no others."""
    facts = slide.properties
    scale = find_scale(facts)
    sizes = [Size(*size) for size in slide.level_dimensions]
    # The binding attaches the stored profile's bytes to every region; the public property would re-encode them.
    profile = slide._profile
    return SlideMetadata(
        vendor=facts.get("openslide.vendor", "unknown"),
        mpp=scale.mpp,
        mpp_source=scale.source,
        objective=scale.objective,
        levels=tuple(Level(size, level_downsample(sizes[0], size)) for size in sizes),
        size_level0=sizes[0],
        icc_sha256=hashlib.sha256(profile).hexdigest() if profile else None,
        notes=scale.notes,
    )


def _reason(error: Exception, path: Path) -> str:
    """OpenSlide's own words in one line, without what may tell who somebody is: names of files (a slide may have several; their
    suffix stays), what is quoted or in brackets, and identifiers."""
    whole = path.absolute()
    folder, stem = (os.fsencode(part).decode(errors="replace") for part in (whole.parent, whole.stem))
    words = str(error).replace(f"Reading {whole}: ", "").replace(f": {whole}", "")
    # First the name that is known: it may hold what else ends a name.
    words = words.replace(f"{folder}{os.sep}{stem}", f"{folder}{os.sep}")
    names = rf"(?<!\w){re.escape(folder)}[/\\].*?(\.\w{{2,4}})?(?=[\"'”]|: |$)"
    words = re.sub(names, lambda name: f"a {name[1] or ''} file", words, flags=re.DOTALL)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in PRIVATE.sub("", words)).split())
