"""The one door between JPEG bytes and pixels (libjpeg-turbo through simplejpeg)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg

Pixels = npt.NDArray[np.uint8]

SUBSAMPLING = "420"
"""Chroma subsampling of encoded tiles: that of the scanners; 4:4:4 costs 20 % more bytes for colours that were never there."""


def encode(rgb: Pixels, quality: int) -> bytes:
    """RGB pixels [H, W, 3] as one JPEG image."""
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=quality, colorsubsampling=SUBSAMPLING)
    return data


def decode(data: bytes | memoryview) -> Pixels:
    """A JPEG image as RGB pixels [H, W, 3].

    Raises:
        ValueError: the bytes are damaged; libjpeg warnings count as damage, since they stand for made-up pixels.
    """
    pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    return pixels
