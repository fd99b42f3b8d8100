"""JPEG bytes <-> pixels: the one door to libjpeg-turbo. Arrays and bytes in, arrays and bytes out.

Streams follow ITU-T T.81 (JPEG); the Adobe marker, which alone tells a decoder that components are RGB, follows Adobe Technical
Note 5116; abbreviated streams, whose tables stand elsewhere, TIFF Technical Note 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

SUBSAMPLING = "420"
"""Chroma subsampling of what is encoded: that of nearly all scanners."""
SOI, SOS, DQT, DHT, DRI, COM = 0xD8, 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
FRAMES = {0xC0, 0xC1, 0xC2}
"""Baseline, extended and progressive DCT with Huffman coding: what every decoder reads."""
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
"""An Adobe marker without its last byte, the colour transform: 0 for RGB, 1 for YCbCr."""
END_OF_IMAGE = b"\xff\xd9"
IN_SCAN_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Anything in entropy-coded data but stuffed bytes and restart markers."""

Pixels = npt.NDArray[np.uint8]


class Frame(NamedTuple):
    """What a stream's header says of its picture: size [px], components, and where its first scan's data start."""

    width: int
    height: int
    components: int
    scan: int


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


def decode_shrunk(data: bytes | memoryview, size: tuple[int, int], factor: int) -> Pixels:
    """A JPEG image as RGB pixels, shrunk by a factor of 2, 4 or 8 in the DCT domain, which costs a fraction of decoding it all.

    Args:
        data: a stream whose picture is ``size`` (width, height) [px], both multiples of ``factor``.
        size: its size.
        factor: 1, 2, 4 or 8.

    Raises:
        ValueError: as ``decode``.
    """
    pixels: Pixels = simplejpeg.decode_jpeg(
        data, colorspace="RGB", strict=True, min_width=size[0] // factor, min_height=size[1] // factor
    )
    return pixels


class Wrapper:
    """Makes stored streams decode alone and right in any decoder, without touching their entropy-coded data.

    Tables of an abbreviated stream are merged in, the Adobe marker says whether components are RGB or YCbCr, and comments and
    all other application markers are left out (names and dates hide there).

    Args:
        tables: the tables-only stream of the file (TIFF tag JPEGTables), if it has one.
        rgb: components are RGB and not YCbCr.
    """

    def __init__(self, tables: bytes | None, *, rgb: bool) -> None:
        self._tables = b"".join(part for kind, part in segments(tables) if kind in {DQT, DHT, DRI}) if tables else b""
        self._adobe = ADOBE + (b"\x00" if rgb else b"\x01")
        self._last: tuple[bytes, bytes, Frame] = (b"", b"", Frame(0, 0, 0, 0))

    def wrap(self, data: bytes) -> tuple[bytes, Frame]:
        """A stored stream made whole, and what it says of its picture.

        Raises:
            ValueError: not a stream of a kind that every decoder reads.
        """
        # Tiles of one slide nearly always share their header: then it is parsed once.
        header, prefix, frame = self._last
        if not header or not data.startswith(header):
            header, prefix, frame = self._parse(data)
            self._last = header, prefix, frame
        return prefix + data[len(header) :], frame

    def _parse(self, data: bytes) -> tuple[bytes, bytes, Frame]:
        kept, frame, length = [], None, 2
        for kind, part in segments(data):
            length += len(part)
            if kind in FRAMES:
                frame = _frame(part)
            elif 0xC0 <= kind <= 0xCF and kind != DHT:
                raise ValueError(f"a JPEG process that few decoders read (marker {kind:02X})")
            if kind in FRAMES or kind in {DQT, DHT, DRI, SOS}:
                kept.append(part)
            if kind == SOS:
                break
        if frame is None or not kept:
            raise ValueError("a JPEG stream without a frame header")
        prefix = b"\xff\xd8" + (self._adobe if frame.components == 3 else b"") + self._tables + b"".join(kept)
        return data[:length], prefix, frame._replace(scan=len(prefix))


def sealed(stream: bytes, scan: int) -> bytes | None:
    """A stream cut at its end marker; None when its data from ``scan`` on are not one plain, complete scan.

    Only such a stream can be passed on unseen: further scans, comments or a second picture may hide in any other.
    """
    end = stream.rfind(END_OF_IMAGE)
    return None if end < scan or IN_SCAN_MARKER.search(stream, scan, end) else stream[: end + 2]


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker segments of a stream up to and with the start of its first scan: marker code, and the segment's bytes.

    Raises:
        ValueError: not a JPEG stream, or one that ends within its header.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG stream")
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            raise ValueError("a damaged JPEG header")
        kind = data[place + 1]
        if kind == 0xFF:
            raise ValueError("a padded JPEG header")
        if kind == 0xD9:
            return
        length = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if place + length > len(data):
            break
        yield kind, data[place : place + length]
        if kind == SOS:
            return
        place += length
    if data[place : place + 2] != b"\xff\xd9":
        raise ValueError("a JPEG stream that ends within its header")


def _frame(segment: bytes) -> Frame:
    precision, count = segment[4], segment[9]
    if precision != 8 or len(segment) < 10 + 3 * count:
        raise ValueError(f"{precision}-bit JPEG samples, not 8")
    height, width = int.from_bytes(segment[5:7], "big"), int.from_bytes(segment[7:9], "big")
    return Frame(width, height, count, 0)
