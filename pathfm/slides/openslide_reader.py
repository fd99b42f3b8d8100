"""The one door to OpenSlide. Its errors become ours here."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import openslide

from pathfm.geometry import Size
from pathfm.slides.reader import Level, Pixels, SlideMetadata, checked_mpp, make_thumbnail, on_white, unreadable
from pathfm.slides.tiff_reader import openslide_misreads

OPENSLIDE_ERRORS = (openslide.OpenSlideError, OSError, ValueError, ctypes.ArgumentError)
"""ValueError and ArgumentError come from its bindings: names and sizes the C interface cannot take."""


class OpenSlideReader:
    """A slide opened by OpenSlide.

    Args:
        path: the slide, or one file of a DICOM series.

    Raises:
        UnreadableSlideError: OpenSlide knows the format but cannot open this file.
    """

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide: openslide.OpenSlide | None = None
        try:
            self._slide = openslide.OpenSlide(path)
            self.metadata = _metadata(self._slide)
        except OPENSLIDE_ERRORS as error:
            self.close()
            raise unreadable(f"cannot be opened: {_reason(error, path)}", path) from error
        if min(self.metadata.size_level0) < 1:
            self.close()
            raise unreadable("the image has no pixels", path)

    def read_region(self, x_level0: int, y_level0: int, level: int, size: Size) -> Pixels:
        """See ``SlideReader.read_region``."""
        # A handle that failed once answers every later call with the same error, so the next read starts with a new one.
        # A level that is not there would be drawn as empty by OpenSlide; it is a mistake of the caller.
        self.metadata.levels[level]
        try:
            if self._slide is None:
                self._slide = openslide.OpenSlide(self._path)
            region = self._slide.read_region((x_level0, y_level0), level, (size.width, size.height))
        except OPENSLIDE_ERRORS as error:
            self.close()
            place = f"the region at x={x_level0} y={y_level0} of level {level}"
            raise unreadable(f"{place} cannot be decoded: {_reason(error, self._path)}", self._path) from error
        return on_white(np.asarray(region))

    def thumbnail(self, longest_px: int) -> tuple[Pixels, float]:
        """See ``make_thumbnail``."""
        return make_thumbnail(self, longest_px)

    def close(self) -> None:
        """Let go of the file."""
        if self._slide is not None:
            self._slide.close()
            self._slide = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


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
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except OPENSLIDE_ERRORS as error:
        raise unreadable(f"cannot be opened: {_reason(error, path)}", path) from error
    return vendor


def _metadata(slide: openslide.OpenSlide) -> SlideMetadata:
    """The allowed facts, and no others."""
    facts = slide.properties
    x, y, objective = (_number(facts.get(key)) for key in ("openslide.mpp-x", "openslide.mpp-y", "openslide.objective-power"))
    mpp, source = checked_mpp(x, y, "openslide.mpp-x")
    sizes, downsamples = slide.level_dimensions, slide.level_downsamples
    # The binding attaches the stored profile's bytes to every region; the public property would re-encode them.
    profile = slide._profile
    return SlideMetadata(
        vendor=facts.get("openslide.vendor", "unknown"),
        mpp=mpp,
        mpp_source=source,
        objective=objective,
        levels=tuple(Level(Size(*size), float(downsample)) for size, downsample in zip(sizes, downsamples, strict=True)),
        size_level0=Size(*sizes[0]),
        icc_sha256=hashlib.sha256(profile).hexdigest() if profile else None,
    )


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _reason(error: Exception, path: Path) -> str:
    """OpenSlide's own words in one line, without the path that ours start with."""
    return " ".join(str(error).replace(f"Reading {path}: ", "").split())
