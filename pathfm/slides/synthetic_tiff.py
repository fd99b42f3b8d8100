"""Writes a pyramid of ready JPEG tiles as a BigTIFF.

tifffile refuses JPEG without the optional imagecodecs, even for tiles that are encoded already; the format needs few words.
Layout: TIFF 6.0, and the BigTIFF design of 2007 (8-byte offsets).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from pathfm.geometry import Size, scale_length

SHORT, LONG, RATIONAL, LONG8 = 3, 4, 5, 16
FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "I", LONG8: "Q"}
JPEG, YCBCR, CENTIMETRE, REDUCED = 7, 6, 3, 1
RATIONAL_SCALE = 1000
UM_PER_CM = 10_000


class PyramidWriter:
    """A TIFF under construction: levels are written one after the other, finest first.

    Args:
        path: the file to write.
        tile_px: side of every tile.
    """

    def __init__(self, path: Path, tile_px: int) -> None:
        self._tile_px = tile_px
        self._file = path.open("wb")
        self._file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        self._link = 8

    def write_level(self, tiles: Iterable[bytes], size: Size, mpp: float) -> None:
        """Append a level.

        Args:
            tiles: its JPEG tiles (4:2:0), row by row; written as they come.
            size: width and height of the level [px].
            mpp: micrometres per pixel of the level.
        """
        offsets, counts = [], []
        for tile in tiles:
            offsets.append(self._file.tell())
            counts.append(self._file.write(tile))
        per_cm = (scale_length(UM_PER_CM * RATIONAL_SCALE, 1 / mpp), RATIONAL_SCALE)
        self._write_directory(
            {
                254: (LONG, (REDUCED if self._link != 8 else 0,)),
                256: (LONG, (size.width,)),
                257: (LONG, (size.height,)),
                258: (SHORT, (8, 8, 8)),
                259: (SHORT, (JPEG,)),
                262: (SHORT, (YCBCR,)),
                277: (SHORT, (3,)),
                282: (RATIONAL, per_cm),
                283: (RATIONAL, per_cm),
                284: (SHORT, (1,)),
                296: (SHORT, (CENTIMETRE,)),
                322: (LONG, (self._tile_px,)),
                323: (LONG, (self._tile_px,)),
                324: (LONG8, tuple(offsets)),
                325: (LONG8, tuple(counts)),
                530: (SHORT, (2, 2)),
            }
        )

    def _write_directory(self, tags: dict[int, tuple[int, tuple[int, ...]]]) -> None:
        """The level's tags, with values of more than 8 bytes put before them, and the link from the directory before."""
        entries = b""
        for tag, (kind, values) in tags.items():
            data = struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)
            if len(data) > 8:
                place = self._align()
                self._file.write(data)
                data = struct.pack("<Q", place)
            count = len(values) // 2 if kind == RATIONAL else len(values)
            entries += struct.pack("<HHQ", tag, kind, count) + data.ljust(8, b"\0")
        start = self._align()
        self._file.write(struct.pack("<Q", len(tags)) + entries + struct.pack("<Q", 0))
        self._file.seek(self._link)
        self._file.write(struct.pack("<Q", start))
        self._link = start + 8 + len(entries)
        self._file.seek(0, 2)

    def _align(self) -> int:
        """Pads to a multiple of 8 bytes, as offsets should be, and tells the place."""
        self._file.write(b"\0" * (-self._file.tell() % 8))
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
