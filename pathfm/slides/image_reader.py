"""Pictures without a pyramid: PNG and JPEG files, and arrays in memory."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pathfm import jpeg
from pathfm.errors import UnreadableSlideError
from pathfm.geometry import Mpp, Size
from pathfm.slides.reader import QUOTED, Level, Pixels, Region, SlideMetadata, SlideReader, checked_mpp, on_white, unreadable

PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, MemoryError, struct.error, zlib.error)
"""What Pillow raises on damaged files (SyntaxError for a broken PNG)."""
MAX_IMAGE_PX = 178_956_970
"""A larger PNG or JPEG is refused, since it can only be decoded whole [px]."""
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}
"""Pillow modes with at most 8 bits per sample that turn into RGB without a choice of window or ink."""
UM_PER_INCH = 25_400.0


class ArrayReader(SlideReader):
    """A picture in memory as a slide with one level.

    Args:
        rgb: pixels [H, W, 3]; kept, not copied.
        mpp: micrometres per pixel, None when unknown.
        facts: metadata of the file it was read from; made from the array when absent.
        profile: the file's colour profile.

    Raises:
        ValueError: not an RGB uint8 array.
    """

    name = "image"

    def __init__(
        self, rgb: Pixels, mpp: Mpp | None = None, facts: SlideMetadata | None = None, profile: bytes | None = None
    ) -> None:
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
            raise ValueError(f"an RGB uint8 array [H, W, 3] is needed, not {rgb.dtype} {rgb.shape}")
        self._rgb, self._profile = rgb, profile
        size = Size(rgb.shape[1], rgb.shape[0])
        source = "array" if mpp else ""
        self.metadata = facts or SlideMetadata("array", mpp, source, None, (Level(size, 1.0),), size)

    def read(self, x: int, y: int, level: int, size: Size) -> Region:
        """See ``SlideReader.read``."""
        full, _ = self.metadata.levels[level]
        canvas = np.full((size.height, size.width, 3), 255, dtype=np.uint8)
        left, top = max(0, x), max(0, y)
        right, bottom = max(left, min(full.width, x + size.width)), max(top, min(full.height, y + size.height))
        canvas[top - y : bottom - y, left - x : right - x] = self._rgb[top:bottom, left:right]
        return Region(canvas, 1 - (right - left) * (bottom - top) / (size.width * size.height))

    def icc_profile(self) -> bytes | None:
        """See ``SlideReader.icc_profile``."""
        return self._profile

    def close(self) -> None:
        """Nothing to let go of."""


def open_image(path: Path) -> ArrayReader | None:
    """A PNG, JPEG or other picture, decoded whole; None for a file that Pillow does not know.

    Raises:
        UnreadableSlideError: the picture is damaged, too large, or not 8-bit RGB or grey.
    """
    with warnings.catch_warnings():
        # Pillow warns of large pictures and odd colour profiles; the limit that holds here is checked by name.
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                _check(image, path)
                facts, profile = _metadata(image), image.info.get("icc_profile")
                # Pillow hides the warnings of libjpeg, which stand for made-up pixels.
                rgb = jpeg.decode(path.read_bytes()) if image.format == "JPEG" else _to_rgb(image)
        except UnidentifiedImageError:
            return None
        except Image.DecompressionBombError as error:
            raise _too_large(path) from error
        except PILLOW_ERRORS as error:
            why = QUOTED.sub("...", str(error))[:120] or type(error).__name__
            raise unreadable(f"the picture cannot be decoded: {why}", path) from error
    return ArrayReader(rgb, facts=facts, profile=profile)


def _check(image: Image.Image, path: Path) -> None:
    if image.width * image.height > MAX_IMAGE_PX:
        raise _too_large(path)
    if image.mode not in MODES:
        raise unreadable(
            f"pixels are stored as {image.mode}, not 8-bit RGB or grey", path, "convert it to an 8-bit RGB picture"
        )


def _too_large(path: Path) -> UnreadableSlideError:
    return unreadable(
        f"a picture of more than {MAX_IMAGE_PX} pixels without tiles", path, "convert it to a tiled, pyramidal TIFF"
    )


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode in {"LA", "PA", "RGBA"} or "transparency" in image.info:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _metadata(image: Image.Image) -> SlideMetadata:
    """The allowed facts, and no others."""
    dpi = image.info.get("dpi")
    x, y = (UM_PER_INCH / float(value) if value else None for value in dpi) if dpi else (None, None)
    mpp, source = checked_mpp(x, y, f"{str(image.format).lower()}.dpi")
    profile = image.info.get("icc_profile")
    size = Size(image.width, image.height)
    return SlideMetadata(
        vendor=str(image.format).lower(),
        mpp=mpp,
        mpp_source=source,
        objective=None,
        levels=(Level(size, 1.0),),
        size_level0=size,
        icc_sha256=hashlib.sha256(profile).hexdigest() if profile else None,
    )
